"""Outcomes read back from where they lie, and given to none but the request they answer."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Sequence

from batchrun.files import io_error, open_regular
from batchrun.journal import records
from batchrun.journal.recovery import damaged, misplaced
from batchrun.journal.slots import Held, SlotTable
from batchrun.journal.state import StateDir
from batchrun.types import Outcome, Usage

_LONGEST = 1 << 33  # more than any length field says
# Holds a usual record whole, so that reading one is one system call.
_READ_AHEAD = 4096
# Reading over what lies between two records is cheaper than a system call for each, up to here.
_WIDEST_GAP = 16 << 10
_RUN_BYTES = 256 << 10
_MOST_OPEN_SEGMENTS = 16


class Reader:
    """Reads what ``table`` says is kept in the segments. Any thread may."""

    def __init__(self, state: StateDir, run_id: str, table: SlotTable) -> None:
        self._state = state
        self._run_id = run_id
        self._table = table
        self._open: dict[int, int] = {}  # descriptors by segment

    def close(self) -> None:
        """Release the files; never raises. The next read opens them again."""
        while self._open:
            _, fd = self._open.popitem()
            with contextlib.suppress(OSError):
                os.close(fd)

    def read(self, slot: int) -> Outcome:
        """The outcome kept for a slot that is not NEW, its checksum verified. Any thread may.

        Raises JournalDamaged when the record is not whole, or is not of this request.
        """
        if self._table.held(slot) is Held.NEW:
            raise KeyError(slot)
        segment, offset = divmod(self._table.position(slot), 1 << records.OFFSET_BITS)
        try:
            outcome = self._read_one(segment, offset)
        except OSError as exc:
            raise io_error(self._state.segment(segment), "read", exc) from exc
        self._check_theirs((slot,), (outcome,))
        return outcome

    def usage(self, position: int) -> Usage:
        """What an attempt told of tokens, in the record there. JournalDamaged when it is not."""
        segment, offset = divmod(position, 1 << records.OFFSET_BITS)
        try:
            frame = os.pread(self._descriptor(segment), records.FAILED_BYTES, offset)
        except OSError as exc:
            raise io_error(self._state.segment(segment), "read", exc) from exc
        usage = records.usage_at(frame, self._salt_of(segment))
        if usage is None:
            raise damaged(self._state.segment(segment), offset)
        return usage

    def read_all(self, slots: Sequence[int]) -> list[Outcome | None]:
        """The outcomes of several slots, in their order; None for a NEW one.

        Rows end in about the order they were sent, so what a slice of the input needs lies close
        together: it is read in blocks, which costs a third of reading record by record.
        """
        outcomes: list[Outcome | None] = [None] * len(slots)
        positions, places = self._table.kept(slots)
        at = 0
        while at < len(positions):
            end = _end_of_run(positions, at)
            segment = positions[at] >> records.OFFSET_BITS
            try:
                self._read_run(segment, positions[at:end], places[at:end], outcomes)
            except OSError as exc:
                raise io_error(self._state.segment(segment), "read", exc) from exc
            at = end
        self._check_theirs(slots, outcomes)
        return outcomes

    def _check_theirs(self, slots: Sequence[int], outcomes: Sequence[Outcome | None]) -> None:
        """Whatever misled the table: nobody is given the answer to another request."""
        table = self._table
        # In one go: this runs for every row that is published.
        firsts = [each.hash for each in outcomes if each is not None and not each.occurrence]
        if table.are_first_of(firsts, slots):
            return
        for slot, outcome in zip(slots, outcomes, strict=True):
            if outcome is None:
                continue
            if (outcome.hash, outcome.occurrence) != (table.hash(slot), table.occurrence(slot)):
                segment, offset = divmod(table.position(slot), 1 << records.OFFSET_BITS)
                raise misplaced(self._state.segment(segment), offset)

    def _read_run(
        self,
        segment: int,
        positions: list[int],
        places: list[int],
        outcomes: list[Outcome | None],
    ) -> None:
        """Decode what lies at these positions of one segment into its places."""
        salt, base, outcome_at = self._salt_of(segment), positions[0], records.outcome_at
        start = base & records.LAST_OFFSET
        block = os.pread(self._descriptor(segment), positions[-1] - base + _READ_AHEAD, start)
        for position, place in zip(positions, places, strict=True):
            outcome = outcome_at(block, position - base, salt)
            if outcome is None:  # longer than the block, or not whole
                outcome = self._read_one(segment, position & records.LAST_OFFSET)
            outcomes[place] = outcome

    def _read_one(self, segment: int, offset: int) -> Outcome:
        fd = self._descriptor(segment)
        frame = os.pread(fd, _READ_AHEAD, offset)
        end = records.frame_end(frame, 0, _LONGEST)
        if end > len(frame):
            frame = os.pread(fd, end, offset)
        outcome = records.outcome_at(frame, 0, self._salt_of(segment))
        if outcome is None:
            raise damaged(self._state.segment(segment), offset)
        return outcome

    def _salt_of(self, segment: int) -> int:
        return records.salt_of(self._run_id, segment)

    def _descriptor(self, segment: int) -> int:
        fd = self._open.get(segment)
        if fd is None:
            if len(self._open) >= _MOST_OPEN_SEGMENTS:
                os.close(self._open.pop(next(iter(self._open))))
            fd = open_regular(self._state.segment(segment), os.O_RDONLY)
            self._open[segment] = fd
        return fd


def _end_of_run(positions: list[int], at: int) -> int:
    """Up to where positions, ascending, are read at once: they lie close together, or it is one."""
    end = bisect_right(positions, positions[at] + _RUN_BYTES, at)
    between = positions[end - 1] - positions[at]
    return end if between <= (end - at) * _WIDEST_GAP else at + 1
