"""The slot table kept beside the segments, believed only for the very bytes it was made of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from struct import Struct
from struct import error as StructError
from typing import BinaryIO
from zlib import crc32

import msgspec

from batchrun.files import open_regular, opened, write_whole
from batchrun.journal import records
from batchrun.journal.segments import Contents, Header
from batchrun.journal.slots import KEPT_BYTES, SlotTable
from batchrun.journal.state import StateDir

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
    used_at: Mapping[int, Sequence[int]] = {}


def write_table(state: StateDir, table: SlotTable, covered: Covered) -> None:
    """Keep the table, unless there is hardly room for it. After an OSError nothing is left."""
    if shutil.disk_usage(state.path).free < len(table) * KEPT_BYTES * _LEAST_FREE:
        return
    columns = table.columns()
    for column in columns:
        covered.crc = crc32(column, covered.crc)
    head = msgspec.json.encode(covered)
    start = _TABLE_HEAD.pack(_TABLE_MAGIC, len(head), crc32(head)) + head
    write_whole(state.table, state.unfinished_table, start, *columns)


def read_table(state: StateDir, header: Header, segments: int) -> Contents | None:
    """What was replayed already, up to the last of its ``sizes``; None when there is nothing."""
    try:
        with open(open_regular(state.table, os.O_RDONLY), "rb") as file:
            covered = _read_covered(file)
            if covered is None or covered.run_id != header.run_id:
                return None
            if len(covered.sizes) > segments or not _are_there(state, covered):
                return None
            table = SlotTable.load(file, covered.slots, covered.on_their_way, covered.used_at)
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
    named = (*covered.on_their_way, *covered.used_at)
    return covered if all(slot in known for slot in named) else None


def _are_there(state: StateDir, covered: Covered) -> bool:
    """Whether the segments have these sizes, the last at least what is said of it, and end so."""
    sizes = covered.sizes
    found = [state.segment(n).stat().st_size for n, _ in enumerate(sizes, 1)]
    return (
        bool(sizes)
        and found[:-1] == sizes[:-1]
        and 0 < sizes[-1] <= found[-1]
        and ends_of(state, sizes) == covered.ends
    )


def ends_of(state: StateDir, sizes: Sequence[int]) -> int:
    """A checksum of the last bytes of the segments, were they of these sizes."""
    crc = 0
    for number, size in enumerate(sizes, 1):
        start = max(0, size - _END_BYTES)
        with opened(state.segment(number), os.O_RDONLY) as fd:
            crc = crc32(os.pread(fd, size - start, start), crc)
    return crc
