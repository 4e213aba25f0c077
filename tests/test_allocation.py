"""Bits and group sizes chosen by layer: budgets are kept, sensitivities are true, choices of the user stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from olive.cache import Cache
from olive.engine import run
from olive.errors import ConfigError, PassError
from olive.model import sha256
from olive.plan import plan
from olive.quant.formats.checkpoint import Checkpoint
from olive.report import Report
from olive.workflow import read_workflow
from places import TEMPLATE, TRAVEL

ROWS = {"name": "json", "files": [str(TRAVEL)], "text_template": TEMPLATE, "max_samples": 8, "max_seq_len": 48}


def quantize(model: Path, out: Path, **step: Any) -> Report:
    step = {"type": "rtn", "data": ROWS, "format": "gptq"} | step
    made = read_workflow({"input_model": {"path": str(model)}, "passes": [step], "output_dir": str(out),
                          "verify": {"level": "files"}})  # fmt: skip
    cache = Cache(out.with_name(out.name + ".cache"))
    return run(plan(made, cache), cache)


def allocation(report: Report) -> dict[str, Any]:
    return report.steps[0].facts["allocation"]


def bits(out: Path) -> dict[str, tuple[int, int]]:
    found = Checkpoint(out)
    return {n: (w.bits, w.group_size) for n in found.quantized for w in [found.quantized_weight(n)]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.checkpoint(folder, "llama", hidden_size=128, intermediate_size=256)
    return folder


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("rtn", "gptq"), ("hqq", "olive"), ("kquant", "compressed-tensors"), ("gptq", "gptq"), ("awq", "olive")],
)
def test_the_size_is_at_or_just_under_the_target(kind: str, layout: str, llama: Path, tmp_path: Path) -> None:
    report = quantize(llama, tmp_path / "out", type=kind, format=layout, target_size="600kB")
    found = allocation(report)
    assert found["bytes"] == report.output_bytes  # what was counted beforehand is what was written
    assert 580_000 < report.output_bytes <= 600_000
    assert len(set(bits(tmp_path / "out").values())) > 1
    assert found["kl_divergence"] > 0
    assert found["held_back_rows"] == 2
    assert report.steps[0].facts.get("calibration_rows", 6) == 6  # none of them is among the others


def test_what_is_written_is_what_was_chosen(llama: Path, tmp_path: Path) -> None:
    found = allocation(quantize(llama, tmp_path / "out", target_size="3.6bpw"))
    written = bits(tmp_path / "out")
    for name, unit in found["units"].items():
        alike = [n for n in written if n.rpartition(".")[0] == name.rpartition(".")[0]]
        if name.endswith("q_proj"):
            assert len({written[n] for n in alike if not n.endswith("o_proj")}) == 1
            assert unit["linears"] == 3
        assert "{}:{}".format(*written[name]) == unit["setting"]
        assert unit["predicted_kl"] == unit["sensitivity"][unit["setting"]]
    assert found["predicted_kl"] == pytest.approx(sum(u["predicted_kl"] for u in found["units"].values()))
    weights = sum(w.codes.numel() for w in map(Checkpoint(tmp_path / "out").quantized_weight, written))
    assert found["bits_per_weight"] == pytest.approx(8 * sum(u["bytes"] for u in found["units"].values()) / weights)
    assert 3.4 < found["bits_per_weight"] <= 3.6


def test_a_measured_sensitivity_is_that_of_the_model_with_one_unit_rounded(llama: Path, tmp_path: Path) -> None:
    from olive.data.samples import windows
    from olive.data.spec import DataSpec
    from olive.model import open_model
    from olive.passes.held_back import hold_back
    from olive.runtime.torch_model import load, load_tokenizer

    found = allocation(quantize(llama, tmp_path / "out", target_size="4bpw"))["units"]
    ids = hold_back(open_model(llama), windows(DataSpec(**ROWS), load_tokenizer(llama)), "test")[0]
    unit, linears = "model.layers.0.mlp.gate_proj", ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    others = [n for n, m in load(llama).named_modules() if isinstance(m, torch.nn.Linear) and n not in linears]
    for setting in ("4:128", "2:32"):
        size = int(setting[2:])
        quantize(llama, tmp_path / setting[0], data=None, bits=int(setting[0]), group_size=size,
                 exclude=[n for n in others if n != "lm_head"])  # fmt: skip
        with torch.no_grad():
            p, q = (torch.log_softmax(load(f)(ids).logits, -1) for f in (llama, tmp_path / setting[0]))
        true = (p.exp() * (p - q)).sum(-1).mean()
        assert found[unit]["sensitivity"][setting] == pytest.approx(float(true), rel=1e-3)


def test_the_smallest_model_that_keeps_a_divergence(llama: Path, tmp_path: Path) -> None:
    loose, tight = (quantize(llama, tmp_path / str(b), kl_budget=b) for b in (0.2, 0.05))
    assert allocation(loose)["kl_divergence"] <= 0.2
    assert allocation(tight)["kl_divergence"] <= 0.05
    assert loose.output_bytes == allocation(loose)["bytes"] < tight.output_bytes == allocation(tight)["bytes"]


def test_a_divergence_that_cannot_be_kept(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.passes.held_back import HeldBack

    honest = HeldBack.compare
    monkeypatch.setattr(HeldBack, "compare", lambda *a: honest(*a) | {"kl_divergence": 0.7})
    with pytest.raises(PassError, match=r"kl_budget 0.2: not kept in \d tries; the nearest had 0.7; give a larger one"):
        quantize(llama, tmp_path / "out", kl_budget=0.2)


def test_sensitivities_are_measured_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.passes.sensitivity import Sensitivities

    file = tmp_path / "kept" / "sensitivities.json"
    for kind in ("rtn", "awq", "gptq"):
        file.unlink(missing_ok=True)
        common: dict[str, Any] = {"type": kind, "sensitivities": str(file)}
        quantize(llama, tmp_path / f"{kind}-first", target_size="4bpw", **common)
        with monkeypatch.context() as patch:
            patch.delattr(Sensitivities, "measure")
            quantize(llama, tmp_path / f"{kind}-again", target_size="4.00bpw", **common)
            other = quantize(llama, tmp_path / f"{kind}-other", target_size="5bpw", **common)
        assert sha256(tmp_path / f"{kind}-first/model.safetensors") == sha256(
            tmp_path / f"{kind}-again/model.safetensors"
        )
        assert 4 < allocation(other)["bits_per_weight"] <= 5
    with pytest.raises(ConfigError, match="measured with another options and quantizer; give another file"):
        quantize(llama, tmp_path / "b", target_size="4bpw", type="rtn", sensitivities=str(file))
    file.write_text("{}")
    with pytest.raises(ConfigError, match="not a file of sensitivities; give another name"):
        quantize(llama, tmp_path / "b", target_size="4bpw", type="gptq", sensitivities=str(file))


def test_saved_statistics_take_the_place_of_the_data(llama: Path, tmp_path: Path) -> None:
    saved = tmp_path / "statistics"
    quantize(llama, tmp_path / "first", type="awq", save_statistics=str(saved), target_size="4bpw", format="olive")
    report = quantize(llama, tmp_path / "out", type="gptq", data=None, statistics=str(saved), target_size="4bpw")
    assert report.steps[0].facts["calibration_rows"] == 6
    assert allocation(report)["held_back_rows"] == 8  # of the shipped text


def test_what_the_user_chose_stands(llama: Path, tmp_path: Path) -> None:
    step = {"exclude": ["*.0.self_attn.*"], "overrides": {"*.1.mlp.*": "8:64"}, "target_size": "5bpw"}
    found = allocation(quantize(llama, tmp_path / "out", **step))["units"]
    written = bits(tmp_path / "out")
    assert not any(".0.self_attn." in name for name in written)
    assert {written[n] for n in written if ".1.mlp." in n} == {(8, 64)}
    assert found["model.layers.0.self_attn.q_proj"]["setting"] == "float"


@pytest.mark.parametrize("tied", [False, True])
def test_tables_take_part_when_asked_for(tied: bool, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "model", "llama", tie_word_embeddings=tied)
    step: dict[str, Any] = {"format": "olive", "lm_head": "int4", "embeddings": "int4"}
    report = quantize(tmp_path / "model", tmp_path / "out", target_size="5bpw", **step)
    tables = {name: unit for name, unit in allocation(report)["units"].items() if "layers" not in name}
    assert sorted(tables) == (["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"])
    written = bits(tmp_path / "out")
    for name, unit in tables.items():
        assert "{}:{}".format(*written[name]) == unit["setting"]
        assert unit["sensitivity"]["2:64"] > unit["sensitivity"]["4:64"] > unit["sensitivity"]["8:64"] > 0
    quantize(tmp_path / "model", tmp_path / "float", target_size="11bpw", overrides={"*.layers.*": "2:64"}, **step)
    assert "model.embed_tokens" not in bits(tmp_path / "float") or not tied


def test_experts_of_a_layer_are_one_unit(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "model", "mixtral", num_hidden_layers=1)
    found = allocation(quantize(tmp_path / "model", tmp_path / "out", target_size="4bpw"))["units"]
    assert {unit["linears"] for unit in found.values()} == {3, 1, 18}
    written = bits(tmp_path / "out")
    assert len({setting for name, setting in written.items() if "experts" in name}) == 1


def test_the_best_of_several_with_one_allocation(llama: Path, tmp_path: Path) -> None:
    report = quantize(llama, tmp_path / "out", type="best", target_size="4bpw",
                      candidates=[{"type": "rtn"}, {"type": "kquant"}])  # fmt: skip
    assert {row["bytes"] for row in report.steps[0].facts["candidates"]} == {
        (tmp_path / "out" / "model.safetensors").stat().st_size
    }
    assert allocation(report)["bits_per_weight"] <= 4


def test_memory_of_the_runtime_is_another_size(llama: Path, tmp_path: Path) -> None:
    found = allocation(quantize(llama, tmp_path / "out", target_size="4.6bpw", size_of="runtime"))
    assert 4 < found["bits_per_weight"] <= 4.6
    assert not any(unit["setting"].startswith("3:") for unit in found["units"].values())  # they would lie in 4 bits


def test_the_report_tells_what_was_chosen(llama: Path, tmp_path: Path) -> None:
    lines = "\n".join(quantize(llama, tmp_path / "out", target_size="4bpw").lines())
    assert "bits:group size by unit: " in lines
    assert "bits per weight, " in lines
    assert "on 2 held-back rows, predicted " in lines


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"target_size": "2.0"}, r"target_size: give a number and a unit \(B, kB, .* or bpw\), as in 2.0GB"),
        ({"target_size": "2GB", "kl_budget": 0.1}, "give one of them"),
        ({"target_size": "2GB", "format": "awq"}, "the awq layout has one setting for all layers; use format gptq"),
        ({"sensitivities": "x"}, "they serve a budget; give target_size or kl_budget too"),
        ({"size_of": "runtime"}, "it says what a budget counts; give target_size or kl_budget too"),
        ({}, "this quantizer uses none without target_size or kl_budget"),
        ({"target_size": "400kB"}, r"target_size 400kB: the smallest settings take 0.\d+MB with all that stays float"),
        ({"target_size": "2bpw"}, r"target_size 2bpw: the smallest settings take 2.\d+bpw; give that or more"),
        ({"target_size": "4bpw", "exclude": ["*"]}, "target_size 4bpw: no linear layer can be quantized"),
        ({"target_size": "9GB"}, "target_size 9GB: the float model is not larger; there is nothing to quantize"),
    ],
)
def test_budgets_that_cannot_be(step: dict[str, Any], words: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        quantize(llama, tmp_path / "out", **step)
    assert not (tmp_path / "out").exists()


def test_a_kill_while_quantizing_does_not_lose_the_sensitivities(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive.passes.gptq import Gptq
    from olive.passes.sensitivity import Sensitivities

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Gptq, "quantize", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(llama, tmp_path / "out", type="gptq", target_size="4bpw")
    with monkeypatch.context() as patch:
        patch.delattr(Sensitivities, "measure")
        quantize(llama, tmp_path / "out", type="gptq", target_size="4bpw")
    quantize(llama, tmp_path / "whole", type="gptq", target_size="4bpw")
    assert sha256(tmp_path / "out/model.safetensors") == sha256(tmp_path / "whole/model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "whole/config.json").read_text()
    )
