"""Right answers on labelled data: what a language model generates, or what a classifier chooses."""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from olive.data.spec import DataSpec
from olive.errors import ConfigError
from olive.evaluate.evaluators import Evaluator, Measuring
from olive.evaluate.metrics import METRICS, Metric
from olive.model import Model

GIVES = {"generation": ("exact_match", "f1"), "classification": ("accuracy", "f1")}
TEMPLATE = "{prompt}{answer}"


class Accuracy(Evaluator):
    """Answers compared with those of labelled rows.

    ``generation``: the model continues each prompt greedily, in GenAI (ONNX) or transformers (checkpoints). exact_match
    compares the whole answer without the blanks around it; f1 compares words, as SQuAD does (Rajpurkar et al. 2016).
    ``classification``: an ONNX graph gives one number per label, the largest counts; f1 is the mean over the labels.
    """

    names = ("accuracy", "f1", "exact_match")

    data: DataSpec | None = None
    """Labelled rows; required. Without a template, a row has the fields prompt and answer (generation), or text and
    label (classification), or label and what the graph's inputs are called."""
    task: Literal["generation", "classification"] = "generation"
    """What the model does."""
    label_field: str = "label"
    """Field of the label in classification: a number, or a name that config.json knows (label2id)."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer."""
    batch_size: int = Field(16, ge=1)
    """Answers that are generated at once."""

    def metrics(self) -> dict[str, Metric]:
        return {name: METRICS[name] for name in GIVES[self.task]}

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        if self.data is None:
            raise ConfigError("accuracy needs labelled rows; give data, as in --data_files rows.jsonl")
        if self.task == "classification":
            from olive.evaluate.classify import classify

            pairs = classify(model, self.data, self.label_field)
            ctx.note(rows=len(pairs))
            return {"accuracy": sum(a == b for a, b in pairs) / len(pairs), "f1": macro_f1(pairs)}
        answers = self._answers(model, ctx)
        ctx.note(rows=len(answers))
        same = sum(_plain(given) == _plain(wanted) for wanted, given in answers)
        overlap = sum(word_f1(given, wanted) for wanted, given in answers)
        return {"exact_match": same / len(answers), "f1": overlap / len(answers)}

    def _answers(self, model: Model, ctx: Measuring) -> list[tuple[str, str]]:
        """Return what is expected of each row, and what the model gives."""
        from olive.data.render import behind_answer, render
        from olive.data.rows import rows
        from olive.data.samples import prompt_ids
        from olive.runtime.torch_model import load_tokenizer

        assert self.data is not None
        spec = self.data
        if spec.text_template is None and not spec.use_chat_template and spec.text_field is None:
            spec = spec.model_copy(update={"text_template": TEMPLATE})
        tokenizer = load_tokenizer(model.path, model.trust_remote_code)
        behind, wanted, prompts = behind_answer(spec), [], []
        for row in itertools.islice(rows(spec), spec.max_samples):
            prompt, answer = render(row, spec, tokenizer)
            if not prompt:
                raise ConfigError(f"{row.where}: has no prompt; give a text_template such as {TEMPLATE}")
            wanted.append(_readable(answer.removesuffix(behind), tokenizer))
            prompts.append(prompt_ids(tokenizer, prompt, special=not spec.use_chat_template))
        given = []
        for tokens in _generate(model, ctx, prompts, self.max_new_tokens, self.batch_size):
            text = tokenizer.decode(tokens)
            given.append(_readable(text.split(behind)[0] if behind else text, tokenizer))
        return list(zip(wanted, given, strict=True))


def _readable(text: str, tokenizer: Any) -> str:
    """Leave out what is for the model alone, such as the token that ends a turn."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True)


def _generate(
    model: Model, ctx: Measuring, prompts: list[list[int]], max_new_tokens: int, batch_size: int
) -> Iterator[list[int]]:
    """Yield the new tokens of each prompt."""
    if model.kind == "onnx":
        from olive.runtime.genai import Generator

        adapters = {"adapter": ctx.adapter} if ctx.adapter is not None else {}
        name = next(iter(adapters), None)
        with Generator(model.path, adapters) as generator:
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                yield from generator.generate_rows(part, adapter=name, max_new_tokens=max_new_tokens)
        return
    import torch

    from olive.runtime.torch_model import load, load_adapted

    trust, device = model.trust_remote_code, ctx.compute_device
    if ctx.adapter is None:
        loaded = load(model.path, device=device, trust_remote_code=trust)
    else:
        loaded = load_adapted(model.path, ctx.adapter, device=device, trust_remote_code=trust)
    for ids in prompts:
        row = torch.tensor([ids], device=device)
        with torch.no_grad():
            mask = torch.ones_like(row)
            out = loaded.generate(row, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        yield out[0, len(ids) :].tolist()


def _plain(text: str) -> str:
    return " ".join(text.split())


def word_f1(given: str, wanted: str) -> float:
    """Return the F1 of the words of two texts, as SQuAD's script counts it: in small letters, without punctuation and
    articles.

    >>> word_f1("in the Old Town", "the old town!")
    0.8
    """
    one, other = _words(given), _words(wanted)
    shared = sum((Counter(one) & Counter(other)).values())
    if not one or not other:
        return float(one == other)
    return 2 * shared / (len(one) + len(other))


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Return the mean over the labels of their F1, from (expected, given) labels.

    >>> macro_f1([(0, 0), (0, 1), (1, 1)])
    0.6666666666666666
    """
    labels = {label for pair in pairs for label in pair}
    right = Counter(wanted for wanted, given in pairs if wanted == given)
    seen = Counter(label for pair in pairs for label in pair)  # expected and given alike
    return sum(2 * right[label] / seen[label] for label in labels) / len(labels)
