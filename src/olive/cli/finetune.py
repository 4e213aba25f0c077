"""``olive finetune``: train a LoRA adapter."""

from __future__ import annotations

import argparse
import difflib

from olive.cli.options import Parser, add_data, add_fields, add_model, given, read_data, read_model
from olive.cli.run import add_flow, execute
from olive.errors import ConfigError

OPTIONS = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    from olive.passes.lora import Lora

    own = Parser(
        prog,
        "Train a LoRA adapter on a float or quantized checkpoint. Further options are handed to "
        "transformers.TrainingArguments: --max_steps 100, --learning_rate 1e-3, --per_device_train_batch_size 8, ...",
        passes_on=True,
    )
    add_model(own)
    own.add_argument("--method", choices=["lora"], default="lora", help="How to fine-tune. Default: lora.")
    add_fields(own, Lora, OPTIONS)
    add_data(own)
    add_flow(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Run the training pass."""
    training = _training(args.more)
    _refuse_misspelt(training)
    data = read_data(args)
    if data is None:
        raise ConfigError("olive finetune: give data to train on, for example --data_files rows.jsonl --data_name json")
    step = {"type": args.method, "data": data, "training": training, **given(args, OPTIONS)}
    workflow = {"input_model": read_model(args, "olive finetune"), "passes": [step]}
    return execute(workflow | given(args, {"output_dir": "output_path"}), args)


def _refuse_misspelt(training: dict[str, str]) -> None:
    """A flag that is nearly one of ours and none of TrainingArguments' was meant for us."""
    own = [flag[2:] for flag in parser("olive finetune").flags() if flag.startswith("--")]
    for name in training:
        near = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
        if near:
            from transformers import TrainingArguments

            if name not in TrainingArguments.__dataclass_fields__:
                raise ConfigError(f"olive finetune: unknown option --{name}; did you mean '--{near[0]}'?")


def _training(words: list[str]) -> dict[str, str]:
    """Read ``--name value``, ``--name=value`` and bare ``--name`` (true)."""
    found: dict[str, str] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, eq, value = word[2:].partition("=")
            found[name] = value if eq else "true"
            name = None if eq else name
        elif name is None:
            raise ConfigError(f"olive finetune: unexpected argument {word!r}; options start with --")
        else:
            found[name], name = word, None
    return found
