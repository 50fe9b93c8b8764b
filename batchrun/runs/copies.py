"""``--dedupe``: of rows that ask the same the first one is sent, and the others take its answer.

Such a row is a *copy*: the plan gives it the slot of the row it follows, and a mark. It is not
sent, and made into a row of the table when that is published. Rows that hold an answer of their
own, paid for without ``--dedupe``, keep it. What a copy was itself asked for before it became one
was billed: that stays with it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from batchrun.config import RunConfig
from batchrun.journal import Held, Journal
from batchrun.types import NO_USAGE, Outcome, Usage

OWN, FOLLOWED, COPY = range(3)
_NONE: Final = 0xFFFF_FFFF


class Copies:
    """A byte a row: whether it has an answer of its own, also for others, or is a copy."""

    def __init__(self, rows: int) -> None:
        self._marks = bytearray(rows)
        self._tried_rows = array("I")  # copies that were asked for themselves before, in order
        self._tried_slots = array("I")  # where that is held

    def follow(self, row: int, leader: int, tried_slot: int | None = None) -> None:
        self._marks[leader] = FOLLOWED
        self._marks[row] = COPY
        if tried_slot is not None:
            self._tried_rows.append(row)
            self._tried_slots.append(tried_slot)

    def is_copy(self, row: int) -> bool:
        return self._marks[row] == COPY

    def marks(self, first: int, end: int) -> bytes:
        """Of these rows; all zero where nothing is copied."""
        return bytes(self._marks[first:end])

    def tried(self, first: int, end: int) -> dict[int, int]:
        """Of these rows the copies that were asked for themselves before, each with that slot."""
        start, stop = (bisect_left(self._tried_rows, row) for row in (first, end))
        return dict(zip(self._tried_rows[start:stop], self._tried_slots[start:stop], strict=True))

    @property
    def rows(self) -> int:
        """How many rows are copies."""
        return self._marks.count(COPY)


def find_copies(slots: array[int], invalid: int, journal: Journal, config: RunConfig) -> Copies:
    """Let rows that lack an answer have the slot of the first one that asks the same.

    What is held goes to the first rows, in their order. Repetitions of a row (``--samples``) are
    no copies of each other: the second one follows the second one of the row before.
    """
    copies, samples = Copies(len(slots)), config.samples
    journal.begin_pass()
    leaders = array("I")  # rows: as many for each request as there are samples
    group_of = array("I")  # by the slot of a request's first occurrence: where its leaders begin
    for row, shared in enumerate(slots):
        if shared == invalid:
            continue
        hash = journal.hash(shared)
        slot = slots[row] = journal.claim(hash)
        first = journal.first_slot(hash)
        while len(group_of) <= first:
            group_of.extend([_NONE] * (len(group_of) + 1_024))
        if group_of[first] == _NONE:
            group_of[first] = len(leaders)
            leaders.extend([_NONE] * samples)
        place = group_of[first] + row % samples
        leader = leaders[place]
        if leader == _NONE:
            leaders[place] = row
        elif _takes(journal.held(slot), journal.held(slots[leader]), config):
            slots[row] = slots[leader]
            copies.follow(row, leader, slot if journal.tried(slot) else None)
    return copies


def _takes(own: Held, leader: Held, config: RunConfig) -> bool:
    """Whether a row takes what the other has rather than what it holds itself."""
    if own is Held.REJECTED and leader is Held.REJECTED:
        return config.retry_failed
    return own is not Held.OK


class Effort(NamedTuple):
    """What was done for one row alone."""

    attempts: int = 0
    in_doubt: int = 0
    usage: Usage = NO_USAGE


NO_EFFORT: Final = Effort()


def copy_of(outcome: Outcome, effort: Effort = NO_EFFORT) -> Outcome:
    """The answer of a row without what belongs to that row: attempts, time, tokens."""
    own = effort._asdict()
    return replace(outcome, occurrence=0, latency_s=None, ttft_s=None, **own)


def efforts(slots: Sequence[int], journal: Journal) -> list[Effort]:
    """What was done for the requests of these slots, which were tried."""
    used = journal.used(slots)
    found = []
    for slot, outcome in zip(slots, journal.read_all(slots), strict=True):
        in_doubt = journal.in_doubt(slot)
        # The attempts of a row that has no outcome yet are not counted one by one.
        attempts = outcome.attempts if outcome else in_doubt
        found.append(Effort(max(attempts, 1), in_doubt, used.get(slot, NO_USAGE)))
    return found


class Payers:
    """The custom_ids of rows that others are copies of, while the table is read in order.

    Ten million of them must not be so many objects: eight bytes a slot, and the ids one by one.
    """

    def __init__(self) -> None:
        self._ids = bytearray()
        self._at = array("Q")  # by slot: where its id begins, plus one

    def names(
        self, marks: bytes, slots: Sequence[int], custom_ids: Sequence[str]
    ) -> list[str | None] | None:
        """For each of the next rows who paid for it, None where it did itself; None for all."""
        if not any(marks):
            return None
        found: list[str | None] = [None] * len(slots)
        for at, mark in enumerate(marks):
            if mark == FOLLOWED:
                self._note(slots[at], custom_ids[at])
            elif mark == COPY:
                found[at] = self._name(slots[at])
        return found

    def _note(self, slot: int, custom_id: str) -> None:
        missing = slot + 1 - len(self._at)
        if missing > 0:
            self._at.frombytes(bytes((missing + (len(self._at) >> 3)) * self._at.itemsize))
        self._at[slot] = len(self._ids) + 1
        name = custom_id.encode("utf-8", "surrogatepass")
        self._ids += len(name).to_bytes(4) + name

    def _name(self, slot: int) -> str:
        start = self._at[slot] - 1
        end = start + 4 + int.from_bytes(self._ids[start : start + 4])
        return self._ids[start + 4 : end].decode("utf-8", "surrogatepass")
