"""Mixtures of experts: separate linear layers compute what fused experts do, and are streamed, quantized and read."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from olive.cli import main
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.formats.shards import Shards, find
from olive.quant.linear import QuantLinear
from olive.quant.sites import find_sites
from olive.runtime.experts import Expert, Experts, equivalent, unfuse
from olive.runtime.layers import LayeredModel, decoder_layers, decoder_linears, skeleton
from olive.runtime.tensors import LoadedTensors, open_tensors
from olive.runtime.torch_model import load

E, H, I = 4, 16, 24  # noqa: E741 - experts, outer and inner channels


class Fused(nn.Module):
    """Experts as transformers fuses them, computed token by token."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H, generator=random))
        self.down_proj = nn.Parameter(torch.randn(E, H, I, generator=random))
        self.act_fn = nn.SiLU()

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up

    def expert(self, x: Tensor, i: int) -> Tensor:
        hidden = self.gate_up_proj[i] @ x
        half = len(hidden) // 2
        return self.down_proj[i] @ self.gated(hidden[:half], hidden[half:])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = []
        for x, index, weights in zip(hidden_states, top_k_index, top_k_weights, strict=True):
            rows.append(sum(w * self.expert(x, int(i)) for i, w in zip(index, weights, strict=True)))
        return torch.stack(rows)


class Clamped(Fused):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up.clamp(-50, 50)


class GateLast(Fused):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(up) * gate


class Interleaved(Fused):
    def expert(self, x: Tensor, i: int) -> Tensor:
        hidden = self.gate_up_proj[i] @ x
        return self.down_proj[i] @ self.gated(hidden[::2], hidden[1::2])


class Biased(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj_bias = nn.Parameter(torch.zeros(E, H))


class Transposed(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, H, 2 * I))
        self.down_proj = nn.Parameter(torch.randn(E, I, H))


class Ungated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(E, I, H))
        self.down_proj = nn.Parameter(torch.randn(E, H, I))


def test_separate_experts_are_the_sum_over_tokens_and_choices() -> None:
    fused = Fused()
    separate = Experts(fused, "experts", ("w1", "w3", "w2"))
    random = torch.Generator().manual_seed(2)
    x, weights = torch.randn(9, H, generator=random), torch.rand(9, 3, generator=random)
    index = torch.stack([torch.randperm(E, generator=random)[:3] for _ in range(9)])
    with torch.no_grad():
        torch.testing.assert_close(separate(x, index, weights), fused(x, index, weights), rtol=1e-5, atol=1e-4)
    assert [name for name, _ in separate.named_parameters()][:3] == ["0.w1.weight", "0.w3.weight", "0.w2.weight"]


@pytest.mark.parametrize(
    ("kind", "same"),
    [(Fused, True), (Clamped, False), (GateLast, False), (Interleaved, False), (Biased, False), (Transposed, False),
     (Ungated, False)],
)  # fmt: skip
def test_only_experts_that_compute_the_same_are_replaced(kind: type[nn.Module], same: bool) -> None:
    assert equivalent(kind()) is same
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": kind()})})
    with torch.device("meta"):
        model.add_module("other", nn.ModuleDict({"experts": kind()}))
    unfuse(model, [])
    assert [isinstance(m, Experts) for n, m in model.named_modules() if n.endswith(".experts")] == [same, same]


