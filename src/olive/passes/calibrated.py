"""What quantizers share that look at calibration data, one decoder layer in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from olive.data.spec import DataSpec
from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import Quantizer, float_source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from olive.quant.affine import QuantizedWeight
    from olive.quant.formats.writer import CheckpointWriter
    from olive.quant.layer import Layer, Results, Rounding
    from olive.quant.sites import Site
    from olive.quant.statistics import SavedStatistics, StatisticsWriter
    from olive.runtime.layers import Batch, LayeredModel

CALIBRATION_WINDOWS = 128
TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens that are run through a layer at once."""


class Calibrated(
    Quantizer,
    sources=(
        "olive.passes.calibrated",
        "olive.passes.streamed",
        "olive.quant.layer",
        "olive.quant.refine",
        "olive.quant.columns",
        "olive.quant.kernels",
        "olive.quant.sites",
        "olive.quant.statistics",
        "olive.data",
    ),
    libraries=("tokenizers",),
):
    """Base of the quantizers that are fitted to data; not a pass by itself."""

    data: DataSpec | None = DataSpec()
    """Calibration data; by default a small shipped text."""
    refine: int = Field(0, ge=0)
    """Rounds of fitting each weight's scales, then its codes, anew to the layer's output (scale estimation and
    coordinate descent) after it is rounded."""
    statistics: str | None = None
    """Folder of statistics that an earlier run saved; they take the place of the data."""
    save_statistics: str | None = None
    """New folder for the statistics of the float model's inputs, which serve other algorithms and settings."""

    fitted: ClassVar[bool] = True
    sequential: ClassVar[bool] = False
    """Each layer sees what the layers before it give once they are quantized, so that it can make up for them."""
    targeted: ClassVar[bool] = False
    """The quantizer also sees what each layer of the float model gives."""
    tokens_per_step: ClassVar[int | None] = None
    """Tokens in a batch; None: as many as are quickest."""

    @property
    def looks(self) -> bool:
        """Whether the quantizer is fitted to data with these options."""
        return True

    @property
    def compares(self) -> bool:
        """Whether the quantizer looks at how a layer's inputs differ from the float model's."""
        return False

    def quantize(self, layer: Layer, groups: dict[str, Any]) -> Results:
        """Quantize one layer's linears; ``groups`` gives bits and group size by name, None where one stays float."""
        raise NotImplementedError

    def rounded_by(self, rounding: Rounding, weight: Tensor, gram: Tensor, group: Any) -> QuantizedWeight:
        """Return a weight as ``rounding`` and the rounds of fitting give it."""
        from olive.quant.refine import refine

        found = rounding(weight, gram, group.bits, group.group_size, symmetric=self.symmetric)
        return refine(weight, gram, found, self.refine)

    @model_validator(mode="after")
    def _one_source(self) -> Calibrated:
        if self.statistics is not None and self.data not in (None, DataSpec()):
            raise ValueError("statistics: they take the place of the data; give one of the two")
        if self.save_statistics is not None and (self.sequential or self.statistics is not None):
            why = "they are read already" if self.statistics else "this algorithm's inputs follow the quantized layers"
            raise ValueError(f"save_statistics: {why}; save them with awq or kquant")
        return self

    def folders(self) -> tuple[Path, ...]:
        return (Path(self.statistics),) if self.statistics is not None else ()

    def alone(self) -> Calibrated:
        return self.model_copy(update={"save_statistics": None})

    def missing(self) -> bool:
        return self.save_statistics is not None and not Path(self.save_statistics).exists()

    def write(self, model: Model, ctx: Context) -> Model:
        from olive.passes.streamed import write_rest
        from olive.quant.formats.writer import CheckpointWriter
        from olive.quant.statistics import SavedStatistics, StatisticsWriter

        source, meta = float_source(model)
        groups = self.groups(meta, ctx)
        layered, identity = open_layers(source, meta, ctx, exact=self.compares)
        known = SavedStatistics(Path(self.statistics), identity) if self.statistics is not None else None
        ids = known.ids if known is not None else calibration_windows(self.data or DataSpec(), model)
        ctx.note(calibration_rows=len(ids), calibration_tokens=ids.numel())
        # Layers that a killed run has finished are kept, unless their statistics are wanted too.
        scratch = ctx.scratch if self.save_statistics is None else None
        writer = CheckpointWriter(model.path, ctx.out, 4 * len(source.float_names), scratch=scratch)
        kept = StatisticsWriter(Path(self.save_statistics), identity, ids) if self.save_statistics else nullcontext()
        with kept as keeper:
            work = LayerByLayer(self, layered, source, writer, known, keeper, ctx)
            work.start(ids, rows_per_batch(ctx, ids, self.tokens_per_step))
            for index, name, block in layered.layers():
                own = {n.removeprefix(name + "."): g for n, g in groups.items() if n.startswith(name + ".")}
                work.layer(index, name, block, own)
                work.tick(index + 1)
        write_rest(source, writer, groups, layered.prefix, self, ctx.compute_device)
        writer.close(self.config(source.config, groups, meta))
        ctx.note(linears=work.facts())
        return Model("hf", ctx.out)


