"""Scale estimation against numpy's least squares, coordinate descent against all code vectors there are."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from olive.quant import columns
from olive.quant import refine as refinement
from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.gptq import gptq
from olive.quant.layer import output_error
from olive.quant.refine import descend, refine, refit_scale


def problem(k: int, n: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a weight, correlated inputs and their Gram matrix."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, k, generator=generator) @ (torch.randn(k, k, generator=generator) + 2 * torch.eye(k))
    return torch.randn(n, k, generator=generator), x, x.t() @ x / tokens


def row_errors(weight: torch.Tensor, gram: torch.Tensor, found: QuantizedWeight) -> torch.Tensor:
    change = (found.dequantize() - weight).double()
    return ((change @ gram.double()) * change).sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_those_of_least_squares_on_the_inputs(symmetric: bool) -> None:
    weight, x, gram = problem(64, 6)
    before = round_to_nearest(weight, 4, 16, symmetric=symmetric)
    found = refit_scale(weight, gram, before)
    assert torch.equal(found.codes, before.codes)
    assert torch.equal(found.zero_point, before.zero_point)
    for n in range(6):
        levels = (before.codes[n].double() - before.zero_point[n].double().repeat_interleave(16)).numpy()
        by_group = np.zeros((64, 4))
        for k in range(64):
            by_group[k, k // 16] = levels[k]
        best = np.linalg.lstsq(x.double().numpy() @ by_group, (x @ weight[n]).double().numpy(), rcond=None)[0]
        assert found.scale[n].double().numpy() == pytest.approx(best, rel=2e-3)  # scales are stored in float16
    assert (row_errors(weight, gram, found) < row_errors(weight, gram, before)).all()


def test_no_scale_changes_its_sign_or_vanishes() -> None:
    weight, _, gram = problem(32, 8)
    before = round_to_nearest(weight, 4, 16, symmetric=True)
    against = refit_scale(-weight, gram, before)  # the best scales are the negative ones
    assert torch.equal(against.scale, before.scale)
    silent = replace(before, codes=before.zero_point.repeat_interleave(16, dim=1))  # all levels 0: nothing to fit
    assert torch.equal(refit_scale(weight, gram, silent).scale, before.scale)


def test_tiles_of_rows_give_the_same_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, gram = problem(32, 7)
    before = round_to_nearest(weight, 3, 16, symmetric=False)
    whole = refit_scale(weight, gram, before)
    monkeypatch.setattr(refinement, "TILE", 64)
    tiled = refit_scale(weight, gram, before)
    assert torch.allclose(whole.scale, tiled.scale, rtol=2e-3)  # a last bit of float16 may go either way


@pytest.mark.parametrize("k", [4, 6])
def test_descent_ends_where_no_single_code_can_be_bettered_and_mostly_at_the_best_of_all(k: int) -> None:
    weight, _, gram = problem(k, 20)
    before = round_to_nearest(weight, 2, k, symmetric=False)
    found = descend(weight, gram, before, sweeps=10)
    every = torch.tensor(list(product(range(4), repeat=k)), dtype=torch.uint8)  # [4^K, K]
    errors, optimal = row_errors(weight, gram, found), 0
    for n in range(20):
        one = QuantizedWeight(every, before.scale[n].expand(len(every), 1), before.zero_point[n].expand(len(every), 1),
                              2, False)  # fmt: skip
        tried = row_errors(weight[n], gram, one)
        slack = errors[n] * (1 + 1e-5)
        apart = (every != found.codes[n]).sum(1)
        assert (tried[apart == 1] >= errors[n] * (1 - 1e-5)).all()
        optimal += bool(tried.min() >= errors[n] - (slack - errors[n]))
    assert optimal >= 10


def test_descent_is_the_slow_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "FEW", 5)  # blocks that do not divide K
    weight, _, gram = problem(32, 4)
    before = round_to_nearest(weight, 3, 16, symmetric=False)
    found = descend(weight, gram, before, sweeps=2)
    g, scale = gram.double(), before.scale.double().repeat_interleave(16, dim=1)
    zero = before.zero_point.double().repeat_interleave(16, dim=1)
    codes = before.codes.double()
    for _ in range(2):
        for j in range(32):
            tried = []
            for code in range(8):
                trial = codes.clone()
                trial[:, j] = code
                change = (trial - zero) * scale - weight.double()
                tried.append(((change @ g) * change).sum(-1))
            codes[:, j] = torch.stack(tried).argmin(0).double()
    assert torch.equal(found.codes.double(), codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_round_lowers_the_output_error_further_below_gptq(symmetric: bool) -> None:
    weight, _, gram = problem(128, 32)
    found = gptq(weight, gram, round_to_nearest(weight, 3, 32, symmetric=symmetric))
    last = start = row_errors(weight, gram, found)
    for _ in range(3):
        found = refine(weight, gram, found, rounds=1)
        errors = row_errors(weight, gram, found)
        assert (errors <= last * (1 + 1e-5)).all()  # compared in float32
        last = errors
    assert last.sum() < 0.9 * start.sum()
    assert output_error(found.dequantize() - weight, gram).item() == pytest.approx(last.sum().item(), rel=1e-3)


def test_silent_channels_and_singular_matrices_are_survived() -> None:
    weight, _, gram = problem(48, 6)
    gram[5], gram[:, 5] = 0, 0
    before = round_to_nearest(weight, 4, 16, symmetric=False)
    for matrix in (gram, torch.ones(48, 48), torch.zeros(48, 48)):
        found = refine(weight, matrix, before, rounds=2)
        assert torch.isfinite(found.dequantize()).all()
        assert (row_errors(weight, matrix, found) <= row_errors(weight, matrix, before) * (1 + 1e-5)).all()
    assert torch.equal(refine(weight, gram, before, rounds=2).codes[:, 5], before.codes[:, 5])
    assert torch.equal(refine(weight, torch.zeros(48, 48), before, rounds=1).codes, before.codes)