def through(folder: Path, ids: Tensor) -> tuple[Any, Any, Tensor]:
    """Run a checkpoint layer by layer; return its model, its tensors and the logits."""
    model = skeleton(folder)
    tensors = open_tensors(folder, model)
    layered = LayeredModel(tensors, model, dtype=torch.float32, devices=["cpu"])
    batches = layered.start(ids, len(ids))
    for index, _, block in layered.layers():
        layered.advance(index, block, batches)
    return model, tensors, layered.logits(batches[0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_streamed_layers_equal_transformers(family: str, fused: bool, tmp_path: Path) -> None:
    expected = tiny.checkpoint(tmp_path, family, fused=fused)
    model, tensors, logits = through(tmp_path, tiny.ids(20))
    with torch.no_grad():
        torch.testing.assert_close(logits, expected(tiny.ids(20)).logits, rtol=1e-4, atol=1e-4)
    assert isinstance(tensors, Checkpoint)  # not loaded whole
    assert decoder_layers(model)[0] == "model.layers"  # and not a longer list of experts
    experts = {name for name in decoder_linears(model) if ".experts." in name}
    assert len(experts) == 2 * 6 * 3
    if not fused:
        stored = {n.removesuffix(".weight") for n in Shards(find(tmp_path)) if ".experts." in n}
        assert experts == stored


def test_a_fused_checkpoint_is_read_one_expert_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.checkpoint(tmp_path, "qwen3_moe", fused=True)
    tensors = open_tensors(tmp_path, skeleton(tmp_path))
    read: list[int] = []
    original = Shards._read

    def watched(self: Shards, name: str, skip: int, size: int) -> Tensor:
        read.append(size)
        return original(self, name, skip, size)

    monkeypatch.setattr(Shards, "_read", watched)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    for i in (0, 5):
        where = f"model.layers.1.mlp.experts.{i}"
        gate, up = experts.gate_up_proj[i].chunk(2)
        for name, wanted in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj[i])):
            assert torch.equal(tensors.weight(f"{where}.{name}.weight"), wanted)
            assert torch.equal(tensors.rows(f"{where}.{name}.weight", 3, 7), wanted[3:7])
            assert tensors.shape(f"{where}.{name}.weight") == tuple(wanted.shape)
    assert max(read) == 2 * 96 * 64 * 4  # gate and up of one expert, float32


