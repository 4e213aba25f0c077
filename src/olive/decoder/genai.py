"""The files that ONNX Runtime GenAI reads beside the graph: genai_config.json and the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.decoder.architecture import Architecture
from olive.decoder.families import text_config
from olive.decoder.graph import MODEL
from olive.decoder.options import Options
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint

REWINDS_BEYOND = 4096
"""For type phi3, GenAI recomputes the cache when a text grows past this length, whatever config.json says."""
MAX_LENGTH = 4096
"""Default length of a text: the cache is allocated for it in advance."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
SEARCH = {
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip
"""What generation_config.json may set, and the defaults."""
CHUNK_SIZE = 512
"""Tokens of a prompt that GenAI reads at once, so that memory does not grow with the prompt."""


def check(folder: Path) -> None:
    """Refuse a checkpoint without the tokenizer file that GenAI needs."""
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder}: no tokenizer.json, which ONNX Runtime GenAI reads; write one with transformers: "
                          "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")  # fmt: skip


def write(checkpoint: Checkpoint, arch: Architecture, options: Options, out: Path) -> list[str]:
    """Write genai_config.json, copy config.json and the tokenizer; return what a reader of the report should know."""
    for name in ("config.json", *TOKENIZER_FILES):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, out / name)
    config, notes = _config(checkpoint, arch, options)
    (out / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes


def _config(checkpoint: Checkpoint, arch: Architecture, options: Options) -> tuple[dict[str, Any], list[str]]:
    folder = checkpoint.folder
    given = dict(checkpoint.config) | dict(text_config(checkpoint.config))
    generation = _read(folder / "generation_config.json")
    special = _special_tokens(folder)
    ends = _ends(given, generation, special)
    first = (generation.get("bos_token_id"), given.get("bos_token_id"), special.get("bos_token"))
    padding = (generation.get("pad_token_id"), given.get("pad_token_id"), special.get("pad_token"), ends[0])
    search = {key: generation.get(key, default) for key, default in SEARCH.items()}
    search |= {"max_length": min(arch.max_positions, MAX_LENGTH), "past_present_share_buffer": True}
    chunk, notes = _chunk_size(arch, options)
    search |= {"chunk_size": chunk} if chunk else {}
    begin = next((i for i in first if i is not None), None)
    provider = options.target
    config = {
        "model": {
            **({} if begin is None else {"bos_token_id": begin}),
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
            "pad_token_id": next(i for i in padding if i is not None),
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


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _special_tokens(folder: Path) -> dict[str, int]:
    """Return the ids of the tokenizer's named tokens (bos_token, eos_token, eot_token, pad_token)."""
    ids = {t["content"]: t["id"] for t in _read(folder / "tokenizer.json").get("added_tokens", [])}
    named = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
    texts = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items() if k.endswith("_token")}
    return {name: ids[text] for name, text in texts.items() if isinstance(text, str) and text in ids}


def _ends(config: Mapping[str, Any], generation: Mapping[str, Any], special: Mapping[str, int]) -> list[int]:
    """Return every token that ends an answer, those of generation_config.json first."""
    ids: list[int] = []
    for found in (generation.get("eos_token_id"), config.get("eos_token_id"),
                  special.get("eos_token"), special.get("eot_token")):  # fmt: skip
        ids += found if isinstance(found, list) else [] if found is None else [found]
    if not ids:
        raise ConfigError("config.json: no eos_token_id, here, in generation_config.json or in the tokenizer's files: "
                          "generation would never end; set it")  # fmt: skip
    return list(dict.fromkeys(ids))
