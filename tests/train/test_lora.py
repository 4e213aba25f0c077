"""Fine-tuning: it learns, says so, writes what PEFT reads, and the same bytes for the same seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from running import Run, lora

import tiny
from olive.data.samples import Sample
from olive.data.spec import DataSpec
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.decoder.peft import read_peft
from olive.errors import ConfigError, PassError
from olive.model import digests, weights_digest
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.torch_model import load
from olive.train.arguments import learning_rate, training_arguments
from olive.train.lora import Job, answer_loss, attach, hold_back, save


def test_training_lowers_the_loss_on_rows_held_back(base: Path, rows_file: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    before = digests(base)
    model = run(lora(rows_file), base)
    assert run.facts["held_back_rows"] == 1 and run.facts["trained_rows"] == 29 and run.facts["dropped_rows"] == 0
    assert run.facts["held_back_loss_after"] < run.facts["held_back_loss_before"] - 0.5
    assert run.steps == [("train", step, 20) for step in range(1, 21)]
    # The base lies beside the adapter as it was, and nothing else does.
    assert digests(base) == before == digests(model.path)
    assert {p.name for p in model.adapters["adapter"].iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "olive.json",
    }  # fmt: skip
    note = json.loads((model.adapters["adapter"] / "olive.json").read_text())
    assert note == {"format": "olive", "kind": "adapter", "base_digest": weights_digest(base)}
    for file in model.adapters["adapter"].iterdir():
        assert str(tmp_path).encode() not in file.read_bytes() and str(base).encode() not in file.read_bytes()


@pytest.mark.parametrize("training", [{"max_steps": 1}, {"num_train_epochs": 1, "per_device_train_batch_size": 32}])
def test_a_single_step_learns_too(training: dict, base: Path, rows_file: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run(lora(rows_file, training=training | {"learning_rate": 0.01}), base)
    assert run.facts["trained_steps"] == 1
    assert run.facts["held_back_loss_after"] < run.facts["held_back_loss_before"]


def test_peft_reloads_the_adapter_with_the_same_logits(base: Path, tmp_path: Path) -> None:
    job = Job(
        base=base, data=DataSpec(), rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "down_proj"], training={},
        trust_remote_code=False, seed=0, device="cpu", work_dir=tmp_path,
    )  # fmt: skip
    torch.manual_seed(0)
    model = attach(load(base), job)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = model.eval()(ids).logits
        save(model, base, tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")(ids).logits
        plain = load(base)(ids).logits
    assert torch.equal(logits, again)
    assert not torch.allclose(logits, plain, atol=1e-2)


SCRIPT = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])
import torch; torch.set_num_threads(int(sys.argv[5]))
from running import Run, lora
Run(Path(sys.argv[4]))(lora(Path(sys.argv[3]), dropout=0.1), Path(sys.argv[2]), seed=3)
"""


def test_same_seed_gives_the_same_bytes_in_another_process(float_base: Path, rows_file: Path, tmp_path: Path) -> None:
    words = (Path(__file__).parent, float_base, rows_file, tmp_path / "there", torch.get_num_threads())
    subprocess.run([sys.executable, "-c", SCRIPT, *map(str, words)], check=True, capture_output=True)
    Run(tmp_path / "here")(lora(rows_file, dropout=0.1), float_base, seed=3)
    found = digests(tmp_path / "here" / "out")
    assert found == digests(tmp_path / "there" / "out") and "adapter/adapter_model.safetensors" in found


def test_seed_decides_the_adapter_alone(float_base: Path, rows_file: Path, tmp_path: Path) -> None:
    short = lora(rows_file, training={"max_steps": 1})
    for seed in (3, 4):
        Run(tmp_path / str(seed))(short, float_base, seed=seed)
    one, two = (digests(tmp_path / str(seed) / "out") for seed in (3, 4))
    assert {name for name in one if one[name] != two[name]} == {"adapter/adapter_model.safetensors"}


