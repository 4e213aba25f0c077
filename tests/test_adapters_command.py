"""``olive adapters``: what a model takes, which adapters fit, and what the manifest says of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from decoder.test_foreign_adapters import write
from olive.cli import main
from olive.model import open_model, read_manifest, weights_digest
from olive.runtime import adapters

NAMES = ("self_attn.v_proj", "mlp.down_proj")


def pairs(rank: int, *, inner: int = 128) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random A [R, K] and B [N, R] on v_proj and down_proj of both layers."""
    generator = torch.Generator().manual_seed(rank)
    sizes = ((64, 32), (inner, 64))
    return {f"model.layers.{i}.{name}": (torch.randn(rank, k, generator=generator) / 8,
                                         torch.randn(n, rank, generator=generator) / 8)
            for i in range(2) for name, (k, n) in zip(NAMES, sizes, strict=True)}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint ``hf``, the adapter ``travel`` and the model ``out`` that was built of both."""
    folder = tmp_path_factory.mktemp("built")
    tiny.checkpoint(folder / "hf", "llama")
    write(folder / "travel", pairs(4), r=4)
    argv = ["auto-opt", "-m", str(folder / "hf"), "-a", str(folder / "travel"), "-o", str(folder / "out")]
    assert main([*argv, "--verify", "files", "--no_cache", "--adapter_precision", "fp16"]) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """Run ``olive adapters``; return its output, or the error where there is none."""
    capsys.readouterr()
    assert main(["adapters", *argv]) == code
    out, err = capsys.readouterr()
    return out or err


def test_the_manifest_describes_the_adapter(built: Path) -> None:
    manifest = read_manifest(built / "out")
    assert manifest is not None
    found = manifest["adapters"]["travel"]
    file = adapters.read(built / "out" / found["path"])
    assert found == {
        "path": "model/adapter_weights.onnx_adapter",
        "rank": 4,
        "dtype": "float16",
        "base_digest": weights_digest(built / "hf"),
        "shapes": {name: list(shape) for name, shape in file.shapes.items()},
    }
    assert found["shapes"]["model.layers.1.mlp.down_proj.lora_A.weight"] == [128, 4]
    assert set(file.dtypes.values()) == {"float16"}
    assert file.base == int(found["base_digest"][:7], 16)


def test_list_as_text(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, 0, "list", "-m", str(built / "out")).split())
    assert f"base {weights_digest(built / 'hf')[:12]} inputs 4 modules take an adapter, of any rank" in text
    assert "model.layers.*.mlp.down_proj K 128 N 64 float16 layers 0-1" in text
    assert "model.layers.*.self_attn.qkv_proj K 64 N 128 float16 layers 0-1 (q_proj, k_proj, v_proj)" in text
    assert "travel rank 4 float16 0.0" in text


def test_list_as_data_with_a_further_adapter(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "more", pairs(2), r=2)
    told = json.loads(run(capsys, 0, "list", "-m", str(built / "out" / "model"), str(tmp_path / "more"), "--json"))
    assert told["base_digest"] == weights_digest(built / "hf")
    assert told["modules"]["model.layers.0.mlp.down_proj"] == {"k": 128, "n": 64, "dtype": "float16", "parts": {}}
    parts = told["modules"]["model.layers.0.self_attn.qkv_proj"]["parts"]
    assert list(parts.values()) == [64, 32, 32]
    own, more = told["adapters"]
    assert (own["name"], own["ranks"], more["name"], more["ranks"]) == ("travel", [4], "more", [2])
    assert own["bytes"] == (built / "out" / "model" / "adapter_weights.onnx_adapter").stat().st_size
    assert own["modules"] == more["modules"] == sorted(told["modules"])


def test_check_tells_of_each_whether_it_fits(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "good", pairs(2), r=2)
    write(tmp_path / "wide", pairs(2, inner=96), r=2)
    write(tmp_path / "dora", pairs(2), r=2, use_dora=True)
    model, file = str(built / "out"), built / "out" / "model" / "adapter_weights.onnx_adapter"
    assert run(capsys, 0, "check", "-m", model, str(tmp_path / "good"), str(file)).splitlines() == [
        f"fits      {tmp_path / 'good'}: rank 2, 4 modules", f"fits      {file}: rank 4, 4 modules"]  # fmt: skip
    given = [str(tmp_path / name) for name in ("good", "wide", "dora", "none")]
    lines = run(capsys, 2, "check", "-m", model, *given).splitlines()
    assert lines[0].startswith("fits")
    assert "model.layers.0.mlp.down_proj.lora_A.weight has shape [96, 2], expected [128, R]" in lines[1]
    assert "use_dora (DoRA) is not supported" in lines[2]
    assert "none: no such adapter file" in lines[3]
    told = json.loads(run(capsys, 2, "check", "-m", model, *given, "--json"))["adapters"]
    assert [found["fits"] for found in told] == [True, False, False, False]
    assert [found.get("tensor") for found in told] == [None, "model.layers.0.mlp.down_proj.lora_A.weight", None, None]


def test_check_of_files(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, base = str(built / "out"), weights_digest(built / "hf")
    name = "model.layers.0.mlp.down_proj.lora_{}.weight"

    def made(file: str, dtype: Any, digest: str, **shapes: tuple[int, int]) -> str:
        tensors = {name.format(which): np.zeros(shape, dtype) for which, shape in shapes.items()}
        adapters.write(tmp_path / file, tensors, digest)
        return str(tmp_path / file)

    good = made("good.onnx_adapter", np.float16, base, A=(128, 3), B=(3, 64))
    unknown = made("unknown.onnx_adapter", np.float16, "", A=(128, 3), B=(3, 64))
    kind = made("kind.onnx_adapter", np.float32, base, A=(128, 3), B=(3, 64))
    other = made("other.onnx_adapter", np.float16, "f" * 64, A=(128, 3), B=(3, 64))
    ranks = made("ranks.onnx_adapter", np.float16, base, A=(128, 3), B=(2, 64))
    assert run(capsys, 0, "check", "-m", model, good, unknown).count("fits") == 2
    lines = run(capsys, 2, "check", "-m", model, kind, other, ranks).splitlines()
    assert f"{name.format('A')} is float32, expected float16; convert the adapter again for this folder" in lines[0]
    assert (
        f"made for another base than {built / 'out' / 'model'} (base_digest fffffff, expected {base[:7]})" in lines[1]
    )
    assert f"{name.format('A')} has rank 3, but {name.format('B')} has rank 2" in lines[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["list"], "olive adapters list: --model_name_or_path (-m) is required"),
        (["check", "-m", "out"], "olive adapters check: give one or more adapters"),
        (["list", "-m", "hf"], "hf: is not an ONNX model; give the folder that auto-opt wrote"),
        (["show", "-m", "out"], "invalid choice: 'show'"),
    ],
)
def test_refusals(
    argv: list[str], message: str, built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(built)
    assert message in run(capsys, 2, *argv)


def test_an_adapter_in_the_current_folder_has_its_folders_name(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built / "travel")
    assert list(open_model(built / "hf", Path()).adapters) == ["travel"]


def test_one_name_for_two_adapters_is_refused(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = built / "out" / "model" / "adapter_weights.onnx_adapter"
    argv = ["generate", "-m", str(built / "out"), "-p", "x", "--adapter", f"a={file}", "--adapter", f"a={file}"]
    assert main(argv) == 2
    assert "a is given twice" in capsys.readouterr().err


def test_a_place_that_cannot_be_made_is_refused(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = built / "hf" / "config.json" / "x.onnx_adapter"
    argv = ["convert-adapters", "-m", str(built / "out"), "-a", str(built / "travel"), "-o", str(out)]
    assert main(argv) == 2
    assert "x.onnx_adapter: cannot be written" in capsys.readouterr().err


def test_a_graph_without_inputs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from olive.decoder.build import build
    from olive.decoder.options import Options
    from olive.quant.formats.checkpoint import Checkpoint

    tiny.checkpoint(tmp_path / "hf", "llama")
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    write(tmp_path / "a", pairs(2), r=2)
    text = run(capsys, 0, "list", "-m", str(tmp_path / "onnx"), str(tmp_path / "a"))
    assert text.splitlines()[1:4] == ["base      unknown", "inputs    none", "adapters  1"]
    assert "a                does not fit: " in text and "it has no adapter inputs" in text
