"""Train a LoRA adapter on a float or quantized checkpoint with PEFT and transformers' Trainer."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olive.data.rows import describe
from olive.data.samples import MASKED, Sample, collate, samples
from olive.data.spec import DataSpec
from olive.errors import ConfigError, PassError
from olive.model import weights_digest
from olive.quant.formats.checkpoint import longest, read_config
from olive.runtime.torch_model import load, load_tokenizer
from olive.train.arguments import training_arguments

log = logging.getLogger("olive")

IN_LAYER = re.compile(r".+\.\d+\..+")
"""The path of a module in a numbered layer."""
HELD_BACK = 0.05
"""Share of the samples that the loss before and after is measured on; at least 1, at most 64."""


@dataclass(frozen=True)
class Job:
    """What to train and how."""

    base: Path
    data: DataSpec
    rank: int
    alpha: float
    dropout: float
    target_modules: str | list[str]
    training: dict[str, Any]
    trust_remote_code: bool
    seed: int
    device: str
    work_dir: Path
    """Where the trainer may keep checkpoints if asked to."""


def train(job: Job, adapter_dir: Path, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Train an adapter, write it to ``adapter_dir`` in PEFT's format and return the facts of the run."""
    import transformers

    tokenizer = load_tokenizer(job.base, job.trust_remote_code)
    dtype = torch.float32 if job.device == "cpu" else torch.bfloat16
    base = load(job.base, dtype=dtype, device=job.device, trust_remote_code=job.trust_remote_code)
    arguments = training_arguments(
        job.training, job.work_dir, base.get_input_embeddings().embedding_dim, job.seed, job.device
    )
    eos = base.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    length = min(job.data.max_seq_len, longest(read_config(job.base)))
    kept, dropped = samples(job.data.model_copy(update={"max_seq_len": length}), tokenizer, ends)
    trained_on, held_back = hold_back(kept, job.seed, describe(job.data))
    if arguments.dataloader_drop_last and len(trained_on) < arguments.train_batch_size:
        raise ConfigError(f"training.dataloader_drop_last: {len(trained_on)} rows do not fill one batch of "
                          f"{arguments.train_batch_size}, so nothing would be learnt")  # fmt: skip
    if "warmup_steps" not in job.training and _steps(arguments, len(trained_on)) == 1:
        arguments.warmup_steps = 0  # the only step would have a rate of 0
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    transformers.set_seed(job.seed)
    model = attach(base, job)
    batch_size = arguments.per_device_eval_batch_size
    before = answer_loss(model, held_back, pad_id, batch_size)
    if not math.isfinite(before):
        raise PassError(f"{job.base}: the loss is {before} before training; look at the checkpoint and at alpha")
    try:
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": sample.input_ids, "labels": sample.labels} for sample in trained_on],
            data_collator=lambda rows: collate([Sample(**row) for row in rows], pad_id),
            callbacks=[_report(progress)],
        )
    except (ValueError, ImportError, RuntimeError) as error:  # of options that cannot be honoured
        raise ConfigError(f"training: {str(error).strip().splitlines()[0]}") from error
    trainer.remove_callback(transformers.PrinterCallback)  # it prints to the program's output
    try:
        trainer.train()
    except (ValueError, ImportError) as error:  # likewise: the optimizer and the data loader look at theirs only now
        raise ConfigError(f"training: {str(error).strip().splitlines()[0]}") from error
    after = answer_loss(model, held_back, pad_id, batch_size)
    if not math.isfinite(after):
        raise PassError(f"training diverged: the loss is {after} after it; give a lower learning_rate than "
                        f"{arguments.learning_rate:g}")  # fmt: skip
    save(model, job.base, adapter_dir)
    return {
        "held_back_loss_before": round(before, 4),
        "held_back_loss_after": round(after, 4),
        "held_back_rows": len(held_back),
        "trained_rows": len(trained_on),
        "dropped_rows": dropped,
        "trained_steps": trainer.state.global_step,
    }


