"""Measure, once for a model, what each bit width and group size of each unit would do to its next-token distributions.

One sweep over the layers: some probe rows pass through the float model, and a copy of them through the float model with
one unit rounded, for each unit. A copy differs from where its unit lies, so it begins there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import PassError
from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import BITS, Quantizer, float_source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from olive.quant.affine import QuantizedWeight
    from olive.quant.layer import Layer
    from olive.quant.sensitivity import Unit
    from olive.quant.statistics import SavedStatistics
    from olive.runtime.layers import Batch

PROBE_ROWS = {"cpu": 8, "cuda": 16}
"""Rows that are compared, at most."""
FEW_ROWS = 4
"""Where there is no room for so many rows, fewer settings are measured."""
WAITING = 4 << 30
"""Bytes that the copies of the probe rows may take."""


@dataclass
class Copies:
    """The probe rows as each of them sees the model, by unit and setting."""

    rows: dict[str, dict[str, list[Batch]]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    linears: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Sensitivities:
    """Measures the units of a model."""

    def __init__(self, quantizer: Quantizer, model: Model, ctx: Context) -> None:
        from olive.passes.calibrated import open_layers

        self.quantizer, self.model, self.ctx = quantizer, model, ctx
        self.source, self.meta = float_source(model)
        self.layered, self.identity = open_layers(self.source, self.meta, ctx, exact=True)
        self.shapes, self.asked = quantizer.asked(self.meta)
        self.tables = quantizer.tables(self.meta)
        self.copies = Copies()

    def measure(self, ids: Tensor, known: SavedStatistics | None, folder: Path | None) -> list[Unit]:
        """Return the units with what each of their settings adds to the divergence.

        ``ids`` [rows, T] are the calibration rows; the statistics of the layers' inputs on them are those ``known``, or
        else gathered, and kept in ``folder``.
        """
        from olive.passes.calibrated import rows_per_batch
        from olive.quant.layer import Layer
        from olive.quant.statistics import StatisticsWriter

        layered = self.layered
        few, self.thrifty = self._probe_rows(ids)
        look = layered.start(ids[:1, :16], 1)[0]
        batches = layered.start(ids, rows_per_batch(self.ctx, ids)) if known is None else []
        plain = layered.start(few, 1)
        self._embed(few)
        with StatisticsWriter(folder, self.identity, ids) if folder else nullcontext() as keeper:
            for index, name, block in layered.layers():
                layer = Layer(name, block, self.source.dtype(), self.quantizer.symmetric)
                layer.look(partial(layered.apply, index, block, look), layered.head_dim())
                if known is not None:
                    layer.statistics = {site: known.get(layer.input_name(site), layered.device) for site in layer.sites}
                else:
                    with layer.watching() as count:
                        layered.advance(index, block, batches, count)
                if keeper is not None:
                    layer.save(keeper)
                layer.check()
                for copies in self.copies.rows.values():
                    for rows in copies.values():
                        layered.advance(index, block, rows)
                self._round(index, layer, plain)
                layered.advance(index, block, plain)
                self.ctx.progress("sensitivity", index + 1, len(layered.blocks))
        return self._units(plain)

    def _probe_rows(self, ids: Tensor) -> tuple[Tensor, bool]:
        """Return the rows that are compared, evenly taken, and whether there is room for half of the probes only."""
        from olive.passes.held_back import KEPT_LOGITS, vocabulary

        most = min(PROBE_ROWS[self.ctx.compute_device], len(ids))
        most = min(most, KEPT_LOGITS // (vocabulary(self.model) * ids.shape[1]))
        copies = 4 * 6 * len(self.layered.blocks)  # of four units in a layer, two group sizes of 2, 3 and 4 bits
        room = WAITING // (copies * ids.shape[1] * self.meta.config.get_text_config().hidden_size * 4)
        thrifty = room < min(FEW_ROWS, most)
        count = max(1, min(most, 2 * room if thrifty else room))
        return ids[[(2 * i + 1) * len(ids) // (2 * count) for i in range(count)]], thrifty

    def _settings(self, linears: tuple[str, ...]) -> dict[str, Any]:
        """Return what each setting that is open to some modules means for each of them."""
        from olive.quant.sensitivity import settings

        shapes = {name: self.shapes[name] for name in linears}
        return settings(shapes, self.quantizer.format, BITS[self.quantizer.format])

    def _round(self, index: int, layer: Layer, plain: list[Batch]) -> None:
        """Begin copies of the probe rows for the units of a layer, and note the errors of all their settings."""
        from olive.quant.sensitivity import split_units

        q = self.quantizer
        own = {name: q.fixed(name, self.asked) for name in self.shapes if name.startswith(f"{layer.name}.")}
        for linears in split_units(layer.name, layer.sites, own):
            options = self._settings(linears)
            unit, fixed = linears[0], own[linears[0]]
            self.copies.linears[unit] = linears
            if fixed is not None or not options:
                continue
            errors, changed = self._errors(layer, linears, options)
            self.copies.errors[unit] = errors
            self.copies.rows[unit] = {}
            for probe, weights in changed.items():
                with _replaced(layer.block, weights):
                    self.copies.rows[unit][probe] = self._through(index, layer.block, plain)

    def _errors(
        self, layer: Layer, linears: tuple[str, ...], options: Mapping[str, Any]
    ) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
        """Return the error of every setting, and the weights as they are with those that are to be measured."""
        from olive.quant.affine import round_to_nearest
        from olive.quant.sensitivity import corners, parts, scale

        site_of = {name: site for site in layer.sites for name in site.linears}
        most = max(s.tokens for s in layer.statistics.values())
        rough, errors = dict.fromkeys(options, 0.0), dict.fromkeys(corners(options), 0.0)
        largest = {parts(setting)[0]: setting for setting in errors}  # groups grow within a width
        changed: dict[str, dict[str, Tensor]] = {s: {} for s in (largest.values() if self.thrifty else errors)}
        for linear in linears:
            name = linear.removeprefix(f"{layer.name}.")
            weight, statistics = layer.weight(name).float(), layer.statistics[site_of[name]]
            gram, share = statistics.mean_gram(), statistics.tokens / max(most, 1)  # an expert adds to few tokens
            for setting, groups in options.items():
                nearest = round_to_nearest(weight, *groups[linear][:2], symmetric=self.quantizer.symmetric)
                rough[setting] += share * _error(nearest, weight, gram)
            for setting in errors:
                rounded = self.quantizer.rounded(weight, gram, options[setting][linear])
                errors[setting] += share * _error(rounded, weight, gram)
                if setting in changed:
                    changed[setting][name] = rounded.dequantize()
        return scale(rough, errors), changed

    def _through(self, index: int, block: nn.Module, rows: list[Batch]) -> list[Batch]:
        from olive.runtime.layers import Batch

        out: list[Batch] = []
        self.layered.run_through(
            index, block, rows, lambda b, hidden: out.append(Batch(b.ids, hidden, b.arguments, b.device))
        )
        return out

    def _embed(self, few: Tensor) -> None:
        """Begin copies of the probe rows for the embeddings, in every setting: there is no error to read off. Those for
        an output head of its own are the plain rows."""
        embeddings = self.layered.model.get_input_embeddings()
        for table in self.tables:
            self.copies.linears[table] = (table,)
            if self.quantizer.fixed(table, self.asked) is not None:
                continue
            own = self.layered.model.get_submodule(table) is embeddings
            for setting, groups in self._settings((table,)).items():
                with self._table(table, groups[table]):
                    rows = self.layered.start(few, 1) if own else []
                self.copies.rows.setdefault(table, {})[setting] = rows

    @contextmanager
    def _table(self, name: str, group: Any) -> Iterator[None]:
        """Round the embeddings or the output head."""
        module: Any = self.layered.model.get_submodule(name)
        weight = module.weight.data
        rounded = self.quantizer.rounded(weight.float(), None, group)
        with _replaced(self.layered.model, {name: rounded.dequantize()}):
            yield

    def _units(self, plain: list[Batch]) -> list[Unit]:
        """Compare the copies with the plain rows."""
        from olive.quant.sensitivity import FLOAT, Unit, scale

        expected = []
        for batch in plain:
            p = self.layered.logits(batch).float().log_softmax(-1)
            expected.append((p.exp(), (p.exp() * p).sum(-1)))
        units = []
        for unit, linears in self.copies.linears.items():
            measured: dict[str, float] = {}
            options = self._settings(linears)
            for setting, rows in self.copies.rows.get(unit, {}).items():
                with self._table(unit, options[setting][unit]) if unit in self.tables else nullcontext():
                    measured[setting] = self._divergence(expected, rows or plain)
            if measured and not all(map(math.isfinite, measured.values())):
                raise PassError(f"{unit}: rounded alone, it gives NaN or infinity on the calibration data")
            found: Mapping[str, float] = measured
            if unit in self.copies.errors:
                found = scale(self.copies.errors[unit], measured)
            fixed = self.quantizer.fixed(unit, self.asked)
            units.append(Unit(unit, linears, {fixed: 0.0} if fixed else {**found, FLOAT: 0.0}))
        return units

    def _divergence(self, expected: list[tuple[Tensor, Tensor]], rows: list[Batch]) -> float:
        """Return the mean KL divergence of some rows from what is ``expected``: probabilities p and sums of p log p."""
        total = 0.0
        for (p, known), batch in zip(expected, rows, strict=True):
            logits = self.layered.logits(batch).float()
            total += float((known - (p * logits).sum(-1) + logits.logsumexp(-1)).clamp_min(0).double().mean())
        return total / len(rows)


def _error(rounded: QuantizedWeight, weight: Tensor, gram: Tensor) -> float:
    from olive.quant.layer import output_error

    return float(output_error(rounded.dequantize() - weight, gram))


@contextmanager
def _replaced(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let some linears or tables inside ``module`` have other weights."""
    inside: dict[str, Any] = {name: module.get_submodule(name) for name in weights}
    kept = {name: part.weight.data for name, part in inside.items()}
    try:
        for name, weight in weights.items():
            inside[name].weight.data = weight.to(kept[name].dtype)
        yield
    finally:
        for name, data in kept.items():
            inside[name].weight.data = data
