"""The labels that an ONNX classifier gives to rows of data."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

from olive.data.rows import Row, rows
from olive.data.spec import DataSpec
from olive.errors import ConfigError, OliveError
from olive.evaluate.latency import TYPES, graph_file, open_graph
from olive.model import Model

if TYPE_CHECKING:
    import numpy as np

FROM_TEXT = {"input_ids", "attention_mask", "token_type_ids"}
"""Inputs that a tokenizer makes of a text."""


def classify(model: Model, spec: DataSpec, label_field: str) -> list[tuple[int, int]]:
    """Return (expected label, given label) of each row."""
    import numpy as np

    if model.kind != "onnx" or (model.path / "genai_config.json").is_file():
        raise ConfigError(f"{model.path}: is no ONNX classifier; for a language model give task: generation")
    session = open_graph(graph_file(model.path))
    names = [value.name for value in session.get_inputs()]
    tokenizer = None
    if set(names) <= FROM_TEXT:
        from olive.runtime.torch_model import load_tokenizer

        tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    known = _labels(model)
    pairs = []
    for row in itertools.islice(rows(spec), spec.max_samples):
        label = _label(row, label_field, known)
        feed = _from_text(row, spec, tokenizer, session) if tokenizer is not None else _from_fields(row, session)
        try:
            scores = np.asarray(session.run(None, feed)[0])
        except Exception as error:  # each of ONNX Runtime's error classes derives from Exception alone
            raise ConfigError(f"{row.where}: the graph refuses it: {str(error).splitlines()[0]}") from None
        if scores.ndim != 2 or len(scores) != 1:
            raise OliveError(
                f"{model.path}: its first output has shape {list(scores.shape)} for one row; a classifier gives "
                "[1, labels]"
            )
        if np.isnan(scores).any():
            raise OliveError(f"{row.where}: the graph gives scores that are no numbers: {scores[0].tolist()}")
        if not 0 <= label < scores.shape[1]:
            raise ConfigError(
                f"{row.where}: label {label} is none of the graph's, which are 0 to {scores.shape[1] - 1}"
            )
        pairs.append((label, int(scores[0].argmax())))
    return pairs


def _from_text(row: Row, spec: DataSpec, tokenizer: Any, session: Any) -> dict[str, np.ndarray]:
    from olive.data.render import render

    text = "".join(render(row, spec, tokenizer))
    kinds = {value.name: _kind(value) for value in session.get_inputs()}
    asked = {f"return_{name}": True for name in kinds if name != "input_ids"}  # not all give all by themselves
    made = tokenizer(text, truncation=True, max_length=spec.max_seq_len, return_tensors="np", **asked)
    return {name: made[name].astype(kind) for name, kind in kinds.items()}


def _from_fields(row: Row, session: Any) -> dict[str, np.ndarray]:
    import numpy as np

    feed = {}
    for value in session.get_inputs():
        if value.name not in row.fields:
            has = ", ".join(row.fields)
            raise ConfigError(f"{row.where}: the graph's input {value.name} is not in the row; its fields: {has}")
        try:
            array = np.asarray(row.fields[value.name], _kind(value))
        except (TypeError, ValueError):
            raise ConfigError(f"{row.where}: field {value.name} must hold numbers, for {value.type}") from None
        feed[value.name] = array if array.ndim == len(value.shape) else array[None]  # one row of the batch
    return feed


def _kind(value: Any) -> str:
    """Return numpy's name of an input's type."""
    return TYPES.get(value.type.removeprefix("tensor(").removesuffix(")"), "float32")


def _labels(model: Model) -> dict[str, int]:
    file = model.path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {str(name): int(number) for name, number in config.get("label2id", {}).items()}


def _label(row: Row, field: str, known: dict[str, int]) -> int:
    if field not in row.fields:
        has = ", ".join(row.fields)
        raise ConfigError(f"{row.where}: no field '{field}' (the row's fields: {has}); say which with label_field")
    value = row.fields[field]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value in known:
        return known[value]
    if isinstance(value, str) and value.isdecimal():  # a table in a text file has no numbers
        return int(value)
    names = ", ".join(known) or "none, so labels must be numbers"
    raise ConfigError(f"{row.where}: label {value!r} is not known; config.json names: {names}")
