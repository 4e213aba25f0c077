"""AWQ's searches against slow versions that run the layer, and the proof that folding changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from olive.quant import awq
from olive.quant import layer as layers
from olive.quant.affine import QuantizedWeight, choose_qparams, quantize, round_to_nearest
from olive.quant.sites import find_sites
from olive.quant.statistics import InputStatistics


def inputs(k: int = 32, tokens: int = 200) -> torch.Tensor:
    """Draw correlated inputs, some channels much larger than others: what AWQ is for."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(tokens, k, generator=generator) @ mix * torch.linspace(0.1, 4, k)


def statistics(x: torch.Tensor) -> InputStatistics:
    found = InputStatistics(x.shape[-1], "cpu")
    for part in x.split(64):
        found.add(part)
    return found


def test_gram_error_is_the_error_of_the_outputs() -> None:
    x = inputs()
    change = torch.randn(8, 32, generator=torch.Generator().manual_seed(4))
    by_gram = layers.output_error(change, statistics(x).mean_gram())
    by_running = (x @ change.t()).square().sum(-1).mean()
    assert by_gram.item() == pytest.approx(by_running.item(), rel=1e-4)  # float32 sums in another order


def test_scale_search_finds_what_running_the_layer_finds() -> None:
    x, w = inputs(), torch.randn(24, 32, generator=torch.Generator().manual_seed(5))

    def rounded(weight: torch.Tensor) -> QuantizedWeight:
        return round_to_nearest(weight, 4, 16, symmetric=False)

    def ran(scale: torch.Tensor) -> float:
        return ((x / scale) @ rounded(w * scale).dequantize().t() - x @ w.t()).square().mean().item()

    found = awq.search_scale([w], statistics(x), rounded, lambda scale: scale)
    activation = x.abs().mean(0)
    magnitude = (w.abs() / w.abs().amax(1, keepdim=True)).mean(0)
    slow = []
    for step in range(awq.SCALE_GRID):
        ratio = step / awq.SCALE_GRID
        scale = activation**ratio / magnitude ** (1 - ratio)
        slow.append(ran(scale / (scale.max() * scale.min()).sqrt()))
    assert ran(found) == pytest.approx(min(*slow, ran(torch.ones(32))), rel=1e-3)
    assert ran(found) < 0.9 * ran(torch.ones(32))


@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_is_the_best_of_its_grid_for_every_group(symmetric: bool) -> None:
    x, w = inputs(), torch.randn(6, 32, generator=torch.Generator().manual_seed(6)) ** 3
    gram = statistics(x).mean_gram()
    found = awq.clip_and_round(w, gram, 4, 16, symmetric=symmetric)
    for n in range(6):
        for g in range(2):
            part = slice(16 * g, 16 * g + 16)
            row = w[n : n + 1, part]

            def error(codes: QuantizedWeight, row: torch.Tensor = row, part: slice = part) -> float:
                return ((codes.dequantize() - row) @ x[:, part].t()).square().mean().item()

            tried = []
            for step in range(awq.CLIP_GRID):
                shrink = 1 - step * (1 - awq.CLIP_TO) / awq.CLIP_GRID
                scale, zero = choose_qparams(
                    row.amin(1, True) * shrink, row.amax(1, True) * shrink, 4, symmetric=symmetric
                )
                tried.append(error(quantize(row, scale, zero, 4, symmetric=symmetric)))
            own = ((found.dequantize()[n : n + 1, part] - row) @ x[:, part].t()).square().mean().item()
            assert own == pytest.approx(min(tried), rel=1e-3, abs=1e-9)


def block_of(family: str, tmp_path: Path, **changes: object) -> tuple[nn.Module, object, int]:
    model = tiny.checkpoint(tmp_path, family, **changes)
    layer = model.model.layers[0]
    seen: dict[str, object] = {}

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["args"], seen["kwargs"] = args, kwargs

    with layer.register_forward_pre_hook(keep, with_kwargs=True), torch.no_grad():
        model(tiny.ids(12, batch=1), use_cache=False)

    def run() -> torch.Tensor:
        with torch.no_grad():
            out = layer(*seen["args"], **seen["kwargs"])  # type: ignore[misc]
        return out[0] if isinstance(out, tuple) else out

    return layer, run, getattr(model.config, "head_dim", None) or 16


FOLDS = {
    "llama": {"q_proj": "input_layernorm", "o_proj": "self_attn.v_proj", "gate_proj": "post_attention_layernorm",
              "down_proj": "mlp.up_proj"},
    "phi3": {"qkv_proj": "input_layernorm", "o_proj": "self_attn.qkv_proj", "gate_up_proj": "post_attention_layernorm",
             "down_proj": "mlp.gate_up_proj"},
    "gemma2": {"q_proj": "input_layernorm", "o_proj": "self_attn.v_proj", "gate_proj": "pre_feedforward_layernorm",
               "down_proj": "mlp.up_proj"},
    "gpt_neox": {"query_key_value": "input_layernorm", "dense_4h_to_h": None},
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_folds_are_found_without_a_table_of_names(family: str, tmp_path: Path) -> None:
    layer, run, head_dim = block_of(family, tmp_path, head_dim=16)
    sites = find_sites(layer, run, head_dim)  # type: ignore[arg-type]
    found = {linear.split(".")[-1]: site.fold and site.fold.module for site in sites for linear in site.linears}
    assert {name: found[name] for name in FOLDS[family]} == FOLDS[family]


def test_grouped_queries_share_the_scale_of_their_value_head(tmp_path: Path) -> None:
    layer, run, head_dim = block_of("llama", tmp_path, head_dim=16)
    site = next(s for s in find_sites(layer, run, head_dim) if s.linears == ("self_attn.o_proj",))  # type: ignore[arg-type]
    scale = site.fold.channel_scale(torch.linspace(0.5, 2, 64))
    heads = scale.view(4, 16)  # [K] -> [H, D]; two query heads read each value head
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_folding_random_scales_leaves_the_layer_as_it_was(family: str, tmp_path: Path) -> None:
    layer, run, head_dim = block_of(family, tmp_path, head_dim=16)
    before = run()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(8)
    for site in find_sites(layer, run, head_dim):  # type: ignore[arg-type]
        k = layer.get_submodule(site.linears[0]).in_features
        asked = site.fold.channel_scale(torch.empty(k).uniform_(0.3, 3, generator=generator))
        applied = site.fold.apply(layer, asked, torch.bfloat16)
        for name in site.linears:
            layer.get_submodule(name).weight.data *= applied
    after = run()  # type: ignore[operator]
    # Float32 rounding only, although the norms are held in bfloat16: the scale follows what they can hold.
    assert torch.allclose(after, before, atol=2e-5 * before.abs().max().item())


def test_a_gelu_between_two_linears_is_not_taken_for_a_fold(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path, "gpt_neox")
    layer = model.gpt_neox.layers[0]
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    rotary = model.gpt_neox.rotary_emb(x, torch.arange(6)[None])

    def run() -> torch.Tensor:
        with torch.no_grad():
            out = layer(x, attention_mask=None, position_embeddings=rotary)
        return out[0] if isinstance(out, tuple) else out

    folds = {name: site.fold for site in find_sites(layer, run, 16) for name in site.linears}
    assert folds["mlp.dense_4h_to_h"] is None
    assert folds["mlp.dense_h_to_4h"].module == "post_attention_layernorm"
    assert folds["attention.query_key_value"].module == "input_layernorm"
