"""AWQ's search of input scales on the Gram matrix, as Olive does it, against running the layer for every candidate.

    python benchmarks/awq_forward.py MODEL --calibration books.txt --text other.txt --windows 16 \\
        --setting group_size=128 --setting group_size=32

The classical search (Lin et al., arXiv 2306.00978, 2023) puts a candidate's rounded weights into the layer, runs it on
all calibration rows and takes the scale whose output is nearest to the float layer's (mean squared error). Both
searches try the same candidates on the same rows, and clip and round alike afterwards. One markdown row for each
search and setting; settings are options of awq. Seconds are those of the search alone: the statistics that ours reads
are gathered on the way through the layers, and clipping needs them in either case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality import _measure, _windows
from torch import Tensor

from olive.passes.awq import Awq
from olive.quant import awq
from olive.quant.affine import round_to_nearest
from olive.quant.layer import Layer
from olive.quant.sites import Site
from olive.runtime.torch_model import load, load_tokenizer

Search = Callable[[Layer, Mapping[str, Any]], None]


def main() -> None:
    """Quantize with both searches and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--setting", action="append", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=16)
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    reference = load(Path(args.model), device=args.device)
    ids = _windows(load_tokenizer(Path(args.model)), Path(args.text), args.tokens)
    print(
        f"{Path(args.model).name} on {Path(args.text).name}, {ids.numel()} tokens; {args.windows} calibration windows"
    )
    print("| setting | search | perplexity | KL divergence | top-1 | seconds of the search | ratio |")
    print("|---|---|---|---|---|---|---|")
    # The layers get their float inputs in both cases. Sequential work keeps them until the layer is done.
    Awq.sequential = True
    Layer.put = lambda *_: None  # type: ignore[method-assign]
    searches: dict[str, Search] = {"Gram matrix": awq.scale_inputs, "layer's forward": scale_by_running}
    for setting in args.setting:
        first = 0.0
        for name, search in searches.items():
            timed = Timed(search)
            awq.scale_inputs = timed
            row = _measure(args, f"awq,{setting}", 0, reference, {"": ids})[""]
            first = first or timed.seconds
            figures = f"{row['perplexity']:.3f} | {row['kl']:.5f} | {row['top1']:.4f}"
            print(f"| {setting} | {name} | {figures} | {timed.seconds:.2f} | {timed.seconds / first:.0f} |", flush=True)


class Timed:
    """A search and the seconds that it took."""

    def __init__(self, search: Search) -> None:
        self.search, self.seconds = search, 0.0

    def __call__(self, layer: Layer, groups: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        self.search(layer, groups)
        self.seconds += time.perf_counter() - began


@torch.no_grad()
def scale_by_running(layer: Layer, groups: Mapping[str, Any]) -> None:
    """Scale every input that folds by the candidate with which the layer's output stays nearest to what it was."""
    assert layer.rows is not None
    rows = layer.rows
    wanted = [rows.run(i).float() for i in range(rows.batches)]
    for site in layer.sites:
        read = [name for name in site.linears if groups.get(name)]
        if site.fold is None or not read:
            continue
        group = groups[read[0]]
        weights = {name: layer.weight(name).clone() for name in read}
        best, best_error = None, float("inf")
        for scale in candidates(layer, site, list(weights.values())):
            for name, weight in weights.items():
                rounded = round_to_nearest(weight * scale, group.bits, group.group_size, symmetric=layer.symmetric)
                layer.weight(name).copy_(rounded.dequantize() / scale)
            outputs = (rows.run(i).float() for i in range(rows.batches))
            error = float(sum((out - want).square().mean() for out, want in zip(outputs, wanted, strict=True)))
            if error < best_error:
                best, best_error = scale, error
        for name, weight in weights.items():
            layer.weight(name).copy_(weight)
        assert best is not None
        layer.scale(site, best)


def candidates(layer: Layer, site: Site, weights: list[Tensor]) -> list[Tensor]:
    """Return the scales [K] that our search tries, as it hands them over to be made foldable, and s = 1."""
    assert site.fold is not None
    fold, statistics = site.fold, layer.statistics[site]
    tried = [torch.ones(statistics.k)]

    def foldable(scale: Tensor) -> Tensor:
        tried.append(fold.channel_scale(scale))
        return tried[-1]

    rounded = partial(round_to_nearest, bits=4, group_size=statistics.k, symmetric=True)
    awq.search_scale(weights, statistics, rounded, foldable)
    return tried


if __name__ == "__main__":
    main()
