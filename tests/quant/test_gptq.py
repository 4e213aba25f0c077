"""GPTQ against a slow version that solves for the best update of all remaining weights after each column."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from olive.quant import columns
from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.columns import Columns, round_run
from olive.quant.gptq import compensate, gptq, lower_factor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(k: int = 48, n: int = 12, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Draw a weight and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x *= torch.linspace(0.2, 3, k)[torch.randperm(k, generator=generator)]
    return torch.randn(n, k, generator=generator), x.t() @ x / len(x)


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    gram = gram.double()
    return gram + torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean() * damping


def oracle(weight: Tensor, gram: Tensor, ranges: QuantizedWeight) -> Tensor:
    """After each column, solve the least-squares problem of the columns left, in float64."""
    w, h = weight.double().clone(), damped(gram)
    left = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    codes = torch.zeros_like(w)
    while left:
        i = left.pop(0)
        group = i // ranges.group_size
        scale, zero = ranges.scale[:, group].double(), ranges.zero_point[:, group].double()
        codes[:, i] = (w[:, i] / scale + zero).round().clamp(0, 15)
        error = w[:, i] - (codes[:, i] - zero) * scale
        if left:
            w[:, left] += error[:, None] * torch.linalg.solve(h[left][:, left], h[left, i])
    return codes


def output_error(change: Tensor, gram: Tensor) -> float:
    return ((change @ gram) * change).sum().item()


# A whole number of runs of 16 columns, a part of one at the end, and less than one.
@pytest.mark.parametrize(("k", "group_size"), [(48, 16), (40, 8), (7, 7)])
def test_codes_are_those_of_the_slow_version(k: int, group_size: int) -> None:
    weight, gram = problem(k)
    ranges = round_to_nearest(weight, 4, group_size, symmetric=False)
    found = gptq(weight, gram, ranges)
    expected = oracle(weight, gram, ranges)
    # A code near a rounding boundary may fall either way in float32, and then moves its row's later codes.
    assert (found.codes == expected).float().mean() > 0.97
    assert (found.codes == expected).all(dim=1).float().mean() > 0.7
    slow = replace(ranges, codes=expected.to(torch.uint8))
    errors = [output_error(q.dequantize() - weight, gram) for q in (found, slow)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_the_output_error_is_well_below_rounding() -> None:
    weight, gram = problem()
    ranges = round_to_nearest(weight, 4, 16, symmetric=False)
    errors = [output_error(q.dequantize() - weight, gram) for q in (gptq(weight, gram, ranges), ranges)]
    assert errors[0] < 0.5 * errors[1]


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = problem()
    ranges = round_to_nearest(weight, 4, 16, symmetric=False)
    assert torch.equal(gptq(weight, torch.eye(48), ranges).codes, ranges.codes)


def test_silent_channels_and_singular_matrices_are_survived() -> None:
    weight, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    single = torch.ones(48, 48)  # one input direction only
    ranges = round_to_nearest(weight, 4, 16, symmetric=False)
    for matrix in (gram, single, torch.zeros(48, 48)):
        found = gptq(weight, matrix, ranges)
        assert torch.isfinite(found.dequantize()).all()
    assert torch.equal(gptq(weight, gram, ranges).codes[:, 5], ranges.codes[:, 5])
    broken = torch.full((48, 48), torch.nan)
    assert torch.equal(gptq(weight, broken, ranges).codes, ranges.codes)


def test_the_factor_is_the_published_one() -> None:
    _, gram = problem()
    lower = lower_factor(gram[None], 0.01)[0].double()
    assert torch.equal(lower, torch.tril(lower))
    assert torch.equal(lower.diagonal(), torch.ones(48, dtype=torch.float64))
    # GPTQ moves an error along row i of U / U_ii, with U upper triangular and U^T U the inverse of the damped Gram
    # matrix; the targets w + (w - q) strict(L)^T are the same if those rows are the inverse of L^T.
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram)), upper=True)
    rows = upper / upper.diagonal()[:, None]
    # Float32 factor of a matrix with a condition number of about 1e3.
    assert torch.allclose(rows @ lower.t(), torch.eye(48, dtype=torch.float64), atol=1e-5)


def test_matrices_of_one_shape_go_together_and_are_damped_one_by_one() -> None:
    problems = [problem(seed=seed) for seed in (2, 3)]
    problems[1][1][:2, :2] = torch.tensor([[1.0, 30.0], [30.0, 1.0]])  # indefinite: needs more damping than the first
    weights, grams = (torch.stack(parts) for parts in zip(*problems, strict=True))
    alone = [round_to_nearest(weight, 4, 16, symmetric=False) for weight in weights]
    together = QuantizedWeight(
        *(torch.stack([getattr(q, name) for q in alone]) for name in ("codes", "scale", "zero_point")), 4, False
    )
    assert torch.linalg.cholesky_ex(damped(grams[1]))[1] > 0
    found = gptq(weights, grams, together)
    for i, ranges in enumerate(alone):
        assert torch.equal(found.codes[i], gptq(weights[i], grams[i], ranges).codes)


def test_damping_grows_until_the_matrix_is_definite() -> None:
    gram = torch.tensor([[1.0, 3.0], [3.0, 1.0]])  # eigenvalues 4 and -2
    lower = lower_factor(gram[None], 0.01)[0].double()
    # 0.01, 0.1 and 1 times the mean leave it indefinite, 10 times does not.
    inverse = torch.linalg.inv(lower)
    diagonal = inverse.t() @ damped(gram, 10) @ inverse
    assert torch.allclose(diagonal, torch.diag(diagonal.diagonal()), atol=1e-6)


@pytest.fixture
def kernel() -> Callable[[Columns, int, int], None]:
    """Return the Triton kernel; without a GPU, Triton interprets it if told so before it is first imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU; set TRITON_INTERPRET=1 to interpret the kernel")
    from olive.quant import kernels

    return kernels.round_run


