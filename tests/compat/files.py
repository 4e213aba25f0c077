"""Small files in the shapes that the public recipes and examples have; names and values are ours."""

from __future__ import annotations

from typing import Any

CPU = {
    "local_system": {
        "type": "LocalSystem",
        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
    }
}
ROWS = {
    "name": "rows",
    "type": "HuggingfaceContainer",
    "load_dataset_config": {"data_name": "json", "data_files": "rows.jsonl", "split": "train[:70%]"},
    "pre_process_data_config": {"text_template": "Q: {prompt}\nA: {response}", "max_samples": 64, "max_seq_len": 256,
                                "strategy": "line-by-line", "add_special_tokens": False},
}  # fmt: skip

BUILDER: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "owner/model", "task": "text-generation"},
    "systems": CPU,
    "engine": {"target": "local_system"},
    "passes": {"builder": {"type": "ModelBuilder", "precision": "int4",
                           "extra_options": {"int4_algo_config": "k_quant_mixed"}}},
}  # fmt: skip
"""One builder, the engine with a target only (recipes for a CPU)."""

NESTED: dict[str, Any] = {
    "input_model": {"type": "HfModel", "config": {"model_path": "owner/model"}},
    "systems": {"local_system": {"type": "LocalSystem", "config": {"accelerators": [
        {"device": "CPU", "execution_providers": ["CPUExecutionProvider"]}]}}},
    "passes": {"builder": {"type": "ModelBuilder", "config": {"precision": "int4", "int4_block_size": 128,
                                                              "int4_accuracy_level": 4}}},
    "engine": {"log_severity_level": 1, "host": "local_system", "target": "local_system", "cache_dir": "cache",
               "output_dir": "models/nested"},
}  # fmt: skip
"""Everything one level deeper under config, as older files have it."""

MIXED: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "owner/model", "load_kwargs": {"torch_dtype": "float16"}},
    "systems": CPU,
    "passes": {
        "s": {"type": "SelectiveMixedPrecision", "algorithm": "kld_gradient", "bits": 4, "high_bits": 8},
        "g": {"type": "gptq", "bits": 4, "sym": False, "group_size": 128},
        "r": {"type": "rtn", "bits": 8, "sym": False, "group_size": 128, "lm_head": True, "embeds": True,
              "overrides": {"lm_head": {"bits": 8}, "model.embed_tokens": {"bits": 8}}},
        "m": {"type": "ModelBuilder", "precision": "int4"},
        "t": {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}]},
    },
    "target": "local_system",
    "log_severity_level": 0,
    "output_dir": "model_cpu",
    "cache_dir": "cache_cpu",
    "evaluators": {"task": {"type": "LMEvaluator", "tasks": ["mmlu"], "batch_size": 1, "max_length": 2048,
                            "provider_options": {"a": "1"}}},
    "evaluator": "task",
    "evaluate_input_model": False,
}  # fmt: skip
"""Several quantizers in a row, an lm-eval evaluator."""

TUNED: dict[str, Any] = {
    "input_model": {"type": "PyTorchModel", "config": {"hf_config": {
        "model_name": "owner/model", "task": "text-generation", "from_pretrained_args": {"trust_remote_code": True}}}},
    "systems": CPU,
    "data_configs": [ROWS],
    "passes": {
        "qlora": {"type": "QLoRA", "config": {
            "compute_dtype": "bfloat16", "quant_type": "nf4", "double_quant": True, "lora_r": 8, "lora_alpha": 16,
            "train_data_config": "rows", "eval_dataset_size": 0.3,
            "training_args": {"seed": 0, "per_device_train_batch_size": 4, "max_steps": 10, "logging_steps": 5,
                              "evaluation_strategy": "steps", "output_dir": "checkpoints"}}},
        "builder": {"type": "ModelBuilder", "config": {"precision": "int4", "search": {"max_length": 2048}}},
        "extract": {"type": "ExtractAdapters", "config": {"make_inputs": True}},
    },
    "engine": {"host": "local_system", "target": "local_system", "output_dir": "models/tuned"},
}  # fmt: skip
"""Fine-tuning from rows, then a graph with adapter inputs."""

