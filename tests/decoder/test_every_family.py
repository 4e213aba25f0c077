"""What every family promises: the tokens of transformers, also in padded batches; integers that compute what they say;
adapters that compute what PEFT computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from olive.decoder import lora
from olive.decoder.build import build
from olive.decoder.families import FAMILIES
from olive.decoder.options import Options
from olive.evaluate.logits import checkpoint_logits
from olive.model import Model
from olive.quant.affine import fitting_group, round_to_nearest
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.session import OnnxDecoder

BOUND = 1e-4
"""Float32 sums in another order differ by about 1e-5 at logits of about 5."""
TOKENS = 64


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def test_every_family_is_tested() -> None:
    assert set(tiny.DECODERS) == set(FAMILIES)


def generated(folder: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Generate greedily in GenAI, all prompts in one batch, shorter ones padded on the right."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    longest = max(map(len, prompts))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=longest + tokens, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, parameters)
    pad = 1
    generator.append_tokens(np.array([p + [pad] * (longest - len(p)) for p in prompts], np.int32))
    found: list[list[int]] = [[] for _ in prompts]
    while len(found[0]) < tokens and not generator.is_done():
        generator.generate_next_token()
        for row, token in zip(found, generator.get_next_tokens(), strict=True):
            row.append(int(token))
    return found


def check_greedy(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the most probable one given those before it; where the first two are nearly equal, either is."""
    ids = torch.tensor([prompt + tokens])
    rows = logits(model, ids)[0, len(prompt) - 1 : -1]
    for row, token in zip(rows, tokens, strict=True):
        if token == model.config.get_text_config().eos_token_id:
            return  # the row has ended; what follows is padding
        assert row.max() - row[token] < 2 * BOUND


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_greedy_tokens_are_those_of_transformers_alone_and_in_a_padded_batch(family: str, tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS[family])
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    prompts = [tiny.ids(length, batch=1, seed=length)[0].tolist() for length in (30, 11, 21)]
    (alone,) = generated(tmp_path / "onnx", prompts[:1], TOKENS)
    check_greedy(model, prompts[0], alone)
    for prompt, tokens in zip(prompts, generated(tmp_path / "onnx", prompts, TOKENS), strict=True):
        check_greedy(model, prompt, tokens)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_logits_of_padded_rows_and_of_the_last_position_alone(family: str, tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS[family])
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(logits="last"))
    ids, lengths = tiny.ids(40, batch=3), (40, 7, 23)
    decoder = OnnxDecoder(tmp_path / "onnx", 1)
    everywhere = decoder.logits(ids.numpy(), lengths=lengths)
    last = raw_logits(tmp_path / "onnx", ids.numpy(), lengths)
    assert last.shape == (3, 1, tiny.VOCAB)
    for row, length in enumerate(lengths):
        expected = logits(model, ids[row : row + 1, :length])[0].numpy()
        assert np.abs(everywhere[row, :length] - expected).max() < BOUND
        assert np.abs(last[row, 0] - expected[-1]).max() < BOUND


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_the_checkpoint_that_a_graph_is_verified_against_is_run_layer_by_layer(family: str, tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS[family])
    ids = tiny.ids(40)
    found = torch.cat(list(checkpoint_logits(Model("hf", tmp_path / "hf"), ids, "cpu")))
    assert (found - logits(model, ids)).abs().max() < BOUND


def raw_logits(folder: Path, ids: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Run the graph as it is."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids, "attention_mask": (np.arange(ids.shape[1]) < np.array(lengths)[:, None]).astype(np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.empty((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], feed)[0]


def linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every matrix of a decoder layer that is rounded, as a view [N, K] into the model."""
    experts = {id(p): p for n, p in model.named_parameters() if p.dim() == 3}
    for name, parameter in model.named_parameters():
        if id(parameter) in experts:
            for i, matrix in enumerate(parameter.data):
                for j, part in enumerate(matrix.chunk(2) if "gate_up" in name else [matrix]):
                    yield f"{name}.{i}.{j}", part
        elif parameter.dim() == 2 and any(part.isdigit() for part in name.split(".")) and not name.endswith(ROUTERS):
            transposed = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
            yield name, parameter.data.t() if transposed else parameter.data


ROUTERS = ("mlp.gate.weight",)


@pytest.mark.parametrize(("precision", "bits"), [("int4", 4), ("int8", 8)])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_rounded_graphs_compute_what_the_dequantized_model_computes(
    family: str, precision: Any, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # experts of 8 bits round activations whatever the accuracy level, but for this switch
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")
    model = tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS[family])
    options = Options(precision, group_size=32, lm_head="float", embeddings="float", accuracy_level=0)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", options)
    rounded = 0
    for _, weight in linears(model):
        size = fitting_group(weight.shape[1], 32)
        assert size is not None
        weight.copy_(round_to_nearest(weight.contiguous(), bits, size, symmetric=False).dequantize())
        rounded += 1
    assert sum(found == bits for found in facts["bits"].values()) == rounded
    ids = tiny.ids(40)
    found = OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy())
    assert np.abs(found - logits(model, ids).numpy()).max() < 1e-3


TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
}
LIKE_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_adapters_on_every_linear(family: str, precision: Any, tmp_path: Path) -> None:
    from decoder.test_adapters import train

    base = tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS[family])
    extra = {"fan_in_fan_out": True} if family == "gpt2" else {}
    tuned = train(tmp_path / "adapter", tmp_path / "hf", TARGETS.get(family, LIKE_LLAMA), 4, **extra)
    options = Options(adapter_precision=precision)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", options, [tmp_path / "adapter"])
    lora.convert(tmp_path / "adapter", tmp_path / "onnx", tmp_path / "a.onnx_adapter")
    decoder, ids = OnnxDecoder(tmp_path / "onnx", 1), tiny.ids(30)
    expected = logits(tuned, ids)
    assert (logits(base, ids) - expected).abs().max() > 0.05
    difference = np.abs(decoder.logits(ids.numpy(), tmp_path / "a.onnx_adapter") - expected.numpy()).max()
    # float16 has 11 bits: relative errors of 5e-4 in A and B, in an update that changes logits by less than 10
    assert difference < (1e-3 if precision == "fp32" else 2e-2)
    assert np.abs(decoder.logits(ids.numpy()) - logits(base, ids).numpy()).max() < BOUND