def calibration_windows(data: DataSpec, model: Model) -> Tensor:
    """Return the calibration rows of ``data``, int64 [rows, T]."""
    from olive.data.samples import windows
    from olive.quant.formats.checkpoint import longest, read_config
    from olive.runtime.torch_model import load_tokenizer

    limits = {
        "max_samples": data.max_samples or CALIBRATION_WINDOWS,
        "max_seq_len": min(data.max_seq_len, longest(read_config(model.path))),
    }
    return windows(data.model_copy(update=limits), load_tokenizer(model.path, model.trust_remote_code))


def gather(model: Model, ctx: Context, ids: Tensor, folder: Path) -> None:
    """Write the statistics of the float model's inputs on the rows ``ids`` into the new ``folder``."""
    from olive.quant.statistics import StatisticsWriter

    source, meta = float_source(model)
    layered, identity = open_layers(source, meta, ctx)
    with StatisticsWriter(folder, identity, ids) as keeper:
        for layer in watched_layers(layered, ids, source.dtype(), ctx):
            layer.save(keeper)


def watched_layers(layered: LayeredModel, ids: Tensor, stored: Any, ctx: Context) -> Iterator[Layer]:
    """Run the rows ``ids`` through a float model; yield each layer with its sites and their inputs' statistics.
    ``stored`` is the type that norms are kept in."""
    from olive.quant.layer import Layer

    probe = layered.start(ids[:1, :16], 1)[0]
    batches = layered.start(ids, rows_per_batch(ctx, ids))
    for index, name, block in layered.layers():
        layer = Layer(name, block, stored, symmetric=False)
        layer.look(partial(layered.apply, index, block, probe), layered.head_dim())
        with layer.watching() as count:
            layered.advance(index, block, batches, count)
        yield layer
        ctx.progress("statistics", index + 1, len(layered.blocks))


def open_layers(source: Any, meta: Any, ctx: Context, *, exact: bool = False) -> tuple[LayeredModel, dict[str, str]]:
    """Return the model, to be run layer by layer where the pass computes, and what its statistics depend on.
    ``exact``: in float32 everywhere, for what compares its runs."""
    import torch

    from olive.runtime.layers import LayeredModel

    devices, dtype = [ctx.compute_device], torch.float32
    if ctx.compute_device == "cuda":  # bfloat16 inputs are exact in TF32; the searches compare sums of thousands
        torch.set_float32_matmul_precision("high")
        devices, dtype = [f"cuda:{i}" for i in range(torch.cuda.device_count())], torch.bfloat16
    identity = {"model": ctx.input_key, "arithmetic": f"{dtype} on {ctx.compute_device}"}
    return LayeredModel(source, meta, dtype=torch.float32 if exact else dtype, devices=devices), identity


