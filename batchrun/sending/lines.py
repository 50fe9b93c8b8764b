"""Whose turn it is among rows that wait: one line a model, and in it who failed how often.

A row that failed once goes before new ones: it has been on its way for longer. One that failed more
often says something about itself: it takes turns with new ones, or a few rows that are refused
whatever happens would close the gate again each time before anybody else gets through. While the
endpoint seems to be away, those that never failed go first: they can say whether it is back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Literal, TypeAlias

from batchrun.types import Request

# How a row stands in its line: failed once; never, but could not go; failed more often.
Rank: TypeAlias = Literal["again", "fresh", "stubborn"]
# Whom to ask in turn; "new" is a row that is in no line yet.
Order: TypeAlias = tuple[Rank | Literal["new"], ...]
_USUAL: Final[Order] = ("again", "fresh", "new", "stubborn")
_TURN_OF_THE_STUBBORN: Final[Order] = ("again", "stubborn", "fresh", "new")
_PROBING: Final[Order] = ("fresh", "new", "again", "stubborn")


class _Line:
    """The rows of one model. Never empty."""

    __slots__ = ("due", "ranks", "timer")

    def __init__(self) -> None:
        self.ranks: dict[Rank, deque[Request]] = {
            "again": deque(),
            "fresh": deque(),
            "stubborn": deque(),
        }
        self.due = 0.0  # before it, asking is of no use
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class Lines:
    """Rows that wait for their turn. ``wake_in`` sets a timer for when a line may go on."""

    def __init__(self, wake_in: Callable[[float], asyncio.TimerHandle]) -> None:
        self._wake_in = wake_in
        self._lines: dict[str, _Line] = {}
        self._rows = 0
        self._stubborn_next = False

    def __len__(self) -> int:
        return self._rows

    def join(self, request: Request, rank: Rank) -> None:
        line = self._lines.get(request.model)
        if line is None:
            line = self._lines[request.model] = _Line()
        line.ranks[rank].append(request)
        self._rows += 1

    def order(self, *, is_probing: bool) -> Order:
        if is_probing:
            return _PROBING
        return _TURN_OF_THE_STUBBORN if self._stubborn_next else _USUAL

    def went(self, rank: Rank | Literal["new"]) -> None:
        if rank != "again":
            self._stubborn_next = rank != "stubborn"

    def heads(self, rank: Rank, now: float) -> Iterator[Request]:
        """The first of each line that may be asked for. Stop iterating once one has left."""
        for line in self._lines.values():
            if line.due <= now and line.ranks[rank]:
                yield line.ranks[rank][0]

    def leave(self, request: Request, rank: Rank) -> None:
        """Take the head of its line, which is ``request``."""
        line = self._lines[request.model]
        line.ranks[rank].popleft()
        self._rows -= 1
        if not any(line.ranks.values()):
            line.cancel()
            del self._lines[request.model]

    def hold(self, model: str, wait_s: float, now: float) -> None:
        """Nobody of this line need ask again for so long."""
        line = self._lines[model]
        line.cancel()
        line.due = now + wait_s
        line.timer = self._wake_in(wait_s)

    def release(self, model: str | None) -> None:
        """This line may ask again at once; with None every line."""
        for name in self._lines if model is None else (model,):
            if (line := self._lines.get(name)) is not None:
                line.due = 0.0

    def is_held(self, model: str, now: float) -> bool:
        line = self._lines.get(model)
        return line is not None and line.due > now

    def has_due(self, now: float) -> bool:
        return any(line.due <= now for line in self._lines.values())

    def has_fresh(self) -> bool:
        return any(line.ranks["fresh"] for line in self._lines.values())

    def clear(self) -> None:
        for line in self._lines.values():
            line.cancel()
        self._lines.clear()
        self._rows = 0
