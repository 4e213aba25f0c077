"""Quantizers that look at data: statistics kept and reused, kills, and input that is not as it should be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from olive.cache import Cache
from olive.engine import run
from olive.errors import ConfigError, OliveError, PassError
from olive.model import sha256
from olive.plan import plan
from olive.report import Report
from olive.workflow import read_workflow
from places import LAB_MODEL, TEMPLATE, TRAVEL

ROWS = {"name": "json", "files": [str(TRAVEL)], "text_template": TEMPLATE, "max_samples": 8, "max_seq_len": 48}


def quantize(model: Path, out: Path, cache: Cache | None = None, seed: int = 0, **step: Any) -> Report:
    step = {"data": ROWS, "group_size": 32} | step
    if step["data"] is None:
        del step["data"]
    made = read_workflow({"input_model": {"path": str(model)}, "passes": [step], "output_dir": str(out),
                          "seed": seed, "verify": {"level": "files"}})  # fmt: skip
    cache = cache or Cache(out.with_name(out.name + ".cache"))
    return run(plan(made, cache, overwrite=True), cache)


def weights(out: Path) -> str:
    return sha256(out / "model.safetensors")


@pytest.mark.parametrize("step", [{"type": "awq"}, {"type": "kquant"}, {"type": "gptq"}], ids=lambda s: s["type"])
def test_saved_statistics_give_the_bytes_of_fresh_ones(step: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / "statistics"
    quantize(LAB_MODEL, tmp_path / "first", type="awq", save_statistics=str(saved))
    quantize(LAB_MODEL, tmp_path / "fresh", **step)
    quantize(LAB_MODEL, tmp_path / "reused", data=None, statistics=str(saved), **step)
    assert weights(tmp_path / "reused") == weights(tmp_path / "fresh")


def test_statistics_are_saved_although_the_result_is_cached(tmp_path: Path) -> None:
    cache, saved = Cache(tmp_path / "cache"), str(tmp_path / "statistics")
    quantize(LAB_MODEL, tmp_path / "out", cache, type="awq", save_statistics=saved)
    shutil.rmtree(saved)
    again = quantize(LAB_MODEL, tmp_path / "out", cache, type="awq", save_statistics=saved)
    assert not again.steps[0].cached
    assert Path(saved, "statistics.json").is_file()


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved = str(tmp_path / "statistics")
    quantize(LAB_MODEL, tmp_path / "out", type="awq", save_statistics=saved)
    tiny.checkpoint(tmp_path / "other", "llama")
    with pytest.raises(ConfigError, match="gathered with another model"):
        quantize(tmp_path / "other", tmp_path / "b", type="awq", data=None, statistics=saved)
    with pytest.raises(ConfigError, match="give one of the two"):
        quantize(LAB_MODEL, tmp_path / "b", type="awq", statistics=saved)
    with pytest.raises(ConfigError, match="follow the quantized layers"):
        quantize(LAB_MODEL, tmp_path / "b", type="gptq", save_statistics=str(tmp_path / "more"))
    with pytest.raises(ConfigError, match="not a finished folder"):
        quantize(LAB_MODEL, tmp_path / "b", type="awq", data=None, statistics=str(LAB_MODEL))


KILLED = """
import json, os, signal, sys
from olive.cache import Cache
from olive.engine import run
from olive.plan import plan
from olive.workflow import read_workflow
made, cache = read_workflow(json.loads(sys.argv[1])), None
cache = Cache(__import__("pathlib").Path(sys.argv[2]))
def progress(what, done, total):
    if (what, done) == ("quantize", 200):
        os.kill(os.getpid(), signal.SIGKILL)
