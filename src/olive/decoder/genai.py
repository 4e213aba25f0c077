"""The files that ONNX Runtime GenAI reads beside the graph: genai_config.json and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olive.decoder import chat, tokenizer_files
from olive.decoder.architecture import Architecture
from olive.decoder.families import text_config
from olive.decoder.graph import MODEL
from olive.decoder.options import Options
from olive.decoder.tokenizer_files import Tokens
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint

REWINDS_BEYOND = 4096
"""For type phi3, GenAI recomputes the cache when a text grows past this length, whatever config.json says."""
MAX_LENGTH = 4096
"""Default length of a text: the cache is allocated for it in advance."""
SEARCH = {
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip
"""What generation_config.json may set, and the defaults: answers are sampled where the model's makers say so."""
CHUNK_SIZE = 512
"""Tokens of a prompt that GenAI reads at once, so that memory does not grow with the prompt."""


def write(checkpoint: Checkpoint, arch: Architecture, options: Options, out: Path) -> list[str]:
    """Write genai_config.json, copy config.json and the tokenizer; return what a reader of the report should know."""
    tokens = Tokens.read(checkpoint.folder)
    notes = tokenizer_files.copy(checkpoint.folder, out, tokens)
    config, more = _config(checkpoint, arch, options, tokens)
    (out / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes + more


def _config(
    checkpoint: Checkpoint, arch: Architecture, options: Options, tokens: Tokens
) -> tuple[dict[str, Any], list[str]]:
    given = dict(checkpoint.config) | dict(text_config(checkpoint.config))
    generation = chat.read(checkpoint.folder / "generation_config.json")
    source = chat.template(checkpoint.folder)
    turn = None if source is None else chat.end_of_turn(source, tokens.named, tokens.added)
    ends, notes = _within(arch, "eos_token_id", [generation.get("eos_token_id"), given.get("eos_token_id"),
                                                 tokens.id("eos_token"), tokens.id("eot_token"), turn])  # fmt: skip
    if not ends:
        raise ConfigError("config.json: no eos_token_id that the model has, here, in generation_config.json or in the "
                          "tokenizer's files: generation would never end; set it")  # fmt: skip
    first, more = _within(arch, "bos_token_id", [_first(generation, given, tokens, "bos_token")])
    notes += more
    padding, more = _within(arch, "pad_token_id", [_first(generation, given, tokens, "pad_token")])
    notes += more
    if tokens.largest >= arch.vocab:
        notes.append(f"tokenizer.json has ids up to {tokens.largest}, the model only {arch.vocab} embeddings: a text "
                     "with such a token stops the run")  # fmt: skip
    search = {key: _setting(generation, key) for key in SEARCH}
    search |= {"max_length": min(arch.max_positions, MAX_LENGTH), "past_present_share_buffer": True}
    chunk, more = _chunk_size(arch, options)
    notes += more
    search |= {"chunk_size": chunk} if chunk else {}
    provider = options.target
    config = {
        "model": {
            **({"bos_token_id": first[0]} if first else {}),
            "context_length": arch.max_positions,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [{provider.genai: provider.options}] if provider.genai else [],
                },
                "filename": MODEL,
                "head_size": arch.head_dim,
                "hidden_size": arch.hidden,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": arch.heads,
                "num_hidden_layers": arch.layers,
                "num_key_value_heads": arch.kv_heads,
            },
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": (padding or ends)[0],
            "type": arch.genai_type or "decoder",
            "vocab_size": arch.vocab,
        },
        "search": search,
    }
    return config, notes


def _chunk_size(arch: Architecture, options: Options) -> tuple[int | None, list[str]]:
    """Return the longest piece of a prompt to be read at once, and what is to be said of ropes that switch."""
    switching = next((rope for rope in arch.ropes if rope and rope.switches()), None)
    if switching is None:
        return options.chunk_size or CHUNK_SIZE, []
    notes = []
    if options.chunk_size:
        notes.append("chunk_size is not used: a prompt read in pieces would mix the two tables of longrope")
    if (arch.genai_type, switching.original) != ("phi3", REWINDS_BEYOND):
        notes.append(f"longrope switches beyond {switching.original} tokens, but GenAI recomputes its cache only at "
                     f"{REWINDS_BEYOND}: a text that crosses it while generating mixes both")  # fmt: skip
    return None, notes


def _setting(generation: Mapping[str, Any], key: str) -> Any:
    """Return a search setting; where generation_config.json gives none of the kind that GenAI takes, the default."""
    given, default = generation.get(key), SEARCH[key]
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    return given if (isinstance(given, bool) if isinstance(default, bool) else number) else default


def _first(generation: Mapping[str, Any], config: Mapping[str, Any], tokens: Tokens, role: str) -> Any:
    """Return the id of a token with one role, from the first who knows it."""
    found = (generation.get(f"{role}_id"), config.get(f"{role}_id"), tokens.id(role))
    return next((i for i in found if i is not None), None)


def _within(arch: Architecture, name: str, given: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Merge ids and lists of ids; one that the model has no embedding for could stop nothing, and is left out."""
    ids = [i for found in given for i in (found if isinstance(found, list) else [found]) if i is not None]
    merged = list(dict.fromkeys(ids))
    outside = [i for i in merged if not 0 <= i < arch.vocab]
    notes = [f"{name} {i} is left out: the model has ids below {arch.vocab}" for i in outside]
    return [i for i in merged if i not in outside], notes
