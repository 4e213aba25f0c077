"""llama.cpp's side of the inference benchmark: a checkpoint to GGUF, its quantization, and the process that measures.

    python benchmarks/llamacpp.py convert MODEL OUT.gguf
    python benchmarks/llamacpp.py quantize IN.gguf OUT.gguf {q4_0,q4_k_m}
    python benchmarks/llamacpp.py bytes FILE.gguf
    python benchmarks/llamacpp.py serve FILE.gguf --threads 2

Needs llama-cpp-python, gguf and numpy, in an environment of its own. The GGUF file has no tokenizer: prompts are ids.
Families: llama, qwen2, phi3. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from turns import Request, serve

CONTEXT, BATCH = 1024, 512
ERROR = 4  # llama.cpp's level
TYPES = {"BF16": np.dtype(np.uint16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["convert", "quantize", "bytes", "serve"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("kind", choices=["q4_0", "q4_k_m"], nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.command == "convert":
        convert(args.source, args.out)
    elif args.command == "quantize":
        quantize(args.source, args.out, args.kind, args.threads)
    elif args.command == "bytes":
        print(streamed_bytes(args.source))
    else:
        serve(lambda: load(args.source, args.threads))


def tensors(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, type and bytes (mapped, not read) of a checkpoint's tensors; bfloat16 as uint16."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start = 8 + length + entry["data_offsets"][0]
            yield name, entry["dtype"], np.memmap(file, TYPES[entry["dtype"]], "r", start, tuple(entry["shape"]))


def convert(folder: Path, out: Path) -> None:
    """Write a float checkpoint as GGUF in its own type."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, layers = config["model_type"], config["num_hidden_layers"]
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "phi3": gguf.MODEL_ARCH.PHI3}[family]
    names = gguf.get_tensor_name_map(arch, layers)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[arch])
    _settings(writer, config)
    ready: list[Callable[[], np.ndarray]] = []

    def add(name: str, array: np.ndarray, kind: str, final: Callable[[], np.ndarray]) -> None:
        size = array.size * TYPES[kind].itemsize
        writer.add_tensor_info(name, array.shape, TYPES[kind], size, raw_dtype=gguf.GGMLQuantizationType[kind])
        ready.append(final)

    for name, values in _rope_factors(config).items():
        add(name, values, "F32", lambda values=values: values)
    for name, kind, array in tensors(folder):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SystemExit(f"{folder}: tensor {name} has no name in GGUF's {family}")
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        part = name.split(".")[-2]
        if family == "llama" and part in heads:
            add(found, array, kind, lambda array=array, n=heads[part]: _interleave(array, n))
        elif array.ndim == 1:
            add(found, array, "F32", lambda array=array, kind=kind: _float32(array, kind))
        else:
            add(found, array, kind, lambda array=array: array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for final in ready:
        writer.write_tensor_data(np.ascontiguousarray(final()))
    writer.close()


def _settings(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["model_type"] == "phi3":
        original = config["original_max_position_embeddings"]
        writer.add_sliding_window(config.get("sliding_window") or 0)
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config["max_position_embeddings"] / original
        if config.get("rope_scaling") and scale > 1:
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def _rope_factors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return what each rotary frequency is divided by, as tensors."""
    scaling = config.get("rope_scaling") or {}
    if "long_factor" in scaling:
        return {f"rope_factors_{k}.weight": np.array(scaling[f"{k}_factor"], np.float32) for k in ("long", "short")}
    if scaling.get("rope_type") != "llama3":
        return {}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)}


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring channels of a head where transformers rotates its two halves."""
    halves = array.reshape(heads, 2, -1, array.shape[1])  # [H * D, K] -> [H, 2, D / 2, K]
    return halves.swapaxes(1, 2).reshape(array.shape)  # [H, D / 2, 2, K] -> [H * D, K]


def _float32(array: np.ndarray, kind: str) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array.astype(np.float32)


def quantize(source: Path, out: Path, kind: str, threads: int) -> None:
    """Quantize with llama.cpp's own defaults for the kind."""
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = threads
    kinds = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
    options.ftype = kinds[kind]
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(options)):
        raise SystemExit(f"{source}: llama.cpp could not quantize it")


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    """Let errors through, and nothing else."""
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def load(file: Path, threads: int) -> Callable[[Request], dict[str, Any]]:
    """Load a model; return the function that answers requests."""
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(file), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"{file}: llama.cpp cannot load it")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, BATCH, BATCH
    options.n_threads = options.n_threads_batch = threads
    state = llama_cpp.llama_init_from_model(model, options)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    cache = llama_cpp.llama_get_memory(state)

    def step(ids: list[int]) -> int:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(state, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise SystemExit(f"{file}: llama_decode failed")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(state, -1), (vocab,)).argmax())

    def answer(request: Request) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(cache, False)
        started = time.perf_counter()
        tokens = [step(request["ids"])]
        read = time.perf_counter()
        for _ in range(request["tokens"]):
            tokens.append(step(tokens[-1:]))
        return {"prefill_s": read - started, "decode_s": time.perf_counter() - read, "tokens": tokens}

    return answer


def streamed_bytes(file: Path) -> int:
    """Bytes of weights that one token reads: every tensor, but of the embeddings only if they are the head too."""
    import gguf

    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(file).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight")
    return sum(sizes.values())


if __name__ == "__main__":
    main()