run(plan(made, cache), cache, progress=progress)
"""


@pytest.mark.parametrize("kind", ["gptq", "awq", "tune"])
def test_layers_finished_before_a_kill_are_not_done_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive.passes import pass_class

    step = {"type": kind, "data": ROWS, "group_size": 32} | ({"iterations": 2} if kind == "tune" else {})
    made = {"input_model": {"path": str(LAB_MODEL)}, "passes": [step], "output_dir": str(tmp_path / "out"),
            "verify": {"level": "files"}}  # fmt: skip
    argv = [sys.executable, "-c", KILLED, json.dumps(made), str(tmp_path / "cache")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums of float numbers depend on it
    killed = subprocess.run(argv, check=False, env=os.environ | threads)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done: list[str] = []
    own = pass_class(kind)
    quantize_layer = own.quantize

    def counted(self: Any, layer: Any, groups: Any) -> Any:
        done.append(layer.name)
        return quantize_layer(self, layer, groups)

    monkeypatch.setattr(own, "quantize", counted)
    cache = Cache(tmp_path / "cache")
    run(plan(read_workflow(made), cache), cache)
    assert done == ["model.layers.2"]
    undisturbed = Cache(tmp_path / "undisturbed")
    again = read_workflow(made | {"output_dir": str(tmp_path / "again")})
    run(plan(again, undisturbed), undisturbed)
    assert weights(tmp_path / "out") == weights(tmp_path / "again")


def test_what_a_kill_left_damaged_is_done_again(tmp_path: Path) -> None:
    from olive.quant.formats.shards import ShardWriter

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    first = ShardWriter(tmp_path, scratch=scratch)
    first.add("a", torch.arange(100))
    first.mark("one", {"fact": 1})
    first.add("b", torch.arange(100))
    first._wait()
    first._file.flush()  # killed here
    second = ShardWriter(tmp_path, scratch=scratch)
    assert (second.marks, second.names()) == ({"one": {"fact": 1}}, ["a"])
    assert torch.equal(second.read("a"), torch.arange(100))
    part = next(scratch.glob("part-*"))
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 255
    part.write_bytes(raw)
    third = ShardWriter(tmp_path, scratch=scratch)
    assert (third.marks, third.names()) == ({}, [])
    third.add("a", torch.arange(100))
    third.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.arange(100))


@pytest.mark.parametrize("kind", ["rtn", "kquant", "hqq", "awq", "gptq", "tune"])
def test_not_a_number_in_the_weights_is_named(kind: str, tmp_path: Path) -> None:
    spoil(tmp_path / "model", "model.layers.1.mlp.down_proj.weight", float("nan"))
    data = {} if kind in ("awq", "gptq", "tune") else {"data": None}
    with pytest.raises(PassError, match=r"layers\.1\.mlp\.(down_proj).*(NaN|weight holds)"):
        quantize(tmp_path / "model", tmp_path / "out", type=kind, **data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_an_overflow_in_the_activations_is_named(kind: str, tmp_path: Path) -> None:
    spoil(tmp_path / "model", "model.layers.0.mlp.up_proj.weight", 3e38)
    with pytest.raises(PassError, match="NaN or infinity on the calibration data"):
        quantize(tmp_path / "model", tmp_path / "out", type=kind)


def spoil(folder: Path, name: str, value: float) -> None:
    tiny.checkpoint(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][:4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", ["rtn", "kquant", "hqq", "awq", "gptq", "tune"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_stays_zero(kind: str, symmetric: bool, tmp_path: Path) -> None:
    from olive.quant.formats.checkpoint import Checkpoint

    name = "model.layers.1.mlp.gate_proj.weight"
    spoil(tmp_path / "model", name, 0.0)
    data = {} if kind in ("awq", "gptq", "tune") else {"data": None}
    more = {"iterations": 2} if kind == "tune" else {}
    quantize(tmp_path / "model", tmp_path / "out", type=kind, symmetric=symmetric, format="gptq", **data, **more)
    assert not Checkpoint(tmp_path / "out").weight(name)[:4].any()


@pytest.mark.parametrize("kind", ["awq", "gptq", "tune", "kquant"])
def test_one_short_row_is_too_little_to_fit_to(kind: str, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Ten words.", encoding="utf-8")
    tiny.checkpoint(tmp_path / "model", "llama")
    more = {"iterations": 2} if kind == "tune" else {}
    report = quantize(tmp_path / "model", tmp_path / "out", type=kind, data={"files": [str(text)]}, **more)
    facts = report.steps[0].facts
    assert facts["calibration_rows"] == 1
    assert all("tokens came by" in f["fallback"] for f in facts["layers"].values())


def test_rows_longer_than_the_context_are_cut(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "model", "llama", max_position_embeddings=64)
    report = quantize(tmp_path / "model", tmp_path / "out", type="awq", data={"max_samples": 2, "max_seq_len": 4096})
    assert report.steps[0].facts["calibration_tokens"] == 2 * 64


@pytest.mark.parametrize("kind", ["rtn", "awq", "gptq"])
def test_sizes_that_no_group_divides(kind: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "model", "llama", intermediate_size=136, num_hidden_layers=1)
    data = {"data": None} if kind == "rtn" else {}
    report = quantize(tmp_path / "model", tmp_path / "out", type=kind, format="gptq", **data)
    fallbacks = report.steps[0].facts["fallbacks"]
    assert fallbacks == {"model.layers.0.mlp.down_proj": "left float"}  # 136 = 8 * 17


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["rtn", "awq", "gptq"])
def test_tied_and_untied_heads_of_a_model_with_one_layer(kind: str, tied: bool, tmp_path: Path) -> None:
    from olive.runtime.torch_model import load

    tiny.checkpoint(tmp_path / "model", "llama", num_hidden_layers=1, tie_word_embeddings=tied)
    data = {"data": None} if kind == "rtn" else {}
    quantize(tmp_path / "model", tmp_path / "out", type=kind, format="gptq", bits=8, **data)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        found, expected = (load(tmp_path / name)(ids).logits for name in ("out", "model"))
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_tables_are_quantized_once(tied: bool, tmp_path: Path) -> None:
    from olive.quant.formats.checkpoint import Checkpoint

    tiny.checkpoint(tmp_path / "model", "llama", tie_word_embeddings=tied)
    quantize(tmp_path / "model", tmp_path / "out", type="rtn", data=None, format="olive", lm_head="int8",
             embeddings="int8")  # fmt: skip
    found = Checkpoint(tmp_path / "out")
    tables = [name for name in found.quantized if "layers" not in name]
    assert tables == ["model.embed_tokens"] if tied else sorted(tables) == ["lm_head", "model.embed_tokens"]


def test_overrides_and_their_mistakes(tmp_path: Path) -> None:
    from olive.quant.formats.checkpoint import Checkpoint

    tiny.checkpoint(tmp_path / "model", "llama")
    overrides = {"*.down_proj": 8, "*.0.self_attn.*": "2:16", "*.0.self_attn.o_proj": "3:64"}
    quantize(tmp_path / "model", tmp_path / "out", type="gptq", overrides=overrides)
    found = Checkpoint(tmp_path / "out")
    settings = {name: (w.bits, w.group_size) for name in found.quantized for w in [found.quantized_weight(name)]}
    assert settings["model.layers.1.mlp.down_proj"] == (8, 32)
    assert settings["model.layers.0.self_attn.q_proj"] == (2, 16)
    assert settings["model.layers.0.self_attn.o_proj"] == (3, 64)
    assert settings["model.layers.1.self_attn.o_proj"] == (4, 32)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"overrides": {"*.x": 8}}, "no linear layer is named like"),
        ({"overrides": {"*.down_proj": "8:x"}}, "give bits"),
        ({"format": "awq", "bits": 8}, "does not hold 8 bits; these do: gptq"),
        ({"format": "olive", "overrides": {"*.down_proj": 3}}, "does not hold 3 bits"),
        ({"embeddings": "int8"}, "use format olive"),
        ({"group_size": 8}, "at least 16"),
    ]
    for change, message in mistakes:
        with pytest.raises(ConfigError, match=message):
            quantize(tmp_path / "model", tmp_path / "out2", **({"type": "gptq"} | change))


def test_tuning_is_deterministic_and_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.passes.tune.Tune.tokens_per_step", 96)  # several batches, whose order the seed decides
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(LAB_MODEL, tmp_path / name, type="tune", iterations=24, seed=seed)
        found[name] = weights(tmp_path / name)
    assert found["a"] == found["b"] != found["c"]


def test_best_tells_what_it_tried_and_keeps_the_nearest(tmp_path: Path) -> None:
    candidates = [{"type": "rtn"}, {"type": "gptq"}, {"type": "gptq", "damping": 1e6}]
    report = quantize(LAB_MODEL, tmp_path / "out", type="best", candidates=candidates, bits=3)
    facts = report.steps[0].facts
    rows = {row["name"]: row["kl_divergence"] for row in facts["candidates"]}
    assert list(rows) == ["rtn", "gptq", "gptq, damping 1000000.0"]
    assert facts["picked"] == min(rows, key=lambda name: rows[name])
    assert facts["calibration_rows"] + facts["held_back_rows"] == 8
    assert any(f"* {facts['picked']}" in line for line in report.lines())


def test_best_keeps_to_its_budget(tmp_path: Path) -> None:
    candidates = [{"type": "rtn"}, {"type": "tune", "iterations": 100000}]
    report = quantize(LAB_MODEL, tmp_path / "out", type="best", candidates=candidates, budget="5s")
    facts = report.steps[0].facts
    assert facts["picked"] == "rtn"
    assert "would not end within 5s" in facts["candidates"][1]["not_done"]
    with pytest.raises(ConfigError, match="as in 90s"):
        quantize(LAB_MODEL, tmp_path / "b", type="best", budget="soon")
    with pytest.raises(OliveError, match="unknown option"):
        quantize(LAB_MODEL, tmp_path / "b", type="best", candidates=[{"type": "rtn", "iterations": 3}])


def test_the_report_tells_each_layer(tmp_path: Path) -> None:
    report = quantize(LAB_MODEL, tmp_path / "out", type="gptq", bits=3)
    layers = report.steps[0].facts["layers"]
    assert len(layers) == 12
    for facts in layers.values():
        assert facts["bits"] == 3
        assert 0 < facts["error"] < facts["error_rounding"]
