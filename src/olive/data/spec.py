"""What data a pass reads: where its rows come from, how a row becomes text, how much of it is used."""

from __future__ import annotations

import string

from pydantic import Field, model_validator

from olive.config import Config

FILE_READERS = ("text", "json", "csv", "parquet")
"""Names that read local files; every other name is a local folder or a dataset of the hub."""


class DataSpec(Config):
    """Data for calibration or training."""

    name: str = Field("text", min_length=1)
    """Where rows come from: text, json, csv or parquet (local files), a local dataset folder, or a hub dataset id.
    Text without files is a small shipped text."""
    files: tuple[str, ...] = ()
    """Data files; for a hub dataset, files inside it."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset."""
    split: str = "train"
    """Split of a dataset."""
    text_field: str | None = None
    """Field that holds a row's text; "text" where nothing else is said and the rows have it."""
    text_template: str | None = None
    """Text of a row, with {field} placeholders; in training, what precedes the last placeholder is the prompt.
    A typed backslash and n is a newline; a literal brace is doubled."""
    use_chat_template: bool = False
    """Render the "messages" of each row with the tokenizer's chat template."""
    max_samples: int | None = Field(None, ge=1)
    """Use at most this many rows (training, by default all) or windows of text (calibration, by default 128)."""
    max_seq_len: int = Field(512, ge=2)
    """Longest sample, in tokens."""

    @model_validator(mode="after")
    def _one_rendering(self) -> DataSpec:
        ways = ("text_field", "text_template", "use_chat_template")
        given = [name for name in ways if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give at most one of {', '.join(ways)}; given: {', '.join(given)}")
        if given and self.name == "text":
            raise ValueError(f"plain text has no fields, so {given[0]} cannot apply; for JSON rows give name json")
        if self.name in FILE_READERS[1:] and not self.files:
            raise ValueError(f"name {self.name} reads local files; give them in files")
        if self.name in FILE_READERS and (self.subset is not None or self.split != "train"):
            part = "subset" if self.subset is not None else "split"
            raise ValueError(f"name {self.name} reads local files whole, so {part} cannot apply; give the files of it")
        if self.text_template is not None:
            template_parts(self.text_template)
        return self


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, field that follows it or None); typed ``\\n`` and ``\\t`` are resolved.

    >>> template_parts("<|user|>{prompt}")
    [('<|user|>', 'prompt')]
    """
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, field, format_spec, conversion in string.Formatter().parse(_unescape(template)):
            if field is not None and (format_spec or conversion or not field.isidentifier()):
                raise ValueError(f"{{{field}}} is not a plain field name")
            parts.append((literal, field))
    except ValueError as error:
        raise ValueError(f"text_template {template!r}: {error}; a literal brace is written {{{{ or }}}}") from None
    if not any(field for _, field in parts):
        raise ValueError(f"text_template {template!r} has no {{field}} placeholder")
    return parts


def _unescape(template: str) -> str:
    # Shells pass backslash-n in double quotes on as two characters.
    return template.replace("\\n", "\n").replace("\\t", "\t")
