"""Rotations against the dense matrix, and rotated layers against the layers that they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from olive.errors import ConfigError
from olive.quant import rotation as rotations
from olive.quant.rotation import Rotation, norm_gain, random_rotation, rotate_layer


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(rotation: Rotation) -> torch.Tensor:
    """Build Q as the products that its docstring names."""
    size = len(rotation.signs) // len(rotation.mix)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    return rotation.signs.diag() @ torch.kron(hadamard / size**0.5, rotation.mix.contiguous())


@pytest.mark.parametrize("size", [1, 2, 64, 96, 80, 7])
def test_it_is_the_orthogonal_matrix_that_it_says(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rotation = random_rotation(size, generator())
    q = dense(rotation)
    assert torch.allclose(q.t() @ q, torch.eye(size, dtype=torch.float64), atol=1e-12)
    x = torch.randn(5, 3, size, generator=generator(), dtype=torch.float64)
    assert torch.allclose(rotation.apply(x), x @ q, atol=1e-12)
    monkeypatch.setattr(rotations, "TILE", 2 * size)  # and a few rows at a time
    assert torch.allclose(rotation.apply(x), x @ q, atol=1e-12)
    assert rotation.apply(x.float()).dtype == torch.float32


def test_a_power_of_two_spreads_every_channel_evenly_over_all() -> None:
    spread = random_rotation(64, generator()).apply(torch.eye(64, dtype=torch.float64))
    assert torch.allclose(spread.abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))


def test_it_is_drawn_from_the_generator() -> None:
    x = torch.randn(96, generator=generator())
    assert torch.equal(random_rotation(96, generator(1)).apply(x), random_rotation(96, generator(1)).apply(x))
    assert not torch.allclose(random_rotation(96, generator(1)).apply(x), random_rotation(96, generator(2)).apply(x))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16},
    "granite": {"residual_multiplier": 0.5},
}
"""Families and what is special about them here: biases on what writes the stream, packed q, k, v, biases on v, norms of
heads, norms of 1 + weight, a scaled residual."""


def layer_of(
    family: str, folder: Path, **changes: Any
) -> tuple[Any, nn.Module, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Return a tiny model, its first layer, hidden states and how to run the layer on such."""
    model: Any = tiny.checkpoint(folder, family, **changes)
    layers = model.gpt_neox.layers if family == "gpt_neox" else model.model.layers
    layer, seen = layers[0], {}

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.update(hidden=args[0], kwargs=kwargs)

    with layer.register_forward_pre_hook(keep, with_kwargs=True), torch.no_grad():
        model(tiny.ids(12, batch=1), use_cache=False)
    layer.requires_grad_(False)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        out = layer(hidden, **seen["kwargs"])
        return out[0] if isinstance(out, tuple) else out

    return model, layer, seen["hidden"].detach(), run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_layer_computes_the_rotated_result(family: str, tmp_path: Path) -> None:
    _, layer, hidden, run = layer_of(family, tmp_path, **FAMILIES[family])
    before = run(hidden)
    kept = {name: p.clone() for name, p in layer.named_parameters()}
    head_dim = layer.self_attn.head_dim
    stream, head = random_rotation(64, generator()), random_rotation(head_dim, generator())
    assert rotate_layer(layer, run, hidden, (stream, head), "layer") == 1  # o_proj reads rotated heads
    wanted = stream.apply(before)
    assert torch.allclose(run(stream.apply(hidden)), wanted, atol=1e-5 * wanted.abs().max().item())
    linears = [name for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
    assert all(not torch.allclose(layer.get_submodule(n).weight, kept[f"{n}.weight"], atol=1e-3) for n in linears)
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert layer.get_submodule(name).weight.unique().tolist() == [0.0 if family == "gemma" else 1.0]


def test_value_heads_are_rotated_each_by_itself_and_shared_by_their_queries(tmp_path: Path) -> None:
    _, layer, hidden, run = layer_of("llama", tmp_path)
    values, outputs = layer.self_attn.v_proj.weight.clone(), layer.self_attn.o_proj.weight.clone()
    gain = layer.input_layernorm.weight.clone()
    stream, head = random_rotation(64, generator(1)), random_rotation(16, generator(2))
    rotate_layer(layer, run, hidden, (stream, head), "layer")
    q, r = dense(stream).float(), dense(head).float()
    two, four = torch.block_diag(r, r), torch.block_diag(r, r, r, r)  # 2 value heads are read by 4 query heads
    assert torch.allclose(layer.self_attn.v_proj.weight, two.t() @ (values * gain) @ q, atol=1e-5)
    assert torch.allclose(layer.self_attn.o_proj.weight, q.t() @ outputs @ four, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt_neox", {}, "input_layernorm .LayerNorm.: rotation is not possible, the norm is not an RMS norm"),
        ("gemma2", {"head_dim": 16}, "its norm post_attention_layernorm is not read by linear layers alone"),
        ("olmo2", {}, "its norm .* is not read by linear layers alone"),
    ],
)
def test_what_does_not_commute_is_refused(family: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    _, layer, hidden, run = layer_of(family, tmp_path, **changes)
    stream, head = random_rotation(64, generator()), random_rotation(16, generator())
    with pytest.raises(ConfigError, match=f"layers.0.*{reason}"):
        rotate_layer(layer, run, hidden, (stream, head), "layers.0")


def test_the_gain_of_a_norm_is_seen_whether_or_not_its_weight_counts_from_one() -> None:
    class FromOne(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    for kind, neutral in ((nn.RMSNorm, 1.0), (FromOne, 0.0)):
        norm = kind(8, eps=1e-6)
        norm.weight.data = torch.linspace(-1, 2, 8)
        gain, found = norm_gain(norm, "norm")
        assert found == neutral
        assert torch.allclose(gain, torch.linspace(-1, 2, 8) + (1 - neutral))
    with pytest.raises(ConfigError, match=r"norm \(LayerNorm\)"):
        norm_gain(nn.LayerNorm(8), "norm")
