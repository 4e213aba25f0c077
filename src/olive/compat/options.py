"""The options of their passes as options of ours."""

from __future__ import annotations

from typing import Any

from olive.compat.notes import Notes, flat
from olive.errors import ConfigError

COMMON = {"bits": "bits", "group_size": "group_size", "sym": "symmetric"}
RENAMED = {
    "rtn": COMMON,
    "kquant": COMMON,
    "gptq": COMMON | {"damp_percent": "damping", "damp": "damping"},
    "awq": {"bits": "bits", "w_bit": "bits", "q_group_size": "group_size", "group_size": "group_size"},
}
"""By our pass: their options with the same meaning, and our names."""
LORA = {"r": "rank", "lora_r": "rank", "alpha": "alpha", "lora_alpha": "alpha", "lora_dropout": "dropout",
        "target_modules": "target_modules"}  # fmt: skip
LORA_DEFAULTS = {"rank": 64, "alpha": 16, "dropout": 0.05}
"""What their pass does where its options are not given."""
NEEDLESS = ("save_as_external_data", "all_tensors_to_one_file", "external_data_name", "size_threshold",
            "convert_attribute", "pack_model_for_onnx_conversion", "input_model_dtype", "torch_dtype", "compute_dtype",
            "device", "device_map", "static_groups", "true_sequential", "ephemeral_gpu_offload", "allow_tf32",
            "metadata_only", "search", "rotate_mode", "enable_GQA_on_CPU", "export_compatible")  # fmt: skip
"""How they load, save and place, which is ours to decide."""
TRAINING = ("output_dir", "overwrite_output_dir", "seed", "data_seed", "evaluation_strategy", "eval_strategy",
            "eval_steps", "per_device_eval_batch_size", "load_best_model_at_end", "group_by_length",
            "metric_for_best_model", "resume_from_checkpoint", "deepspeed", "save_steps", "save_strategy",
            "save_total_limit")  # fmt: skip
"""Options of the trainer that ours sets, or that transformers has dropped."""
ALGORITHMS = {"default": "rtn", "rtn": "rtn"}


def tables(step: dict[str, Any], options: dict[str, Any], place: str, notes: Notes) -> None:
    """Translate the flags for the output head and the embeddings; their bits are the pass's, or an override's."""
    given = options.get("overrides")
    changed = given if isinstance(given, dict) else {}
    for theirs, ours, module in (("lm_head", "lm_head", "lm_head"), ("embeds", "embeddings", "embed_tokens")):
        if not options.pop(theirs, False):
            continue
        own = next((flat(value) for name, value in changed.items() if name.rpartition(".")[2] == module), {})
        bits = own.get("bits", options.get("bits", 4))
        if bits in (4, 8):
            step[ours] = f"int{bits}"
            if ours == "embeddings":
                step["format"] = "olive"
        else:
            notes.add(f"{place}.{theirs}", f"{bits} bits have no counterpart for tables; they stay float")
    if changed:
        kept = {n: v for n, v in changed.items() if n.rpartition(".")[2] not in ("lm_head", "embed_tokens")}
        options["overrides"] = kept


def overrides(step: dict[str, Any], options: dict[str, Any], place: str, notes: Notes) -> None:
    """Translate bits and group size by layer; names are literal there."""
    found = {}
    given = options.pop("overrides", None) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{place}.overrides: expected a mapping of names to options, got {given!r}")
    for name, value in given.items():
        own = flat(value)
        if name.startswith("re:"):
            notes.add(f"{place}.overrides.{name}", "regular expressions have no counterpart; use a pattern with *")
            continue
        if "symmetric" in own:
            notes.add(f"{place}.overrides.{name}.symmetric", "has no counterpart; left out")
        bits = own.get("bits", options.get("bits", 4))
        found[name] = f"{bits}:{own['group_size']}" if "group_size" in own else str(bits)
    if found:
        step["overrides"] = found


def excluded(step: dict[str, Any], options: dict[str, Any], place: str, notes: Notes) -> None:
    """Translate what stays float; plain words stand anywhere in a name there."""
    found = []
    given = options.pop("modules_to_not_convert", None) or []
    if not isinstance(given, list):
        raise ConfigError(f"{place}.modules_to_not_convert: expected a list of names, got {given!r}")
    for name in given:
        if str(name).startswith("re:"):
            notes.add(f"{place}.modules_to_not_convert", f"{name}: regular expressions have no counterpart")
        elif name != "lm_head":  # float unless asked for
            found.append(f"*{name}*")
    if found:
        step["exclude"] = found


def builder(step: dict[str, Any], options: dict[str, Any], place: str, notes: Notes) -> None:
    """Translate a builder's options; those in ``extra_options`` are the same by other ways."""
    extra = flat(options.pop("extra_options", None))
    known = ("int4_block_size", "int4_is_symmetric", "int4_accuracy_level", "int4_algo_config")
    own = {name: options.pop(name, extra.pop(name, None)) for name in known}
    precision = str(options.pop("precision", "fp32"))
    if precision in ("fp32", "fp16", "int4", "int8"):
        step["precision"] = precision
    else:
        notes.add(f"{place}.precision", f"{precision} has no counterpart; the default is used")
    if precision in ("int4", "int8"):
        step["group_size"] = own["int4_block_size"] or 32
        step["symmetric"] = own["int4_is_symmetric"] is not False
    algorithm = own["int4_algo_config"]
    if algorithm is not None:
        step["algorithm"] = "kquant" if str(algorithm).startswith("k_quant") else ALGORITHMS.get(str(algorithm), "rtn")
        if str(algorithm) not in ("default", "rtn", "k_quant"):
            notes.add(
                f"{place}.int4_algo_config", f"{algorithm}: layers that it writes with 8 bits have the others' here"
            )
    level = own["int4_accuracy_level"]
    if level in (0, 4):
        step["accuracy_level"] = level
    elif level is not None:
        notes.add(f"{place}.int4_accuracy_level", f"{level} has no counterpart; 0 and 4 have")
    for name in extra:
        notes.add(f"{place}.extra_options.{name}", "has no counterpart; left out")


def lora(step: dict[str, Any], options: dict[str, Any], place: str, notes: Notes) -> None:
    """Translate training; what is not given is as in their pass."""
    training = flat(options.pop("training_args", None))
    for name in TRAINING:
        if training.pop(name, None) is not None:
            notes.add(f"{place}.training_args.{name}", "is decided here; left out")
    given = {LORA[name] for name in options if name in LORA}
    step |= {name: value for name, value in LORA_DEFAULTS.items() if name not in given}
    if training:
        step["training"] = training
    if not options.get("target_modules"):
        options.pop("target_modules", None)
    if "data" not in step:
        notes.add(place, "its training data could not be translated; give data to the pass")
