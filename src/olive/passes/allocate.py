"""Bits and group size by layer, for a budget of bytes or of divergence from the float model."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import ConfigError, PassError
from olive.model import Model
from olive.passes.base import Context
from olive.passes.held_back import HeldBack
from olive.passes.measured import Measured
from olive.passes.quantizer import BUDGET, PER_WEIGHT, UNITS, Quantizer, float_source

if TYPE_CHECKING:
    from olive.quant.sensitivity import Unit

AIMS = (1.0, 0.98, 0.95, 0.9)
"""Shares of kl_budget that the tries aim at: the first goes by the prediction, the others by what the last one gave."""
CLOSE = 0.95
"""Share of kl_budget above which no further try is made."""


def allocate(quantizer: Quantizer, model: Model, ctx: Context) -> Model:
    """Measure sensitivities, choose settings, quantize with them, and measure the result on held-back rows."""
    work = Allocation(quantizer, model, ctx)
    judge = HeldBack(model, work.measured.held, ctx.compute_device)
    if quantizer.target_size is not None:
        chosen = work.within(quantizer.target_size)
        facts: dict[str, Any] = {}
        (ctx.scratch / "quantizer").mkdir(exist_ok=True)
        inner = replace(ctx, scratch=ctx.scratch / "quantizer", note=facts.update)
        made = work.with_settings(chosen).write(model, inner)
        ctx.note(**facts, allocation=work.facts(chosen, judge.compare(made)))
        return made
    best = _tries(work, judge)
    for path in (best.place / "files").iterdir():
        path.rename(ctx.out / path.name)
    ctx.note(**best.facts)
    return Model("hf", ctx.out)


@dataclass
class _Try:
    """One quantized model on the way to a kl_budget."""

    place: Path
    size: int
    facts: dict[str, Any]


def _tries(work: Allocation, judge: HeldBack) -> _Try:
    """Make the smallest model within the divergence; predictions are corrected by what earlier tries gave."""
    budget = work.quantizer.kl_budget
    assert budget is not None
    best, seen, factor, nearest = None, set(), 1.0, math.inf
    for number, share in enumerate(AIMS):
        chosen = work.smallest(share * budget / factor)
        if tuple(chosen) in seen:
            break
        seen.add(tuple(chosen))
        place = work.ctx.scratch / f"try-{number}"
        shutil.rmtree(place, ignore_errors=True)
        (place / "files").mkdir(parents=True)
        facts: dict[str, Any] = {}
        inner = replace(work.ctx, out=place / "files", scratch=place, note=facts.update)
        figures = judge.compare(work.with_settings(chosen).write(work.model, inner))
        found, predicted = figures["kl_divergence"], work.predicted(chosen)
        facts["allocation"] = work.facts(chosen, figures)
        nearest = min(nearest, found)
        size = facts["allocation"]["bytes"]
        if found <= budget and (best is None or size < best.size):
            if best is not None:
                shutil.rmtree(best.place)
            best = _Try(place, size, facts)
        else:
            shutil.rmtree(place)
        if CLOSE * budget <= found <= budget or predicted == 0:
            break
        factor = found / predicted
    if best is None:
        raise PassError(
            f"kl_budget {budget}: not kept in {len(seen)} tries; the nearest had {nearest:.4g}; give a larger one, "
            "more calibration data or a better algorithm"
        )
    return best


class Allocation:
    """The units of a model, what their settings cost, and the quantizer that a choice of settings makes."""

    def __init__(self, quantizer: Quantizer, model: Model, ctx: Context) -> None:
        self.quantizer, self.model, self.ctx = quantizer, model, ctx
        self.source, self.meta = float_source(model)
        self.shapes, self.asked = quantizer.asked(self.meta)
        self.measured = Measured(quantizer, model, ctx)
        self.units = self.measured.units
        self.groups = [self._groups(unit) for unit in self.units]

    # What settings cost

    def _groups(self, unit: Unit) -> dict[str, dict[str, Any]]:
        """Return what each setting of a unit means for each of its modules; None: float."""
        from olive.quant.formats.writer import choose_groups
        from olive.quant.sensitivity import FLOAT, parts

        shapes = {name: self.shapes[name] for name in unit.linears}
        return {
            setting: dict.fromkeys(shapes)
            if setting == FLOAT
            else dict(choose_groups(shapes, self.quantizer.format, *parts(setting)))
            for setting in unit.divergence
        }

    def _bytes(self, groups: Mapping[str, Any]) -> int:
        from olive.quant.sensitivity import runtime_bytes, stored_bytes

        q, total = self.quantizer, 0
        for name, group in groups.items():
            n, k = self.shapes[name]
            if q.size_of == "runtime":
                total += runtime_bytes(n, k, group)
            elif group is None:
                total += n * k * self.source.stored_dtype(f"{name}.weight").itemsize
            else:
                total += stored_bytes(q.format, n, k, group, q.symmetric)
        return total

    def _table(self) -> list[list[Any]]:
        from olive.quant.allocate import Choice

        return [
            [Choice(self._bytes(groups[setting]), loss) for setting, loss in unit.divergence.items()]
            for unit, groups in zip(self.units, self.groups, strict=True)
        ]

    def _whole(self, chosen: Sequence[int]) -> int:
        """Return the size of the model with such settings, in bytes of what size_of names."""
        groups: dict[str, Any] = {}
        for unit, options, i in zip(self.units, self.groups, chosen, strict=True):
            groups |= options[list(unit.divergence)[i]]
        rest = [name for name in self.source.float_names if name.removesuffix(".weight") not in groups]
        counts = {name: math.prod(self.source.shape(name)) for name in rest}
        if self.quantizer.size_of == "runtime":
            return self._bytes(groups) + 4 * sum(counts.values())
        from olive.quant.formats.writer import checkpoint_bytes

        sizes = [self._bytes({name: group}) for name, group in groups.items()]
        sizes += [count * self.source.stored_dtype(name).itemsize for name, count in counts.items()]
        silent = replace(self.ctx, note=lambda **_: None)
        made = self.with_settings(chosen)
        config = made.config(self.source.config, made.groups(self.meta, silent), self.meta)
        return checkpoint_bytes(self.model.path, config, sizes, 4 * len(self.source.float_names))

    # Choosing

    def within(self, target: str) -> list[int]:
        """Return the choice of settings with the least divergence within a target size."""
        from olive.quant.allocate import least_loss

        table = self._table()
        smallest = [min(enumerate(one), key=lambda item: item[1].size)[0] for one in table]
        number, unit = re.findall(r"[\d.]+|\D+", target)
        per_weight = unit == PER_WEIGHT
        size = int(float(number) * (self._weights() / 8 if per_weight else UNITS[unit]))
        measure = self._of_units if per_weight else self._whole
        rest = measure(smallest) - sum(u[i].size for u, i in zip(table, smallest, strict=True))
        while (chosen := least_loss(table, size - rest)) is not None:
            self._check_some(chosen, f"target_size {target}: the float model is not larger")
            over = measure(chosen) - size  # config.json names what differs from the common setting
            if over <= 0:
                return chosen
            rest += over
        lowest = measure(smallest)
        told = (
            f"{8 * lowest / self._weights():.3f}bpw"
            if per_weight
            else f"{lowest / 1e6:.3f}MB with all that stays float"
        )
        more = "" if per_weight else ", or quantize lm_head and embeddings too"
        raise ConfigError(f"target_size {target}: the smallest settings take {told}; give that or more{more}")

    def smallest(self, divergence: float) -> list[int]:
        """Return the smallest choice of settings with a predicted divergence of at most ``divergence``."""
        from olive.quant.allocate import least_size

        chosen = least_size(self._table(), divergence)
        assert chosen is not None  # every unit that is free may stay float
        self._check_some(chosen, f"kl_budget {self.quantizer.kl_budget}: only the float model keeps it")
        return chosen

    def _check_some(self, chosen: Sequence[int], why: str) -> None:
        from olive.quant.sensitivity import FLOAT

        if all(list(unit.divergence) == [FLOAT] for unit in self.units):
            raise ConfigError(
                f"{why.partition(':')[0]}: no linear layer can be quantized: all are excluded, or groups of 32 and "
                f"more do not fit them in format {self.quantizer.format}"
            )
        if all(list(unit.divergence)[i] == FLOAT for unit, i in zip(self.units, chosen, strict=True)):
            raise ConfigError(f"{why}; there is nothing to quantize")

    def predicted(self, chosen: Sequence[int]) -> float:
        """Return the divergence that is to be expected of a choice."""
        return math.fsum(list(u.divergence.values())[i] for u, i in zip(self.units, chosen, strict=True))

    def with_settings(self, chosen: Sequence[int]) -> Quantizer:
        """Return the quantizer that gives each unit its setting."""
        from olive.quant.sensitivity import FLOAT, parts

        q = self.quantizer
        free = {u.name: u for u in self.units if len(u.divergence) > 1}
        settings = {u.name: list(u.divergence)[i] for u, i in zip(self.units, chosen, strict=True) if u.name in free}
        tables = q.tables(self.meta)
        common = Counter(s for name, s in settings.items() if s != FLOAT and name not in tables)
        change: dict[str, Any] = dict.fromkeys(BUDGET)
        change["size_of"] = "checkpoint"
        if common:
            change["bits"], change["group_size"] = parts(common.most_common(1)[0][0])
        overrides, exclude = dict(q.overrides), list(q.exclude)
        for name, setting in settings.items():
            if setting != FLOAT:
                overrides |= dict.fromkeys(free[name].linears, setting)
            elif name not in tables:
                exclude += free[name].linears
            else:
                change |= self._float_table(name)
        change |= {"overrides": overrides, "exclude": tuple(exclude)}
        if self.measured.statistics is not None:
            change |= {"statistics": str(self.measured.statistics), "save_statistics": None, "data": None}
        elif not q.fitted:
            change["data"] = None
        return q.model_copy(update=change)

    def _float_table(self, name: str) -> dict[str, str]:
        tied = len(self.quantizer.tables(self.meta)) == 1 and self.quantizer.lm_head != "float"
        embeddings = self.meta.get_submodule(name) is self.meta.get_input_embeddings()
        return {"embeddings": "float"} | ({"lm_head": "float"} if tied else {}) if embeddings else {"lm_head": "float"}

    def facts(self, chosen: Sequence[int], figures: Mapping[str, float]) -> dict[str, Any]:
        """Return what the report tells."""
        budget = self.quantizer.target_size or self.quantizer.kl_budget
        units = {}
        for unit, groups, i in zip(self.units, self.groups, chosen, strict=True):
            setting = list(unit.divergence)[i]
            units[unit.name] = {
                "linears": len(unit.linears),
                "setting": setting,
                "bytes": self._bytes(groups[setting]),
                "predicted_kl": unit.divergence[setting],
                "sensitivity": dict(unit.divergence),
            }
        return {
            "budget": budget,
            "size_of": self.quantizer.size_of,
            "bytes": self._whole(chosen),
            "bits_per_weight": 8 * self._of_units(chosen) / self._weights(),
            "predicted_kl": self.predicted(chosen),
            "held_back_rows": len(self.measured.held),
            **figures,
            "units": units,
        }

    def _counted(self) -> list[int]:
        """Return which units are quantized weights, not left float by the options."""
        from olive.quant.sensitivity import FLOAT

        return [number for number, unit in enumerate(self.units) if list(unit.divergence) != [FLOAT]]

    def _weights(self) -> int:
        return sum(math.prod(self.shapes[name]) for number in self._counted() for name in self.units[number].linears)

    def _of_units(self, chosen: Sequence[int]) -> int:
        """Return the bytes of the quantized weights alone."""
        table = self._table()
        return sum(table[number][chosen[number]].size for number in self._counted())
