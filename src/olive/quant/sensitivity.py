"""Units that get one setting each, what each setting would do to the model, and what it takes to store.

The divergence of a model from its source is, for small changes of its weights, about a sum over units; and for one
unit it grows as the error that rounding makes in the unit's output, tr(dW G dW^T) for a change dW of its weights and
the Gram matrix G of its inputs. So the divergence is measured for the smallest and the largest groups of each width
(the corners), rounded as the quantizer does it, and read off the error for the others: that of rounding to nearest,
whose ratio to the quantizer's own changes little.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from olive.quant.affine import QuantizedWeight
from olive.quant.formats import FORMATS
from olive.quant.formats.layout import Grouping
from olive.quant.formats.writer import choose_groups
from olive.quant.sites import Site

GROUP_SIZES = (32, 64, 128, 256)
FLOAT = "float"
RUNTIME_BITS_PER_GROUP = 64
"""ONNX Runtime's MatMulNBits keeps a float32 scale per group, and one more float32 for its zero point."""
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Unit:
    """Linear layers (or a table) that get one setting together."""

    name: str
    linears: tuple[str, ...]
    divergence: Mapping[str, float]
    """What each setting adds to the KL divergence, in nats per token. A setting is ``bits:group_size`` or ``float``."""


def split_units(name: str, sites: Sequence[Site], setting: Mapping[str, str | None]) -> Iterator[tuple[str, ...]]:
    """Yield the linears of a layer ``name`` that belong together, by their full names: those that read one input, and
    all experts of a mixture. ``setting``: for each linear the one it is to have, None where it is to be chosen."""
    together: dict[tuple[str, str | None], list[str]] = {}
    for site in sites:
        for linear in site.linears:
            full = f"{name}.{linear}"
            if full not in setting:
                continue  # a router
            numbered = re.match(r"(.+?)\.\d+\.", linear)
            together.setdefault((numbered[1] if numbered else site.linears[0], setting[full]), []).append(full)
    yield from map(tuple, together.values())


def settings(shapes: Shapes, method: str, bits: Sequence[int]) -> dict[str, dict[str, Grouping]]:
    """Return every setting that the layout ``method`` holds for all of some modules [N, K], with what it means for
    each of them. Where a group size does not fit, the next smaller one that does counts, once."""
    found: dict[str, dict[str, Grouping]] = {}
    for b in bits:
        for size in GROUP_SIZES:
            groups = choose_groups(shapes, method, b, size)
            whole = {name: group for name, group in groups.items() if group is not None}
            if len(whole) == len(shapes) and whole not in found.values():
                found[f"{b}:{size}"] = whole
    return found


def corners(options: Iterable[str]) -> list[str]:
    """Return the settings whose error is worth the algorithm's own rounding: of each width below 8 bits, the smallest
    and the largest groups. What 8 bits add is so little that their errors need not be exact."""
    sizes: dict[int, list[int]] = {}
    for bits, size in map(parts, options):
        sizes.setdefault(bits, []).append(size)
    low = [bits for bits in sizes if bits < 8] or list(sizes)
    return [f"{bits}:{size}" for bits in low for size in dict.fromkeys((min(sizes[bits]), max(sizes[bits])))]


def parts(setting: str) -> tuple[int, int]:
    """Return a setting's bits and group size."""
    bits, size = setting.split(":")
    return int(bits), int(size)


def scale(rough: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    """Return a figure for each setting from a proportional one, ``rough``, and the true one that is ``known`` for some.

    The ratio of the two changes little. Between the group sizes of one width it is interpolated in their logarithms;
    for a width of which nothing is known, the nearest counts.
    """
    tiny = 1e-30
    ratios: dict[int, list[tuple[float, float]]] = {}
    for setting, value in known.items():
        bits, size = parts(setting)
        ratios.setdefault(bits, []).append((math.log2(size), math.log((value + tiny) / (rough[setting] + tiny))))
    found = {}
    for setting, value in rough.items():
        bits, size = parts(setting)
        points = sorted(min(ratios.items(), key=lambda item: abs(item[0] - bits))[1])
        (x0, y0), (x1, y1) = points[0], points[-1]
        share = min(max((math.log2(size) - x0) / (x1 - x0), 0), 1) if x1 > x0 else 0
        found[setting] = value * math.exp(y0 + (y1 - y0) * share)
    return found


@lru_cache(maxsize=4096)
def stored_bytes(method: str, n: int, k: int, group: Grouping, symmetric: bool) -> int:
    """Return the bytes of a weight's tensors [N, K] in a layout, from their shapes alone."""
    groups = (n, k // group.group_size)
    weight = QuantizedWeight(
        codes=torch.empty(n, k, dtype=torch.uint8, device="meta"),
        scale=torch.empty(groups, dtype=torch.float16, device="meta"),
        zero_point=torch.empty(groups, dtype=torch.uint8, device="meta"),
        bits=group.bits,
        symmetric=symmetric,
    )
    return sum(part.nbytes for part in FORMATS[method].pack(weight).values())


def runtime_bytes(n: int, k: int, group: Grouping | None) -> int:
    """Return the bytes of a weight [N, K] in the memory of ONNX Runtime on a CPU; codes of 3 bits lie in 4."""
    if group is None:
        return 4 * n * k
    bits = 4 if group.bits == 3 else group.bits
    return n * (k * bits + k // group.group_size * RUNTIME_BITS_PER_GROUP) // 8
