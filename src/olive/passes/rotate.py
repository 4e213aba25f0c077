"""Rotation of a checkpoint's residual stream and value heads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from olive.errors import ConfigError
from olive.model import Model
from olive.passes.base import Context, Pass
from olive.passes.quantizer import float_source

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.rotation import Rotation
    from olive.runtime.layers import LayeredModel

TOKENS = 16


class Rotate(
    Pass,
    accepts="hf",
    produces="hf",
    sources=(
        "olive.passes.rotate",
        "olive.passes.quantizer",
        "olive.quant.rotation",
        "olive.quant.sites",
        "olive.quant.formats",
        "olive.runtime",
    ),
    libraries=("torch", "transformers"),
):
    """Spread outliers over all channels before a model is quantized, by random rotations that are folded into the
    weights (QuaRot, arXiv 2404.00456, 2024). The model computes the same: every layer is run to prove it. Weights are
    written as float32."""

    def run(self, model: Model, ctx: Context) -> Model:
        import torch

        with torch.no_grad():
            return _rotate(model, ctx)


def _rotate(model: Model, ctx: Context) -> Model:
    import torch

    from olive.quant.formats.writer import CheckpointWriter
    from olive.quant.rotation import random_rotation, rotate_layer
    from olive.runtime.layers import LayeredModel

    source, meta = float_source(model)
    torch.set_float32_matmul_precision("highest")  # an earlier step may have allowed TF32, too coarse for the proofs
    layered = LayeredModel(source, meta, dtype=torch.float32, devices=[ctx.compute_device])
    ends = Ends(layered)
    generator = torch.Generator().manual_seed(ctx.seed)
    vocabulary, k = ends.embedding.weight.shape
    stream = random_rotation(k, generator)
    head_dim = layered.head_dim() or k
    rotations = stream, random_rotation(head_dim, generator)
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=generator)
    plain = layered.start(ids, 1)[0]
    turned = replace(plain, hidden=stream.apply(plain.hidden))
    writer = CheckpointWriter(model.path, ctx.out, len(source.float_names) + 1)
    written: set[str] = set()
    heads: dict[str, bool] = {}
    for index, name, block in layered.layers():

        def run(hidden: Tensor, index: int = index, block: Any = block) -> Tensor:
            return layered.apply(index, block, replace(plain, hidden=hidden))

        out = run(plain.hidden)
        heads[name] = rotate_layer(block, run, plain.hidden, rotations, name) > 0
        plain.hidden, turned.hidden = out, run(turned.hidden)
        for parameter, value in block.named_parameters():
            writer.tensor(f"{name}.{parameter}", value)
            written.add(f"{name}.{parameter}")
        ctx.progress("rotate", index + 1, len(layered.blocks))
    changed = ends.rotate(stream, plain, turned)
    for name, tensor in changed.items():
        writer.tensor(name, tensor)
    for name in source.float_names:
        if name not in written and name not in changed and name not in ends.names:
            writer.tensor(name, source.weight(name))
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"} | {"dtype": "float32"}
    writer.close(config | ({"tie_word_embeddings": False} if ends.untied else {}))
    ctx.note(value_heads_rotated=heads, lm_head_untied=ends.untied)
    return Model("hf", ctx.out)


class Ends:
    """What lies before and behind the layers: embeddings, final norm, output head."""

    def __init__(self, layered: LayeredModel) -> None:
        """Refuse a model that has more than these outside its layers."""
        model: Any = layered.model
        self.layered, self.kind = layered, type(model).__name__
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        name_of = {module: name for name, module in model.named_modules()}
        self.names = {f"{name_of[m]}.{p}" for m in (self.embedding, self.head) for p, _ in m.named_parameters()}
        inside = layered.prefix + "."
        k = self.embedding.weight.shape[1]
        rest = {n: p for n, p in model.named_parameters() if not n.startswith(inside) and n not in self.names}
        norms = [name for name, parameter in rest.items() if parameter.shape == (k,) and name.endswith(".weight")]
        other = [name for name in rest if name.rpartition(".")[0] != norms[0].rpartition(".")[0]] if norms else []
        if other or not norms:
            what = f"{other[0]} reads or writes the residual stream too" if other else "it has no final norm"
            raise ConfigError(
                f"{layered.tensors.folder} ({self.kind}): rotation is not possible: {what}; only models with token "
                "embeddings, layers, a final RMS norm and an output head can be rotated; leave out rotate"
            )
        self.norm_name = norms[0].removesuffix(".weight")
        self.names.add(norms[0])
        self.embedding_name, self.head_name = name_of[self.embedding], name_of[self.head]
        self.untied = False

    def rotate(self, rotation: Rotation, plain: Any, turned: Any) -> dict[str, Tensor]:
        """Rotate embeddings and head, fold the final norm into the head; returns the tensors by name.

        ``plain`` and ``turned`` are the rows behind the layers of the model as it was and as it is: the rotated whole
        must give the same logits. A tied head that the norm does not leave as it is becomes a weight of its own.
        """
        import torch
        from torch import nn

        from olive.quant.rotation import norm_gain, same

        norm = self.layered.model.get_submodule(self.norm_name)
        expected = self.layered.logits(plain)
        embedded = self.layered.start(plain.ids, 1)[0].hidden
        gain, neutral = norm_gain(norm, self.norm_name)
        tied = self.head.weight is self.embedding.weight
        self.untied = tied and not bool((gain == 1).all())
        if self.untied or not tied:
            self.head.weight = nn.Parameter(rotation.apply(self.head.weight.data * gain), requires_grad=False)
        norm.weight.data = torch.full_like(norm.weight.data, neutral)
        self.embedding.weight.data = rotation.apply(self.embedding.weight.data)
        wanted = rotation.apply(embedded)
        entered = same(self.layered.start(plain.ids, 1)[0].hidden, wanted, wanted.norm())
        if not entered or not same(self.layered.logits(turned), expected, expected.norm()):
            raise ConfigError(
                f"{self.layered.tensors.folder} ({self.kind}): rotation is not possible: what the model does with "
                f"{'its last hidden states' if entered else 'its embeddings'} is changed by it; leave out rotate"
            )
        modules = {self.embedding_name: self.embedding, self.norm_name: norm}
        if self.untied or not tied:
            modules[self.head_name] = self.head
        return {
            f"{name}.{p}": tensor.data for name, module in modules.items() for p, tensor in module.named_parameters()
        }
