"""Fine-tune a LoRA adapter on a float or quantized checkpoint."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from olive.data.spec import DataSpec
from olive.errors import ConfigError
from olive.model import Model
from olive.passes.base import Context, Pass

ALL_LINEAR = "all-linear"


class Lora(
    Pass,
    accepts="hf",
    produces="hf",
    changes_model=False,
    sources=(
        "olive.data",
        "olive.passes.lora",
        "olive.quant.affine",
        "olive.quant.formats",
        "olive.quant.linear",
        "olive.runtime.torch_model",
        "olive.train",
    ),
    libraries=("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets"),
):
    """Train low-rank updates of the linear layers (LoRA, Hu et al. 2021); the base stays as it is, packed if quantized.

    A share of 5 % of the rows (1 to 64) is held back: the loss on their answers before and after is reported.
    """

    data: DataSpec | None = None
    """Rows to train on; required."""
    rank: int = Field(16, ge=1, json_schema_extra={"flag": "lora_r"})
    """Rank of the updates."""
    alpha: float = Field(32, gt=0, json_schema_extra={"flag": "lora_alpha"})
    """The updates are scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a layer's inputs that training drops at random before the update."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Layers to train, by the ends of their names; "all-linear" is every linear layer within the decoder, but not in
    experts."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Options of transformers.TrainingArguments, such as max_steps, learning_rate, per_device_train_batch_size."""

    def run(self, model: Model, ctx: Context) -> Model:
        if self.data is None:
            raise ConfigError("lora needs data to train on; add data: to the pass or give --data_name and --data_files")
        if model.adapters:
            raise ConfigError(f"{model.name}: has an adapter already; give its base model alone (its model/ folder)")
        from olive.cache import lay
        from olive.train.lora import Job, train

        modules = self.target_modules
        if modules == (ALL_LINEAR,):  # as a flag, which takes a list
            modules = ALL_LINEAR
        job = Job(
            base=model.path,
            data=self.data,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=modules if isinstance(modules, str) else list(modules),
            training=self.training,
            trust_remote_code=model.trust_remote_code,
            seed=ctx.seed,
            device=ctx.compute_device,
            work_dir=ctx.scratch / "trainer",
        )
        ctx.note(**train(job, ctx.out / "adapter", ctx.progress))
        lay(model.path, ctx.out / "model")
        return Model("hf", ctx.out / "model", {"adapter": ctx.out / "adapter"}, model.trust_remote_code)
