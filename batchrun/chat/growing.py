"""What a stream lets grow piece by piece, counted in bytes while it does."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import TypeGuard

import msgspec

from batchrun.config import JSONValue

Object = Mapping[str, JSONValue]
# What Python needs for an empty choice or tool call, roughly: a stream that opens a million of them
# must not pass for a small one.
OBJECT_COST = 2_000


class Budget:
    """Bytes kept so far; one for all parts of a reply."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class Text:
    """Text that grows by pieces."""

    __slots__ = ("_buffer", "_kept")

    def __init__(self, kept: Budget) -> None:
        self._kept = kept
        self._buffer = io.StringIO()

    def add(self, piece: str) -> None:
        # One wide character makes all of a text wide.
        self._kept.bytes += len(piece) if piece.isascii() else 4 * len(piece)
        self._buffer.write(piece)

    def __str__(self) -> str:
        return self._buffer.getvalue()


class Members:
    """Members of an object that are passed on as they came, kept as JSON to know their size."""

    __slots__ = ("_kept", "values")

    def __init__(self, kept: Budget) -> None:
        self._kept = kept
        self.values: dict[str, msgspec.Raw] = {}

    def set_first(self, name: str, value: JSONValue) -> None:
        """Keep the first value that says something."""
        if name not in self.values and value not in (None, "", 0):
            self.set_last(name, value)

    def set_last(self, name: str, value: JSONValue) -> None:
        """Keep the last value that is not null."""
        if value is None:
            return
        raw = msgspec.Raw(encode_loosely(value))
        before = self.values.get(name)
        self._kept.bytes += len(raw) - (len(before) if before else -len(name) - 100)
        self.values[name] = raw


class Items:
    """A list that grows by pieces, its items passed on as they came."""

    __slots__ = ("_kept", "values")

    def __init__(self, kept: Budget) -> None:
        self._kept = kept
        self.values: list[msgspec.Raw] = []

    def add(self, items: JSONValue) -> None:
        if isinstance(items, list):
            for item in items:
                raw = msgspec.Raw(encode_loosely(item))
                self._kept.bytes += len(raw) + 100
                self.values.append(raw)


def is_object(value: object) -> TypeGuard[Object]:
    return isinstance(value, dict)


def as_list(value: JSONValue) -> list[JSONValue]:
    return value if isinstance(value, list) else []


def objects(value: JSONValue) -> Iterator[Object]:
    return (item for item in as_list(value) if is_object(item))


def encode_loosely(value: object) -> bytes:
    """``value`` as JSON, also what msgspec refuses: lone surrogates and enormous numbers."""
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError, ValueError, RecursionError):
        return json.dumps(value, default=_plain).encode()


def _plain(value: object) -> object:
    if isinstance(value, msgspec.Raw):
        return json.loads(bytes(value))
    raise TypeError(f"{type(value).__name__} is not JSON")
