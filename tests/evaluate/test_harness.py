"""lm-eval through the bridge: the scores of its own transformers backend, metrics with directions, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pairs import Pair

from olive.cache import Cache
from olive.errors import ConfigError, OliveError
from olive.evaluate.evaluators import Measuring, measured
from olive.evaluate.harness import LmEval
from olive.search.study import search

SENTENCES = ["The river is wide.", "A bird sings in the old tree.", "Rain.", "Nobody knew the way to the station."]
CHOICES = [{"query": f"Say: {text}", "choices": [f" {other}" for other in SENTENCES[:3]] + [" A", " B"], "gold": i}
           for i, text in enumerate(SENTENCES)]  # fmt: skip
LONG = [{"text": " ".join(f"Heap {i} has {i * i} stones." for i in range(count))} for count in (3, 12, 30)]
"""The last two are longer than the model's 256 positions. No text repeats itself: of windows that read the same tokens
but score a different number of them, the harness's transformers backend scores the wrong ones."""
HIGHER = {"acc": True, "acc_norm": True, "word_perplexity": False, "byte_perplexity": False, "exact_match": True}


def write(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a task over some rows; what datasets keeps of them lies beside."""
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    kept = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "datasets")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": kept, "test_split": "test", **more}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def metrics(*names: str, how: str = "mean") -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": how, "higher_is_better": HIGHER[name]} for name in names]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write(folder, "choose", CHOICES, output_type="multiple_choice", doc_to_text="{{query}}",
          doc_to_choice="{{choices}}", doc_to_target="{{gold}}", target_delimiter="",
          metric_list=metrics("acc", "acc_norm"))  # fmt: skip
    write(folder, "read", LONG, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
          metric_list=metrics("word_perplexity", "byte_perplexity", how="weighted_perplexity"))  # fmt: skip
    asked = {"until": ["x", "Q"], "max_gen_toks": 24, "do_sample": False}
    write(folder, "say", CHOICES, output_type="generate_until", doc_to_text="{{query}}", doc_to_target="{{query}}",
          generation_kwargs=asked, metric_list=metrics("exact_match"))  # fmt: skip
    write(folder, "draw", CHOICES, output_type="generate_until", doc_to_text="{{query}}", doc_to_target="{{query}}",
          generation_kwargs={"until": ["x"], "do_sample": True, "temperature": 0.7},
          metric_list=metrics("exact_match"))  # fmt: skip
    average = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "all_choices", "task": ["choose"], "aggregate_metric_list": average}
    (folder / "all_choices.yaml").write_text(yaml.safe_dump(group))
    return folder


def evaluator(tasks: Path, *names: str, **more: Any) -> LmEval:
    return LmEval(tasks=names, include_path=str(tasks), **more)


def requests(lm: Any, tasks: Path, name: str, kind: str) -> list[Any]:
    """Return what a backend answers to each request of a task."""
    loaded = evaluator(tasks, name)._load()
    (task,) = loaded["tasks"].values()
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return getattr(lm, kind)(task.instances)


def backends(pair: Pair, batch_size: int, adapted: bool = False) -> list[Any]:
    """Return our bridge and the harness's own backend on the same model."""
    options = LmEval(tasks=("x",), batch_size=batch_size)
    return [
        options._lm(pair.onnx, Measuring(adapter=pair.onnx_adapter if adapted else None)),
        options._lm(pair.hf, Measuring(adapter=pair.peft if adapted else None)),
    ]


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("adapted", [False, True])
def test_log_likelihoods_are_those_of_the_harness(batch_size: int, adapted: bool, pair: Pair, tasks: Path) -> None:
    ours, theirs = backends(pair, batch_size, adapted)
    for name, kind in (("choose", "loglikelihood"), ("read", "loglikelihood_rolling")):
        found, wanted = (requests(lm, tasks, name, kind) for lm in (ours, theirs))
        assert len(found) == {"choose": 20, "read": 3}[name]
        if kind == "loglikelihood":
            assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
            found, wanted = ([value for value, _ in values] for values in (found, wanted))
        assert found == pytest.approx(wanted, rel=1e-5)  # sums of some hundred float32 logarithms


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_the_harness(batch_size: int, pair: Pair, tasks: Path) -> None:
    ours, theirs = backends(pair, batch_size)
    found = requests(ours, tasks, "say", "generate_until")
    assert found == requests(theirs, tasks, "say", "generate_until")
    assert all("x" not in text and "Q" not in text for text in found)
    assert any(text for text in found)


def test_rows_are_read_together(pair: Pair, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run for a batch of rows, and the same tokens are read once: not one run for each choice."""
    (ours, _) = backends(pair, 4)
    shapes = []
    read = ours._decoder.logits
    monkeypatch.setattr(ours._decoder, "logits", lambda ids, *more: shapes.append(ids.shape) or read(ids, *more))
    requests(ours, tasks, "choose", "loglikelihood")
    rows = 4 * 4  # three sentences, and one for " A" and " B", which are two tokens of which the first is read
    assert [shape[0] for shape in shapes] == [4] * (rows // 4)
    assert [shape[1] for shape in shapes] == sorted((shape[1] for shape in shapes), reverse=True)


def test_large_logits_make_small_batches(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, _) = backends(pair, 16)
    monkeypatch.setattr("olive.evaluate.bridge.LOGITS", 3 * 10 * 320)
    assert [len(batch) for batch in ours._batches([tuple(range(10))] * 7)] == [3, 3, 1]


def test_metrics_have_the_directions_of_the_harness(tasks: Path) -> None:
    """So that they can be goals and objectives; in the existing tool lm-eval's cannot."""
    found = evaluator(tasks, "choose", "read", "say").metrics()
    assert {name: metric.direction for name, metric in found.items()} == {
        "choose.acc": "maximize",
        "choose.acc_norm": "maximize",
        "read.word_perplexity": "minimize",
        "read.byte_perplexity": "minimize",
        "say.exact_match": "maximize",
    }
    assert all(metric.name == name and metric.help for name, metric in found.items())


def test_a_group_gives_its_average(pair: Pair, tasks: Path) -> None:
    wanted = measured(evaluator(tasks, "choose"), pair.onnx, Measuring())["choose.acc"]
    assert measured(evaluator(tasks, "all_choices"), pair.onnx, Measuring()) == {"all_choices.acc": wanted}


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_a_measurement_gives_every_metric_and_repeats(form: str, pair: Pair, tasks: Path) -> None:
    model = getattr(pair, form)
    facts: dict[str, Any] = {}
    asked = evaluator(tasks, "choose", "read", limit=2, num_fewshot=1)
    found = measured(asked, model, Measuring(note=facts.update))
    assert set(found) == set(asked.metrics())
    assert facts == {"rows": {"choose": 2, "read": 2}}
    assert measured(asked, model, Measuring()) == found


def test_a_search_takes_a_task_as_its_objective(pair: Pair, tasks: Path, tmp_path: Path) -> None:
    """The existing tool's cannot."""
    template = {
        "input_model": {"path": str(pair.hf.path)},
        "passes": [{"type": "rtn", "group_size": 16, "bits": {"choice": [2, 8]}}],
        "evaluators": {"lm": {"type": "lm_eval", "tasks": ["read", "choose"], "include_path": str(tasks)}},
        "goals": ["read.word_perplexity <= input * 10", "read.byte_perplexity minimal", "choose.acc maximal"],
        "search": {"sampler": "grid"},
        "output_dir": str(tmp_path / "out"),
    }
    found = search(template, Cache(tmp_path / "cache"))
    scores = [trial.metrics["read.byte_perplexity"] for trial in found.trials]
    assert len(set(scores)) == 2
    assert found.best == scores.index(min(scores))
    assert all(trial.feasible and 0 <= trial.metrics["choose.acc"] <= 1 for trial in found.trials)


def test_a_task_may_be_a_file(tasks: Path, pair: Pair) -> None:
    found = measured(LmEval(tasks=(str(tasks / "choose.yaml"),)), pair.onnx, Measuring())
    assert found == measured(evaluator(tasks, "choose"), pair.onnx, Measuring())


def test_refusals(tasks: Path, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks: .*none\.yaml: no such file"):
        LmEval(tasks=(str(tmp_path / "none.yaml"),)).metrics()
    with pytest.raises(ConfigError, match=r"include_path .*none: no such folder"):
        LmEval(tasks=("choose",), include_path=str(tmp_path / "none")).metrics()
    write(tmp_path, "gone", CHOICES, output_type="multiple_choice", doc_to_text="{{query}}",
          doc_to_choice="{{choices}}", doc_to_target="{{gold}}")  # fmt: skip
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"gone.*: cannot be loaded: Unable to find .*gone\.jsonl"):
        LmEval(tasks=("gone",), include_path=str(tmp_path)).metrics()
    with pytest.raises(ConfigError, match=r"asks for sampled answers .* set do_sample false"):
        measured(evaluator(tasks, "draw"), pair.onnx, Measuring())
    with pytest.raises(ConfigError, match="max_gen_toks 24 leaves no room for a prompt in max_length 20"):
        measured(evaluator(tasks, "say", max_length=20), pair.onnx, Measuring())
    with pytest.raises(OliveError, match="is longer than max_length 8"):
        measured(evaluator(tasks, "choose", max_length=8), pair.onnx, Measuring())


def test_the_harness_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(OliveError, match=r"lm_eval is not installed; run: pip install 'olive-onnx\[eval\]'"):
        LmEval(tasks=("x",), include_path=str(tmp_path)).metrics()
