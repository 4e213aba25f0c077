"""Training of codes and scales: the gradients, the text that a model writes itself, and that it helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

import tiny
from olive.quant.affine import round_to_nearest
from olive.quant.distill import TrainedLinear, distill, divergence, put, write_rows
from olive.runtime.torch_model import load
from places import LAB_MODEL


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (2, True)])
def test_gradients_are_those_of_the_weight_that_the_codes_stand_for(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, x, bias = (torch.randn(*shape, generator=generator) for shape in ((6, 64), (5, 64), (6,)))
    start = round_to_nearest(weight, bits, 32, symmetric=symmetric)
    linear = TrainedLinear(start, weight, bias)
    linear.codes.data[0, 0, 0], linear.codes.data[1, 0, 0] = -2.0, 2.0**bits + 1  # beyond the codes that there are
    y = linear(x)
    plain = linear.result().dequantize().requires_grad_()
    expected = functional.linear(x, plain, bias)
    assert torch.equal(linear.result().scale, start.scale)
    assert (y - expected).abs().max() < 1e-5
    toward = torch.randn(y.shape, generator=generator)
    y.backward(toward)
    expected.backward(toward)
    assert plain.grad is not None and linear.codes.grad is not None and linear.factor.grad is not None
    for n in range(6):  # weight[n, k] = (code - zero point) * scale * factor
        for g in range(2):
            scale, zero = float(start.scale[n, g]), float(start.zero_point[n, g])
            own = plain.grad[n, g * 32 : g * 32 + 32]
            codes = linear.result().codes[n, g * 32 : g * 32 + 32].float()
            of_codes = own * scale
            of_codes[(linear.codes[n, g] < 0) | (linear.codes[n, g] > 2**bits - 1)] = 0
            assert torch.allclose(linear.codes.grad[n, g], of_codes, atol=1e-5)
            assert torch.allclose(linear.factor.grad[n, g, 0], (own * (codes - zero) * scale).sum(), atol=1e-4)


def test_training_starts_at_the_codes_it_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator)
    start = round_to_nearest(weight, 3, 32, symmetric=False)
    moved = start.codes.clone()
    moved[:, ::2] = (moved[:, ::2].int() + 2).clamp(0, 7).to(torch.uint8)  # not the nearest ones
    start = type(start)(moved, start.scale, start.zero_point, 3, symmetric=False)
    linear = TrainedLinear(start, weight, None)
    assert torch.equal(linear.result().codes, start.codes)
    exact = weight.view(8, 2, 32) / start.scale.float()[..., None] + start.zero_point.float()[..., None]
    near = (exact - linear.rounded()).abs() < 0.45
    assert near.any() and not near.all()
    assert torch.equal(linear.codes[near], exact[near])


def test_rows_are_drawn_from_what_the_model_predicts(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path, "llama")
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that the distribution is far from uniform
    prompts = tiny.ids(4, batch=2).repeat(2000, 1)
    torch.manual_seed(0)
    rows = write_rows(model, prompts, 5)
    assert torch.equal(rows[:, :4], prompts)
    ends = model.generation_config.eos_token_id
    for row in range(2):
        with torch.no_grad():
            logits = model(prompts[row : row + 1]).logits[0, -1]
        logits[ends] = -float("inf")  # no row ends early
        expected = logits.softmax(-1)
        found = torch.bincount(rows[row::2, 4], minlength=len(expected)) / 2000
        assert found[ends].sum() == 0
        # What 2,000 draws differ by on average, by the normal approximation; at temperature 0.7 or 1.5 it is 5 times.
        usual = (2 * expected * (1 - expected) / (torch.pi * 2000)).sqrt().sum()
        assert (found - expected).abs().sum() < 2 * usual


def test_training_brings_a_trained_model_nearer_to_its_source() -> None:
    teacher, student = load(LAB_MODEL), load(LAB_MODEL)
    names = [name for name, m in teacher.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
    floats = {name: teacher.get_submodule(name).weight.data for name in names}
    start = {name: round_to_nearest(weight, 3, 64, symmetric=False) for name, weight in floats.items()}
    put(student, start)
    torch.manual_seed(0)
    own = write_rows(teacher, torch.randint(20, 2000, (40, 4)), 48)

    def compare() -> float:
        with torch.no_grad():
            return float(divergence(teacher, student, own[32:]))

    before = compare()
    found = distill(teacher, student, start, floats.__getitem__, own[:32], steps=40, rate=0.01, seed=0)
    after = compare()
    assert after < 0.9 * before
    assert found.keys() == start.keys()
    put(student, found)
    assert compare() == after
    assert any(not torch.equal(found[name].codes, start[name].codes) for name in names)
    assert any(not torch.equal(found[name].scale, start[name].scale) for name in names)


def test_divergence_is_the_mean_over_all_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = tiny.checkpoint(tmp_path / "a", "llama"), tiny.checkpoint(tmp_path / "b", "llama", rms_norm_eps=0.5)
    rows, total = tiny.ids(6), 0.0
    with torch.no_grad():
        p, q = (model(rows).logits.double().softmax(-1) for model in (one, other))
        for b in range(2):
            for t in range(6):
                total += sum(float(p[b, t, v] * (p[b, t, v] / q[b, t, v]).log()) for v in range(p.shape[-1]))
        assert total > 0
        assert float(divergence(one, other, rows)) == pytest.approx(total / 12, rel=1e-3, abs=1e-7)
