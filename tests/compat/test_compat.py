"""Microsoft Olive's workflow files: recognised, translated, and what has no counterpart named with its place."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from olive.cli import main
from olive.compat import convert, is_foreign
from olive.compat.data import data_sets
from olive.compat.notes import Notes
from olive.compat.passes import DONE_BY_DECODER, HINTS, ROUNDED_BY_DECODER, TYPES
from olive.errors import ConfigError
from olive.workflow import read_workflow
from places import LAB_MODEL, ROOT, TRAVEL

from .files import ALL, BUILDER, LEGACY, MIXED, NESTED, NPU, SEARCHED, TUNED


def changed(data: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return copy.deepcopy(data) | parts


def one(**options: Any) -> dict[str, Any]:
    """Return how a single pass is translated."""
    return convert(changed(BUILDER, passes={"p": options}), "f").data["passes"][0]


def said(data: dict[str, Any], **options: Any) -> list[str]:
    return list(convert(data, "f", **options).notes)


@pytest.mark.parametrize("name", ALL)
def test_their_files_are_told_from_ours(name: str) -> None:
    assert is_foreign(ALL[name])
    ours = {"input_model": {"path": "m"}, "passes": [{"type": "rtn"}], "output_dir": "o"}
    assert not is_foreign(ours)
    assert not is_foreign([])


def test_a_builder_becomes_the_decoder_pass() -> None:
    assert convert(BUILDER, "f").data == {
        "input_model": {"path": "owner/model"},
        "target": {"device": "cpu", "provider": "CPUExecutionProvider"},
        "passes": [{"type": "decoder", "precision": "int4", "group_size": 32, "symmetric": True,
                    "algorithm": "kquant"}],
    }  # fmt: skip
    assert said(BUILDER) == [
        "passes.builder.int4_algo_config: k_quant_mixed: layers that it writes with 8 bits have the others' here"
    ]


def test_options_one_level_deeper_are_read_the_same() -> None:
    assert convert(NESTED, "f").data == {
        "input_model": {"path": "owner/model"},
        "target": {"device": "cpu", "provider": "CPUExecutionProvider"},
        "passes": [{"type": "decoder", "precision": "int4", "group_size": 128, "symmetric": True,
                    "accuracy_level": 4}],
        "output_dir": "models/nested",
    }  # fmt: skip
    assert said(NESTED) == []


def test_a_pass_without_a_counterpart_is_refused_with_its_place_and_a_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        convert(MIXED, "recipe.json")
    assert str(caught.value).splitlines() == [
        "recipe.json: passes.s: SelectiveMixedPrecision has no counterpart: the option target_size of a quantizer "
        "chooses bits by layer",
        "Passes without a counterpart are left out with --skip_unknown.",
    ]
    with pytest.raises(ConfigError, match=r"passes.cs: CaptureSplitInfo(.|\n)*passes.sq: Onnx(.|\n)*passes.st: Static"):
        convert(NPU, "recipe.json")


def test_values_of_another_shape_are_refused_with_their_place() -> None:
    system = {"type": "LocalSystem", "accelerators": {"device": "cpu"}}
    with pytest.raises(ConfigError, match=r"systems.local_system.accelerators: expected a list, got \{'device'"):
        convert(changed(BUILDER, systems={"local_system": system}), "f")
    for name, value in (("overrides", ["lm_head"]), ("modules_to_not_convert", "down_proj")):
        with pytest.raises(ConfigError, match=rf"passes.p.{name}: expected a (mapping|list) of names"):
            one(type="Rtn", **{name: value})
    for files in (3, {"train": 3}):
        rows = {"name": "d", "load_dataset_config": {"data_name": "json", "data_files": files}}
        step = {"type": "Gptq", "data_config": "d"}
        made = convert(changed(BUILDER, data_configs=[rows], passes={"p": step}), "f").data
        assert made["data"]["d"]["files"] == [3]  # refused where ours are read


def test_one_of_our_passes_without_its_dash_is_not_theirs() -> None:
    assert not is_foreign({"input_model": {"path": "m"}, "passes": {"type": "rtn"}})


def test_two_quantizers_in_a_row_become_one_with_quantized_tables() -> None:
    made = convert(MIXED, "f", skip_unknown=True)
    assert made.data["passes"] == [
        {"type": "gptq", "bits": 4, "symmetric": False, "group_size": 128, "lm_head": "int8", "embeddings": "int8",
         "format": "olive"},
        {"type": "decoder", "precision": "int4", "group_size": 32, "symmetric": True},
    ]  # fmt: skip
    assert made.data["evaluators"] == {
        "task": {"type": "lm_eval", "tasks": ["mmlu"], "batch_size": 1, "max_length": 2048}
    }
    assert list(made.notes)[1:] == [
        "passes.r: done by gptq before it: lm_head and embeddings are options of it",
        "passes.t: TieWordEmbeddings: the decoder pass writes tied tables once itself",
        "evaluators.task.provider_options: has no counterpart; left out",
    ]


def test_training_keeps_its_data_its_options_and_their_defaults() -> None:
    made = convert(TUNED, "f")
    assert made.data["input_model"] == {"path": "owner/model", "trust_remote_code": True}
    assert made.data["data"] == {"rows": {
        "name": "json", "files": ["rows.jsonl"], "text_template": "Q: {prompt}\nA: {response}",
        "max_samples": 64, "max_seq_len": 256}}  # fmt: skip
    lora, decoder = made.data["passes"]
    assert lora == {"type": "lora", "data": "rows", "rank": 8, "alpha": 16, "dropout": 0.05,
                    "training": {"per_device_train_batch_size": 4, "max_steps": 10, "logging_steps": 5}}  # fmt: skip
    assert decoder["type"] == "decoder"
    assert made.notes == (
        "data_configs.0.split: local files are read whole; left out",
        "passes.qlora.training_args.output_dir: is decided here; left out",
        "passes.qlora.training_args.seed: is decided here; left out",
        "passes.qlora.training_args.evaluation_strategy: is decided here; left out",
        "passes.qlora: the base is trained on as it is; put a quantizer before it for a quantized base",
        "passes.qlora.quant_type: has no counterpart; left out",
        "passes.qlora.double_quant: has no counterpart; left out",
        "passes.qlora.eval_dataset_size: has no counterpart; left out",
        "passes.extract: the decoder pass makes the adapter inputs of the graph itself",
    )


def test_alternatives_and_lists_of_values_become_a_search() -> None:
    made = convert(SEARCHED, "f")
    assert made.data["passes"] == [
        [{"type": "rtn", "bits": {"choice": [4, 8]}, "group_size": 32}, {"type": "gptq", "data": "rows"}],
        {"type": "decoder", "precision": "int4", "algorithm": "rtn", "group_size": 64, "symmetric": False,
         "accuracy_level": 4},
    ]  # fmt: skip
    assert made.data["search"] == {"sampler": "tpe", "trials": 12, "order": "pass_by_pass"}
    assert made.data["seed"] == 3
    assert made.notes == (
        "data_configs.0.split: local files are read whole; left out",
        "passes.round.nodes_to_exclude: has no counterpart; left out",
        "search_strategy.include_pass_params: has no counterpart; left out",
    )


def test_a_list_of_one_value_is_that_value_and_what_cannot_be_a_choice_is_told() -> None:
    assert one(type="Rtn", bits=[8], sym=[True, False]) == {
        "type": "rtn", "bits": 8, "symmetric": {"choice": [True, False]},
    }  # fmt: skip
    made = convert(changed(BUILDER, passes={"p": {"type": "Rtn", "lm_head": [False, True]}}), "f")
    assert made.data["passes"] == [{"type": "rtn"}]
    assert made.notes == ("passes.p.lm_head: only False is tried; list alternatives of the pass for the others",)
    builder = {"type": "ModelBuilder", "precision": ["int4", "fp32"], "int4_block_size": [64]}
    made = convert(changed(BUILDER, passes={"p": builder}), "f")
    assert made.data["passes"] == [{"type": "decoder", "precision": "int4", "group_size": 64, "symmetric": True}]
    assert made.notes == ("passes.p.precision: only int4 is tried; list alternatives of the pass for the others",)


def test_an_evaluator_that_is_not_there_is_told() -> None:
    assert "evaluator: no evaluator is called 'own'; nothing is measured" in said(changed(BUILDER, evaluator="own"))


def test_flows_systems_elsewhere_and_data_from_scripts_are_told() -> None:
    made = convert(LEGACY, "f", skip_unknown=True)
    assert made.data == {
        "input_model": {"path": "owner/model", "adapter_path": "adapter"},
        "target": {"device": "gpu", "provider": "CUDAExecutionProvider"},
        "passes": [{"type": "awq", "bits": 4, "group_size": 64, "symmetric": True, "exclude": ["*down_proj*"]}],
    }
    assert made.notes == (
        "passes.merge: MergeAdapterWeights has no counterpart: the decoder pass keeps an adapter apart, as inputs of "
        "the graph",
        "packaging_config: has no counterpart; the output folder is the package",
        "azureml_client: has no counterpart; the workflow runs here",
        "data_configs.0: reads rows by a user script, which has no counterpart; write them to a JSON file",
        "data_configs.2: TransformersTokenDummyDataContainer has no counterpart; left out",
        "pass_flows: only the first is run; write a workflow file for each other one",
        "passes.awq.data_config: scripted could not be translated; the shipped text is used",
        "passes.awq.modules_to_not_convert: re:.*gate.*: regular expressions have no counterpart",
        "systems.gpu.type: AzureML has no counterpart; the workflow runs here",
        "systems.gpu.accelerators.0.execution_providers: only CUDAExecutionProvider is a target; left out: "
        "CPUExecutionProvider",
    )


def test_files_by_split_are_those_of_the_split() -> None:
    files = {"train": "a.jsonl", "test": ["b.jsonl"]}
    load = {"data_name": "json", "data_files": files, "split": "test"}
    assert data_sets([{"name": "d", "load_dataset_config": load}], Notes()) == {
        "d": {"name": "json", "files": ["b.jsonl"]}
    }


def test_columns_become_a_template() -> None:
    passes = {"g": {"type": "GptqModel", "data_config": "columns", "damp_percent": 0.05, "bits": 4}}
    made = convert(changed(LEGACY, passes=passes, pass_flows=None), "f").data
    assert made["data"] == {
        "columns": {"name": "owner/data", "split": "train", "text_template": "{a}\n{b}", "max_seq_len": 64}
    }
    assert made["passes"] == [{"type": "gptq", "data": "columns", "damping": 0.05, "bits": 4}]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"type": "Rtn", "bits": 8, "sym": True}, {"type": "rtn", "bits": 8, "symmetric": True}),
        ({"type": "KQuant", "group_size": 32}, {"type": "kquant", "group_size": 32}),
        ({"type": "gptq", "overrides": {"model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32}}},
         {"type": "gptq", "overrides": {"model.layers.0.mlp.up_proj": "8:32"}}),
        ({"type": "QuaRot", "rotate_mode": "hadamard"}, {"type": "rotate"}),
        ({"type": "MobiusBuilder", "precision": "fp32"}, {"type": "decoder", "precision": "fp32"}),
        ({"type": "LoRA", "r": 4, "alpha": 8, "lora_dropout": 0.1, "target_modules": ["o_proj"]},
         {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["o_proj"]}),
    ],
)  # fmt: skip
def test_each_pass_is_translated_option_by_option(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert one(**theirs) == ours


@pytest.mark.parametrize(
    ("kind", "algorithm", "group_size", "symmetric"),
    [("OnnxBlockWiseRtnQuantization", "rtn", 128, True), ("OnnxHqqQuantization", "hqq", 128, False),
     ("OnnxKQuantQuantization", "kquant", 32, False), ("OnnxMatMul4Quantizer", "rtn", 128, True)],
)  # fmt: skip
def test_rounding_of_a_finished_graph_is_done_by_the_decoder_pass(
    kind: str, algorithm: str, group_size: int, symmetric: bool
) -> None:
    passes = {"m": {"type": "ModelBuilder", "precision": "fp32"}, "q": {"type": kind, "bits": 8}}
    (step,) = convert(changed(BUILDER, passes=passes), "f").data["passes"]
    assert step == {"type": "decoder", "precision": "int8", "algorithm": algorithm, "group_size": group_size,
                    "symmetric": symmetric}  # fmt: skip
    with pytest.raises(ConfigError, match="rounds the weights of a finished graph"):
        convert(changed(BUILDER, passes={"q": {"type": kind}}), "f")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"target": "nowhere", "engine": {}}, "f: target: no system is called 'nowhere'; allowed: local_system"),
        ({"systems": {"local_system": {"accelerators": [{"device": "npu"}]}}}, "npu is not a target here"),
        ({"systems": {"local_system": {"accelerators": [{"execution_providers": ["QNNExecutionProvider"]}]}}},
         "f: systems.local_system: QNNExecutionProvider is not a target here; targets: CPUExecutionProvider"),
        ({"input_model": {"type": "PyTorchModel", "model_script": "m.py"}}, "without model_path has no counterpart"),
        ({"input_model": {"type": "OpenVINOModel", "model_path": "m"}}, "OpenVINOModel has no counterpart"),
        ({"builds": {"a": {}}}, "f: builds: has no counterpart; write one workflow file for each build"),
        ({"passes": {"m": {"type": "ModelBuilder", "metadata_only": True}}}, "passes: none of them has a counterpart"),
    ],
)  # fmt: skip
def test_what_makes_the_whole_file_useless_is_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(changed(BUILDER, **parts), "f")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["BUILDER", "NESTED", "MIXED", "TUNED", "NPU", "LEGACY"])
def test_what_is_translated_is_a_workflow_of_ours(name: str) -> None:
    data = convert(ALL[name], "f", skip_unknown=True).data
    data.pop("evaluators", None)  # read by the reader of evaluators
    for spec in data.get("data", {}).values():
        if "files" in spec:
            spec["files"] = [str(TRAVEL)]
    read_workflow({"output_dir": "o"} | data)


@pytest.mark.usefixtures("cache")
def test_run_accepts_their_file_and_saves_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = changed(NPU, input_model={"type": "HfModel", "model_path": str(LAB_MODEL)})
    data["passes"] = {"r": {"type": "Rtn", "group_size": 64}, "s": {"type": "SplitModel"}}
    file, ours = tmp_path / "theirs.json", tmp_path / "ours.yaml"
    file.write_text(json.dumps(data))
    argv = ["run", str(file), "-o", str(tmp_path / "out"), "--verify", "files", "--save_config_file", str(ours)]
    assert main(argv) == 2
    assert f"{file}: passes.s: SplitModel has no counterpart" in capsys.readouterr().err
    assert not ours.exists()
    assert main([*argv, "--skip_unknown", "--set", "passes.rtn.bits=8"]) == 0
    assert "note: passes.s: SplitModel has no counterpart" in capsys.readouterr().err
    assert yaml.safe_load(ours.read_text())["passes"][0]["group_size"] == 64
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 8
    assert main(["run", str(ours), "-o", str(tmp_path / "again")]) == 0
    assert "rtn          cached" in capsys.readouterr().out


def test_the_table_in_the_docs_names_every_type() -> None:
    told = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "compat.md").read_text(encoding="utf-8")))
    small = {word.lower() for word in told}
    assert {*TYPES, *ROUNDED_BY_DECODER, *DONE_BY_DECODER, *HINTS} - small == set()
