"""Compare built ONNX models with transformers: logits over a text's length, and the first greedy tokens.

    python benchmarks/logits.py MODEL [MODEL ...] [--tokens 200] [--greedy 32] [--quantized]

Each MODEL is a float checkpoint. Without --quantized it is built as fp32. With it, it is first rounded to 4 bits in
groups of 32 (GPTQ layout), built with accuracy level 0 and float lm_head and embeddings, and compared with the
dequantized checkpoint. A greedy token may differ where the two best logits are closer than twice the difference.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from olive.quant.formats.checkpoint import read_config
from olive.runtime.genai import Generator
from olive.runtime.session import OnnxDecoder


def olive(*argv: str) -> None:
    """Run a command; its output is not wanted."""
    subprocess.run([sys.executable, "-m", "olive", *argv, "--no_cache"], check=True, stdout=subprocess.DEVNULL)


def greedy_matches(
    want: torch.Tensor, found: list[int], model: torch.nn.Module, prompt: torch.Tensor, tie: float
) -> str:
    """Say how many greedy tokens agree before the first difference that is not a tie."""
    for i, (a, b) in enumerate(zip(want.tolist(), found, strict=False)):
        if a != b:
            with torch.no_grad():
                logits = model(torch.cat([prompt[0], want[:i]])[None]).logits[0, -1]
            margin = (logits[a] - logits[b]).item()
            return f"{i} (then a tie: margin {margin:.1e})" if margin < tie else f"{i}, DIFFERS by {margin:.1e}"
    return f"{min(len(want), len(found))} of {len(want)}"


def main() -> None:
    """Compare each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--greedy", type=int, default=32)
    parser.add_argument("--quantized", action="store_true")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    for source in args.models:
        with tempfile.TemporaryDirectory(prefix="olive-logits-") as name:
            work = Path(name)
            options, reference = ["--precision", "fp32"], source
            if args.quantized:
                olive("quantize", "-m", str(source), "--group_size", "32", "-o", f"{work}/q", "--verify", "none")
                olive("dequantize", "-m", f"{work}/q", "-o", f"{work}/float", "--verify", "none")
                options = ["--accuracy_level", "0", "--lm_head", "float", "--embeddings", "float"]
                reference = work / "float"
            built = str(work / "q" if args.quantized else source)
            olive("auto-opt", "-m", built, *options, "-o", f"{work}/onnx", "--verify", "none")
            folder = work / "onnx" / "model"
            vocab = read_config(source)["vocab_size"]
            ids = torch.randint(5, vocab, (1, args.tokens), generator=torch.Generator().manual_seed(0))
            found = OnnxDecoder(folder).logits(ids.numpy())
            model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
            with torch.inference_mode():
                want = model(ids, use_cache=False).logits.numpy()
            worst = float(np.abs(want - found).max())
            del want, found
            prompt = ids[:, :32]
            out = model.generate(
                prompt, max_new_tokens=args.greedy, do_sample=False, attention_mask=torch.ones_like(prompt)
            )
            with Generator(folder) as generator:
                answer = generator.generate(prompt[0].tolist(), max_new_tokens=args.greedy).tokens
            agree = greedy_matches(out[0, 32:], answer, model, prompt, 2 * worst)
            kind = "int4" if args.quantized else "fp32"
            print(
                f"{source.name}: {kind}, {args.tokens} tokens: max difference {worst:.1e}; greedy {agree}", flush=True
            )


if __name__ == "__main__":
    main()
