"""A row as text: from a field, a template or the tokenizer's chat template, split into prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.data.rows import Row
from olive.data.spec import DataSpec, template_parts
from olive.errors import ConfigError, did_you_mean

MARK = "<olive answer>"
"""Stands for an answer, to see what a chat template writes behind one."""


def render(row: Row, spec: DataSpec, tokenizer: Any) -> tuple[str, str]:
    """Return a row's prompt, which may be empty, and what a model should say after it."""
    prompt, answer = _parts(row, spec, tokenizer)
    try:
        (prompt + answer).encode()
    except UnicodeEncodeError as error:  # JSON can say "\ud83d", the first half of an emoji
        half = error.object[error.start]
        raise ConfigError(f"{row.where}: its text holds {half!a}, half a character, at place {error.start}; mend or "
                          "drop the row") from None  # fmt: skip
    return prompt, answer


def _parts(row: Row, spec: DataSpec, tokenizer: Any) -> tuple[str, str]:
    if spec.use_chat_template:
        return _chat(row, tokenizer)
    if spec.text_template is None:
        return "", _field(row, spec)
    *before, (literal, answer), tail = _around_answer(spec.text_template)
    prompt = "".join(text + _value(row, field, spec.text_template) for text, field in before) + literal
    return prompt, _value(row, answer, spec.text_template) + tail[0]


def generation_prompt(template: str, question: str | Mapping[str, str]) -> str:
    """Return the text to generate from: the template up to its last placeholder, filled in.

    A plain string fills the only placeholder before the last.

    >>> generation_prompt("Q: {prompt} A: {response}", "Where?")
    'Q: Where? A: '
    """
    *before, (literal, _), _ = _around_answer(template)
    names = sorted({field for _, field in before if field})
    if isinstance(question, str):
        if len(names) != 1:
            raise ConfigError(f"text_template {template!r} asks for {names or 'nothing'}; give each by name")
        question = {names[0]: question}
    row = Row("question", question)
    return "".join(text + _value(row, field, template) for text, field in before) + literal


def behind_answer(spec: DataSpec) -> str:
    """Return the literal text that a template writes behind the answer.

    >>> behind_answer(DataSpec(name="json", files=("rows.jsonl",), text_template="{question}={answer};"))
    ';'
    """
    return _around_answer(spec.text_template)[-1][0] if spec.text_template is not None else ""


def _around_answer(template: str) -> list[tuple[str, str | None]]:
    """Return the template's parts with the last placeholder second to last and the literal text after it last."""
    parts = template_parts(template)
    if parts[-1][1] is not None:
        parts.append(("", None))
    # Doubled braces come as extra literals without a field: they belong to the text that follows.
    merged: list[tuple[str, str | None]] = []
    for literal, field in parts:
        if merged and merged[-1][1] is None:
            literal = merged.pop()[0] + literal
        merged.append((literal, field))
    return merged


def _value(row: Row, field: str | None, template: str) -> str:
    if field is None:
        return ""
    if field not in row.fields:
        has = ", ".join(row.fields) or "none"
        raise ConfigError(
            f"{row.where}: field '{field}' of text_template {template!r} is not in the row; its fields: {has}"
        )
    return _text(row, field)


def _field(row: Row, spec: DataSpec) -> str:
    field = spec.text_field or "text"
    if field not in row.fields:
        what = f"no field '{field}'" + (did_you_mean(field, row.fields) if spec.text_field else "")
        has = ", ".join(row.fields) or "none"
        raise ConfigError(
            f"{row.where}: {what} (the row's fields: {has}); say which text to use with text_field, text_template or "
            "use_chat_template"
        )
    return _text(row, field)


def _text(row: Row, field: str) -> str:
    value = row.fields[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{row.where}: field '{field}' must hold text, got {value!r:.80}")
    return str(value)


def _chat(row: Row, tokenizer: Any) -> tuple[str, str]:
    """Split a conversation before its last assistant message, which must be its last message."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError("use_chat_template: this model's tokenizer has no chat template; give a text_template")
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        has = ", ".join(row.fields) or "none"
        raise ConfigError(
            f"{row.where}: use_chat_template needs a field 'messages', a list of {{role, content}}; its fields: {has}"
        )
    for number, message in enumerate(messages, 1):
        if not _is_message(message):
            raise ConfigError(f"{row.where}: message {number} must hold role and content as text, got {message!r:.80}")
    if messages[-1]["role"] != "assistant":
        raise ConfigError(f"{row.where}: the last message must be the assistant's, got role {messages[-1]['role']!r}")
    try:
        whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt: str = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise ConfigError(f"{row.where}: the tokenizer's chat template refuses the messages: {error}") from None
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    # The template writes a finished turn otherwise than an open one (thinking blocks, for one): the answer follows
    # what a model will be given when it is asked. What ends it is not searched for the answer, which may be "e".
    marked: str = tokenizer.apply_chat_template([*messages[:-1], messages[-1] | {"content": MARK}], tokenize=False)
    return prompt, messages[-1]["content"].strip() + marked.rpartition(MARK)[2]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
