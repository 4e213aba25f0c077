"""The documentation keeps up with the code: reference generated, commands and flags real, links whole."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from olive.cli import COMMANDS
from olive.cli.options import Parser, normalize, parse_arguments
from places import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").rglob("*.md"))]  # fmt: skip
TRAINING = {"max_steps", "learning_rate", "per_device_train_batch_size"}
"""Options of TrainingArguments that the pages use; finetune passes unknown flags on to it."""

TEXT = ("", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ".jsonl")
"""Suffixes of the files that people read; Makefile and the like have none."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parser_of(command: str) -> Parser:
    return importlib.import_module(COMMANDS[command][0]).parser(f"olive {command}")


def blocks(text: str, language: str) -> Iterator[str]:
    """Yield the fenced blocks of a language."""
    fenced = re.findall(r"^[ ]*```(\w*)\n(.*?)^[ ]*```$", text, re.MULTILINE | re.DOTALL)
    return (body for kind, body in fenced if kind == language)


def without_blocks(text: str) -> str:
    return re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.MULTILINE | re.DOTALL)


def command_lines() -> Iterator[tuple[str, str]]:
    """Yield every line of a shell block, or of a script of the examples, that calls olive."""
    scripts = [*sorted((ROOT / "examples").rglob("*.sh"))]
    texts = [(path, block) for path in PAGES for block in blocks(path.read_text(encoding="utf-8"), "sh")]
    for path, text in [*texts, *((path, path.read_text(encoding="utf-8")) for path in scripts)]:
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip().startswith("olive "):
                yield name_of(path), line.strip()


@pytest.mark.parametrize("page", ["commands.md", "passes.md", "evaluators.md"])
def test_the_reference_is_what_the_code_says(page: str) -> None:
    path = ROOT / "docs" / page
    pages = runpy.run_path(str(path.with_name("generate.py")))["pages"]()
    assert path.read_text(encoding="utf-8") == pages[path], "run: python docs/generate.py"


@pytest.mark.parametrize(("page", "line"), list(command_lines()))
def test_command_lines_are_understood(page: str, line: str) -> None:
    _, command, *words = shlex.split(line, comments=True)
    assert command in COMMANDS, page
    args = parse_arguments(parser_of(command), normalize(words))
    assert {word.partition("=")[0].lstrip("-") for word in args.more if word.startswith("-")} <= TRAINING


def test_the_lab_is_told_as_it_is_run() -> None:
    lab = [line for page, line in command_lines() if page.endswith("lab.sh")]
    assert lab
    for page in ("README.md", "examples/lab/README.md"):
        told = [line for name, line in command_lines() if name == page]
        assert [line for line in lab if line not in told] == [], page


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_and_flags_named_in_passing_exist(path: Path) -> None:
    text = without_blocks(path.read_text(encoding="utf-8"))
    words = re.findall(r"`olive ([^\s`]+)", text)
    assert {word for word in words if word not in COMMANDS and word not in ("COMMAND", "--help")} == set()
    known = {flag for command in COMMANDS for flag in parser_of(command).flags()} | {f"--{name}" for name in TRAINING}
    flags = {normalize([flag])[0] for flag in re.findall(r"`(--[\w-]+)", text)}
    assert flags - known == set()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        page = path.parent / target if target else path
        assert page.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_names_every_part_of_the_source() -> None:
    tree = next(blocks((ROOT / "README.md").read_text(encoding="utf-8"), ""))
    source = ROOT / "src" / "olive"
    parts = {path.name for path in source.glob("*.py")} - {"__init__.py"}
    parts |= {f"{path.parent.name}/" for path in source.glob("*/__init__.py")}
    assert parts - set(tree.split()) == set()


def test_no_file_names_a_place_on_somebody_s_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so it is not known which files belong to the repository")
    place = re.compile(r"(?<![\w.~)}\]>-])/(?:work|root|home|tmp)\b")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in TEXT and path.is_file() and not name.startswith("examples/lab/models/"):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{name}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if place.search(line)]
    assert found == []