def test_a_tensor_that_is_stored_transposed_is_left_to_transformers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny.checkpoint(tmp_path, "qwen3_moe", fused=True)
    path = tmp_path / "model.safetensors"
    stored = dict(Shards([path]).items())
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(stored | {name: stored[name].transpose(1, 2).contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="cannot load"):
        open_tensors(tmp_path, skeleton(tmp_path))


def test_what_transformers_computes_is_loaded_whole_under_the_same_names(tmp_path: Path) -> None:
    expected = tiny.checkpoint(tmp_path, "qwen3_vl_moe")  # it may transpose these tensors
    model, tensors, logits = through(tmp_path, tiny.ids(12))
    assert isinstance(tensors, LoadedTensors)
    assert set(tensors.float_names) == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(logits, expected(tiny.ids(12)).logits, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_renamed_layer_runs_on_its_own_experts(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "mixtral")
    block = decoder_layers(skeleton(tmp_path))[1][0]
    copied = copy.deepcopy(block)
    assert copied.mlp is copied.block_sparse_moe
    assert copied.mlp is not block.mlp
    assert not [name for name, _ in copied.named_modules() if name.startswith("mlp")]


def test_what_chooses_experts_stays_float(tmp_path: Path) -> None:
    # The shared expert is as wide as there are experts, as in Qwen3-Next: it is still no router.
    tiny.checkpoint(tmp_path / "a", "qwen2_moe", num_experts=32, shared_expert_intermediate_size=32)
    linears = decoder_linears(skeleton(tmp_path / "a"))
    beside = {name.removeprefix("model.layers.0.mlp.") for name in linears if name.startswith("model.layers.0.mlp.s")}
    assert beside == {"shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"}
    afmoe = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_dense_layers": 0,
             "head_dim": 16, "layer_types": ["full_attention"] * 2}  # fmt: skip
    tiny.checkpoint(tmp_path / "b", "afmoe", **afmoe)
    model = skeleton(tmp_path / "b")
    assert isinstance(model.get_submodule("model.layers.0.mlp.router.gate"), nn.Linear)
    assert "model.layers.0.mlp.experts.0.gate_proj" in decoder_linears(model)
    assert "model.layers.0.mlp.router.gate" not in decoder_linears(model)


def test_experts_of_another_kind_are_refused_by_quantizers_only(tmp_path: Path) -> None:
    expected = tiny.checkpoint(tmp_path, "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    model, _, logits = through(tmp_path, tiny.ids(8))
    with torch.no_grad():
        torch.testing.assert_close(logits, expected(tiny.ids(8)).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"experts of model\.layers\.0\.mlp\.experts \(GptOssExperts\)"):
        decoder_linears(model)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_every_expert_has_its_sites_even_if_the_probe_does_not_reach_it(family: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, family)
    model = skeleton(tmp_path)
    layered = LayeredModel(open_tensors(tmp_path, model), model, dtype=torch.float32, devices=["cpu"])
    probe, many = layered.start(tiny.ids(1, batch=1), 1)[0], layered.start(tiny.ids(40, batch=1), 1)[0]
    index, _, block = next(layered.layers())
    reached: Counter[str] = Counter()
    for name, module in block.named_modules():
        if isinstance(module, Expert):
            module.register_forward_hook(lambda *_, name=name: reached.update([name]))
    layered.apply(index, block, probe)
    assert len(reached) == 2  # one token, two of six experts
    sites = find_sites(block, partial(layered.apply, index, block, probe), layered.head_dim())
    linears = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(name for site in sites for name in site.linears) == sorted(linears)
    random = torch.Generator().manual_seed(3)
    reference = layered.apply(index, block, many)
    assert len(reached) == 6
    folded = 0
    for name, expert in block.named_modules():
        if not isinstance(expert, Expert):
            continue
        gate, up, down = (f"{name}.{own}" for own in expert.names)
        assert [(gate, up)] == [site.linears for site in sites if gate in site.linears]
        site = next(site for site in sites if down in site.linears)
        assert site.linears == (down,)
        assert site.fold is not None
        assert site.fold.module == up
        scale = torch.rand(len(site.fold.rows), generator=random) + 0.5
        linear: Any = block.get_submodule(down)
        linear.weight.data = linear.weight.data * site.fold.apply(block, scale, torch.float32)
        folded += 1
    assert folded == 6
    torch.testing.assert_close(layered.apply(index, block, many), reference, rtol=1e-4, atol=1e-4)


def test_a_linear_that_nothing_reaches_is_a_site_of_its_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    block = Block()
    sites = find_sites(block, lambda: block(torch.ones(2, 4)).detach(), None)
    assert [(site.linears, site.fold) for site in sites] == [(("used",), None), (("unused",), None)]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("family", "fused", "algorithm"),
    [("mixtral", False, "rtn"), ("mixtral", False, "awq"), ("mixtral", False, "gptq"), ("mixtral", True, "rtn"),
     ("qwen3_moe", True, "rtn"), ("qwen3_moe", True, "awq"), ("qwen3_moe", True, "gptq"), ("qwen3_moe", False, "rtn")],
)  # fmt: skip
def test_experts_are_quantized_one_by_one(family: str, fused: bool, algorithm: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny.checkpoint(tmp_path / "hf", family, fused=fused)
    argv = ["quantize", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "q"), "--algorithm", algorithm]
    if algorithm != "rtn":
        text = tmp_path / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog, and then it rests a while. " * 60)
        argv += ["-d", "text", "--data_files", str(text)]
    assert main([*argv, "--group_size", "32", "--max_kl", "0.3"]) == 0
    checkpoint = Checkpoint(tmp_path / "q")
    assert len(checkpoint.quantized) == 2 * (4 + 6 * 3)
    single = {("mixtral", False): "block_sparse_moe.experts.5.w2", ("mixtral", True): "mlp.experts.5.w2"}
    assert f"model.layers.1.{single.get((family, fused), 'mlp.experts.5.down_proj')}" in checkpoint.quantized
    assert not [name for name in checkpoint.quantized if name.endswith(".gate")]
    assert main(["dequantize", "-m", str(tmp_path / "q"), "-o", str(tmp_path / "f"), "--max_kl", "1e-5"]) == 0
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "f", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    packed = load(tmp_path / "q")
    assert sum(isinstance(m, QuantLinear) for m in packed.modules()) == len(checkpoint.quantized)
    with torch.no_grad():
        expected, found = plain.eval()(tiny.ids(20)).logits, packed(tiny.ids(20)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(source(tiny.ids(20)).logits, expected, atol=1e-2)


@pytest.mark.usefixtures("cache")
def test_single_experts_that_transformers_cannot_read_are_loaded(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "granitemoe", num_local_experts=4, num_experts_per_tok=2)
    for command, source, out in (("quantize", "hf", "q"), ("dequantize", "q", "f")):
        assert main([command, "-m", str(tmp_path / source), "-o", str(tmp_path / out), "--max_kl", "0.5"]) == 0
    packed, plain = load(tmp_path / "q"), load(tmp_path / "f")
    with torch.no_grad():
        torch.testing.assert_close(packed(tiny.ids(9)).logits, plain(tiny.ids(9)).logits, rtol=1e-4, atol=1e-4)
