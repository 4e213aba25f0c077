"""Reading rows: what is read, and what a user is told when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from olive.config import parse
from olive.data.render import generation_prompt, render
from olive.data.rows import Row, default_text, fingerprint, heldout_text, rows
from olive.data.spec import DataSpec, template_parts
from olive.errors import ConfigError

TEMPLATE = "<|user|>\\n{prompt}<|end|>\\n<|assistant|>\\n{response}<|end|>"


def _file(tmp_path: Path, text: str, name: str = "d.jsonl") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def _refusal(spec: DataSpec) -> str:
    with pytest.raises(ConfigError) as caught:
        list(rows(spec))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_shipped_texts_do_not_overlap() -> None:
    text, held = default_text(), heldout_text()
    assert len(text) > 100_000 and len(held) > 10_000
    assert not any(held[i : i + 60] in text for i in range(0, len(held) - 60, 60))


@pytest.mark.parametrize("as_array", [False, True])
def test_json_rows_carry_their_place(tmp_path: Path, as_array: bool) -> None:
    items = [{"a": "x\u2028y"}, {"a": "2"}]
    text = json.dumps(items) if as_array else "\n\n".join(json.dumps(i, ensure_ascii=False) for i in items)
    name = _file(tmp_path, text)
    read = list(rows(DataSpec(name="json", files=(name,))))
    assert [row.fields for row in read] == items
    assert read[1].where == (f"{name}, item 2" if as_array else f"{name}:3")


def test_csv_and_parquet_rows(tmp_path: Path) -> None:
    import pandas

    frame = pandas.DataFrame({"q": ["a", "b"], "r": ["c", "d"]})
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_parquet(tmp_path / "d.parquet")
    for name in ("csv", "parquet"):
        read = list(rows(DataSpec(name=name, files=(str(tmp_path / f"d.{name}"),))))
        assert [dict(row.fields) for row in read] == [{"q": "a", "r": "c"}, {"q": "b", "r": "d"}]


def test_csv_is_read_as_it_is_written(tmp_path: Path) -> None:
    file = _file(tmp_path, '\ufeffq,r\r\n"a, b",007\r\nNA,None\r\n\r\nTrue,"1.50\n"\r\n,\r\n', "d.csv")
    read = list(rows(DataSpec(name="csv", files=(file,))))
    expected = [("a, b", "007"), ("NA", "None"), ("True", "1.50\n"), ("", "")]
    assert [(row.fields["q"], row.fields["r"]) for row in read] == expected
    assert read[2].where == f"{file}:6"


def test_a_csv_row_of_another_length_is_named(tmp_path: Path) -> None:
    file = _file(tmp_path, "q,r\nhow,well, thanks\n", "d.csv")
    assert _refusal(DataSpec(name="csv", files=(file,))).startswith(f"{file}:2: 3 fields, but the first line names 2")


def test_broken_line_names_file_and_line(tmp_path: Path) -> None:
    name = _file(tmp_path, '{"a": 1}\n{"a" 2}\n')
    message = _refusal(DataSpec(name="json", files=(name,)))
    assert message.startswith(f"{name}:2: not JSON: Expecting ':' delimiter")


def test_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    name = _file(tmp_path, "3\n")
    assert _refusal(DataSpec(name="json", files=(name,))).startswith(f"{name}:1: expected a JSON object")


@pytest.mark.parametrize(("name", "text"), [("json", "\n\n"), ("text", " \n"), ("csv", ""), ("csv", "a,b\n")])
def test_empty_data_is_refused(tmp_path: Path, name: str, text: str) -> None:
    assert "empty" in _refusal(DataSpec(name=name, files=(_file(tmp_path, text),)))


@pytest.mark.parametrize("name", ["text", "json", "csv"])
def test_missing_file_is_named(name: str) -> None:
    assert _refusal(DataSpec(name=name, files=("no/such.file",))) == "no/such.file: no such data file"


def test_broken_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"abc\xff")
    assert "not UTF-8 text (byte 3)" in _refusal(DataSpec(files=(str(tmp_path / "d.txt"),)))


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_broken_table_is_named(tmp_path: Path, name: str) -> None:
    file = _file(tmp_path, 'a,b\n1,2\n"x\n', f"d.{name}")
    place = f"{file}:3" if name == "csv" else file
    assert _refusal(DataSpec(name=name, files=(file,))).startswith(f"{place}: cannot be read as {name}: ")


def test_unknown_dataset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'jsn' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = _refusal(DataSpec(name="jsn"))
    assert message.startswith("data jsn: cannot be read as a dataset: Dataset 'jsn'")
    assert message.endswith("did you mean 'json'?")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "hub/set", "text_field": "a", "text_template": "{a}"}, "at most one of"),
        ({"text_template": "{a}"}, "plain text has no fields"),
        ({"name": "json"}, "reads local files"),
        ({"name": "json", "files": ("a.json",), "split": "test"}, "split cannot apply"),
        ({"name": "csv", "files": ("a.csv",), "subset": "en"}, "subset cannot apply"),
        ({"name": "hub/set", "text_template": "no field"}, "no {field} placeholder"),
        ({"name": "hub/set", "text_template": "{a"}, "literal brace"),
        ({"name": "hub/set", "text_template": "{a!r}"}, "not a plain field name"),
        ({"max_sampels": 3}, "did you mean 'max_samples'?"),
    ],
)
def test_options_that_contradict_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(DataSpec, options, "data")
    assert said in str(caught.value)


def test_typed_escapes_become_newline_and_tab() -> None:
    assert template_parts("a\\n{b}\\t\n") == [("a\n", "b"), ("\t\n", None)]


def test_field_values_keep_their_backslashes() -> None:
    spec = DataSpec(name="hub/set", text_template="{p}|{r}")
    assert render(Row("x:1", {"p": "C:\\new", "r": "{p}"}), spec, None) == ("C:\\new|", "{p}")


def test_prompt_ends_before_the_last_placeholder() -> None:
    row = Row("x:1", {"prompt": "Q?", "response": "A."})
    prompt, answer = render(row, DataSpec(name="hub/set", text_template=TEMPLATE), None)
    assert prompt == "<|user|>\nQ?<|end|>\n<|assistant|>\n" == generation_prompt(TEMPLATE, "Q?")
    assert answer == "A.<|end|>"


def test_doubled_braces_are_literal() -> None:
    spec = DataSpec(name="hub/set", text_template="{{x}}{p}{{{r}}}")
    assert render(Row("x:1", {"p": "P", "r": "R"}), spec, None) == ("{x}P{", "R}")


def test_missing_template_field_names_all_there_is_to_know(tmp_path: Path) -> None:
    name = _file(tmp_path, '{"prompt": "a", "answer": "b"}\n')
    spec = DataSpec(name="json", files=(name,), text_template=TEMPLATE)
    with pytest.raises(ConfigError) as caught:
        render(next(rows(spec)), spec, None)
    message = str(caught.value)
    assert message.startswith(f"{name}:1: field 'response' of text_template ")
    assert message.endswith("is not in the row; its fields: prompt, answer")


def test_field_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="field 'text' must hold text, got None"):
        render(Row("x:1", {"text": None}), DataSpec(name="hub/set"), None)


def test_fingerprint_follows_contents_not_places(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one = DataSpec(name="json", files=(_file(tmp_path, "{}"),))
    same = DataSpec(name="json", files=(_file(tmp_path / "other", "{}"),))
    changed = DataSpec(name="json", files=(_file(tmp_path, "{} ", "e.jsonl"),))
    assert fingerprint(one) == fingerprint(same)
    others = [changed, one.model_copy(update={"max_seq_len": 7}), DataSpec(), DataSpec(name="hub/set")]
    assert len({fingerprint(spec) for spec in [one, *others]}) == 5