NPU: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "owner/model"},
    "data_configs": [{"name": "wikitext", "type": "HuggingfaceContainer",
                      "load_dataset_config": {"data_name": "wikitext", "subset": "wikitext-2-raw-v1", "split": "train"},
                      "pre_process_data_config": {"max_samples": 128, "max_seq_len": 512}}],
    "passes": {
        "q": {"type": "QuaRot"},
        "g": {"type": "GptqQuantizer", "sym": True, "group_size": -1, "data_config": "wikitext"},
        "cs": {"type": "CaptureSplitInfo", "num_splits": 4},
        "mb": {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 32, "int4_accuracy_level": 4,
               "int4_op_types_to_quantize": ["MatMul", "Gather"]},
        "sq": {"type": "OnnxStaticQuantization", "data_config": "wikitext", "activation_type": "uint16"},
        "st": {"type": "StaticLLM", "batch_size": 1, "context_length": 64},
    },
    "output_dir": "models/npu",
    "no_artifacts": True,
}  # fmt: skip
"""A pipeline for an NPU: the quantizers have counterparts, what follows has none."""

SEARCHED: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "owner/model"},
    "systems": CPU,
    "data_configs": [ROWS],
    "passes": {
        "quantize": [{"type": "Rtn", "bits": [4, 8], "group_size": 32}, {"type": "Gptq", "data_config": "rows"}],
        "build": {"type": "ModelBuilder", "precision": "fp32"},
        "round": {"type": "OnnxBlockWiseRtnQuantization", "block_size": 64, "is_symmetric": False,
                  "accuracy_level": 4, "nodes_to_exclude": ["/lm_head/MatMul"]},
    },
    "search_strategy": {"execution_order": "pass-by-pass", "sampler": "tpe", "max_samples": 12, "seed": 3,
                        "include_pass_params": True},
    "target": "local_system",
    "output_dir": "models/searched",
}  # fmt: skip
"""Alternatives of a pass, lists of values, a search."""

LEGACY: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "owner/model", "adapter_path": "adapter"},
    "systems": {"gpu": {"type": "AzureML", "accelerators": [
        {"device": "gpu", "execution_providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}]}},
    "data_configs": [
        {"name": "scripted", "type": "HuggingfaceContainer", "user_script": "rows.py",
         "load_dataset_config": {"type": "load_rows", "params": {"data_name": "owner/data", "split": "train"}}},
        {"name": "columns", "type": "HuggingfaceContainer", "components": {"load_dataset": {"type": "x"}},
         "params_config": {"data_name": "owner/data", "split": "train",
                           "component_kwargs": {"pre_process_data": {"text_cols": ["a", "b"], "source_max_len": 64}}}},
        {"name": "dummy", "type": "TransformersTokenDummyDataContainer"},
    ],
    "passes": {
        "awq": {"type": "AutoAWQQuantizer", "w_bit": 4, "q_group_size": 64, "zero_point": False,
                "pack_model_for_onnx_conversion": True, "data_config": "scripted",
                "modules_to_not_convert": ["down_proj", "re:.*gate.*"]},
        "merge": {"type": "MergeAdapterWeights"},
        "unused": {"type": "Rtn"},
    },
    "pass_flows": [["awq", "merge"], ["unused"]],
    "azureml_client": {"workspace_name": "w"},
    "packaging_config": [{"type": "Zipfile", "name": "OutputModel"}],
    "target": "gpu",
    "output_dir": None,
}  # fmt: skip
"""Flows, a system elsewhere, data from scripts, from columns and made up."""

ALL = {"BUILDER": BUILDER, "NESTED": NESTED, "MIXED": MIXED, "TUNED": TUNED, "NPU": NPU, "SEARCHED": SEARCHED,
       "LEGACY": LEGACY}  # fmt: skip
