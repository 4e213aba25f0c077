"""Run the lab's three commands on a model, then measure what the fine-tuning brought, in torch and in ONNX Runtime.

    python benchmarks/lab.py MODEL TRAIN.jsonl EVAL.jsonl [WORK_FOLDER]

Prints the seconds of each command and the perplexity of the evaluation rows' answers: of the quantized base, of the
base with the adapter (PEFT), and of the ONNX model with the adapter file.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

TEMPLATE = r"<|user|>\n{prompt}<|end|>\n<|assistant|>\n{response}<|end|>"


def commands(model: Path, rows: Path) -> list[list[str]]:
    """Return the lab's commands; outputs go to models/phi below the current folder."""
    return [
        ["quantize", "--model_name_or_path", str(model), "--trust_remote_code", "--algorithm", "awq",
         "--output_path", "models/phi/awq", "--log_level", "1"],
        ["finetune", "--method", "lora", "--model_name_or_path", "models/phi/awq", "--data_files", str(rows),
         "--data_name", "json", "--text_template", TEMPLATE, "--max_steps", "100", "--output_path", "./models/phi/ft",
         "--log_level", "1"],
        ["auto-opt", "--model_name_or_path", "models/phi/ft/model", "--adapter_path", "models/phi/ft/adapter",
         "--device", "cpu", "--provider", "CPUExecutionProvider", "--use_ort_genai", "--output_path",
         "models/phi/onnx-ao", "--log_level", "1"],
    ]  # fmt: skip


def perplexity(logits: Callable[[torch.Tensor], torch.Tensor], samples: list) -> float:
    """Perplexity of the samples' answers; ``logits`` maps ids [1, T] to [1, T, V]."""
    loss, count = 0.0, 0
    for sample in samples:
        ids, labels = torch.as_tensor(sample.input_ids), torch.as_tensor(sample.labels)
        log_p = logits(ids[None]).float().log_softmax(-1)[0, :-1]
        known = labels[1:] != -100
        loss -= log_p[known].gather(-1, labels[1:][known][:, None]).double().sum().item()
        count += int(known.sum())
    return math.exp(loss / count)


def main() -> None:
    """Run and print one row."""
    model, rows, held_out = (Path(word).resolve() for word in sys.argv[1:4])
    work = Path(sys.argv[4] if len(sys.argv) > 4 else tempfile.mkdtemp(prefix="olive-lab-")).resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.chdir(work)
    environment = os.environ | {"OLIVE_CACHE_DIR": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    for command in commands(model, rows):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "olive", *command], check=True, env=environment)
        print(f"-- {command[0]}: {time.perf_counter() - started:.1f} s", flush=True)

    from peft import PeftModel

    from olive.data.samples import samples
    from olive.data.spec import DataSpec
    from olive.runtime.session import OnnxDecoder
    from olive.runtime.torch_model import load, load_tokenizer

    base = load(Path("models/phi/ft/model")).eval()
    tokenizer = load_tokenizer(Path("models/phi/ft/model"), False)
    ends = base.generation_config.eos_token_id
    spec = DataSpec(name="json", files=(str(held_out),), text_template=TEMPLATE)
    kept = samples(spec, tokenizer, ends if isinstance(ends, list) else [ends]).kept
    with torch.inference_mode():
        before = perplexity(lambda ids: base(ids).logits, kept)
        adapted = PeftModel.from_pretrained(base, "models/phi/ft/adapter").eval()
        after = perplexity(lambda ids: adapted(ids).logits, kept)
    folder = Path("models/phi/onnx-ao/model")
    decoder = OnnxDecoder(folder)
    adapter = folder / "adapter_weights.onnx_adapter"
    onnx = perplexity(lambda ids: torch.from_numpy(decoder.logits(np.asarray(ids), adapter)), kept)
    print(f"{model.name}: answers' perplexity {before:.2f} -> {after:.3f} ({after / before:.4f} of it); "
          f"ONNX with adapter {onnx:.3f} ({onnx / after - 1:+.2%})")  # fmt: skip


if __name__ == "__main__":
    main()
