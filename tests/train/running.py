"""Run the fine-tuning pass alone, as the engine would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from olive.data.spec import DataSpec
from olive.model import Model, sha256
from olive.passes.base import Context
from olive.passes.lora import Lora
from olive.target import Target

TEMPLATE = "{q}\\n{a}"
QUICK = {"max_steps": 20, "per_device_train_batch_size": "4", "learning_rate": "1e-2"}


def lora(rows_file: Path, **options: Any) -> Lora:
    spec = DataSpec(name="json", files=(str(rows_file),), text_template=TEMPLATE, max_seq_len=64)
    return Lora(**{"data": spec, "rank": 4, "alpha": 8, "training": QUICK} | options)


class Run:
    """One run of a pass in a fresh folder, and what it reported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.facts, self.steps = folder, dict[str, Any](), list[tuple[str, int, int]]()

    def __call__(self, pass_: Lora, base: Path, seed: int = 0) -> Model:
        out, scratch = self.folder / "out", self.folder / "scratch"
        out.mkdir(parents=True)
        scratch.mkdir()
        report: Callable[..., None] = lambda *step: self.steps.append(step)  # noqa: E731
        context = Context(out, "input", scratch, Target(), "cpu", seed, sha256, self.facts.update, report)
        return pass_.run(Model("hf", base), context)
