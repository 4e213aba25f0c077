"""Quantization with training of the whole model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.data.spec import DataSpec
from olive.model import Model
from olive.passes.base import Context
from olive.passes.calibrated import calibration_windows
from olive.passes.held_back import hold_back
from olive.passes.quantizer import float_source
from olive.passes.tune import Tune

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight


SOURCES = ("olive.passes.distill", "olive.passes.held_back", "olive.quant.distill", "olive.quant.linear",
           "olive.runtime.torch_model")  # fmt: skip


class Distill(Tune, sources=SOURCES):
    """The result of tune, of which all codes and scales are then trained together towards the float model's
    predictions, mostly on text that it writes itself (LLM-QAT, arXiv 2305.17888, 2023). More accurate than tune, for
    models that fit into the memory of a GPU with 40 bytes per parameter; on a CPU it takes hours."""

    steps: int = Field(2000, ge=1)
    """Steps of training, of 8 rows each."""
    learning_rate: float = Field(0.001, gt=0)
    """Largest step of training, in units of a code."""
    own_rows: int = Field(4096, ge=8)
    """Rows that the float model writes to be trained on, as long as those of the data."""

    def write(self, model: Model, ctx: Context) -> Model:
        place, facts = ctx.scratch / "tuned", dict[str, Any]()
        shutil.rmtree(place / "files", ignore_errors=True)
        (place / "files").mkdir(parents=True)
        tuned = super().write(model, replace(ctx, out=place / "files", scratch=place, note=facts.update))
        found = self._trained(model, tuned.path, ctx, facts)
        self._write(tuned.path, found, ctx.out)
        shutil.rmtree(place)
        ctx.note(**facts)
        return Model("hf", ctx.out)

    def _trained(self, model: Model, tuned: Path, ctx: Context, facts: dict[str, Any]) -> dict[str, QuantizedWeight]:
        """Return the linears of the layers after training, or none if it was for nothing."""
        import torch

        from olive.quant.distill import distill, divergence
        from olive.quant.formats.checkpoint import Checkpoint
        from olive.quant.formats.layout import end_of
        from olive.runtime.torch_model import load

        device, trust = ctx.compute_device, model.trust_remote_code
        teacher = load(model.path, device=device, trust_remote_code=trust)
        rows, held = self._rows(model, teacher, ctx)
        student = load(tuned, device=device, trust_remote_code=trust)
        stored, (source, _) = Checkpoint(tuned), float_source(model)
        start = {name: _on(stored.quantized_weight(name), device) for name in stored.quantized if not end_of(name)}

        def compare() -> float:
            with torch.no_grad():
                return float(torch.stack([divergence(teacher, student, row[None]) for row in held]).mean())

        before = compare()
        found = distill(
            teacher,
            student,
            start,
            lambda name: source.weight(f"{name}.weight").float().to(device),
            rows,
            steps=self.steps,
            rate=self.learning_rate,
            seed=ctx.seed,
            tick=lambda done: ctx.progress("train", done, self.steps),
        )
        after = compare()
        facts |= {"own_rows": self.own_rows, "held_back_kl_before": before, "held_back_kl_after": after}
        if not after < before:  # nor if it is not a number
            facts["warning"] = "training did not help and was undone; give a lower learning_rate or more own_rows"
            return {}
        for linear in facts["linears"].values():  # the errors were those before training
            linear.pop("error", None)
            linear.pop("error_rounding", None)
        return {name: _on(weight, "cpu") for name, weight in found.items()}

    def _rows(self, model: Model, teacher: Any, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return the rows [rows, T] to train on, the data's and the model's own, and some of its own to compare on."""
        import torch

        from olive.quant.distill import PROMPT, write_rows
        from olive.quant.statistics import SavedStatistics

        known = SavedStatistics(Path(self.statistics), {}) if self.statistics is not None else None
        data = calibration_windows(self.data or DataSpec(), model) if known is None else known.ids
        data = data.to(ctx.compute_device)
        length = data.shape[1]
        torch.manual_seed(ctx.seed)
        prompt = min(PROMPT, length - 1)
        places = torch.randint(data.numel() - prompt + 1, (self.own_rows, 1), device=data.device)
        prompts = data.flatten()[places + torch.arange(prompt, device=data.device)]
        own = write_rows(teacher, prompts, length, lambda done: ctx.progress("write rows", done, self.own_rows))
        own, held = hold_back(model, own, "distill")
        return torch.cat([data, own]), held

    def _write(self, tuned: Path, found: dict[str, QuantizedWeight], out: Path) -> None:
        """Write the tuned checkpoint with the linears that were found."""
        from olive.quant.formats.checkpoint import Checkpoint
        from olive.quant.formats.writer import CheckpointWriter

        stored = Checkpoint(tuned)
        writer = CheckpointWriter(tuned, out, len(stored.tensors))
        for name in stored.float_names:
            writer.tensor(name, stored.tensors[name])
        for name in stored.quantized:
            writer.quantized(name, found.get(name) or stored.quantized_weight(name), self.format)
        writer.close(stored.config)


def _on(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    moved = {name: getattr(weight, name).to(device) for name in ("codes", "scale", "zero_point")}
    return replace(weight, **moved)
