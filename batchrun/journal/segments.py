"""A journal's files: names, headers, and one segment read and written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from batchrun.files import open_regular
from batchrun.journal import records
from batchrun.journal.slots import SlotTable
from batchrun.journal.state import StateDir

FORMAT = 1
# Larger blocks leave the processor's cache and take longer.
_BLOCK = 256 << 10
_MOST_FORESEEN = 4.0


class Header(msgspec.Struct, frozen=True):
    """What a journal is about; written once, before anything else."""

    format: int
    hash_version: int
    run_id: str
    created_at_ms: int
    batchrun_version: str
    settings: Mapping[str, object]
    synthetic: bool


class Format(msgspec.Struct):
    """What the headers of all formats have."""

    format: object


class Recovery(msgspec.Struct, frozen=True):
    """What opening found and repaired."""

    cut_bytes: int = 0
    holes: int = 0
    hole_bytes: int = 0


class Gap(NamedTuple):
    """Bytes of one segment that are no frames."""

    segment: int
    start: int
    end: int


@dataclass(slots=True)
class Contents:
    """What the segments of a journal say, replayed in order."""

    header: Header
    table: SlotTable = field(default_factory=SlotTable)
    imported: set[str] = field(default_factory=set)
    gaps: list[Gap] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    durable: int = 0  # the last position a SYNC vouches for
    events: int = 0  # replayed, and not taken from a kept table
    from_table: bool = False

    def expect(self, segments: int) -> None:
        """Make room for what a journal of so many segments holds, if they go on as they began."""
        done = len(self.sizes)
        if done:
            self.table.reserve(round(len(self.table) * min(segments / done, _MOST_FORESEEN)))

    def add(self, segment: Segment) -> None:
        """Note what is known of a segment now that it has been read."""
        sealed_bytes = segment.sealed_bytes
        if sealed_bytes is not None and self.sizes and self.sizes[-1] < sealed_bytes:
            self._add_missing_end(segment.number - 1, sealed_bytes)
        self.imported.update(segment.imported)
        self.durable = max(self.durable, segment.durable)
        self.gaps += segment.gaps
        self.events += segment.events
        self.sizes.append(segment.size)

    def _add_missing_end(self, segment: int, sealed_bytes: int) -> None:
        start = self.sizes[-1]
        if self.gaps and self.gaps[-1].segment == segment and self.gaps[-1].end == start:
            start = self.gaps.pop().start
        self.gaps.append(Gap(segment, start, sealed_bytes))
        self.sizes[-1] = sealed_bytes


class Segment:
    """One segment being read from its first frame to its last."""

    def __init__(self, state: StateDir, number: int, run_id: str, start: int) -> None:
        self.number = number
        self.start = start
        path = state.segment(number)
        self.fd = open_regular(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size
        self.salt = records.salt_of(run_id, number)
        self.gaps: list[Gap] = []
        self.events = 0
        self.durable = 0
        self.sealed_bytes: int | None = None  # how long the segment before was when it was left
        self.imported: list[str] = []

    def replay(self, table: SlotTable) -> None:
        """Tell the table every event, in order; note the rest."""
        offset = self.start
        while offset < self.size:
            block = os.pread(self.fd, _BLOCK, offset)
            read = self._take(table, block, offset)
            offset += read
            if read or offset >= self.size:
                continue
            # Not even the first is whole: it is longer than a block, or it is none.
            if frame := self._frame_at(offset):
                offset += self._take(table, frame, offset)
            else:
                offset = self._skip_gap(offset)

    def _take(self, table: SlotTable, block: bytes, offset: int) -> int:
        """Replay the whole frames that a block begins with; how many bytes they are."""
        read = records.parsed(block, self.salt, records.position_of(self.number, offset))
        table.replay(read.events)
        self.events += len(read.events)
        for kind, payload in read.others:
            self._note(kind, payload)
        return read.length

    def _note(self, kind: int, payload: bytes) -> None:
        if kind == records.SYNC:
            self.durable = max(self.durable, *records.POSITION.unpack(payload))
        elif kind == records.SEALED:
            (self.sealed_bytes,) = records.POSITION.unpack(payload)
        elif kind == records.IMPORTED:
            self.imported.append(payload.decode())

    def _frame_at(self, offset: int) -> bytes:
        head = os.pread(self.fd, records.FRAME.size, offset)
        end = records.frame_end(head, 0, self.size - offset)
        frame = os.pread(self.fd, end, offset) if end else b""
        return (
            frame
            if end and len(frame) == end and records.is_whole(frame, 0, end, self.salt)
            else b""
        )

    def _skip_gap(self, start: int) -> int:
        """Where the next whole frame begins, or the end of the file."""
        at = start + 1
        while len(block := os.pread(self.fd, _BLOCK, at)) >= len(records.MAGIC):
            found = block.find(records.MAGIC)
            if found < 0:
                at += len(block) - len(records.MAGIC) + 1
                continue
            at += found
            if self._frame_at(at):
                break
            at += 1
        else:
            at = self.size
        self.gaps.append(Gap(self.number, start, at))
        return at