def _steps(arguments: Any, rows: int) -> int:
    """Return how often the weights are updated."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    in_a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return math.ceil(math.ceil(rows / in_a_step) * arguments.num_train_epochs)


def hold_back(kept: Sequence[Sample], seed: int, where: str) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those to train on and a few, chosen by seed, to measure on."""
    count = min(64, max(1, int(len(kept) * HELD_BACK)))
    if count >= len(kept):
        raise ConfigError(f"{where}: training needs at least 2 rows (one is held back to measure on), got {len(kept)}")
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return (
        [sample for i, sample in enumerate(kept) if i not in held],
        [sample for i, sample in enumerate(kept) if i in held],
    )


def attach(base: Any, job: Job) -> Any:
    """Put fresh LoRA layers on the model's linear layers; everything else is frozen."""
    import peft

    modules = _linears(base) if job.target_modules == "all-linear" else job.target_modules
    names = [f".{name}" for name, _ in base.named_modules()]
    for wanted in modules if isinstance(modules, list) else ():  # PEFT passes over one that fits nothing
        if not any(name.endswith(f".{wanted}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in _linears(base)})
            raise ConfigError(f"target_modules {wanted!r}: no layer's name ends so; linear layers: {', '.join(ends)}")
    config = peft.LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    base.config.use_cache = False
    try:
        return peft.get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError(f"target_modules {job.target_modules!r}: {str(error).splitlines()[0]}") from error


def _linears(base: Any) -> list[str]:
    """Name the linear layers in the layers of the text decoder, but those of experts: what graphs take adapters on. By
    the ends of their names, as other tools expect, unless a layer elsewhere is called the same.

    PEFT's own all-linear also adapts towers that never see an image here, and experts in forms that nobody reads.
    """
    from transformers.pytorch_utils import Conv1D

    decoder, every = base.get_decoder(), dict(base.named_modules())
    start = next((f"{name}." for name, module in every.items() if name and module is decoder), "")
    linears = [name for name, module in every.items() if isinstance(module, torch.nn.Linear | Conv1D)]
    chosen = [name for name in linears if name.startswith(start) and IN_LAYER.fullmatch(name.removeprefix(start))
              and ".experts." not in name]  # fmt: skip
    ends = {name.rpartition(".")[2] for name in chosen}
    elsewhere = any(name.rpartition(".")[2] in ends for name in set(linears) - set(chosen))
    return chosen if elsewhere else sorted(ends)


@torch.inference_mode()
def answer_loss(model: Any, held: Sequence[Sample], pad_id: int, batch_size: int) -> float:
    """Return the mean negative log-likelihood of the tokens that are not masked."""
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(held, key=lambda sample: len(sample.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = {k: v.to(model.device) for k, v in collate(ordered[start : start + batch_size], pad_id).items()}
        labels = batch.pop("labels")[:, 1:]  # [B, T] -> [B, T-1]: the logits at t are for the token at t+1
        logits = model(**batch).logits[:, :-1].float()  # [B, T-1, V]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total += loss.item()
        count += int((labels != MASKED).sum())
    return total / max(count, 1)


def save(model: Any, base: Path, adapter_dir: Path) -> None:
    """Write the adapter in PEFT's format, float32, the same bytes for the same weights, and the digest of its base."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = ""  # PEFT would write the place on this machine
    # "auto" would ask the hub whether the vocabulary has grown.
    model.save_pretrained(adapter_dir, save_embedding_layers=False)
    (adapter_dir / "README.md").unlink(missing_ok=True)  # PEFT's empty form, with a path in it
    file = adapter_dir / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order changes from run to run
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    note = {"format": "olive", "kind": "adapter", "base_digest": weights_digest(base)}
    (adapter_dir / "olive.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _report(progress: Callable[[str, int, int], None]) -> Any:
    import transformers

    class Report(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            progress("train", state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
            if logs and "loss" in logs:
                log.info("step %d of %d: loss %.3f", state.global_step, state.max_steps, float(logs["loss"]))

    return Report()
