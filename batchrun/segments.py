"""The files of a journal as they are found: replayed into a table, judged, and repaired.

*What opening finds.* A process may die in the middle of a write: bad bytes with nothing valid after
them are a tail, and cut. A machine may lose power: of what was not yet durable any page may be
missing, so bad bytes after the last SYNC are holes, skipped even where valid frames follow, and
filled so that no later SYNC covers them. Bad bytes before the last SYNC are damage, and end the
run: those answers were promised.

*The kept table.* After a long replay, and when a run ends in order, the whole table is left in one
file, so that the next has only to read what came after. It is believed only when it is whole and
the segments end as they did then: a segment may have been restored from a backup, and have grown
again. Records are checked when they are read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import BinaryIO, NamedTuple
from zlib import crc32

import msgspec

from batchrun import records
from batchrun.errors import JournalDamaged, LocalIOError
from batchrun.files import make_durable, open_regular, opened, sync_directory, write_whole
from batchrun.slots import KEPT_BYTES, SlotTable
from batchrun.state import StateDir

FORMAT = 1
# Larger blocks leave the processor's cache and take longer.
_BLOCK = 256 << 10
_MOST_FILLER = 1 << 20
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


class _Format(msgspec.Struct):
    """What the headers of all formats have."""

    format: object


class Recovery(msgspec.Struct, frozen=True):
    """What opening found and repaired."""

    cut_bytes: int = 0
    holes: int = 0
    hole_bytes: int = 0


# ── replaying ────────────────────────────────────────────────────────────────────────────────────


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

    def __init__(self, state: Path, number: int, run_id: str, start: int) -> None:
        self.number = number
        self.start = start
        self.path = segment_path(state, number)
        self.fd = open_regular(self.path, os.O_RDONLY)
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


def replay(state: Path) -> Contents | None:
    """Read the segments of a directory; None when there are none. Changes no segment."""
    numbers = StateDir(state).segments()
    if not numbers:
        return None
    for expected, number in enumerate(numbers, 1):
        if number != expected:
            raise _missing(segment_path(state, expected), number)
    header, start = _read_header(segment_path(state, 1))
    contents = _read_table(state, header, len(numbers)) or Contents(header, sizes=[start])
    begun = len(contents.sizes)
    start = contents.sizes.pop()
    for number in numbers[begun - 1 :]:
        contents.expect(len(numbers))
        segment = Segment(state, number, header.run_id, start if number == begun else 0)
        try:
            segment.replay(contents.table)
        finally:
            os.close(segment.fd)
        contents.add(segment)
    contents.table.process_ended()
    for gap in contents.gaps:
        if records.position_of(gap.segment, gap.start) < contents.durable:
            raise damaged(segment_path(state, gap.segment), gap.start)
    return contents


def repair(state: Path, contents: Contents) -> Recovery:
    """Cut the tail and fill the holes, so that they are found once only."""
    cut_bytes = holes = hole_bytes = 0
    for gap in contents.gaps:
        length = gap.end - gap.start
        ends_its_file = gap.end == contents.sizes[gap.segment - 1]
        # Between two frames at least one was lost, so only at an end is there less than a frame.
        if length < records.FRAME.size and not ends_its_file:
            raise damaged(segment_path(state, gap.segment), gap.start)
        is_tail = ends_its_file and gap.segment == len(contents.sizes)
        cut = is_tail or length < records.FRAME.size
        _close_gap(state, gap, records.salt_of(contents.header.run_id, gap.segment), cut=cut)
        if cut:
            contents.sizes[gap.segment - 1] = gap.start
            cut_bytes += length
        else:
            holes += 1
            hole_bytes += length
    return Recovery(cut_bytes, holes, hole_bytes)


def _close_gap(state: Path, gap: Gap, salt: int, *, cut: bool) -> None:
    with opened(segment_path(state, gap.segment)) as fd:
        if cut:
            os.ftruncate(fd, gap.start)
        else:
            _fill(fd, gap.start, gap.end, salt)
        make_durable(fd)


def _fill(fd: int, start: int, end: int, salt: int) -> None:
    while start < end:
        length = min(end - start, _MOST_FILLER)
        if 0 < end - start - length < records.FRAME.size:
            length -= records.FRAME.size
        frame = records.frame_of(records.FILLER, bytes(length - records.FRAME.size), salt)
        if os.pwrite(fd, frame, start) != length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        start += length


# ── the kept table ───────────────────────────────────────────────────────────────────────────────

_TABLE_HEAD = Struct("<4sII")  # magic, length of the head, its checksum
_TABLE_MAGIC = b"\xf5BT\x02"
# Records tell when they were made, so no others in their place end a segment with the same bytes.
# A long body may say the same again: this is more than most.
_END_BYTES = 64 << 10
# Times the size of a table: where less is free, answers may soon need it.
_LEAST_FREE = 10


class Covered(msgspec.Struct):
    """What a kept table is of: all records up to here, every one of them durable."""

    run_id: str
    sizes: list[int]  # of the segments; of the last, how much of it
    ends: int  # checksum of the bytes they end with
    imported: list[str]
    on_their_way: list[int]
    slots: int
    crc: int = 0


def write_table(state: Path, table: SlotTable, covered: Covered) -> None:
    """Keep the table, unless there is hardly room for it. After an OSError nothing is left."""
    if shutil.disk_usage(state).free < len(table) * KEPT_BYTES * _LEAST_FREE:
        return
    columns = table.columns()
    for column in columns:
        covered.crc = crc32(column, covered.crc)
    head = msgspec.json.encode(covered)
    start = _TABLE_HEAD.pack(_TABLE_MAGIC, len(head), crc32(head)) + head
    write_whole(StateDir(state).table, _new_table(state), start, *columns)


def forget_table(state: Path) -> None:
    """Take the kept table away; the segments say all that it does."""
    if _unlink(StateDir(state).table):
        sync_directory(state)


def forget_unfinished_table(state: Path) -> None:
    """Take away what a process that was killed while writing a table has left."""
    _unlink(_new_table(state))


def _new_table(state: Path) -> Path:
    return StateDir(state).table.with_suffix(".new")


def _unlink(cache: Path) -> bool:
    """Whether it is gone now. One that cannot be taken away is no reason to end a run."""
    with contextlib.suppress(OSError):
        cache.unlink()
        return True
    return False


def _read_table(state: Path, header: Header, segments: int) -> Contents | None:
    """What was replayed already, up to the last of its ``sizes``; None when there is nothing."""
    try:
        with open(open_regular(StateDir(state).table, os.O_RDONLY), "rb") as file:
            covered = _read_covered(file)
            if covered is None or covered.run_id != header.run_id:
                return None
            if len(covered.sizes) > segments or not _are_there(state, covered):
                return None
            table = SlotTable.load(file, covered.slots, covered.on_their_way)
    except (OSError, EOFError, ValueError, StructError, RecursionError, msgspec.MsgspecError):
        return None
    crc = 0
    for column in table.columns():
        crc = crc32(column, crc)
    if crc != covered.crc:
        return None
    table.forget_passes()
    table.begin_pass()
    return Contents(
        header,
        table,
        set(covered.imported),
        sizes=covered.sizes,
        durable=records.position_of(len(covered.sizes), covered.sizes[-1]),
        from_table=True,
    )


def _read_covered(file: BinaryIO) -> Covered | None:
    """The head of a table that is as long as it must be; nothing is read that is longer."""
    size = os.fstat(file.fileno()).st_size
    magic, length, crc = _TABLE_HEAD.unpack(file.read(_TABLE_HEAD.size))
    if magic != _TABLE_MAGIC or length > size:
        return None
    head = file.read(length)
    if crc32(head) != crc:
        return None
    covered = msgspec.json.decode(head, type=Covered)
    if size != _TABLE_HEAD.size + length + covered.slots * KEPT_BYTES:
        return None
    known = range(covered.slots)
    return covered if all(slot in known for slot in covered.on_their_way) else None


def _are_there(state: Path, covered: Covered) -> bool:
    """Whether the segments have these sizes, the last at least what is said of it, and end so."""
    sizes = covered.sizes
    found = [segment_path(state, n).stat().st_size for n, _ in enumerate(sizes, 1)]
    return (
        bool(sizes)
        and found[:-1] == sizes[:-1]
        and 0 < sizes[-1] <= found[-1]
        and ends_of(state, sizes) == covered.ends
    )


def ends_of(state: Path, sizes: Sequence[int]) -> int:
    """A checksum of the last bytes of the segments, were they of these sizes."""
    crc = 0
    for number, size in enumerate(sizes, 1):
        start = max(0, size - _END_BYTES)
        with opened(segment_path(state, number), os.O_RDONLY) as fd:
            crc = crc32(os.pread(fd, size - start, start), crc)
    return crc


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def segment_path(state: Path, number: int) -> Path:
    return StateDir(state).segment(number)


def clear(state: Path, dispose: Callable[[Path], object]) -> None:
    """Take all segments away, the last first: a kill leaves a shorter journal, and a whole one."""
    forget_table(state)
    forget_unfinished_table(state)
    for number in reversed(StateDir(state).segments()):
        segment = segment_path(state, number)
        if (index := segment.with_suffix(".idx")).exists():
            dispose(index)
        dispose(segment)


def create_first_segment(state: Path, header: Header) -> None:
    """The first segment has its header from the moment it has its name."""
    path = segment_path(state, 1)
    frame = records.frame_of(records.HEADER, msgspec.json.encode(header), 0)
    write_whole(path, path.with_suffix(".new"), frame, durable=True)
    sync_directory(state)
    sync_directory(state.parent)


def _read_header(path: Path) -> tuple[Header, int]:
    """The header of a journal, and where the frame after it begins."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(records.FRAME.size)
        end = records.frame_end(head, 0, size)
        frame = head + file.read(end - len(head)) if end else b""
    if (
        not frame
        or not records.is_whole(frame, 0, end, 0)
        or frame[records.CRC_END] != records.HEADER
    ):
        raise damaged(path, 0)
    payload = frame[records.BODY_AT : end]
    try:
        found = msgspec.json.decode(payload, type=_Format).format
        if found == FORMAT:
            return msgspec.json.decode(payload, type=Header), end
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise damaged(path, 0) from exc
    else:
        raise LocalIOError(
            f"{path}: journal format {found}; this batchrun reads format {FORMAT}",
            next_steps=("use the version of batchrun that began this run",),
        )


def misplaced(path: Path, offset: int) -> JournalDamaged:
    return JournalDamaged(
        f"{path}: damaged at byte {offset:,}: the record of another request lies there",
        offset=offset,
        next_steps=(
            f"remove {StateDir(path.parent).table}, which is made from the records, "
            "then run the same command",
        ),
    )


def damaged(path: Path, offset: int) -> JournalDamaged:
    return JournalDamaged(
        f"{path}: damaged at byte {offset:,}: a record that was safely on disk is not whole",
        offset=offset,
        next_steps=(
            "restore this file from a backup, then run the same command",
            f"or move {path.parent} away to begin anew: its answers would be asked for again",
        ),
    )


def _missing(path: Path, next_found: int) -> JournalDamaged:
    return JournalDamaged(
        f"{path}: is missing, while {segment_path(path.parent, next_found).name} is there",
        offset=0,
        next_steps=(
            "restore this file from a backup, then run the same command",
            f"or move {path.parent} away to begin anew: its answers would be asked for again",
        ),
    )
