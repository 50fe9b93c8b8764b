"""What the segments hold after any death: replayed, cut ends repaired, damage told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec

from batchrun.errors import JournalDamaged, LocalIOError
from batchrun.files import make_durable, open_regular, opened, sync_directory, write_whole
from batchrun.journal import records
from batchrun.journal.kept_table import read_table
from batchrun.journal.segments import (
    FORMAT,
    Contents,
    Format,
    Gap,
    Header,
    Recovery,
    Segment,
)
from batchrun.journal.state import StateDir

_MOST_FILLER = 1 << 20
_OTHER_VERSION = "use the version of batchrun that began this run"


def replay(state: StateDir) -> Contents | None:
    """Read the segments of a directory; None when there are none. Changes no segment."""
    numbers = state.segments()
    if not numbers:
        return None
    for expected, number in enumerate(numbers, 1):
        if number != expected:
            raise _missing(state, expected, number)
    header, start = _read_header(state.segment(1))
    contents = read_table(state, header, len(numbers)) or Contents(header, sizes=[start])
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
            raise damaged(state.segment(gap.segment), gap.start)
    return contents


def repair(state: StateDir, contents: Contents) -> Recovery:
    """Cut the tail and fill the holes, so that they are found once only."""
    cut_bytes = holes = hole_bytes = 0
    for gap in contents.gaps:
        length = gap.end - gap.start
        ends_its_file = gap.end == contents.sizes[gap.segment - 1]
        # Between two frames at least one was lost, so only at an end is there less than a frame.
        if length < records.FRAME.size and not ends_its_file:
            raise damaged(state.segment(gap.segment), gap.start)
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


def _close_gap(state: StateDir, gap: Gap, salt: int, *, cut: bool) -> None:
    with opened(state.segment(gap.segment)) as fd:
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


def create_first_segment(state: StateDir, header: Header) -> None:
    """The first segment has its header from the moment it has its name."""
    path = state.segment(1)
    frame = records.frame_of(records.HEADER, msgspec.json.encode(header), 0)
    write_whole(path, path.with_suffix(".new"), frame, durable=True)
    sync_directory(state.path)
    sync_directory(state.path.parent)


def check_version(state: StateDir, held: Header, wanted: Header) -> None:
    """LocalIOError where requests are told apart in another way: none would find its answer."""
    if held.hash_version != wanted.hash_version:
        raise LocalIOError(
            f"{state.segment(1)}: its requests are hashed as of version {held.hash_version}; this"
            f" batchrun hashes them as of version {wanted.hash_version}",
            next_steps=(_OTHER_VERSION,),
        )


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
        found = msgspec.json.decode(payload, type=Format).format
        if found == FORMAT:
            return msgspec.json.decode(payload, type=Header), end
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise damaged(path, 0) from exc
    else:
        raise LocalIOError(
            f"{path}: journal format {found}; this batchrun reads format {FORMAT}",
            next_steps=(_OTHER_VERSION,),
        )


def _missing(state: StateDir, number: int, next_found: int) -> JournalDamaged:
    path = state.segment(number)
    return JournalDamaged(
        f"{path}: is missing, while {state.segment(next_found).name} is there",
        offset=0,
        next_steps=_restore(path),
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
        next_steps=_restore(path),
    )


def _restore(path: Path) -> tuple[str, str]:
    return (
        "restore this file from a backup, then run the same command",
        f"or move {path.parent} away to begin anew: its answers would be asked for again",
    )
