"""Quality on a text: the numbers of a slow computation in transformers, in both forms of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from pairs import Pair
from torch import Tensor

import tiny
from olive.data.rows import heldout_text
from olive.data.spec import DataSpec
from olive.errors import ConfigError, OliveError
from olive.evaluate.evaluators import Measuring, measured
from olive.evaluate.quality import Quality
from olive.evaluate.text import TextQuality
from olive.model import Model
from olive.runtime.layers import LayeredModel
from olive.runtime.torch_model import load_adapted, load_tokenizer

LENGTH = 90  # no multiple of the positions that are computed at once


def spec(text: Path, **more: Any) -> DataSpec:
    return DataSpec(files=(str(text),), max_seq_len=LENGTH, **more)


def windows(model: Model, text: Path) -> Tensor:
    ids = load_tokenizer(model.path)(text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def slow(p: Tensor, q: Tensor, ids: Tensor) -> dict[str, float]:
    """Compute the metrics of logits [rows, T, V] in double precision, all at once."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    loss = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    return {"perplexity": float(loss.exp()), "kl_divergence": float(divergence), "top1_agreement": float(agreement)}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Model:
    """Return the pair's checkpoint with a little noise."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("other") / "hf"
    shutil.copytree(pair.hf.path, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return Model("hf", folder)


def in_transformers(model: Model, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_metrics_are_those_of_transformers(form: str, pair: Pair, other: Model, text: Path) -> None:
    model = getattr(pair, form)
    ids = windows(model, text)
    wanted = slow(in_transformers(other, ids), in_transformers(pair.hf, ids), ids)
    found = measured(TextQuality(data=spec(text)), model, Measuring(source=other))
    assert wanted["kl_divergence"] > 0.01
    assert found == pytest.approx(wanted, rel=1e-4)  # float32 against double precision
    assert measured(TextQuality(data=spec(text)), model, Measuring(source=other)) == found
    alone = measured(TextQuality(data=spec(text), compare=False), model, Measuring())
    assert alone == pytest.approx({"perplexity": found["perplexity"]}, rel=1e-12)


def test_logits_taken_in_parts_give_the_same_sums() -> None:
    p, q = (torch.randn(3, 130, 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ids = torch.randint(0, 50, (3, 130))
    quality = Quality()
    for row in range(3):
        quality.add(p[row : row + 1], q[row : row + 1], ids[row : row + 1])
    assert {k: v for k, v in quality.figures().items() if k in slow(p, q, ids)} == pytest.approx(
        slow(p, q, ids), rel=1e-5
    )


def test_the_source_compared_with_itself_is_the_same(pair: Pair, text: Path) -> None:
    found = measured(TextQuality(data=spec(text)), pair.hf, Measuring(source=pair.hf))
    assert (found["kl_divergence"], found["top1_agreement"]) == (0.0, 1.0)


def test_adapters_count_in_both_forms(pair: Pair, text: Path) -> None:
    ids = windows(pair.hf, text)
    with torch.no_grad():
        tuned = load_adapted(pair.hf.path, pair.peft)(ids).logits
    wanted = slow(in_transformers(pair.hf, ids), tuned, ids)
    assert wanted["kl_divergence"] > 0.001
    for model, adapter in ((pair.hf, pair.peft), (pair.onnx, pair.onnx_adapter)):
        found = measured(TextQuality(data=spec(text)), model, Measuring(source=pair.hf, adapter=adapter))
        assert found == pytest.approx(wanted, rel=1e-3)
        ctx = Measuring(source=pair.hf, adapter=adapter, source_adapter=pair.peft)
        assert measured(TextQuality(data=spec(text)), model, ctx)["kl_divergence"] < 1e-6


def test_without_data_it_is_the_text_that_no_quantizer_sees(pair: Pair) -> None:
    ids = TextQuality().ids(pair.hf, None)
    read = load_tokenizer(pair.hf.path).decode(ids[0])
    assert heldout_text().startswith(read[:100])
    assert ids.shape[1] == 256  # all that the model's positions allow
    assert len(TextQuality(data=DataSpec(max_samples=3)).ids(pair.hf, None)) == 3


def test_the_source_is_computed_once_for_many_candidates(
    pair: Pair, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = Measuring(source=pair.hf, cache_dir=tmp_path)
    first = measured(TextQuality(data=spec(text)), pair.onnx, ctx)
    assert len(list(tmp_path.iterdir())) == 1

    def refuse(_: LayeredModel) -> Any:
        raise AssertionError("the layers ran again")

    monkeypatch.setattr(LayeredModel, "layers", refuse)
    assert measured(TextQuality(data=spec(text)), pair.onnx, ctx) == first
    with pytest.raises(AssertionError, match="ran again"):
        measured(TextQuality(data=spec(text, max_samples=2)), pair.onnx, ctx)


def test_models_that_cannot_be_compared_are_refused(pair: Pair, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="kl_divergence, top1_agreement: compare with a source model, and none was given"
    ):
        measured(TextQuality(data=spec(text)), pair.hf, Measuring())
    tiny.checkpoint(tmp_path / "wide", "llama", vocab_size=384)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 320 entries, .*wide one of 384; compare models of one"):
        measured(TextQuality(data=spec(text)), pair.hf, Measuring(source=Model("hf", tmp_path / "wide")))
    shutil.copytree(pair.hf.path, tmp_path / "strange")
    file = tmp_path / "strange" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["t"] = vocab["t"], vocab["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"its tokenizer reads the text otherwise than that of .*strange"):
        measured(TextQuality(data=spec(text)), pair.hf, Measuring(source=Model("hf", tmp_path / "strange")))


def test_a_text_of_one_token_is_refused(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"one.txt: one token has no next one to predict; give more text"):
        measured(TextQuality(data=spec(tmp_path / "one.txt"), compare=False), pair.hf, Measuring())


def test_a_graph_with_the_last_logits_alone_is_refused(pair: Pair, text: Path, tmp_path: Path) -> None:
    """GenAI's builder makes such heads with prune_lm_head; their one row would be scored as if it were all."""
    shutil.copytree(pair.onnx.path, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    (head,) = [node for node in model.graph.node if "logits" in node.output]
    (cut,) = [i for i, name in enumerate(head.input) if name not in {t.name for t in model.graph.initializer}]
    last = onnx.helper.make_tensor("last", onnx.TensorProto.INT64, [1], [-1])
    model.graph.initializer.append(last)
    model.graph.node.insert(
        len(model.graph.node) - 1, onnx.helper.make_node("Gather", [head.input[cut], "last"], ["only"], axis=1)
    )
    head.input[cut] = "only"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, tmp_path / "onnx" / "model.onnx")
    with pytest.raises(OliveError, match="logits of the last token only, so text cannot be scored"):
        measured(TextQuality(data=spec(text), compare=False), Model("onnx", tmp_path / "onnx"), Measuring())


def test_logits_that_are_no_numbers_are_refused(pair: Pair, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(pair.hf.path, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(OliveError, match="logits that are not finite numbers"):
        measured(TextQuality(data=spec(text), compare=False), Model("hf", tmp_path / "hf"), Measuring())
