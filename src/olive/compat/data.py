"""Their data configurations as data sets of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.compat.notes import Notes, flat
from olive.data.spec import FILE_READERS

COMPONENTS = ("load_dataset_config", "pre_process_data_config", "post_process_data_config", "dataloader_config")
NEEDLESS = ("add_special_tokens", "pad_to_max_len", "use_attention_mask", "batch_size", "strategy", "corpus_strategy",
            "dataset_type", "kv_cache", "shuffle", "trust_remote_code", "token", "joiner", "task")  # fmt: skip
"""Settings of how rows become batches: ours are windows of equal length, or samples with the prompt masked."""
LENGTHS = ("max_seq_len", "source_max_len", "seqlen", "seq_length", "max_len")
CONTAINERS = ("huggingfacecontainer",)


def data_sets(given: Any, notes: Notes) -> dict[str, Any]:
    """Translate all; one that cannot be is left out, and what uses it is told so."""
    listed = given if isinstance(given, list) else [{"name": k, **flat(v)} for k, v in flat(given).items()]
    found = {}
    for i, own in enumerate(listed):
        name = str(flat(own).get("name") or i)
        place = f"data_configs.{i if isinstance(given, list) else name}"
        spec = data_set(own, place, notes)
        if spec is not None:
            found[name] = spec
    return found


def data_set(given: Any, place: str, notes: Notes) -> dict[str, Any] | None:
    """Translate one; None if rows come from a script or are made up."""
    own = flat(given)
    kind = str(own.pop("type", "HuggingfaceContainer"))
    own.pop("name", None)
    if own.pop("user_script", None) or own.pop("script_dir", None):
        notes.add(place, "reads rows by a user script, which has no counterpart; write them to a JSON file")
        return None
    if kind.lower() not in CONTAINERS:
        notes.add(place, f"{kind} has no counterpart; left out")
        return None
    options = _options(own)
    found: dict[str, Any] = {}
    renamed = {"data_name": "name", "subset": "subset", "split": "split", "text_template": "text_template",
               "text_field": "text_field", "max_samples": "max_samples"}  # fmt: skip
    for theirs, ours in renamed.items():
        value = options.pop(theirs, None)
        if value is not None:
            found[ours] = value
    files = options.pop("data_files", None)
    if isinstance(files, Mapping) and found.get("split", "train") in files:
        files = files[found.pop("split", "train")]
    elif isinstance(files, Mapping):
        files = [file for group in files.values() for file in (group if isinstance(group, list) else [group])]
    if files:
        found["files"] = files if isinstance(files, list) else [files]
    if found.get("name") in FILE_READERS:
        for part in ("subset", "split"):
            if found.pop(part, "train") != "train":
                notes.add(f"{place}.{part}", "local files are read whole; left out")
    columns = options.pop("text_cols", None)
    columns = [columns] if isinstance(columns, str) else columns
    if columns and "text_template" not in found and "text_field" not in found:
        if len(columns) == 1:
            found["text_field"] = columns[0]
        else:
            found["text_template"] = "\n".join(f"{{{column}}}" for column in columns)
    if options.pop("chat_template", None) or options.pop("use_chat_template", None):
        found["use_chat_template"] = True
    length = next((options.pop(name) for name in LENGTHS if name in options), None)
    if length is not None:
        found["max_seq_len"] = length
    for name in options:
        if name not in NEEDLESS:
            notes.add(f"{place}.{name}", "has no counterpart; left out")
    return found if found.get("name") else None


def _options(own: dict[str, Any]) -> dict[str, Any]:
    """Return the options of all components on one level."""
    deeper = flat(own.pop("params_config", None))
    deeper |= {name: value for part in flat(deeper.pop("component_kwargs", None)).values()
               for name, value in flat(part).items()}  # fmt: skip
    own.pop("components", None)
    found: dict[str, Any] = {}
    for name, value in own.items():
        part = flat(value) if name in COMPONENTS else {name: value}
        part.pop("type", None)
        found |= part
    return found | deeper