def dyadic(b: int, k: int, n: int) -> Columns:
    """Draw a problem in multiples of powers of two, so that every sum is exact and many targets lie half-way."""
    generator = torch.Generator().manual_seed(k)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    return Columns(
        weight=draw(-32, 32, b, k, n).to(DEVICE) / 8,
        asked=draw(-8, 8, b, k, n).to(DEVICE) / 64,
        error=torch.zeros(b, k, n, device=DEVICE),
        codes=torch.zeros(b, k, n, dtype=torch.uint8, device=DEVICE),
        lower=draw(-2, 2, b, k, k).to(DEVICE) / 8,
        scale=(draw(0, 1, b, 3, n) * 2 - 1).to(DEVICE) * 2 ** draw(-2, 0, b, 3, n).to(DEVICE),
        zero_point=draw(0, 15, b, 3, n).to(DEVICE),
        group=draw(0, 2, b, k).long().to(DEVICE),
        top=15,
    )


@pytest.mark.parametrize(("b", "k", "n", "start", "stop"), [(1, 128, 12, 0, 128), (2, 70, 9, 5, 70), (1, 1, 1, 0, 1)])
def test_the_kernel_gives_the_same_bits(
    kernel: Callable[[Columns, int, int], None], b: int, k: int, n: int, start: int, stop: int
) -> None:
    ours, theirs = dyadic(b, k, n), dyadic(b, k, n)
    kernel(ours, start, stop)
    round_run(theirs, start, stop)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.error, theirs.error)


def test_the_kernel_serves_a_whole_weight(
    kernel: Callable[[Columns, int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(k=160, n=5)
    ranges = round_to_nearest(weight, 4, 32, symmetric=True)
    expected = gptq(weight, gram, ranges).codes
    monkeypatch.setattr(columns, "_rounding", lambda _: (kernel, 128))
    found = gptq(
        weight.to(DEVICE),
        gram.to(DEVICE),
        QuantizedWeight(ranges.codes, ranges.scale.to(DEVICE), ranges.zero_point.to(DEVICE), 4, True),
    )
    assert (found.codes.cpu() == expected).float().mean() > 0.97  # see above


def shifted(tokens: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw a float model's inputs x' [T, K] and what a layer behind quantized ones sees instead, x [T, K]."""
    fixed, generator = torch.Generator().manual_seed(5), torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=fixed) * torch.linspace(0.3, 2, k) / k**0.5
    tilt = torch.eye(k) + 0.1 * torch.randn(k, k, generator=fixed) / k**0.5
    x = torch.randn(tokens, k, generator=generator) @ mix
    return x, x @ tilt + 0.03 * x.std(0) * torch.randn(tokens, k, generator=generator)


def moments(x_float: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.t() @ x / len(x), (x_float - x).t() @ x / len(x)


def test_compensation_solves_its_least_squares_problem() -> None:
    x_float, x = shifted(tokens=200, k=24, seed=0)
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    gram, cross = moments(x_float, x)
    pull = (0.01 * gram.diagonal().mean() * len(x)).sqrt() * torch.eye(24)
    inputs, targets = torch.cat([x, pull]).double(), torch.cat([x_float, pull]).double() @ weight.double().t()
    expected = torch.linalg.lstsq(inputs, targets).solution.t()
    assert torch.allclose(compensate(weight, gram, cross, 0.01).double(), expected, atol=1e-5)


def gptaq(weight: Tensor, gram: Tensor, cross: Tensor, ranges: QuantizedWeight) -> Tensor:
    """Round column by column as GPTAQ does (arXiv 2504.02692): later columns make up for each column's error and for
    its part of the input's change."""
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram)[order][:, order]), upper=True)
    moved = torch.triu(cross.double()[order][:, order] @ upper.t(), 1) @ upper
    w, rounded = weight.double()[:, order], torch.zeros_like(weight, dtype=torch.float64)
    for i, channel in enumerate(order.tolist()):
        group = channel // ranges.group_size
        scale, zero = ranges.scale[:, group].double(), ranges.zero_point[:, group].double()
        own = w[:, i].clone()
        rounded[:, channel] = ((own / scale + zero).round().clamp(0, 15) - zero) * scale
        error = (own - rounded[:, channel]) / upper[i, i]
        w[:, i + 1 :] += own[:, None] * moved[i, i + 1 :] - error[:, None] * upper[i, i + 1 :]
    return rounded.float()


def test_compensation_brings_fresh_outputs_nearer_to_the_float_models() -> None:
    k = 64
    gram, cross = moments(*shifted(tokens=1024, k=k, seed=0))
    x_float, x = shifted(tokens=2048, k=k, seed=1)
    weight = torch.randn(32, k, generator=torch.Generator().manual_seed(1)) * 0.1
    ranges = round_to_nearest(weight, 4, 16, symmetric=False)

    def error(rounded: Tensor) -> float:
        return (x_float @ weight.t() - x @ rounded.t()).square().mean().item()

    plain = error(gptq(weight, gram, ranges).dequantize())
    columnwise = error(gptaq(weight, gram, cross, ranges))
    ours = error(gptq(compensate(weight, gram, cross), gram, ranges).dequantize())
    # Later columns alone make up for part of a change that touches all of them; all columns for nearly all of it.
    assert ours < columnwise < plain
    assert ours < 0.5 * plain
