"""Which shape a table of prompts has, and which of its columns are sent."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

from batchrun.chat.rows import (
    CUSTOM_ID,
    NOT_SENT_AS_BODY,
    REQUEST_FIELDS,
    Layout,
    PromptSettings,
    Row,
)
from batchrun.chat.turns import Turns
from batchrun.config import JSONValue, Shape
from batchrun.errors import UsageError

_LISTED_WIDTH: Final = 60


def detect(
    columns: Sequence[str],
    rows: Sequence[Row],
    settings: PromptSettings,
    forced: Shape | None,
    name: str,
) -> Layout:
    """Decide the shape of the table ``name`` from its columns and its first good rows.

    A table without rows fits every shape: it is published empty, not refused.
    UsageError when nothing fits, when two shapes fit, or when a named column is missing.
    """
    table = _Table(columns, rows, settings, name)
    shape = forced or table.shape()
    if settings.image and shape not in ("prompt", "template"):
        raise UsageError(f"{name}: --image goes with a prompt column or -p, not with {shape}")
    if rows:
        table.demand(shape)
    return _layout(shape, columns, settings)


class _Table(NamedTuple):
    """What is known of one file before its shape is."""

    columns: Sequence[str]
    rows: Sequence[Row]
    settings: PromptSettings
    name: str

    def shape(self) -> Shape:
        """The one shape the columns fit; templates fit all."""
        if self.settings.makes_messages:
            return "template"
        if self.settings.prompt_column is not None:
            return "prompt"
        fitting = [shape for shape in ("messages", "prompt") if shape in self.columns]
        if self._fits_batch(alone=not fitting):
            return "batch"
        if len(fitting) > 1:
            raise UsageError(
                f'{self.name}: has a "messages" and a "prompt" column; '
                "choose with --shape messages or --shape prompt"
            )
        if fitting == ["messages"]:
            return "messages"
        if fitting or not self.rows:
            return "prompt"
        raise UsageError(f'{self.name}: no "prompt", "messages" or "body" column.{self._advice()}')

    def _fits_batch(self, *, alone: bool) -> bool:
        """A column "body" beside "prompt" may be a mail's text; only objects make batch lines."""
        if CUSTOM_ID not in self.columns or "body" not in self.columns:
            return False
        return alone or any(_is_object(row.get("body")) for row in self.rows)

    def demand(self, shape: Shape) -> None:
        """UsageError for a column that the shape or an option names and no row has."""
        for column, option in self._named(shape):
            if column not in self.columns:
                raise UsageError(
                    f'{self.name}: no column "{column}", which {option} asks for.\n'
                    f"  It has: {_listed(self.columns)}"
                )

    def _named(self, shape: Shape) -> Iterable[tuple[str, str]]:
        if shape == "prompt":
            given = self.settings.prompt_column
            yield (given, "--prompt-column") if given else ("prompt", "--shape prompt")
        elif shape == "template":
            for column in sorted(Turns.of(self.settings).columns or ()):
                yield column, "the template"
        elif shape != "body":
            yield ("messages" if shape == "messages" else "body", f"--shape {shape}")
        for column in self.settings.body_columns:
            yield column, "--body-columns"
        for column in self.settings.image:
            yield column, "--image"

    def _advice(self) -> str:
        lines = f"\n  It has: {_listed(self.columns)}."
        if any(_is_object(row.get("body")) for row in self.rows):
            return lines + " Try --shape batch"
        guess = self._likely_prompt()
        made = f", or -p 'Summarise: {{{{ {guess} }}}}'"
        return f"{lines} Try --prompt-column {guess}{made}" if guess else lines

    def _likely_prompt(self) -> str | None:
        """The column of text most like a prompt: by its usual names, else the longest texts."""
        lengths = {
            column: sum(len(text) for row in self.rows if isinstance(text := row.get(column), str))
            for column in self.columns
        }
        texts = {column: length for column, length in lengths.items() if length}
        for usual in ("prompt", "question", "query", "instruction", "input", "text", "content"):
            for column in texts:
                if column.casefold() == usual:
                    return column
        return max(texts, key=lambda column: texts[column], default=None)


def _layout(shape: Shape, columns: Sequence[str], settings: PromptSettings) -> Layout:
    prompt_column = (settings.prompt_column or "prompt") if shape == "prompt" else None
    more = {*settings.body_columns, *settings.image}
    if shape == "template":
        named = Turns.of(settings).columns
        more.update(columns if named is None else named)
    sent = tuple(c for c in columns if _is_sent(c, shape, prompt_column, more))
    steering = {CUSTOM_ID, "method", "url"} if shape == "batch" else {CUSTOM_ID}
    used = {*sent, *steering}
    return Layout(
        shape=shape,
        prompt_column=prompt_column,
        sent=sent,
        carried_only=tuple(c for c in columns if c not in used),
        columns_needed=None if shape == "body" else tuple(c for c in columns if c in used),
    )


def _is_sent(
    column: str, shape: Shape, prompt_column: str | None, asked_for: Collection[str]
) -> bool:
    if column in asked_for:
        return True
    if shape in ("prompt", "template"):
        return column == prompt_column
    if shape == "messages":
        return column == "messages" or column in REQUEST_FIELDS
    if shape == "batch":
        return column == "body"
    return column not in NOT_SENT_AS_BODY


def _listed(columns: Sequence[str]) -> str:
    """Column names in about one line."""
    shown: list[str] = []
    width = 0
    for column in columns:
        width += len(column) + 2
        if shown and width > _LISTED_WIDTH:
            return f"{', '.join(shown)} and {len(columns) - len(shown):,} more"
        shown.append(column)
    return ", ".join(shown) or "no columns"


def _is_object(value: JSONValue) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith("{"))
