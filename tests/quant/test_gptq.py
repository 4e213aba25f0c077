"""GPTQ against a slow version that solves for the best update of all remaining weights after each column."""

from __future__ import annotations

import torch

from olive.quant.affine import round_to_nearest
from olive.quant.gptq import gptq, inverse_factor


def problem(k: int = 48, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a weight and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x *= torch.linspace(0.2, 3, k)[torch.randperm(k, generator=generator)]
    return torch.randn(n, k, generator=generator), x.t() @ x / len(x)


def oracle(weight: torch.Tensor, gram: torch.Tensor, damping: float, ranges: object) -> torch.Tensor:
    """After each column, solve the least-squares problem of the columns left, in float64."""
    w, h = weight.double().clone(), gram.double()
    h = h + torch.eye(len(h), dtype=torch.float64) * h.diagonal().mean() * damping
    left = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    codes = torch.zeros_like(w)
    while left:
        i = left.pop(0)
        group = i // ranges.group_size  # type: ignore[attr-defined]
        scale = ranges.scale[:, group].double()  # type: ignore[attr-defined]
        zero = ranges.zero_point[:, group].double()  # type: ignore[attr-defined]
        codes[:, i] = (w[:, i] / scale + zero).round().clamp(0, 15)
        error = w[:, i] - (codes[:, i] - zero) * scale
        if left:
            w[:, left] += error[:, None] * torch.linalg.solve(h[left][:, left], h[left, i])
    return codes


def test_codes_are_those_of_the_slow_version() -> None:
    weight, gram = problem()
    ranges = round_to_nearest(weight, 4, 16, symmetric=False)
    found = gptq(weight, gram, ranges).codes
    expected = oracle(weight, gram, 0.01, ranges)
    # A code near a rounding boundary may fall either way in float32, and then moves its row's later codes.
    assert (found == expected).float().mean() > 0.97
    assert (found == expected).all(dim=1).float().mean() > 0.7


def test_the_output_error_is_well_below_rounding() -> None:
    weight, gram = problem()
    ranges = round_to_nearest(weight, 4, 16, symmetric=False)

    def error(rounded: torch.Tensor) -> float:
        change = rounded - weight
        return ((change @ gram) * change).sum().item()

    assert error(gptq(weight, gram, ranges).dequantize()) < 0.5 * error(ranges.dequantize())


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


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, gram = problem()
    upper = inverse_factor(gram, 0.01).double()
    damped = gram.double() + torch.eye(48, dtype=torch.float64) * gram.double().diagonal().mean() * 0.01
    # Float32 factors of a matrix with a condition number of about 1e4.
    assert torch.allclose(upper.t() @ upper @ damped, torch.eye(48, dtype=torch.float64), atol=2e-2)
