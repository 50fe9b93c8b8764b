"""What the code needs to know of chat completions, as one value.

Whoever makes a request or reads a reply takes the value as ``api`` and asks it; who is given none
means ``CHAT``. Another API of the same endpoints (embeddings, responses) is a second value, with
functions of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from msgspec import Struct

from batchrun.chat import reply
from batchrun.chat.build import Builder
from batchrun.chat.rows import Layout, PromptSettings, Row
from batchrun.chat.shape import detect
from batchrun.chat.stream import Assembler
from batchrun.config import JSONValue, Shape
from batchrun.providers import CHAT_PATH
from batchrun.types import Answer, Answers, Reply


class _Detect(Protocol):
    def __call__(
        self,
        columns: Sequence[str],
        rows: Sequence[Row],
        settings: PromptSettings,
        forced: Shape | None,
        name: str,
    ) -> Layout: ...


class _MakeBuilder(Protocol):
    def __call__(
        self,
        layout: Layout,
        settings: PromptSettings,
        image_url: Callable[[JSONValue], str] = ...,
    ) -> Builder: ...


class _Assembler(Protocol):
    def __call__(self, *, limit_bytes: int) -> Assembler: ...


class Api(Struct, frozen=True, kw_only=True):
    """One API: how rows become its requests, and its replies answers. Nothing in it does I/O."""

    path: str  # ends every URL, and begins what ``request_hash`` hashes
    detect: _Detect  # which columns of a table are sent, and how
    builder: _MakeBuilder  # row → body
    parse: Callable[[bytes], Reply]  # enough of a reply to decide on it
    assembler: _Assembler  # a reply that comes as a stream
    answer: Callable[[bytes], Answer]  # what one reply fills columns with
    columns: Callable[[Sequence[bytes]], Answers]  # the same for many, by column
    nothing: bytes  # a reply that fills no column, to stand among those that do
    rebuild: Callable[[Answer], bytes]  # the reply that would fill the columns so


CHAT: Final = Api(
    path=CHAT_PATH,
    detect=detect,
    builder=Builder,
    parse=reply.parse,
    assembler=Assembler,
    answer=reply.answer,
    columns=reply.columns,
    nothing=reply.NOTHING,
    rebuild=reply.rebuild,
)
