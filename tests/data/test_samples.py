"""Token ids: windows for calibration; for training, masks and prompts made of the tokens that generation uses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers_by_kind import CHAT, KINDS, tokenizer

from olive.data.render import generation_prompt
from olive.data.samples import MASKED, Sample, collate, prompt_ids, samples, windows
from olive.data.spec import DataSpec
from olive.errors import ConfigError

ROWS = [
    {"prompt": "Where is the moon?", "response": "Above the trees."},
    {"prompt": "And  now ", "response": " a leading space"},
    {"prompt": "x", "response": "\nnewline first"},
    {"prompt": "ends in newline\n", "response": "\n\ntwo"},
    {"prompt": "The begin", "response": "ning of a word"},
]
TEMPLATES = [
    "<|user|>\\n{prompt}<|end|>\\n<|assistant|>\\n{response}<|end|>",
    "{prompt} {response}",
    "{prompt}{response}",
]


def _spec(tmp_path: Path, rows: list[Any], **options: Any) -> DataSpec:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSpec(name="json", files=(str(file),), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_tokens_are_those_of_generation(tmp_path: Path, kind: str, template: str) -> None:
    used = tokenizer(kind)
    end = used.convert_tokens_to_ids("<|end|>")
    kept, dropped = samples(_spec(tmp_path, ROWS, text_template=template), used, [end])
    assert dropped == 0
    for sample, row in zip(kept, ROWS, strict=True):
        text = generation_prompt(template, row["prompt"])
        asked = prompt_ids(used, text)
        assert sample.input_ids[: len(asked)] == asked
        assert sample.labels == [MASKED] * len(asked) + sample.input_ids[len(asked) :]
        assert sample.input_ids[-1] in (end, used.eos_token_id) and used.eos_token_id not in asked
        answer = row["response"] + ("<|end|>" if "<|end|>" in template else "<|endoftext|>")
        # The answer reads as given, whatever the boundary did to its tokens; only the text's start may get a space.
        said = used.decode(sample.input_ids).removeprefix("<s>")
        assert said == text + answer or (kind == "metaspace" and said == " " + text + answer)
        assert asked.count(used.bos_token_id) == (kind in ("bytes_bos", "metaspace"))


def test_bos_stands_only_at_the_start(tmp_path: Path) -> None:
    used = tokenizer("metaspace")
    (sample,) = samples(_spec(tmp_path, ROWS[:1], text_template="{prompt}{response}"), used).kept
    assert sample.input_ids[0] == used.bos_token_id and sample.input_ids.count(used.bos_token_id) == 1


def test_chat_masks_all_but_the_last_answer(tmp_path: Path) -> None:
    used = tokenizer("bytes")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "the last"},
    ]
    end = used.convert_tokens_to_ids("<|end|>")
    (sample,) = samples(_spec(tmp_path, [{"messages": messages}], use_chat_template=True), used, [end]).kept
    answer = [token for token in sample.labels if token != MASKED]
    assert used.decode(answer) == "the last<|end|>"  # the template's newline behind it is cut: generation stops before
    asked = used.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert sample.input_ids[: len(asked)] == asked


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "needs a field 'messages'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message must be the assistant's, got role 'user'"),
        ({"messages": [{"role": "user"}]}, "message 1 must hold role and content as text, got {'role': 'user'}"),
    ],
)
def test_chat_rows_that_do_not_fit_are_refused(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        samples(_spec(tmp_path, [row], use_chat_template=True), tokenizer("bytes"))
    assert ":1: " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("answer", ["e", "end", "the last"])
def test_an_answer_is_not_searched_for_where_a_template_ends_it(tmp_path: Path, answer: str) -> None:
    used = copy.copy(tokenizer("bytes"))
    used.chat_template = CHAT.replace("'<|assistant|>\n'", "'<|assistant|>\n<think>\n'")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    end = used.convert_tokens_to_ids("<|end|>")
    (sample,) = samples(_spec(tmp_path, [{"messages": messages}], use_chat_template=True), used, [end]).kept
    assert used.decode([token for token in sample.labels if token != MASKED]) == f"{answer}<|end|>"


def test_an_empty_text_teaches_nothing(tmp_path: Path) -> None:
    found = samples(_spec(tmp_path, [{"text": ""}, {"text": "a"}]), tokenizer("bytes"))
    assert (len(found.kept), found.dropped) == (1, 1)
    with pytest.raises(ConfigError, match="none of 1 rows has something to learn"):
        samples(_spec(tmp_path, [{"text": ""}]), tokenizer("bytes"))


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r":1: its text holds '\\ud83d', half a character, at place 3"):
        samples(_spec(tmp_path, [{"text": "hi \ud83d"}]), tokenizer("bytes"))


def test_whole_text_is_learnt_without_a_prompt(tmp_path: Path) -> None:
    used = tokenizer("bytes_bos")
    (sample,) = samples(_spec(tmp_path, [{"body": "some text"}], text_field="body"), used).kept
    assert used.decode(sample.input_ids) == "<s>some text<|endoftext|>"
    assert MASKED not in sample.labels[1:]


def test_samples_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    used = tokenizer("bytes")
    rows = [{"prompt": "a long question " * 20, "response": "b"}, {"prompt": "a", "response": "b c d e f g" * 10}]
    spec = _spec(tmp_path, rows, text_template="{prompt}{response}", max_seq_len=16)
    kept, dropped = samples(spec, used)
    assert (len(kept), dropped) == (1, 1) and len(kept[0].input_ids) == 16
    with pytest.raises(ConfigError, match="raise max_seq_len"):
        samples(_spec(tmp_path, rows[:1], text_template="{prompt}{response}", max_seq_len=16), used)


def test_max_samples_bounds_the_rows(tmp_path: Path) -> None:
    spec = _spec(tmp_path, ROWS, text_template="{prompt}{response}", max_samples=2)
    assert len(samples(spec, tokenizer("bytes")).kept) == 2


def test_windows_are_even_cuts_of_the_text(tmp_path: Path) -> None:
    used = tokenizer("bytes_bos")
    all_of_it = windows(DataSpec(max_seq_len=64), used)
    some = windows(DataSpec(max_seq_len=64, max_samples=5), used)
    assert all_of_it.shape[1] == 64 and all_of_it.dtype == torch.int64 and used.bos_token_id not in all_of_it
    count = len(all_of_it)
    assert torch.equal(some, all_of_it[[i * count // 5 for i in range(5)]])
    (tmp_path / "short.txt").write_text("a few words")
    short = windows(DataSpec(files=(str(tmp_path / "short.txt"),), max_seq_len=64), used)
    assert used.decode(short[0]) == "a few words" and short.shape[0] == 1


def test_windows_of_rows_join_rendered_texts(tmp_path: Path) -> None:
    used = tokenizer("bytes")
    cut = windows(_spec(tmp_path, ROWS[:2], text_template="{prompt}|{response}.", max_seq_len=4), used)
    joined = "".join(f"{row['prompt']}|{row['response']}." for row in ROWS[:2])
    assert cut.shape[1] == 4 and joined.startswith(used.decode(cut.flatten()))


def test_windows_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokens"):
        windows(_spec(tmp_path, [{"text": ""}]), tokenizer("bytes"))


def test_collate_pads_on_the_right() -> None:
    batch = collate([Sample([1, 2, 3], [MASKED, 2, 3]), Sample([4], [4])], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[MASKED, 2, 3], [4, MASKED, MASKED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
