"""Chat templates: which one a checkpoint has, what it makes of a conversation, and how GenAI must be given it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from olive.errors import ConfigError

Turns = list[dict[str, str]]
USER = {"role": "user", "content": "Where's the\n\ncafé?  (2 of them)"}
ANSWER = {"role": "assistant", "content": "It's there."}
CONVERSATIONS: tuple[Turns, ...] = (
    [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER],
    [USER, ANSWER, USER],
    [USER],
)
"""Asked of every template; some take no system turn, some no second question."""


def template(folder: Path) -> str | None:
    """Return a checkpoint's default chat template, if it has one; as in transformers, a file of its own goes first."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read(folder / name).get("chat_template")
        if isinstance(found, list):  # several with names
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def render(source: str, turns: Sequence[Mapping[str, str]], tokens: Mapping[str, str], *, open_turn: bool) -> str:
    """Return a conversation as transformers renders it; ``open_turn``: up to where the model's answer begins."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversations = [[dict(turn) for turn in turns]]
    texts, _ = render_jinja_template(conversations, chat_template=source, add_generation_prompt=open_turn, **tokens)
    return texts[0]


def conversations(source: str, tokens: Mapping[str, str]) -> Iterator[tuple[Turns, str]]:
    """Yield those of CONVERSATIONS that a template takes, each with its text."""
    for turns in CONVERSATIONS:
        try:
            yield turns, render(source, turns, tokens, open_turn=True)
        except Exception:  # whatever a template raises: it does not take this conversation
            continue


def end_of_turn(source: str, tokens: Mapping[str, str], added: Mapping[str, int]) -> int | None:
    """Return the token that a template writes after an answer, if it is one of the ``added`` tokens (text to id)."""
    for turns in ([CONVERSATIONS[0][0], USER, ANSWER], [USER, ANSWER]):
        try:
            before, found, after = render(source, turns, tokens, open_turn=False).rpartition(ANSWER["content"])
        except Exception:  # whatever a template raises
            continue
        following = [token for token in added if found and token and after.lstrip().startswith(token)]
        longest = max(following, key=len, default=None)
        # what opens the turn, perhaps with a role's name, is no end of one: the template always opens the next
        if longest and not re.search(re.escape(longest) + r"\w*\s*$", before):
            return added[longest]
    return None


def for_genai(source: str, tokens: Mapping[str, str]) -> str:
    """Return a template that GenAI renders as transformers renders ``source``.

    transformers drops a line break after a tag and blanks before it, GenAI does not: where that matters, they are taken
    out of the template.
    """
    untrimmed = re.sub(r"(?<![-+])([%#]\})", r"+\1", re.sub(r"(\{[%#])(?![-+])", r"\1+", source))  # + turns it off
    same = all(_renders_as(untrimmed, turns, tokens, text) for turns, text in conversations(source, tokens))
    return source if same else re.sub(r"(?m)^[ \t]+(?=\{[%#](?!\+))|(?<=[%#]\})(?<!\+[%#]\})\n", "", source)


def _renders_as(source: str, turns: Turns, tokens: Mapping[str, str], text: str) -> bool:
    try:
        return render(source, turns, tokens, open_turn=True) == text
    except Exception:  # whatever a template raises
        return False
