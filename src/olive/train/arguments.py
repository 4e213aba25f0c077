"""Training options as a user gives them, checked and completed into transformers' ``TrainingArguments``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from olive.errors import ConfigError, did_you_mean

OURS = {
    "output_dir": "set by the output path of the command",
    "seed": "set by the seed of the workflow",
    "data_seed": "set by the seed of the workflow",
    "use_cpu": "set by compute_device",
    "push_to_hub": "upload the finished folder",
    "resume_from_checkpoint": "training starts from the beginning",
    "eval_strategy": "rows that are held back are measured before and after",
    "eval_on_start": "rows that are held back are measured before and after",
    "load_best_model_at_end": "the last step is what is kept",
}
"""Options of the trainer that are refused, and what is in their place."""
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def learning_rate(hidden_size: int) -> float:
    """Return a rate at which LoRA learns well in some hundred steps; narrow models take higher ones.

    LoRA's best rate is about ten times full fine-tuning's whatever the rank, as long as updates are scaled by
    alpha / rank with a fixed alpha (Schulman et al., LoRA Without Regret, 2025). The slope is ours: on models of width
    256 and 512, six tenths of this rate learn clearly less in 100 steps.
    """
    return float(f"{5e-4 * (3072 / hidden_size) ** 0.75:.2g}")


def training_arguments(options: Mapping[str, Any], work_dir: Path, hidden_size: int, seed: int, device: str) -> Any:
    """Return ``TrainingArguments``: ``options`` over defaults that suit LoRA. Strings are converted by their fields."""
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            name, _, reason = message.removeprefix("argument --").partition(": ")
            raise ConfigError(f"training.{name.split('/')[0]}: {reason}")

    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in options:
        if name in OURS:
            raise ConfigError(f"training.{name}: not an option here; {OURS[name]}")
        if name not in names:
            raise ConfigError(f"training.{name}: unknown option of transformers.TrainingArguments{_near(name, names)}")
    scalars = {name: value for name, value in options.items() if isinstance(value, str | bool | int | float)}
    words = [f"--{name}={value}" for name, value in scalars.items()]
    parsed = vars(Parser(TrainingArguments, allow_abbrev=False).parse_args(words))
    given = {name: parsed[name] if name in scalars else value for name, value in options.items()}
    defaults = {
        "learning_rate": learning_rate(hidden_size),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # a share of all steps
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "train_sampling_strategy": "group_by_length",  # little padding
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
    }
    fixed = {
        "output_dir": str(work_dir),
        "seed": seed,
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "dataloader_pin_memory": device != "cpu",
    }
    try:
        made = TrainingArguments(**defaults | given | fixed)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {str(error).strip().splitlines()[0]}") from error
    for name in COUNTS:
        if getattr(made, name) < 1:
            raise ConfigError(f"training.{name}: should be at least 1, got {getattr(made, name)}")
    length = "num_train_epochs" if made.max_steps < 0 else "max_steps"
    if not getattr(made, length) > 0:
        raise ConfigError(f"training.{length}: should be above 0, lest nothing be learnt; got {getattr(made, length)}")
    return made


def _near(name: str, names: set[str]) -> str:
    near = did_you_mean(name, names)
    return near if near.startswith("; did") else "; its documentation lists them"  # too many to list here
