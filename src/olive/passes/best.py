"""Several quantizers on one model; the one that keeps it best is the result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from olive.config import Time, parse, seconds
from olive.data.spec import DataSpec
from olive.errors import ConfigError, PassError
from olive.model import Model
from olive.passes.base import Context
from olive.passes.calibrated import Calibrated, calibration_windows, gather
from olive.passes.held_back import HeldBack, hold_back
from olive.passes.quantizer import BUDGET, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight

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

    fitted: ClassVar[bool] = True

    def rounded(self, weight: Tensor, gram: Tensor | None, group: Any) -> QuantizedWeight:
        """Round as GPTQ does."""
        from olive.passes.gptq import Gptq

        return Gptq(symmetric=self.symmetric).rounded(weight, gram, group)

    def write(self, model: Model, ctx: Context) -> Model:
        began = time.perf_counter()
        limit = float("inf") if self.budget is None else seconds(self.budget)
        passes = [self._pass(number, options) for number, options in enumerate(self.candidates)]
        ids, held = hold_back(model, calibration_windows(self.data, model), "best")
        shared = ctx.scratch / "statistics"
        shutil.rmtree(shared, ignore_errors=True)
        if any(isinstance(step, Calibrated) for _, step in passes):
            gather(model, ctx, ids, shared)
        judge = HeldBack(model, held, ctx.compute_device)
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
                row |= judge.compare(made)
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
        common = self.model_dump(include=set(Quantizer.model_fields) - {"data", *BUDGET})
        name = ", ".join([options["type"], *(f"{key} {value}" for key, value in own.items())])
        return name, parse(kind, common | own, where + ".")


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
