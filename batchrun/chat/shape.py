"""Which of the four shapes a table of prompts has, and which of its columns are sent."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from msgspec import Struct

from batchrun.config import JSONValue, Shape
from batchrun.errors import UsageError

Row: TypeAlias = Mapping[str, JSONValue]
Body: TypeAlias = dict[str, JSONValue]
CUSTOM_ID: Final = "custom_id"


# The request fields a `messages` row may carry; every other column is only carried.
REQUEST_FIELDS: Final = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "stream",
        "seed",
        "random_seed",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "frequency_penalty",
        "presence_penalty",
        "logprobs",
        "top_logprobs",
    }
)


NOT_SENT_AS_BODY: Final = frozenset({CUSTOM_ID, "metadata"})
_LISTED_WIDTH: Final = 60


class PromptSettings(Struct, frozen=True, kw_only=True):
    """What the user asks of every row. Names in ``params_replacing`` win over the row's own."""

    model: str | None = None
    model_replaces: bool = False
    system: str | None = None
    params: Mapping[str, JSONValue] = MappingProxyType({})
    params_replacing: frozenset[str] = frozenset()
    stream: bool = False
    stream_usage: bool = False  # this endpoint streams usage only when asked to
    prompt_column: str | None = None
    body_columns: tuple[str, ...] = ()


class Layout(Struct, frozen=True):
    """How one file's rows become bodies; ``sent`` and ``carried_only`` are for the start line."""

    shape: Shape
    prompt_column: str | None
    sent: tuple[str, ...]
    carried_only: tuple[str, ...]
    columns_needed: tuple[str, ...] | None  # None: all


class Built(Struct, gc=False):
    """A row's request: its body, not yet encoded, and which request that is."""

    body: Body
    hash: bytes
    model: str  # "" when nothing names one
    model_from_row: bool


class Identity(Struct, gc=False):
    """Which request a row is."""

    hash: bytes
    model: str


class Invalid(Struct, gc=False):
    """A row that cannot become a request, and why: a code for programs, words for a person."""

    code: str
    reason: str


class Unusable(ValueError):
    """The reason why a row has no body, and the code that tells it from other reasons."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


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
        """The one shape the columns fit."""
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
        elif shape != "body":
            yield ("messages" if shape == "messages" else "body", f"--shape {shape}")
        for column in self.settings.body_columns:
            yield column, "--body-columns"

    def _advice(self) -> str:
        lines = f"\n  It has: {_listed(self.columns)}."
        if "body" in self.columns:
            return lines + " Try --shape batch"
        guess = self._likely_prompt()
        return f"{lines} Try --prompt-column {guess}" if guess else lines

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
    sent = tuple(c for c in columns if _is_sent(c, shape, prompt_column, settings.body_columns))
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
    column: str, shape: Shape, prompt_column: str | None, body_columns: Collection[str]
) -> bool:
    if column in body_columns:
        return True
    if shape == "prompt":
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