def rows_per_batch(ctx: Context, ids: Tensor, tokens: int | None = None) -> int:
    return max(1, (tokens or TOKENS[ctx.compute_device]) // ids.shape[1])


def split_alike(one: list[Batch], other: list[Batch]) -> None:
    """Halve batches until those at one place have the same rows: either list may hold some that did not fit whole."""
    at = 0
    while at < len(one):
        sizes = len(one[at].ids), len(other[at].ids)
        larger = one if sizes[0] > sizes[1] else other
        if sizes[0] == sizes[1]:
            at += 1
        else:
            larger[at : at + 1] = larger[at].halves()


class LayerByLayer:
    """A calibrated quantizer at work on one decoder layer after the other."""

    def __init__(
        self,
        quantizer: Calibrated,
        layered: LayeredModel,
        source: Any,
        writer: CheckpointWriter,
        known: SavedStatistics | None,
        keeper: StatisticsWriter | None,
        ctx: Context,
    ) -> None:
        self.quantizer, self.layered, self.source, self.writer = quantizer, layered, source, writer
        self.known, self.keeper, self.ctx = known, keeper, ctx
        self.sites: dict[Any, list[Site]] = {}
        self.batches: list[Batch] = []
        self.floats: list[Batch] = []

    def start(self, ids: Tensor, rows_per_batch: int) -> None:
        """Embed the calibration rows, as far as the quantizer needs them."""
        self.probe = self.layered.start(ids[:1, :16], 1)[0]
        if self.known is None or self.quantizer.sequential:
            self.batches = self.layered.start(ids, rows_per_batch)
        if self.quantizer.targeted or self.quantizer.compares:
            self.floats = self.layered.start(ids, rows_per_batch)

    def layer(self, index: int, name: str, block: nn.Module, groups: dict[str, Any]) -> None:
        """Quantize one layer and write it, or take it over from a killed run; then let the rows pass through it."""
        from olive.quant.layer import Layer, Rows

        began, sequential = perf_counter(), self.quantizer.sequential
        advance = partial(self.layered.advance, index, block)
        if name in self.writer.shards.marks:
            advance(self.floats)
            if sequential:
                self._recall(name, block, groups)
            advance(self.batches)
            return
        layer = Layer(name, block, self.source.dtype(), self.quantizer.symmetric)
        self._look(layer, index)
        source = block
        if self.quantizer.compares:
            source = copy.deepcopy(block)  # what is compared with when the weights change
            layer.compare = partial(self._compare, layer, index, source)
            layer.compare(layer.sites)
        else:
            advance(self.floats)
            self._watch(layer, index)
        if self.keeper is not None:
            layer.save(self.keeper)
        block.float()
        layer.check()
        if self.quantizer.targeted:
            split_alike(self.floats, self.batches)
        layer.rows = Rows(
            len(self.batches),
            lambda i: self.layered.apply(index, block, self.batches[i]),
            lambda i: self.floats[i].hidden,
            lambda share: self.tick(index + share),
            self.ctx.seed,
        )
        results = self.quantizer.quantize(layer, groups)
        for module, result in results.items():
            self.writer.quantized(f"{name}.{module}", result.weight, self.quantizer.format)
        for parameter, tensor in block.named_parameters():
            if parameter.removesuffix(".weight") not in results:
                full = f"{name}.{parameter}"
                self.writer.tensor(full, tensor.to(self.source.stored_dtype(full)))
        seconds = round((perf_counter() - began) / max(len(results), 1), 4)
        self.writer.shards.mark(name, {f"{name}.{n}": r.facts() | {"seconds": seconds} for n, r in results.items()})
        if sequential:
            if source is not block:
                self.layered.advance(index, source, self.floats)
            layer.put(results, self.layered.dtype)
            advance(self.batches)

    def tick(self, layers: float) -> None:
        """Tell how many layers are done."""
        self.ctx.progress("quantize", round(100 * layers), 100 * len(self.layered.blocks))

    def _look(self, layer: Layer, index: int) -> None:
        """Find a layer's sites, or take those of an earlier one that is made alike."""
        made = (type(layer.block), *((name, tuple(p.shape)) for name, p in layer.block.named_parameters()))
        if made not in self.sites:
            layer.look(partial(self.layered.apply, index, layer.block, self.probe), self.layered.head_dim())
            self.sites[made] = layer.sites
        layer.sites = self.sites[made]

    def _watch(self, layer: Layer, index: int) -> None:
        """Gather the statistics of a layer's inputs, or take those that are known."""
        if self.known is not None and not self.quantizer.sequential:
            device = self.layered.device
            layer.statistics = {site: self.known.get(layer.input_name(site), device) for site in layer.sites}
        else:
            run = self.layered.run_through if self.quantizer.sequential else self.layered.advance
            with layer.watching() as count:
                run(index, layer.block, self.batches, count)

    def _compare(self, layer: Layer, index: int, source: nn.Module, sites: list[Site]) -> None:
        """Gather the statistics of some inputs of a layer, compared with those in ``source``, the layer as it was."""
        split_alike(self.floats, self.batches)
        with layer.comparing(source, sites) as (expect, count):
            for theirs, own in zip(self.floats, self.batches, strict=True):  # the inputs of one pair are in memory
                self.layered.run_through(index, source, [theirs], expect)
                self.layered.run_through(index, layer.block, [own], count)

    def _recall(self, name: str, block: nn.Module, groups: dict[str, Any]) -> None:
        """Give a layer the weights that a killed run wrote for it."""
        from olive.quant.formats import FORMATS

        shards, method = self.writer.shards, FORMATS[self.quantizer.format]
        written = set(shards.names())
        for parameter, value in block.named_parameters():
            full, module = f"{name}.{parameter}", parameter.removesuffix(".weight")
            if full in written:
                value.copy_(shards.read(full))
            else:
                names = {part: f"{name}.{module}.{part}" for part in method.PARTS}
                parts = {part: shards.read(name) for part, name in names.items() if name in written}
                group, linear = groups[module], f"{name}.{module}"
                settings = method.settings(group.bits, group.group_size, self.quantizer.symmetric, {linear: group})
                weight = method.unpack(parts, method.module_settings(settings, linear), linear)
                value.copy_(weight.dequantize())

    def facts(self) -> dict[str, Any]:
        """Return what the report tells of each linear layer."""
        return {linear: facts for layer in self.writer.shards.marks.values() for linear, facts in layer.items()}
