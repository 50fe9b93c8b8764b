"""Equal requests of ``complete``: the first one is sent, the others get what it brings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from batchrun.outputs import InvalidRow
from batchrun.runs.copies import copy_of
from batchrun.types import Outcome


class Settled(NamedTuple):
    """A row that is done: its place among the rows from 0, its name, and what came of it."""

    number: int
    custom_id: str
    outcome: Outcome | InvalidRow
    paid_by: str | None = None  # the custom_id of the row whose answer this one takes


class Equals:
    """Who waits for whose answer, and the answers that were given: they stay for those to come."""

    def __init__(self) -> None:
        self._settled: dict[bytes, Settled | None] = {}  # None: on its way
        self._waiting: dict[bytes, list[tuple[int, str]]] = {}
        self.waiting = 0

    def is_first(self, hash: bytes, number: int, custom_id: str) -> bool:
        """Note that this row asks that; False for one that is to wait for the answer of another."""
        if hash not in self._settled:
            self._settled[hash] = None
            return True
        self._waiting.setdefault(hash, []).append((number, custom_id))
        self.waiting += 1
        return False

    def settled(self, hash: bytes, first: Settled) -> Iterator[Settled]:
        """Note what came; yield it for those that waited for it."""
        self._settled[hash] = first
        return self.ready(hash)

    def ready(self, hash: bytes) -> Iterator[Settled]:
        """What rows get that wait for an answer that is there."""
        if (first := self._settled[hash]) is None:
            return
        outcome = first.outcome
        if type(outcome) is Outcome:
            outcome = copy_of(outcome)
        for number, custom_id in self._waiting.pop(hash, ()):
            self.waiting -= 1
            yield Settled(number, custom_id, outcome, first.custom_id)