def test_listing_the_pass_loads_no_tensor_library() -> None:
    code = "import sys, olive.passes.lora; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": None}, "lora needs data to train on"),
        ({"training": {"max_step": 3}}, r"training\.max_step: unknown option .*did you mean 'max_steps'"),
        ({"training": {"max_steps": "many"}}, r"training\.max_steps: invalid int value: 'many'"),
        ({"training": {"bf16": "perhaps"}}, r"training\.bf16: .*perhaps"),
        ({"training": {"lr_scheduler_type": "no"}}, r"training\.lr_scheduler_type: invalid choice: 'no'"),
        ({"training": {"output_dir": "x"}}, r"training\.output_dir: not an option here; .*output path"),
        ({"training": {"resume_from_checkpoint": "x"}}, r"training\.resume_from_checkpoint: .*from the beginning"),
        ({"training": {"eval_strategy": "steps"}}, r"training\.eval_strategy: .*held back"),
        (
            {"training": {"per_device_train_batch_size": 0}},
            r"training\.per_device_train_batch_size: .*at least 1, got 0",
        ),
        ({"training": {"gradient_accumulation_steps": 0}}, r"training\.gradient_accumulation_steps: .*at least 1"),
        ({"training": {"max_steps": 0}}, r"training\.max_steps: should be above 0, .*got 0"),
        ({"training": {"num_train_epochs": 0}}, r"training\.num_train_epochs: should be above 0, .*got 0"),
        ({"training": {"use_liger_kernel": True, "max_steps": 1}}, r"training: .*liger-kernel.* is not available"),
        ({"training": {"learning_rate": -1, "max_steps": 1}}, r"training: Invalid learning rate: -1"),
        (
            {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 64}},
            r"training\.dataloader_drop_last: 29 rows do not fill one batch of 64",
        ),
        (
            {"target_modules": ("q_proj", "nosuch")},
            r"target_modules 'nosuch': no layer's name ends so; linear layers: down_proj, .*, q_proj, up_proj, v_proj",
        ),
        ({"target_modules": "nosuch"}, r"target_modules .*nosuch"),
    ],
)
def test_wrong_options_are_refused(options: dict, said: str, float_base: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Run(tmp_path / "run")(lora(rows_file, **options), float_base)
    assert caught.value.exit_code == 2
    assert not list((tmp_path / "run" / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"training": {"max_steps": 4, "learning_rate": "1e38"}}, "training diverged: the loss is nan .* than 1e\\+38"),
        ({"alpha": float("inf")}, "the loss is nan before training"),
    ],
)
def test_an_adapter_that_holds_nan_is_not_a_result(
    options: dict, said: str, float_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(PassError, match=said):
        Run(tmp_path / "run")(lora(rows_file, **options), float_base)
    assert not list((tmp_path / "run" / "out").iterdir())


def test_all_linear_may_come_as_a_flag_which_makes_a_list(float_base: Path, rows_file: Path, tmp_path: Path) -> None:
    options = {"training": {"max_steps": 1}}
    for name, modules in (("text", "all-linear"), ("list", ("all-linear",))):
        Run(tmp_path / name)(lora(rows_file, target_modules=modules, **options), float_base)
    assert digests(tmp_path / "text" / "out") == digests(tmp_path / "list" / "out")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma3"])
def test_by_default_no_expert_and_no_tower_is_adapted(family: str, rows_file: Path, tmp_path: Path) -> None:
    """The graph takes adapters on neither."""
    tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS.get(family, {}))
    model = Run(tmp_path / "run")(lora(rows_file, training={"max_steps": 1}), tmp_path / "hf")
    found = {module.rpartition(".")[2] for module in read_peft(model.adapters["adapter"])}
    mlp = {"gate_proj", "up_proj", "down_proj"} if family == "gemma3" else set()
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj"} | mlp
    facts = build(Checkpoint(model.path), tmp_path / "onnx", Options(), list(model.adapters.values()))
    assert facts["adapted"]


def test_one_row_is_too_few() -> None:
    with pytest.raises(ConfigError, match=r"d\.jsonl: training needs at least 2 rows .* got 1"):
        hold_back([Sample([1], [1])], 0, "d.jsonl")


def test_held_back_rows_follow_the_seed() -> None:
    kept = [Sample([i], [i]) for i in range(100)]
    trained, held = hold_back(kept, 1, "")
    assert len(held) == 5 and sorted(s.input_ids[0] for s in trained + held) == list(range(100))
    assert hold_back(kept, 1, "") == (trained, held) != hold_back(kept, 2, "")
    assert len(hold_back(kept * 20, 1, "")[1]) == 64


def test_loss_counts_answers_only(float_base: Path) -> None:
    model = load(float_base)
    held = [Sample([5, 6, 7, 8], [-100, -100, 7, 8]), Sample([9, 1], [-100, 1])]
    with torch.no_grad():
        long = model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
        short = model(torch.tensor([[9, 1]])).logits[0].log_softmax(-1)
    expected = -(long[1, 7] + long[2, 8] + short[0, 1]) / 3
    assert answer_loss(model, held, pad_id=0, batch_size=2) == pytest.approx(expected.item(), rel=1e-5)


def test_strings_from_a_command_line_are_converted(tmp_path: Path) -> None:
    given = {"max_steps": "7", "learning_rate": "3e-4", "bf16": "false", "optim": "adamw_torch", "warmup_steps": 0.1}
    made = training_arguments(given, tmp_path, 512, 5, "cpu")
    assert (made.max_steps, made.learning_rate, made.bf16, made.seed) == (7, 3e-4, False, 5)
    assert training_arguments({}, tmp_path, 512, 5, "cpu").learning_rate == learning_rate(512)
