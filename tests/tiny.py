"""Tiny random checkpoints of each family, with a tokenizer, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 320
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of 256 bytes and a few special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|bos|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|endoftext|>",
              "pad_token": "<|endoftext|>", "add_bos_token": False, "chat_template": template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


EXPERTS = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 16,
                  "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
                  "shared_expert_intermediate_size": 128},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
}  # fmt: skip
"""What families with experts need besides SIZES."""

DECODERS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 6, "query_pre_attn_scalar": 24},
    "gpt2": {},
    "gpt_neox": {"hidden_size": 256},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4,
                "logits_scaling": 1.7},
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 16},
    "mixtral": {"sliding_window": 16},
    "olmo2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {},
    "smollm3": {"num_hidden_layers": 4},
    "stablelm": {"hidden_size": 256},
    "starcoder2": {"sliding_window": 16},
}  # fmt: skip
"""What each family that olive builds needs besides SIZES, with windows that a short text crosses."""

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": SIZES | {"rope_parameters": MROPE},
        "vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                          "fullatt_block_indexes": [1]},
        "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303,
    },
    "qwen3_vl_moe": {
        "text_config": SIZES | EXPERTS["qwen3_moe"] | {"rope_parameters": MROPE},
        "vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                          "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 14},
        "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303,
    },
    "llava": {
        "text_config": {"model_type": "llama"} | SIZES,
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                          "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        "image_token_index": 300,
    },
    "gemma3": {
        "text_config": SIZES | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
                          "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302,
    },
}  # fmt: skip
"""Families that see, each with more vision layers than text layers."""


def checkpoint(folder: Path, family: str, *, fused: bool = False, **changes: Any) -> torch.nn.Module:
    """Save a random float32 checkpoint of a family; return the transformers model.

    ``fused``: under transformers' own names, where experts are fused, instead of those that checkpoints have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    sees = family in VISION
    config = AutoConfig.for_model(family, **((VISION[family] if sees else SIZES | EXPERTS.get(family, {})) | changes))
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # larger than the usual start, so that attention and rotation matter in the logits
            weight.normal_(1.0, 0.3) if "norm" in name else weight.normal_(0.0, 1.2 / weight.shape[-1] ** 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, save_original_format=not fused)
    tokenizer(folder)
    return model


def ids(tokens: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Return random token ids [B, T] beyond the special ones."""
    return torch.randint(5, 260, (batch, tokens), generator=torch.Generator().manual_seed(seed))
