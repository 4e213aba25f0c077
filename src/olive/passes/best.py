"""Several quantizers on one model; the one that keeps it best is the result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.config import Time, parse, seconds
from olive.data.spec import DataSpec
from olive.errors import ConfigError, PassError
from olive.model import Model
from olive.passes.base import Context
from olive.passes.calibrated import Calibrated, calibration_windows, gather
from olive.passes.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

HELD_BACK = 8
"""Calibration rows that are kept from the quantizers, to compare them on."""
KEPT_LOGITS = 1 << 28
"""Values of the float model's logits that are kept in memory for comparing; fewer rows are held back if need be."""
DEFAULT: tuple[dict[str, Any], ...] = (
    {"type": "kquant", "refine": 2},
    {"type": "awq", "refine": 2},
    {"type": "gptq"},
    {"type": "tune"},
)


class OutOfTime(Exception):
    """A candidate would not end within the budget."""


class Best(
    Quantizer,
    sources=("olive.passes.best", "olive.passes", "olive.quant", "olive.evaluate", "olive.runtime", "olive.data"),
    libraries=("tokenizers",),
):
    """Try several quantizers, the quick ones first, and keep the one whose next-token distributions are nearest to the
    float model's (KL divergence) on calibration rows that none of them has seen."""

    data: DataSpec = DataSpec()
    """Calibration data; by default a small shipped text."""
    candidates: tuple[dict[str, Any], ...] = Field(DEFAULT, min_length=1)
    """Passes to try, each with its own options; bits, group size, layout and the like are this pass's."""
    budget: Time | None = None
    """Time to spend, as in 90s, 10m or 2h: a candidate that would not be done by then is given up. Default: as long as
    it takes."""

    def run(self, model: Model, ctx: Context) -> Model:
        began = time.perf_counter()
        limit = float("inf") if self.budget is None else seconds(self.budget)
        passes = [self._pass(number, options) for number, options in enumerate(self.candidates)]
        ids, held = self._rows(model)
        shared = ctx.scratch / "statistics"
        shutil.rmtree(shared, ignore_errors=True)
        if any(isinstance(step, Calibrated) for _, step in passes):
            gather(model, ctx, ids, shared)
        expected = [row.cpu() for row in _logits(model, held, ctx.compute_device)]
        tried: list[dict[str, Any]] = []
        winner: tuple[float, Path, dict[str, Any]] | None = None
        for number, (name, step) in enumerate(passes):
            place = ctx.scratch / f"candidate-{number}"
            shutil.rmtree(place, ignore_errors=True)
            (place / "files").mkdir(parents=True)
            started = time.perf_counter()
            facts: dict[str, Any] = {}
            own = replace(
                ctx,
                out=place / "files",
                scratch=place,
                note=facts.update,
                progress=_watched(ctx.progress, name, started, began + limit),
            )
            row: dict[str, Any] = {"name": name}
            if isinstance(step, Calibrated):
                step = step.model_copy(update={"statistics": str(shared)})
            try:
                made = step.run(model, own)
                row["seconds"] = round(time.perf_counter() - started, 1)
                row |= _compare(expected, _logits(made, held, ctx.compute_device), held)
                row["bytes"] = sum(path.stat().st_size for path in made.path.glob("*.safetensors"))
            except OutOfTime:
                row["not_done"] = f"would not end within {self.budget}"
            except PassError as error:
                row["not_done"] = str(error)
            tried.append(row)
            if "kl_divergence" in row and (winner is None or row["kl_divergence"] < winner[0]):
                if winner is not None:
                    shutil.rmtree(winner[1])
                winner = (row["kl_divergence"], place, facts | {"picked": name})
            else:
                shutil.rmtree(place)
        shutil.rmtree(shared, ignore_errors=True)
        if winner is None:
            raise PassError(f"best: no candidate was done: {'; '.join(r['not_done'] for r in tried)}; give more time")
        for path in (winner[1] / "files").iterdir():
            path.rename(ctx.out / path.name)
        ctx.note(**winner[2], candidates=tried, held_back_rows=len(held))
        return Model("hf", ctx.out)

    def _pass(self, number: int, options: dict[str, Any]) -> tuple[str, Quantizer]:
        from olive.passes import pass_class

        where = f"candidates.{number}"
        kind = pass_class(str(options.get("type")), where)
        if not issubclass(kind, Quantizer) or kind is Best:
            raise ConfigError(f"{where}: {options['type']} is not a quantizer that can be tried")
        own = {name: value for name, value in options.items() if name != "type"}
        common = self.model_dump(include=set(Quantizer.model_fields))
        name = ", ".join([options["type"], *(f"{key} {value}" for key, value in own.items())])
        return name, parse(kind, common | own, where + ".")

    def _rows(self, model: Model) -> tuple[Tensor, Tensor]:
        """Return calibration rows for the quantizers and, taken evenly from among them, rows to compare on."""
        import torch

        from olive.quant.formats.checkpoint import read_config

        ids = calibration_windows(self.data, model)
        vocabulary = int(read_config(model.path).get("vocab_size") or 1 << 17)
        count = max(1, min(HELD_BACK, len(ids) // 4, KEPT_LOGITS // (vocabulary * ids.shape[1])))
        if len(ids) < 2:
            raise ConfigError("best: one row of calibration data is too little to choose by; give more data")
        held = torch.zeros(len(ids), dtype=torch.bool)
        held[[(2 * i + 1) * len(ids) // (2 * count) for i in range(count)]] = True
        return ids[~held], ids[held]


def _watched(
    progress: Callable[[str, int, int], None], name: str, started: float, deadline: float
) -> Callable[[str, int, int], None]:
    """Pass progress on; give up where it tells that the deadline cannot be kept."""

    def watch(what: str, done: int, total: int) -> None:
        progress(f"{what} ({name})", done, total)
        elapsed = time.perf_counter() - started
        if done and started + elapsed / done * total > deadline:
            raise OutOfTime

    return watch


def _logits(model: Model, ids: Tensor, device: str) -> Any:
    from olive.evaluate.logits import checkpoint_logits

    return checkpoint_logits(model, ids, device)


def _compare(expected: list[Any], found: Any, ids: Any) -> dict[str, float]:
    from olive.evaluate.quality import Quality

    quality = Quality()
    for row, (want, got) in enumerate(zip(expected, found, strict=True)):
        quality.add(want, got.cpu(), ids[row : row + 1])
    figures = quality.figures()
    return {name: figures[name] for name in ("perplexity_source", "perplexity", "kl_divergence", "top1_agreement")}
