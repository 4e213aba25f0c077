"""Quality per bit of the quantizers: perplexity, KL divergence and top-1 agreement with the float model.

    python benchmarks/quality.py MODEL --calibration books.txt --text other.txt more.txt --tokens 8192 32768 \\
        --setting rtn --setting awq --setting gptq,group_size=128,symmetric=true

Each setting is an algorithm with options of its pass. Windows of 512 tokens, no special tokens, float32, all
positions. Bits per weight count scales (16 bits) and zero points. With --seeds the calibration text is rotated, so that
other windows are taken; mean and spread are given. One markdown row per setting and text; all figures as JSON lines in
--json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from olive.cache import Cache
from olive.engine import run as execute
from olive.plan import plan
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.torch_model import load, load_tokenizer
from olive.workflow import read_workflow

WINDOW = 512


def main() -> None:
    """Quantize and measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--setting", action="append", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    args = parser.parse_args()
    reference = load(Path(args.model), device=args.device)
    tokenizer = load_tokenizer(Path(args.model))
    texts = {(t, n): _windows(tokenizer, Path(t), n) for t in args.text for n in args.tokens}
    print("| model | text, tokens | setting | bits per weight | perplexity | KL divergence | p99 | top-1 | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for setting in args.setting:
        runs = [_measure(args, setting, seed, reference, texts) for seed in range(args.seeds)]
        for text, ids in texts.items():
            where = {"model": Path(args.model).name, "text": f"{Path(text[0]).stem} {ids.numel()}"}
            _print(where, setting, [run[text] for run in runs])
            if args.json:
                with Path(args.json).open("a") as file:
                    for seed, run in enumerate(runs):
                        file.write(json.dumps(where | {"setting": setting, "seed": seed} | run[text]) + "\n")


def _windows(tokenizer: Any, path: Path, limit: int) -> torch.Tensor:
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=False).input_ids[0]
    count = len(ids[:limit]) // WINDOW
    return ids[: count * WINDOW].view(count, WINDOW)


def _measure(args: Any, setting: str, seed: int, reference: Any, texts: dict[Any, torch.Tensor]) -> dict[Any, Any]:
    name, *options = setting.split(",")
    step: dict[str, Any] = {"type": name}
    for option in options:
        key, _, value = option.partition("=")
        try:
            step[key] = json.loads(value)
        except ValueError:
            step[key] = value
    with tempfile.TemporaryDirectory() as folder:
        text = Path(args.calibration).read_text(encoding="utf-8")
        start = random.Random(seed).randrange(len(text)) if seed else 0
        rotated = Path(folder, "calibration.txt")
        rotated.write_text(text[start:] + text[:start], encoding="utf-8")
        if name not in ("rtn", "hqq", "kquant") or step.pop("data", False):
            step["data"] = {"files": [str(rotated)], "max_samples": args.windows, "max_seq_len": WINDOW}
        workflow = read_workflow(
            {
                "input_model": {"path": args.model},
                "passes": [step],
                "output_dir": str(Path(folder, "out")),
                "compute_device": args.device,
                "seed": seed,
                "verify": {"level": "files"},
            }
        )
        cache = Cache(Path(folder, "cache"))
        planned = plan(workflow, cache)
        began = time.perf_counter()
        execute(planned, cache)
        seconds = time.perf_counter() - began
        out = Path(folder, "out")
        row = {"bits": _bits_per_weight(out), "seconds": seconds}
        found = load(out, device=args.device)
        return {text: row | _compare(reference, found, ids.to(args.device)) for text, ids in texts.items()}


def _bits_per_weight(folder: Path) -> float:
    checkpoint = Checkpoint(folder)
    bits = weights = 0.0
    for module in checkpoint.quantized:
        weight = checkpoint.quantized_weight(module)
        per_group = 16 + (0 if weight.symmetric else weight.bits)
        bits += weight.codes.numel() * weight.bits + weight.scale.numel() * per_group
        weights += weight.codes.numel()
    return bits / weights


@torch.inference_mode()
def _compare(reference: Any, candidate: Any, ids: torch.Tensor) -> dict[str, float]:
    torch.set_float32_matmul_precision("highest")  # on a GPU the quantizers lower it
    losses, source_losses, divergences, same = [], [], [], 0
    for window in ids.split(2):
        p = torch.log_softmax(reference(input_ids=window, use_cache=False).logits.float(), -1)
        q = torch.log_softmax(candidate(input_ids=window, use_cache=False).logits.float(), -1)
        following = window[:, 1:, None]
        losses.append(q[:, :-1].gather(-1, following).double().flatten())
        source_losses.append(p[:, :-1].gather(-1, following).double().flatten())
        divergences.append((p.exp() * (p - q)).sum(-1).clamp_min(0).double().flatten())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    divergence = torch.cat(divergences)
    return {
        "perplexity_source": math.exp(-torch.cat(source_losses).mean()),
        "perplexity": math.exp(-torch.cat(losses).mean()),
        "kl": float(divergence.mean()),
        "kl_p99": float(divergence.quantile(0.99)),
        "top1": same / ids.numel(),
    }


def _print(where: dict[str, str], setting: str, rows: list[dict[str, float]]) -> None:
    def told(key: str, digits: int) -> str:
        values = [row[key] for row in rows]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    columns = [told("bits", 2), told("perplexity", 3), told("kl", 4), told("kl_p99", 3), told("top1", 4)]
    print(
        f"| {where['model']} | {where['text']} | {setting} | {' | '.join(columns)} | {told('seconds', 1)} |", flush=True
    )


if __name__ == "__main__":
    main()
