"""The words of requests: a row, a body, what is asked of every row, and what a row became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeAlias

from msgspec import Struct

from batchrun.config import JSONValue, Shape

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
    prompt: str | None = None
    messages: Sequence[JSONValue] | None = None
    image: tuple[str, ...] = ()
    schema_digest: bytes = b""  # of the schema that answers have to fit; it is part of the request

    @property
    def makes_messages(self) -> bool:
        return self.prompt is not None or self.messages is not None


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
