"""The size of a model's files."""

from __future__ import annotations

from olive.evaluate.evaluators import Evaluator, Measuring
from olive.model import Model, files


class Size(Evaluator):
    """Bytes of all files of the model: weights, graph, tokenizer, configuration, and adapters that lie among them."""

    names = ("size_on_disk",)

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:  # noqa: ARG002
        return {"size_on_disk": float(sum((model.path / name).stat().st_size for name in files(model.path)))}
