"""Errors to divergences, and what settings take to store."""

from __future__ import annotations

import math

import pytest
import torch

from olive.quant.affine import round_to_nearest
from olive.quant.formats import FORMATS
from olive.quant.formats.layout import Grouping
from olive.quant.sensitivity import corners, runtime_bytes, scale, settings, split_units, stored_bytes
from olive.quant.sites import Site


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "olive"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_those_that_are_written(method: str, bits: int, symmetric: bool) -> None:
    if bits not in FORMATS[method].BITS:
        pytest.skip("the layout does not hold these bits")
    weight = round_to_nearest(torch.randn(64, 128), bits, 32, symmetric=symmetric)
    written = sum(part.nbytes for part in FORMATS[method].pack(weight).values())
    assert stored_bytes(method, 64, 128, Grouping(bits, 32), symmetric) == written


def test_bytes_in_memory_are_those_of_the_runtime() -> None:
    n, k = 64, 128
    assert runtime_bytes(n, k, Grouping(4, 128)) == n * k // 2 + n * 8  # 4.5 bits per weight
    assert runtime_bytes(n, k, Grouping(3, 128)) == runtime_bytes(n, k, Grouping(4, 128))
    assert runtime_bytes(n, k, Grouping(2, 32)) == n * k // 4 + n * 4 * 8
    assert runtime_bytes(n, k, None) == 4 * n * k


def test_settings_are_those_that_fit_once_each() -> None:
    found = settings({"a": (64, 64), "b": (32, 64)}, "gptq", (2, 4))
    assert list(found) == ["2:32", "2:64", "4:32", "4:64"]  # 128 would be 64 again
    assert found["4:64"] == {"a": Grouping(4, 64), "b": Grouping(4, 64)}
    assert settings({"a": (64, 36)}, "gptq", (4,)) == {}


def test_units_are_what_reads_one_input_and_all_experts() -> None:
    sites = [
        Site(("attn.q", "attn.k", "attn.v"), None),
        Site(("attn.o",), None),
        Site(("mlp.experts.0.gate", "mlp.experts.0.up"), None),
        Site(("mlp.experts.0.down",), None),
        Site(("mlp.experts.1.gate", "mlp.experts.1.up"), None),
        Site(("mlp.router",), None),
    ]
    names = [name for site in sites[:-1] for name in site.linears]
    own = dict.fromkeys((f"layer.{name}" for name in names), None) | {"layer.attn.k": "8:32"}
    assert list(split_units("layer", sites, own)) == [
        ("layer.attn.q", "layer.attn.v"),
        ("layer.attn.k",),
        ("layer.attn.o",),
        tuple(f"layer.mlp.experts.{n}" for n in ("0.gate", "0.up", "0.down", "1.gate", "1.up")),
    ]


def test_the_other_settings_keep_the_ratio_of_the_corners() -> None:
    rough = {f"{bits}:{size}": 4.0**-bits * size for bits in (2, 4, 8) for size in (32, 64, 128)}
    ratio = {"2:32": 0.5, "2:128": 0.25, "4:32": 0.8, "4:128": 0.8}
    assert corners(rough) == list(ratio)
    found = scale(rough, {name: rough[name] * share for name, share in ratio.items()})
    expected = ratio | {"2:64": math.sqrt(0.5 * 0.25), "4:64": 0.8, "8:32": 0.8, "8:64": 0.8, "8:128": 0.8}
    assert {name: found[name] / rough[name] for name in rough} == pytest.approx(expected)


def test_corners_of_one_group_size_and_of_eight_bits_alone() -> None:
    assert corners(["2:32", "4:32", "8:32"]) == ["2:32", "4:32"]
    assert corners(["8:32", "8:64", "8:128"]) == ["8:32", "8:128"]
