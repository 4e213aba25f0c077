"""A checkpoint folder, float or quantized, as a transformers model; a quantized one keeps its integers packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from olive.errors import ConfigError
from olive.quant.formats.checkpoint import BUFFERS, Checkpoint
from olive.quant.linear import QuantLinear
from olive.runtime.experts import fused_experts
from olive.runtime.layers import auto_class, skeleton, unloadable

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tokenization_*.py")


def load(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", trust_remote_code: bool = False
) -> Any:
    """Return a causal language model; linear layers that are quantized in the checkpoint become ``QuantLinear``,
    quantized embeddings are dequantized."""
    checkpoint = Checkpoint(folder)
    if checkpoint.method is None:
        model = _load_float(checkpoint, dtype, trust_remote_code)
    else:
        model = _fill(checkpoint, dtype, trust_remote_code)
    return model.eval().to(device)


def load_adapted(folder: Path, adapter: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """Return a float32 causal language model with a PEFT adapter."""
    from peft import PeftModel

    base = load(folder, trust_remote_code=trust_remote_code)
    try:
        return PeftModel.from_pretrained(base, adapter).eval().to(device)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{adapter}: not an adapter of {folder}: {reason}") from error


def _load_float(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    folder = checkpoint.folder
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model, info = auto_class(config).from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise unloadable(folder, error) from error
    # transformers fills a missing tensor with random numbers and only warns.
    if info["missing_keys"]:
        if fused_experts(model):  # of some families it does not know the experts by single names, as we write them
            return _fill(checkpoint, dtype, trust_remote_code)
        raise ConfigError(f"{folder}: tensor {min(info['missing_keys'])} is missing; fetch the checkpoint again")
    return model


def _fill(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Build the model without weights and fill it: transformers itself reads these layouts only on a GPU."""
    from transformers import GenerationConfig

    folder = checkpoint.folder
    model: Any = skeleton(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    for name in checkpoint.quantized:
        _replace(model, name, checkpoint, dtype)
    quantized_biases = {f"{name}.bias" for name in checkpoint.quantized}
    state = {}
    for name in checkpoint.float_names:
        if name not in quantized_biases:
            tensor = checkpoint.tensors[name]
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    unused = [name for name in unexpected if not name.endswith(BUFFERS)]
    if isinstance(model.get_output_embeddings(), QuantLinear):  # a head of its own, whatever config.json says
        model.config.tie_word_embeddings = False
    model.tie_weights()
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if empty:
        raise ConfigError(f"{folder}: tensor {min(empty)} is missing; fetch the checkpoint again")
    if unused:
        raise ConfigError(
            f"{folder}: tensor {min(unused)} has no place in {type(model).__name__}; config.json and weights disagree"
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _replace(model: nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    weight = checkpoint.quantized_weight(name)
    n, k = weight.codes.shape
    where = f"{checkpoint.folder}: quantized layer {name} [{n}, {k}]"
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"{where} has no place in {type(model).__name__}; config.json and weights disagree") from None
    if isinstance(dense, nn.Embedding) and dense.weight.shape == (n, k):
        dense.weight = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
        return
    if not isinstance(dense, nn.Linear) or (dense.out_features, dense.in_features) != (n, k):
        raise ConfigError(f"{where} does not fit the model's {dense!r}; config.json and weights disagree")
    model.set_submodule(name, QuantLinear(weight, checkpoint.tensors.get(f"{name}.bias"), dtype))


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    # Without files transformers would make an empty tokenizer for some models.
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise ConfigError(
            f"no tokenizer in {folder}: neither tokenizer.json nor a vocabulary; copy the tokenizer files of the "
            "original model there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"no tokenizer in {folder} that can be loaded: {reason}; fetch its files again") from error
