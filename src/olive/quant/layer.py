"""One decoder layer under quantization: its sites, the statistics of their inputs, and what can be done to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from olive.errors import PassError
from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.kquant import kquant
from olive.quant.refine import refine
from olive.quant.sites import Site, find_sites
from olive.quant.statistics import InputStatistics, StatisticsWriter
from olive.quant.tune import tune


@dataclass(frozen=True)
class Result:
    """One linear layer's integers and how it came to them."""

    weight: QuantizedWeight
    before: float
    """Relative output error ||dW x||^2 / ||W x||^2 of rounding to nearest; nan where no input was seen."""
    after: float
    """The same of ``weight``."""
    fallback: str | None = None
    """Why another algorithm was used than the one asked for."""

    def facts(self) -> dict[str, Any]:
        """Return what the report tells."""
        found: dict[str, Any] = {"bits": self.weight.bits, "group_size": self.weight.group_size}
        found |= {"error_rounding": round(self.before, 6), "error": round(self.after, 6)}
        return found | ({"fallback": self.fallback} if self.fallback else {})


Results = dict[str, Result]


def output_error(change: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output change of a weight change: tr(dW G dW^T) for dW [N, K], G [K, K]."""
    return ((change @ gram) * change).sum()


class Rounding(Protocol):
    """A way to quantize one weight [N, K], row by row, given the Gram matrix [K, K] of its input."""

    def __call__(
        self, weight: Tensor, gram: Tensor, bits: int, group_size: int, *, symmetric: bool
    ) -> QuantizedWeight: ...


def few_tokens(k: int) -> int:
    """Return how many tokens are too few to fit K input channels to."""
    return max(32, min(k // 8, 512))


@dataclass(frozen=True)
class Rows:
    """The calibration rows as a layer sees them, in batches."""

    batches: int
    run: Callable[[int], Tensor]
    """Runs the layer on a batch, by its number: [B, T, K]."""
    target: Callable[[int], Tensor]
    """What the float model's layer gives for a batch [B, T, K]."""
    tick: Callable[[float], None]
    """Told the share of the layer's work that is done."""
    seed: int


class Layer:
    """A decoder layer. Its forward runs in its own type; all arithmetic on its weights is float32."""

    def __init__(self, name: str, block: nn.Module, stored: torch.dtype, symmetric: bool) -> None:
        """``stored``: the type that norms are kept in; ``symmetric``: codes are centred on zero."""
        self.name, self.block, self.stored, self.symmetric = name, block, stored, symmetric
        self.sites: list[Site] = []
        self.statistics: dict[Site, InputStatistics] = {}
        self.rows: Rows | None = None
        self.compared: list[Site] = []
        """Sites whose inputs can be compared with the float model's, in the order in which they run."""
        self.compare: Callable[[list[Site]], None] | None = None
        """Gathers the statistics of some sites anew, with that comparison."""

    def look(self, probe: Callable[[], Tensor], head_dim: int | None) -> None:
        """Find the sites; ``probe`` runs the layer on a small input."""
        with torch.no_grad():
            self.sites = find_sites(self.block, probe, head_dim)

    @contextmanager
    def watching(self) -> Iterator[Callable[..., None]]:
        """Gather the statistics of every site's input. Yields what has to be called after each run of the layer that
        counts: a run that fails half-way does not."""
        with self._inputs(self.block, self.sites) as pending:
            yield partial(self._count, pending)

    @contextmanager
    def comparing(
        self, source: nn.Module, sites: list[Site]
    ) -> Iterator[tuple[Callable[..., None], Callable[..., None]]]:
        """Gather the same for some ``sites``, and how their inputs differ from those in ``source``, the float model's
        layer. Yields what has to be called after each run of ``source``, and then after each run of this layer on the
        same rows.

        Experts are not compared: the two send them different tokens.
        """
        expected: dict[Site, Tensor] = {}
        with self._inputs(source, sites) as theirs, self._inputs(self.block, sites) as pending:

            def expect(_: Any, out: Tensor) -> None:
                for site, x in _whole(theirs, out).items():
                    expected[site] = torch.cat([expected[site], x]) if site in expected else x
                theirs.clear()

            def count(_: Any, out: Tensor) -> None:
                seen = _whole(pending, out)
                self.compared = list(seen)
                for site in list(expected):
                    wanted = expected.pop(site)
                    if site in seen:
                        self.statistics[site].compare(seen[site], wanted[: len(seen[site])])
                        if len(wanted) > len(seen[site]):  # this was a part of a batch that did not fit
                            expected[site] = wanted[len(seen[site]) :]
                self._count(pending)

            yield expect, count

    def _count(self, pending: dict[Site, Tensor], *_: Any) -> None:
        for site in list(pending):
            self.statistics[site].add(pending.pop(site))

    @contextmanager
    def _inputs(self, block: nn.Module, sites: list[Site]) -> Iterator[dict[Site, Tensor]]:
        """Yield what each site's input was in the last run of ``block``, as they ran; forget the statistics."""
        pending: dict[Site, Tensor] = {}
        hooks = [block.register_forward_pre_hook(lambda *_: pending.clear())]
        for site in sites:
            first: Any = block.get_submodule(site.linears[0])
            self.statistics[site] = InputStatistics(first.in_features, first.weight.device)
            hooks.append(first.register_forward_pre_hook(_keep(pending, site)))
        try:
            yield pending
        finally:
            for hook in hooks:
                hook.remove()

    def input_name(self, site: Site) -> str:
        """Name a site's input by the first linear that reads it."""
        return f"{self.name}.{site.linears[0]}"

    def save(self, writer: StatisticsWriter) -> None:
        """Keep the statistics on disk."""
        for site, statistics in self.statistics.items():
            writer.add(self.input_name(site), statistics)

    def check(self) -> None:
        """Refuse weights or inputs that hold NaN or infinity."""
        for site in self.sites:
            for name in site.linears:
                if not bool(torch.isfinite(self.weight(name)).all()):
                    raise PassError(f"{self.name}.{name}: its weight holds NaN or infinity; mend the checkpoint")
            if not bool(torch.isfinite(self.statistics[site].sums()[1]).all()):
                raise PassError(
                    f"{self.input_name(site)}: its input holds NaN or infinity on the calibration data; the "
                    "model overflows there: check it in float32, or leave the data out that does it"
                )

    def weight(self, name: str) -> Tensor:
        """Return a linear's weight [N, K]."""
        linear: Any = self.block.get_submodule(name)
        return linear.weight.data

    def scale(self, site: Site, scale: Tensor) -> None:
        """Multiply the columns of a site's readers by ``scale`` [K] and divide their input by it."""
        assert site.fold is not None
        applied = site.fold.apply(self.block, scale, self.stored)
        for name in site.linears:
            self.weight(name).mul_(applied)
        self.statistics[site].rescale(applied)

    def compensate(self, groups: Mapping[str, Any], compensation: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Change the weights that ``groups`` quantizes so that they make up for how their inputs differ from the float
        model's. ``compensation`` maps a weight [N, K], the Gram matrix [K, K] and the mean of (x' - x) x^T [K, K], with
        x' the float model's input, to the new weight.

        A change brings the later inputs of the layer nearer to the float model's, so they are compared anew: made up
        for twice, a difference would come back with the other sign.
        """
        assert self.compare is not None
        order, stale = self.compared, False
        for i, site in enumerate(order):
            names = [name for name in site.linears if groups.get(name)]
            if stale and names:
                self.compare([later for later in self.sites if later not in order[:i]])
                stale = False
            statistics = self.statistics[site]
            cross = statistics.mean_cross()
            if cross is not None and statistics.tokens >= few_tokens(statistics.k):
                for weight in map(self.weight, names):
                    weight.copy_(compensation(weight, statistics.mean_gram(), cross))
                    stale = True
        if stale and len(order) < len(self.sites):
            self.compare([site for site in self.sites if site not in order])

    def round(self, groups: Mapping[str, Any], rounding: Rounding, refining: int = 0) -> Results:
        """Quantize every linear that ``groups`` gives bits and a group size; what reads one input goes together.
        ``refining``: rounds of fitting scales and codes anew."""
        results: Results = {}
        for site in self.sites:
            together: dict[Any, list[str]] = {}
            for name in site.linears:
                if groups.get(name):
                    together.setdefault(groups[name], []).append(name)
            for group, names in together.items():
                results |= self._round(names, site, group, rounding, refining)
        for name in (n for n, group in groups.items() if group and n not in results):
            weight = kquant(self.weight(name), groups[name].bits, groups[name].group_size, symmetric=self.symmetric)
            results[name] = Result(weight, float("nan"), float("nan"), "never ran")
        return results

    def _round(self, names: list[str], site: Site, group: Any, rounding: Rounding, refining: int) -> Results:
        statistics, settings = self.statistics[site], (group.bits, group.group_size)
        gram, weights = statistics.mean_gram(), [self.weight(name) for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        starved = statistics.tokens < few_tokens(statistics.k)
        if starved:
            importance = gram.diagonal() if statistics.tokens else None
            chosen = kquant(weight, *settings, symmetric=self.symmetric, importance=importance)
        else:
            chosen = rounding(weight, gram, *settings, symmetric=self.symmetric)
            chosen = refine(weight, gram, chosen, refining)
        results: Results = {}
        for name, own, part in zip(names, weights, split(chosen, [len(w) for w in weights]), strict=True):
            size = output_error(own, gram).clamp(min=1e-12)
            plain = round_to_nearest(own, *settings, symmetric=self.symmetric)
            errors = [float(output_error(q.dequantize() - own, gram) / size) for q in (plain, part)]
            fallback = f"only {statistics.tokens} tokens came by: rounded to searched ranges" if starved else None
            results[name] = Result(part, errors[0], errors[1], fallback)
        return results

    def tune(self, start: Results, iterations: int, rate: float) -> Results:
        """Tune rounding and scales of all linears together; see :mod:`olive.quant.tune`."""
        assert self.rows is not None
        weights = tune(
            self.block,
            {name: result.weight for name, result in start.items()},
            self.rows,
            iterations=iterations,
            rate=rate,
        )
        gram_of = {name: self.statistics[site].mean_gram() for site in self.sites for name in site.linears}
        results: Results = {}
        for name, weight in weights.items():
            error = start[name].after
            if name in gram_of:
                own = self.weight(name)
                size = output_error(own, gram_of[name]).clamp(min=1e-12)
                error = float(output_error(weight.dequantize() - own, gram_of[name]) / size)
            results[name] = replace(start[name], weight=weight, after=error)
        return results

    def put(self, results: Results, dtype: torch.dtype) -> None:
        """Let the layer compute with its rounded weights, in ``dtype``."""
        for name, result in results.items():
            self.weight(name).copy_(result.weight.dequantize())
        self.block.to(dtype)


def _whole(pending: Mapping[Site, Tensor], out: Tensor) -> dict[Site, Tensor]:
    """Return the inputs that hold every token of the layer's output [B, T, K], as [B * T, K]."""
    tokens = out.shape[:-1].numel()
    return {site: x.flatten(0, -2) for site, x in pending.items() if x.shape[:-1].numel() == tokens}


def _keep(pending: dict[Site, Tensor], site: Site) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        pending[site] = args[0]

    return hook


def split(weight: QuantizedWeight, rows: list[int]) -> list[QuantizedWeight]:
    """Cut a weight into parts of so many rows each."""
    parts = zip(weight.codes.split(rows), weight.scale.split(rows), weight.zero_point.split(rows), strict=True)
    return [QuantizedWeight(codes, scale, zeros, weight.bits, weight.symmetric) for codes, scale, zeros in parts]
