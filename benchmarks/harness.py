"""lm-eval on an ONNX folder through our bridge, beside the harness's own transformers backend on a checkpoint.

    python benchmarks/harness.py ONNX CHECKPOINT --rows travel.jsonl --text books.txt

Two tasks are made of the files: to choose the right one of four responses to a prompt, and the perplexity of passages
of text. Scoring alone is timed, after both models are loaded and have read one small batch; the two take turns. One
line per task: scores of both, seconds of both, their ratio, and the largest difference between two log likelihoods.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

LOGGED = "lm_eval"
CHOICES = 4
PASSAGE = 1500  # characters


def main() -> None:
    """Make the tasks, run them on both backends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx")
    parser.add_argument("checkpoint")
    parser.add_argument("--rows", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        tasks = [choice_task(Path(folder), Path(args.rows)), text_task(Path(folder), Path(args.text))]
        compare(args, tasks)


def choice_task(folder: Path, rows: Path) -> str:
    """Write a task: which of four responses belongs to the prompt?"""
    source = random.Random(0)
    pairs = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    lines = []
    for pair in pairs:
        others = sorted({other["response"] for other in pairs} - {pair["response"]})
        gold = source.randrange(CHOICES)
        choices = source.sample(others, CHOICES - 1)
        choices.insert(gold, pair["response"])
        query = f"<|user|>\n{pair['prompt']}<|end|>\n<|assistant|>\n"
        lines.append(json.dumps({"query": query, "choices": choices, "gold": gold}))
    (folder / "choice.jsonl").write_text("\n".join(lines))
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task = {"task": "travel_choice", "output_type": "multiple_choice", "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "target_delimiter": "",
            "metric_list": metrics}  # fmt: skip
    return _write(folder, task, "choice.jsonl")


def text_task(folder: Path, text: Path) -> str:
    """Write a task: the perplexity of passages."""
    whole = text.read_text(encoding="utf-8")
    passages = [whole[start : start + PASSAGE] for start in range(0, len(whole), PASSAGE)]
    (folder / "passages.jsonl").write_text("\n".join(json.dumps({"text": passage}) for passage in passages))
    names = {"word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity",
             "bits_per_byte": "bits_per_byte"}  # fmt: skip
    metrics = [{"metric": name, "aggregation": how, "higher_is_better": False} for name, how in names.items()]
    task = {"task": "book_passages", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": metrics}  # fmt: skip
    return _write(folder, task, "passages.jsonl")


def _write(folder: Path, task: dict[str, Any], data: str) -> str:
    task |= {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / data)}},
        "test_split": "test",
    }
    file = folder / f"{task['task']}.yaml"
    file.write_text(yaml.safe_dump(task))
    return str(file)


def compare(args: argparse.Namespace, tasks: list[str]) -> None:
    """Run every task on both, in turns."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from olive.evaluate.bridge import OnnxLM
    from olive.model import open_model

    logging.getLogger(LOGGED).setLevel(logging.ERROR)
    ours = OnnxLM(open_model(Path(args.onnx)), None, batch_size=args.batch_size, max_length=2048)
    theirs = HFLM(
        pretrained=args.checkpoint, dtype="float32", device="cpu", batch_size=args.batch_size, max_length=2048
    )
    backends = {"onnx": ours, "transformers": theirs}
    loaded = TaskManager(include_defaults=False).load(tasks)
    for name, task in loaded["tasks"].items():
        one = {"tasks": {name: task}, "groups": {}, "group_map": {}}
        scores: dict[str, dict[str, float]] = {}
        seconds: dict[str, list[float]] = {key: [] for key in backends}
        processor: dict[str, list[float]] = {key: [] for key in backends}
        found: dict[str, list[Any]] = {}
        for turn in range(args.rounds + 1):  # the first is a warm-up on a few rows
            for key, lm in backends.items():
                watched = _watched(lm)
                limit = args.limit if turn else 2
                results = lm_eval.evaluate(watched, one, limit=limit, bootstrap_iters=0, log_samples=False)
                if turn:
                    seconds[key].append(watched.seconds)
                    processor[key].append(watched.processor)
                    found[key] = watched.found
                    row = results["results"][name]
                    scores[key] = {k.split(",")[0]: v for k, v in row.items() if isinstance(v, float)}
        numbers = {key: [v[0] if isinstance(v, tuple) else v for v in values] for key, values in found.items()}
        apart = max(abs(a - b) for a, b in zip(*numbers.values(), strict=True))
        times = {key: statistics.median(values) for key, values in seconds.items()}
        print(json.dumps({"task": name, "scores": scores, "seconds": times, "rounds": seconds,
                          "processor seconds": {key: statistics.median(v) for key, v in processor.items()},
                          "requests": len(found["onnx"]),
                          "onnx over transformers": times["onnx"] / times["transformers"],
                          "largest difference of log likelihoods": apart}))  # fmt: skip


def _watched(lm: Any) -> Any:
    """Return the backend with its scoring timed and its answers kept."""
    from lm_eval.api.model import LM

    class Watched(LM):
        seconds = processor = 0.0
        found: list[Any]

        def _timed(self, name: str, requests: list[Any]) -> list[Any]:
            started, used = time.perf_counter(), time.process_time()
            self.found = getattr(lm, name)(requests)
            self.seconds += time.perf_counter() - started
            self.processor += time.process_time() - used
            return self.found

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            return self._timed("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
            return self._timed("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Any]) -> list[Any]:
            return self._timed("generate_until", requests)

    return Watched()


if __name__ == "__main__":
    main()
