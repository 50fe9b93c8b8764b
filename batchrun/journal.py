"""Append outcomes as they land, know what is answered, and keep others out while a run writes.

A journal is a directory of segments ``journal-000001.seg`` ..., each a sequence of frames:

    magic 4 | length u32 | crc32 u32 | type u8 | payload          length counts type and payload

* HEADER    first frame of the first segment, JSON; durable before the file has its name
* SENT      hash, occurrence: an attempt is about to begin
* FAILED    hash, occurrence, in doubt?: it ended, and the request is not settled
* OUTCOME   numbers, a small JSON, then the endpoint's bytes as they came
* REOPEN    hash, occurrence: a settled failure counts as never settled
* IMPORTED  the run id of a published output whose answers were taken over
* SYNC      everything before this position is durable
* SEALED    first frame of a later segment: the length of the one before
* FILLER    where a hole was

*What opening finds.* A process may die in the middle of a write: bad bytes with nothing valid after
them are a tail, and cut. A machine may lose power: of what was not yet durable any page may be
missing, so bad bytes after the last SYNC are holes, skipped even where valid frames follow, and
filled so that no later SYNC covers them. Bad bytes before the last SYNC are damage, and end the
run: those answers were promised.

*Why a frame is believed.* The checksum starts from a value made of the run's id and the segment's
number. So a frame that was moved, left over from another run, or sent to us inside a reply does
not pass, even where a search through a hole stumbles upon it.

The index (``slots.SlotTable``) is derived by replaying the frames. A sealed segment's events are
kept beside it in a ``.idx`` file, a twentieth of its size, and a run that ends in order leaves the
whole table in one file, so that the next has only to read what came after. Neither is trusted
further than its checksum, and bodies are checked when they are read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import NamedTuple, NoReturn

import msgspec
from msgspec.structs import astuple, replace

from batchrun.config import IfLocked
from batchrun.errors import JournalDamaged, LocalIOError, Locked
from batchrun.slots import MAX_IN_DOUBT, Held, SlotTable, Survey
from batchrun.types import Outcome, OutcomeKind, Usage

__all__ = [
    "FORMAT",
    "Header",
    "Held",
    "Holder",
    "Journal",
    "Lock",
    "Recovery",
    "Status",
    "Survey",
    "holder",
    "lock",
    "read_status",
    "write_status",
]

FORMAT = 1
SEGMENT_BYTES = 256 << 20

HEADER, SENT, FAILED, OUTCOME, REOPEN, IMPORTED, SYNC, SEALED, FILLER = range(1, 10)

# Not UTF-8, so no JSON that an endpoint sends holds it by chance.
_MAGIC = b"\xf5BJ\xff"
_FRAME = Struct("<4sIIB")
_PREFIX = Struct("<4sII")
_CRC_END = _PREFIX.size  # what the checksum covers begins here, with the type
_BODY_AT = _FRAME.size
_REQUEST = Struct("<16sI")
_TRIED = Struct("<B16sIB")  # with the type in front: SENT, FAILED and REOPEN are built in one go
_POSITION = Struct("<Q")
_TYPED_NUMBERS = Struct("<B16sIBBHIIqdd5qI")
_NUMBERS = Struct("<16sIBBHIIqdd5qI")  # the last is the length of the JSON after it
_REPLAYED = Struct("<16sIBB6xI")  # of those: hash, occurrence, kind, flags, in doubt
# Their numbers are on disk: append, never reorder.
_KINDS: tuple[OutcomeKind, ...] = (
    "ok",
    "rejected",
    "rate_limit",
    "transient",
    "timeout",
    "invalid_response",
)
_KIND_NUMBER = {kind: number for number, kind in enumerate(_KINDS)}
_OK = _KIND_NUMBER["ok"]
_OK_HELD = int(Held.OK)
_FINAL, _REBUILT = 1, 2
_NOT_A_NUMBER = float("nan")
_UNKNOWN = -1  # tokens not reported
_MOST_TOKENS = (1 << 63) - 1

# A position is a segment's number and a byte offset in it, so positions compare as the log runs.
_OFFSET_BITS = 40
_LAST_OFFSET = (1 << _OFFSET_BITS) - 1

_BLOCK = 1 << 20
_LONGEST = 1 << 33  # more than any length field says
# Holds a usual record whole, so that reading one is one system call.
_READ_AHEAD = 4096
# Reading over what lies between two records is cheaper than another system call up to about here.
_WIDEST_GAP = 64 << 10
# Read at once when publishing: larger blocks leave the processor's cache and take longer.
_RUN_BYTES = 256 << 10
_MOST_OPEN_SEGMENTS = 16
_MOST_FILLER = 1 << 20

# One replayed event, the same from a segment's frames and from its index file:
# hash, occurrence, type, what is held (OUTCOME) or in doubt? (FAILED), attempts in doubt, offset.
# _BEGUN marks an end whose SENT stands earlier in the same segment.
_EVENT = Struct("<16sIBBHQ")
_Event = tuple[bytes, int, int, int, int, int]
_BEGUN = 0x80

_Pending = tuple[int, int, int, int, int]  # type, slot, held, position, in doubt
_CREATE = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Header(msgspec.Struct, frozen=True):
    """What a journal is about; written once, before anything else."""

    format: int
    hash_version: int
    run_id: str
    created_at_ms: int
    batchrun_version: str
    settings: Mapping[str, object]
    synthetic: bool


class Recovery(msgspec.Struct, frozen=True):
    """What opening found and repaired."""

    cut_bytes: int = 0
    holes: int = 0
    hole_bytes: int = 0


class _Meta(msgspec.Struct, omit_defaults=True, gc=False):
    code: str = ""
    message: str = ""
    request_id: str = ""
    model: str = ""


_encode_meta = msgspec.json.Encoder().encode
_decode_meta = msgspec.json.Decoder(_Meta).decode
_crc32 = zlib.crc32


class Journal:
    """The answers of one output. Whoever writes holds the lock; ``peek`` needs none.

    Appends go to a buffer, and nothing in it counts before ``flush`` has written it. After a failed
    write or fsync the journal takes nothing more: every further append raises the same error, and
    what is on disk is what the next ``open`` finds.
    """

    def __init__(self, state: Path, segment_bytes: int, *, writable: bool) -> None:
        self.run_path = state
        self._segment_bytes = segment_bytes
        self._writable = writable
        self._buffer = bytearray()
        self._pending: list[_Pending] = []
        self._readers: dict[int, int] = {}
        self._fd = -1
        self._to_seal: list[int] = []
        self._failure: LocalIOError | None = None

    @classmethod
    def open(cls, state: Path, header: Header, *, segment_bytes: int = SEGMENT_BYTES) -> Journal:
        """Continue the journal in this directory, repaired, or begin one with this header.

        Raises JournalDamaged when records that were durable are not whole, LocalIOError otherwise.
        """
        self = cls(state, segment_bytes, writable=True)
        with _reporting(state, "open the journal"):
            _make_private(state)
            contents = _replay(state, keep_indexes=True)
            if contents is None:
                self._begin(header)
                return self
            self._adopt(contents, _repair(state, contents))
            self._continue_last_segment()
            self._note_unsynced(contents.durable)
        return self

    @classmethod
    def peek(cls, state: Path) -> Journal | None:
        """A snapshot to read from, also beside a running process; None where there is no journal.

        Repairs nothing. A torn tail is a record on its way, and not counted.
        """
        with _reporting(state, "read the journal"):
            contents = _replay(state, keep_indexes=False)
        if contents is None:
            return None
        self = cls(state, SEGMENT_BYTES, writable=False)
        self._adopt(contents, Recovery())
        return self

    def _begin(self, header: Header) -> None:
        _create_first_segment(self.run_path, header)
        size = _segment_path(self.run_path, 1).stat().st_size
        self._adopt(_Contents(header, sizes=[size]), Recovery())
        self._continue_last_segment()

    def _adopt(self, contents: _Contents, recovery: Recovery) -> None:
        self.header = contents.header
        self.recovery = recovery
        self.imported = contents.imported
        self._table = contents.table
        self._segment = len(contents.sizes)
        self._size = contents.sizes[-1]
        self._salt = _salt(self.header.run_id, self._segment)
        self._durable = contents.durable
        self._dirty = False
        self._syncing: _Sync | None = None

    def _continue_last_segment(self) -> None:
        path = _segment_path(self.run_path, self._segment)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)

    def _note_unsynced(self, durable: int) -> None:
        """A killed process may have left records that are written but not yet durable."""
        segment, offset = divmod(durable, 1 << _OFFSET_BITS)
        for number in range(max(segment, 1), self._segment):
            with _opened(_segment_path(self.run_path, number)) as fd:
                _make_durable(fd)
        after_sync = self._size - offset - len(_frame(SYNC, _POSITION.pack(0), 0))
        self._dirty = segment != self._segment or after_sync > 0

    # ── what is held ─────────────────────────────────────────────────────────────────────────────

    @property
    def answers(self) -> int:
        """Slots whose answer is settled for good: OK or REJECTED."""
        return self._table.count(Held.OK) + self._table.count(Held.REJECTED)

    @property
    def attempts_in_doubt(self) -> int:
        """Attempts that may have been billed without an answer, over all runs."""
        return self._table.total_in_doubt()

    def count(self, held: Held) -> int:
        return self._table.count(held)

    def begin_pass(self) -> None:
        """Let claims start again from occurrence 0."""
        self._table.begin_pass()

    def claim(self, hash: bytes) -> int:
        """The slot for the next row with this hash in this pass.

        OK slots are given out first, then REJECTED, then PASSING; then new ones.
        """
        return self._table.claim(hash)

    def claim_all(self, hashes: Iterable[bytes]) -> list[int]:
        """The slots of several rows, as ``claim`` gives them one by one."""
        return self._table.claim_all(hashes)

    def survey(self, slots: Sequence[int]) -> Survey:
        """What is held for these slots, in sum."""
        return self._table.survey(slots)

    def forget_passes(self) -> None:
        """Free what only ``claim`` needs; ``begin_pass`` derives it again."""
        self._table.forget_passes()

    def held(self, slot: int) -> Held:
        return self._table.held(slot)

    def occurrence(self, slot: int) -> int:
        return self._table.occurrence(slot)

    def hash(self, slot: int) -> bytes:
        return self._table.hash(slot)

    def in_doubt(self, slot: int) -> int:
        """Attempts that may have been billed, over all runs, those that a kill cut off included."""
        return self._table.in_doubt(slot)

    def read(self, slot: int) -> Outcome:
        """The outcome kept for a slot that is not NEW, its checksum verified. Any thread may."""
        if self._table.held(slot) is Held.NEW:
            raise KeyError(slot)
        segment, offset = divmod(self._table.position(slot), 1 << _OFFSET_BITS)
        try:
            frame = self._read_frame(segment, offset)
        except OSError as exc:
            raise _io_error(_segment_path(self.run_path, segment), "read", exc) from exc
        return _decode_outcome(frame, _BODY_AT, len(frame))

    def read_all(self, slots: Sequence[int]) -> list[Outcome | None]:
        """The outcomes of several slots, in their order; None for a NEW one.

        Rows end in about the order they were sent, so what a slice of the input needs lies close
        together: it is read in blocks, which costs a third of reading record by record.
        """
        outcomes: list[Outcome | None] = [None] * len(slots)
        for run in _runs(self._table.kept(slots)):
            segment, start = divmod(run[0][0], 1 << _OFFSET_BITS)
            try:
                self._read_run(segment, start, run, outcomes)
            except OSError as exc:
                raise _io_error(_segment_path(self.run_path, segment), "read", exc) from exc
        return outcomes

    def _read_run(
        self,
        segment: int,
        start: int,
        run: list[tuple[int, int]],
        outcomes: list[Outcome | None],
    ) -> None:
        """Decode what lies at these positions of one segment into its places."""
        salt, base = self._salt_of(segment), _position(segment, start)
        block = os.pread(self._reader(segment), run[-1][0] - base + _READ_AHEAD, start)
        view, length, unpack = memoryview(block), len(block), _FRAME.unpack_from
        for position, place in run:
            at = position - base
            if at + _BODY_AT <= length:
                magic, covered, crc, kind = unpack(block, at)
                end = at + _CRC_END + covered
                # Not _is_whole: every record of a run passes here.
                if (
                    end <= length
                    and magic == _MAGIC
                    and kind == OUTCOME
                    and _crc32(view[at + _CRC_END : end], salt) == crc
                ):
                    outcomes[place] = _decode_outcome(block, at + _BODY_AT, end)
                    continue
            # Longer than the block, or not whole.
            frame = self._read_frame(segment, start + at)
            outcomes[place] = _decode_outcome(frame, _BODY_AT, len(frame))

    def _read_frame(self, segment: int, offset: int) -> bytes:
        fd = self._reader(segment)
        frame = os.pread(fd, _READ_AHEAD, offset)
        end = _frame_end(frame, 0, _LONGEST)
        if end > len(frame):
            frame += os.pread(fd, end - len(frame), offset + len(frame))
        whole = 0 < end <= len(frame) and _is_whole(frame, 0, end, self._salt_of(segment))
        if not whole or frame[_CRC_END] != OUTCOME:
            raise _damaged(_segment_path(self.run_path, segment), offset)
        return frame[:end]

    def _salt_of(self, segment: int) -> int:
        return _salt(self.header.run_id, segment)

    def _reader(self, segment: int) -> int:
        fd = self._readers.get(segment)
        if fd is None:
            if len(self._readers) >= _MOST_OPEN_SEGMENTS:
                os.close(self._readers.pop(next(iter(self._readers))))
            fd = os.open(_segment_path(self.run_path, segment), os.O_RDONLY | os.O_NOFOLLOW)
            self._readers[segment] = fd
        return fd

    # ── what happens ─────────────────────────────────────────────────────────────────────────────

    def sending(self, hash: bytes, occurrence: int, slot: int) -> None:
        """An attempt is about to begin; flush before its first byte leaves."""
        self._append_tried(SENT, hash, occurrence, 0)
        self._pending.append((SENT, slot, 0, 0, 0))

    def failed(self, hash: bytes, occurrence: int, slot: int, in_doubt: bool) -> None:
        """An attempt ended without settling its request."""
        self._append_tried(FAILED, hash, occurrence, in_doubt)
        self._pending.append((FAILED, slot, 0, 0, in_doubt))

    def settled(self, slot: int, outcome: Outcome) -> None:
        """Keep an outcome; without effect where an OK one is held. The occurrence is the slot's.

        ``outcome.in_doubt`` counts the attempts of all runs.
        """
        if self._table.held(slot) is Held.OK:
            return
        if self._failure is not None or self._fd < 0:
            self._refuse()
        occurrence = self._table.occurrence(slot)
        try:
            head = _outcome_head(outcome, occurrence)
        except (StructError, UnicodeEncodeError):
            outcome = _storable(outcome)
            head = _outcome_head(outcome, occurrence)
        body, buffer = outcome.body, self._buffer
        crc = _crc32(body, _crc32(head, self._salt))
        position = _position(self._segment, self._size + len(buffer))
        buffer += _PREFIX.pack(_MAGIC, len(head) + len(body), crc)
        buffer += head
        buffer += body
        held = _held_by(outcome.kind == "ok", outcome.final)
        self._pending.append((OUTCOME, slot, held, position, outcome.in_doubt))
        self._dirty = True

    def reopen(self, slot: int) -> None:
        """A settled failure counts as never settled. An OK answer stays."""
        self._append_tried(REOPEN, self._table.hash(slot), self._table.occurrence(slot), 0)
        self._pending.append((REOPEN, slot, 0, 0, 0))

    def note_imported(self, run_id: str) -> None:
        """The answers of this run's published output have all been taken over."""
        self._append(IMPORTED, run_id.encode())
        self.imported.add(run_id)

    def _append_tried(self, kind: int, hash: bytes, occurrence: int, in_doubt: int) -> None:
        if self._failure is not None or self._fd < 0:
            self._refuse()
        rest = _TRIED.pack(kind, hash, occurrence, in_doubt)
        self._buffer += _PREFIX.pack(_MAGIC, len(rest), _crc32(rest, self._salt)) + rest
        self._dirty = True

    def _append(self, kind: int, payload: bytes) -> None:
        if self._failure is not None or self._fd < 0:
            self._refuse()
        self._buffer += _frame(kind, payload, self._salt)
        self._dirty = True

    def _refuse(self) -> NoReturn:
        raise self._failure or LocalIOError(f"{self.run_path}: this journal is not open to write")

    # ── making it stay ───────────────────────────────────────────────────────────────────────────

    def flush(self) -> None:
        """Write what was appended, in one system call; only now does it count.

        After a LocalIOError nothing of it counts here, though whole records of it may be found by
        the next ``open``.
        """
        if not self._buffer:
            return
        if self._failure is not None:
            self._refuse()
        buffer, self._buffer = self._buffer, bytearray()
        pending, self._pending = self._pending, []
        self._write(buffer)
        self._apply(pending)
        if self._size >= self._segment_bytes:
            self._begin_segment()

    def _write(self, buffer: bytes | bytearray) -> None:
        try:
            written = os.write(self._fd, buffer)
            while written < len(buffer):
                written += os.write(self._fd, memoryview(buffer)[written:])
        except OSError as exc:
            self._fail("write", exc)
        self._size += len(buffer)

    def _apply(self, pending: list[_Pending]) -> None:
        table = self._table
        for kind, slot, held, position, in_doubt in pending:
            if kind == OUTCOME:
                table.settled(slot, held, position, in_doubt)
            elif kind == SENT:
                table.sent(slot)
            elif kind == FAILED:
                table.failed(slot, bool(in_doubt))
            elif kind == REOPEN:
                table.reopened(slot)

    def _fail(self, doing: str, error: OSError) -> NoReturn:
        path = _segment_path(self.run_path, self._segment)
        self._failure = _io_error(path, doing, error)
        raise self._failure from error

    def _begin_segment(self) -> None:
        """Go on in a new file. The full one stays open until a sync has sealed it."""
        path = _segment_path(self.run_path, self._segment + 1)
        try:
            fd = os.open(path, _CREATE, 0o600)
        except OSError as exc:
            self._fail("create", exc)
        self._to_seal.append(self._fd)
        sealed_bytes = self._size
        self._fd, self._size, self._segment = fd, 0, self._segment + 1
        self._salt = self._salt_of(self._segment)
        self._write(_frame(SEALED, _POSITION.pack(sealed_bytes), self._salt))

    def begin_sync(self) -> Callable[[], None] | None:
        """What another thread must run to make everything so far durable; None when it is.

        Flushes first. When the call returned, ``end_sync`` notes it. Its failure is final: the
        kernel may have dropped the pages, and a second fsync would claim success.
        """
        self.flush()
        if not self._dirty or self._syncing is not None:
            return None
        self._dirty = False
        sealing, self._to_seal = self._to_seal, []
        self._syncing = _Sync(
            sealing, self._fd, _position(self._segment, self._size), self.run_path, self._fail
        )
        return self._syncing

    def end_sync(self) -> None:
        """Note that the last ``begin_sync`` has been carried out."""
        if self._failure is not None:
            self._refuse()
        if self._syncing is not None:
            self._durable = self._syncing.position
            self._buffer += _frame(SYNC, _POSITION.pack(self._durable), self._salt)
            self._syncing = None

    def sync(self) -> None:
        """Make everything durable and say so, in this thread."""
        # One that was begun and abandoned may be running now, or may never run by itself.
        if self._syncing is not None:
            self._syncing()
            self.end_sync()
        if (make_durable := self.begin_sync()) is not None:
            make_durable()
            self.end_sync()
        self.flush()

    def close(self, *, remember: bool = True) -> None:
        """Release the files. What was not flushed is gone; never raises.

        With ``remember``, what is held is kept for the next ``open``, if all of it is durable.
        """
        # It only saves time: where it cannot be written, the segments are read again.
        with contextlib.suppress(OSError):
            if remember and self._is_settled():
                self._keep_table()
        if self._syncing is not None:
            self._syncing.abandon()
            self._syncing = None
        fds = [self._fd, *self._to_seal, *self._readers.values()]
        self._fd, self._to_seal = -1, []
        self._readers.clear()
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _is_settled(self) -> bool:
        """Whether all the table says is durable, and worth keeping; not of a deleted journal."""
        segment = self._durable >> _OFFSET_BITS
        return (
            self._fd >= 0
            and segment == self._segment
            and not (self._dirty or self._buffer or self._syncing or self._failure)
            and len(self._table) >= _FEWEST_KEPT
            and os.fstat(self._fd).st_nlink > 0
        )

    def _keep_table(self) -> None:
        sealed = (_segment_path(self.run_path, n) for n in range(1, self._segment))
        covered = _Covered(
            run_id=self.header.run_id,
            sizes=[*(path.stat().st_size for path in sealed), self._durable & _LAST_OFFSET],
            imported=sorted(self.imported),
            on_their_way=self._table.on_their_way,
            slots=len(self._table),
        )
        _write_table(self.run_path, self._table, covered)

    # ── beginning anew ───────────────────────────────────────────────────────────────────────────

    def reset(self, header: Header) -> None:
        """Delete every record and begin with this header."""
        self._leave(lambda path: path.unlink())
        with _reporting(self.run_path, "begin a journal"):
            self._begin(header)

    def set_aside(self, target: Path) -> None:
        """Move every record to another directory; only ``reset`` opens this journal again."""

        def move(path: Path) -> None:
            path.replace(target / path.name)

        with _reporting(target, "move the journal"):
            _make_private(target)
            # A first segment there is an older journal, whole; without one it is this one's rest,
            # from a move that was killed.
            if _segment_path(target, 1).exists():
                _dispose(target, lambda path: path.unlink())
        self._leave(move)

    def _leave(self, dispose: Callable[[Path], object]) -> None:
        if not self._writable:
            self._refuse()
        self.close(remember=False)
        self._buffer, self._pending = bytearray(), []
        with _reporting(self.run_path, "move the journal"):
            _dispose(self.run_path, dispose)
            _sync_directory(self.run_path)


# ── frames ───────────────────────────────────────────────────────────────────────────────────────


def _frame(kind: int, payload: bytes, salt: int) -> bytes:
    covered = bytes((kind,)) + payload
    return _PREFIX.pack(_MAGIC, len(covered), _crc32(covered, salt)) + covered


def _salt(run_id: str, segment: int) -> int:
    return _crc32(f"{run_id}/{segment}".encode())


def _position(segment: int, offset: int) -> int:
    return segment << _OFFSET_BITS | offset


def _frame_end(frame: bytes, at: int, limit: int) -> int:
    """Where the frame at ``at`` claims to end; 0 when none can begin here and end by ``limit``."""
    if len(frame) - at < _FRAME.size:
        return 0
    magic, length, _ = _PREFIX.unpack_from(frame, at)
    end: int = at + _CRC_END + length
    return end if magic == _MAGIC and length and end <= limit else 0


def _is_whole(frame: bytes, at: int, end: int, salt: int) -> bool:
    crc: int = _PREFIX.unpack_from(frame, at)[2]
    return _crc32(memoryview(frame)[at + _CRC_END : end], salt) == crc


def _outcome_head(outcome: Outcome, occurrence: int) -> bytes:
    """An OUTCOME from its type to its JSON; the body follows."""
    meta = _encode_meta(_Meta(outcome.code, outcome.message, outcome.request_id, outcome.model))
    latency_s, ttft_s = outcome.latency_s, outcome.ttft_s
    prompt, completion, total, cached, reasoning = astuple(outcome.usage)
    return (
        _TYPED_NUMBERS.pack(
            OUTCOME,
            outcome.hash,
            occurrence,
            _KIND_NUMBER[outcome.kind],
            (_FINAL if outcome.final else 0) | (_REBUILT if outcome.rebuilt else 0),
            outcome.http_status or 0,
            outcome.attempts,
            outcome.in_doubt,
            outcome.finished_at_ms,
            _NOT_A_NUMBER if latency_s is None else latency_s,
            _NOT_A_NUMBER if ttft_s is None else ttft_s,
            _UNKNOWN if prompt is None else prompt,
            _UNKNOWN if completion is None else completion,
            _UNKNOWN if total is None else total,
            _UNKNOWN if cached is None else cached,
            _UNKNOWN if reasoning is None else reasoning,
            len(meta),
        )
        + meta
    )


def _storable(outcome: Outcome) -> Outcome:
    """An endpoint may say anything: texts without lone surrogates, numbers that fit their fields.

    A token count that no 64-bit column can show is not reported, rather than shown wrong.
    """
    counts = (getattr(outcome.usage, name) for name in Usage.__struct_fields__)
    texts = {
        name: getattr(outcome, name).encode("utf-8", "replace").decode()
        for name in _Meta.__struct_fields__
    }
    return replace(
        outcome,
        **texts,
        http_status=min(outcome.http_status or 0, 0xFFFF),
        usage=Usage(*(n if n is not None and 0 <= n <= _MOST_TOKENS else None for n in counts)),
    )


def _decode_outcome(block: bytes, at: int, end: int) -> Outcome:
    """The OUTCOME whose payload lies there."""
    (
        hash_, occurrence, kind, flags, status, attempts, in_doubt, finished_at_ms,
        latency_s, ttft_s, prompt, completion, total, cached, reasoning, meta_bytes,
    ) = _NUMBERS.unpack_from(block, at)  # fmt: skip
    at += _NUMBERS.size
    body_at = at + meta_bytes
    meta = _decode_meta(block[at:body_at])
    return Outcome(
        hash_,
        occurrence,
        _KINDS[kind],
        bool(flags & _FINAL),
        attempts,
        in_doubt,
        status or None,
        meta.code,
        meta.message,
        meta.request_id,
        meta.model,
        # NaN is the one value that differs from itself.
        latency_s if latency_s == latency_s else None,
        ttft_s if ttft_s == ttft_s else None,
        finished_at_ms,
        Usage(
            prompt if prompt >= 0 else None,
            completion if completion >= 0 else None,
            total if total >= 0 else None,
            cached if cached >= 0 else None,
            reasoning if reasoning >= 0 else None,
        ),
        block[body_at:end],
        bool(flags & _REBUILT),
    )


def _runs(wanted: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut sorted (position, place) pairs where a gap is not worth reading over."""
    start = 0
    for at in range(1, len(wanted) + 1):
        if (
            at == len(wanted)
            or wanted[at][0] - wanted[at - 1][0] > _WIDEST_GAP
            or wanted[at][0] - wanted[start][0] > _RUN_BYTES
        ):
            yield wanted[start:at]
            start = at


def _held_by(ok: bool, final: bool) -> Held:
    if ok:
        return Held.OK
    return Held.REJECTED if final else Held.PASSING


# ── replaying ────────────────────────────────────────────────────────────────────────────────────


class _Gap(NamedTuple):
    """Bytes of one segment that are no frames."""

    segment: int
    start: int
    end: int


@dataclass(slots=True)
class _Contents:
    """What the segments of a journal say, replayed in order."""

    header: Header
    table: SlotTable = field(default_factory=SlotTable)
    imported: set[str] = field(default_factory=set)
    gaps: list[_Gap] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    durable: int = 0  # the last position a SYNC vouches for

    def take(self, segment: int, events: Iterator[_Event]) -> None:
        table, base = self.table, _position(segment, 0)
        find, settled, sent = table.find, table.settled, table.sent
        for hash_, occurrence, kind, state, in_doubt, offset in events:
            slot = find(hash_, occurrence)
            if state & _BEGUN or kind == SENT:
                sent(slot)
                state &= ~_BEGUN
            if kind == OUTCOME:
                settled(slot, state, base + offset, in_doubt)
            elif kind == FAILED:
                table.failed(slot, bool(state))
            elif kind == REOPEN:
                table.reopened(slot)

    def add(self, segment: _Segment) -> None:
        """Note what is known of a segment now that it has been read."""
        summary = segment.summary
        sealed_bytes = summary.sealed_bytes
        if sealed_bytes is not None and self.sizes and self.sizes[-1] < sealed_bytes:
            self._add_missing_end(segment.number - 1, sealed_bytes)
        self.imported.update(summary.imported)
        self.durable = max(self.durable, summary.durable)
        self.gaps += segment.gaps
        self.sizes.append(segment.size)

    def _add_missing_end(self, segment: int, sealed_bytes: int) -> None:
        start = self.sizes[-1]
        if self.gaps and self.gaps[-1].segment == segment and self.gaps[-1].end == start:
            start = self.gaps.pop().start
        self.gaps.append(_Gap(segment, start, sealed_bytes))
        self.sizes[-1] = sealed_bytes


class _Summary(msgspec.Struct):
    """What a segment holds besides events; with them in its index file."""

    salt: int  # tells the segments of all runs apart
    size_bytes: int
    durable: int = 0
    sealed_bytes: int | None = None  # how long the segment before was when it was left
    imported: list[str] = []
    events_crc: int = 0


class _Segment:
    """One segment being read from its first frame to its last."""

    def __init__(self, state: Path, number: int, run_id: str, start: int) -> None:
        self.number = number
        self.start = start
        self.path = _segment_path(state, number)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        self.size = os.fstat(self.fd).st_size
        self.salt = _salt(run_id, number)
        self.summary = _Summary(self.salt, self.size)
        self.gaps: list[_Gap] = []

    def events(self) -> Iterator[_Event]:
        """What the frames say, in an order that is right for every request by itself.

        An attempt's SENT is folded into its end. Fills ``summary`` and ``gaps`` on the way.
        """
        sent: dict[bytes, int] = {}
        replayed, key_bytes = _REPLAYED.unpack_from, _REQUEST.size
        for offset, kind, block, at, end in self._frames():
            if not SENT <= kind <= REOPEN:
                self._note(kind, block[at:end])
                continue
            key = block[at : at + key_bytes]
            if kind == SENT:
                if key in sent:
                    yield _sent_event(key, offset)
                sent[key] = offset
                continue
            begun = 0 if sent.pop(key, None) is None else _BEGUN
            if kind == OUTCOME:
                hash_, occurrence, number, flags, in_doubt = replayed(block, at)
                held = _OK_HELD if number == _OK else _held_by(False, bool(flags & _FINAL))
                yield hash_, occurrence, OUTCOME, held | begun, min(in_doubt, MAX_IN_DOUBT), offset
            else:
                state = block[at + key_bytes] | begun
                yield *_REQUEST.unpack(key), kind, state, 0, offset
        for key, offset in sent.items():
            yield _sent_event(key, offset)

    def _note(self, kind: int, payload: bytes) -> None:
        if kind == SYNC:
            self.summary.durable = max(self.summary.durable, *_POSITION.unpack(payload))
        elif kind == SEALED:
            (self.summary.sealed_bytes,) = _POSITION.unpack(payload)
        elif kind == IMPORTED:
            self.summary.imported.append(payload.decode())

    def _frames(self) -> Iterator[tuple[int, int, bytes, int, int]]:
        """Every whole frame: its offset, its type, and where in a block its payload lies."""
        unpack, salt, offset = _FRAME.unpack_from, self.salt, self.start
        while offset < self.size:
            block = os.pread(self.fd, _BLOCK, offset)
            view, length, at = memoryview(block), len(block), 0
            # _frame_end and _is_whole in line: this runs once for every record there is.
            while at + _BODY_AT <= length:
                magic, covered, crc, kind = unpack(block, at)
                end = at + _CRC_END + covered
                if magic != _MAGIC or not covered or end > length:
                    break
                if _crc32(view[at + _CRC_END : end], salt) != crc:
                    break
                yield offset + at, kind, block, at + _BODY_AT, end
                at = end
            offset += at
            if at or offset >= self.size:
                continue
            # Not even the first is whole: it is longer than a block, or it is none.
            if frame := self._frame_at(offset):
                yield offset, frame[_CRC_END], frame, _BODY_AT, len(frame)
                offset += len(frame)
            else:
                offset = self._skip_gap(offset)

    def _frame_at(self, offset: int) -> bytes:
        head = os.pread(self.fd, _FRAME.size, offset)
        end = _frame_end(head, 0, self.size - offset)
        frame = os.pread(self.fd, end, offset) if end else b""
        return frame if end and len(frame) == end and _is_whole(frame, 0, end, self.salt) else b""

    def _skip_gap(self, start: int) -> int:
        """Where the next whole frame begins, or the end of the file."""
        at = start + 1
        while len(block := os.pread(self.fd, _BLOCK, at)) >= len(_MAGIC):
            found = block.find(_MAGIC)
            if found < 0:
                at += len(block) - len(_MAGIC) + 1
                continue
            at += found
            if self._frame_at(at):
                break
            at += 1
        else:
            at = self.size
        self.gaps.append(_Gap(self.number, start, at))
        return at


def _sent_event(key: bytes, offset: int) -> _Event:
    hash_, occurrence = _REQUEST.unpack(key)
    return hash_, occurrence, SENT, 0, 0, offset


def _replay(state: Path, *, keep_indexes: bool) -> _Contents | None:
    """Read the segments of a directory; None when there are none. Changes no segment."""
    numbers = _segment_numbers(state)
    if not numbers:
        return None
    for expected, number in enumerate(numbers, 1):
        if number != expected:
            raise _damaged(_segment_path(state, expected), 0)
    header, start = _read_header(_segment_path(state, 1))
    contents = _read_table(state, header) or _Contents(header, sizes=[start])
    begun = len(contents.sizes)
    start = contents.sizes.pop()
    for number in numbers[begun - 1 :]:
        segment = _Segment(state, number, header.run_id, start if number == begun else 0)
        try:
            # Of a segment that is known in part already, an index file would say too much.
            if number == numbers[-1] or (number == begun and contents.durable):
                contents.take(number, segment.events())
            else:
                _take_sealed(contents, segment, keep_index=keep_indexes)
        finally:
            os.close(segment.fd)
        contents.add(segment)
    contents.table.process_ended()
    for gap in contents.gaps:
        if _position(gap.segment, gap.start) < contents.durable:
            raise _damaged(_segment_path(state, gap.segment), gap.start)
    return contents


def _repair(state: Path, contents: _Contents) -> Recovery:
    """Cut the tail and fill the holes, so that they are found once only."""
    cut_bytes = holes = hole_bytes = 0
    for gap in contents.gaps:
        length = gap.end - gap.start
        ends_its_file = gap.end == contents.sizes[gap.segment - 1]
        # Between two frames at least one was lost, so only at an end is there less than a frame.
        if length < _FRAME.size and not ends_its_file:
            raise _damaged(_segment_path(state, gap.segment), gap.start)
        is_tail = ends_its_file and gap.segment == len(contents.sizes)
        cut = is_tail or length < _FRAME.size
        _close_gap(state, gap, _salt(contents.header.run_id, gap.segment), cut=cut)
        if cut:
            contents.sizes[gap.segment - 1] = gap.start
            cut_bytes += length
        else:
            holes += 1
            hole_bytes += length
    return Recovery(cut_bytes, holes, hole_bytes)


def _close_gap(state: Path, gap: _Gap, salt: int, *, cut: bool) -> None:
    with _opened(_segment_path(state, gap.segment)) as fd:
        if cut:
            os.ftruncate(fd, gap.start)
        else:
            _fill(fd, gap.start, gap.end, salt)
        _make_durable(fd)


def _fill(fd: int, start: int, end: int, salt: int) -> None:
    while start < end:
        length = min(end - start, _MOST_FILLER)
        if 0 < end - start - length < _FRAME.size:
            length -= _FRAME.size
        frame = _frame(FILLER, bytes(length - _FRAME.size), salt)
        if os.pwrite(fd, frame, start) != length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        start += length


# ── index files ──────────────────────────────────────────────────────────────────────────────────

_INDEX_HEAD = Struct("<4sII")  # magic, length of the summary, its checksum
_INDEX_MAGIC = b"\xf5BX\x02"


def _take_sealed(contents: _Contents, segment: _Segment, *, keep_index: bool) -> None:
    path = segment.path.with_suffix(".idx")
    events = _read_index(path, segment)
    if events is None:
        events = b"".join(_EVENT.pack(*event) for event in segment.events())
        if keep_index and not segment.gaps:
            _write_index(path, segment.summary, events)
    contents.table.reserve(len(contents.table) + len(events) // _EVENT.size)
    contents.take(segment.number, _EVENT.iter_unpack(events))


def _read_index(path: Path, segment: _Segment) -> bytes | None:
    """The packed events of a sealed segment, or None when its index file is not to be trusted."""
    try:
        data = path.read_bytes()
        magic, length, crc = _INDEX_HEAD.unpack_from(data)
        head_end = _INDEX_HEAD.size + length
        head = data[_INDEX_HEAD.size : head_end]
        if magic != _INDEX_MAGIC or _crc32(head) != crc:
            return None
        summary = msgspec.json.decode(head, type=_Summary)
    except (OSError, StructError, msgspec.MsgspecError):
        return None
    events = data[head_end:]
    same = (summary.salt, summary.size_bytes) == (segment.salt, segment.size)
    if not same or len(events) % _EVENT.size or _crc32(events) != summary.events_crc:
        return None
    segment.summary = summary
    return events


def _write_index(path: Path, summary: _Summary, events: bytes) -> None:
    summary.events_crc = _crc32(events)
    head = msgspec.json.encode(summary)
    temporary = path.with_suffix(".idx-new")
    # It only saves time: where it cannot be written, the segment is read again.
    with contextlib.suppress(OSError):
        data = _INDEX_HEAD.pack(_INDEX_MAGIC, len(head), _crc32(head)) + head + events
        _write_private(temporary, data)
        temporary.replace(path)


# ── the kept table ───────────────────────────────────────────────────────────────────────────────

_TABLE = "journal-table"
_TABLE_MAGIC = b"\xf5BT\x01"
# Fewer are replayed in no time, and a replay finds damage at once, not when a body is read.
_FEWEST_KEPT = 20_000


class _Covered(msgspec.Struct):
    """What a kept table is of: all records up to here, every one of them durable."""

    run_id: str
    sizes: list[int]  # of the segments; of the last, how much of it
    imported: list[str]
    on_their_way: list[int]
    slots: int
    crc: int = 0


def _write_table(state: Path, table: SlotTable, covered: _Covered) -> None:
    columns = table.columns()
    for column in columns:
        covered.crc = _crc32(column, covered.crc)
    head = msgspec.json.encode(covered)
    temporary = state / f"{_TABLE}.new"
    start = _INDEX_HEAD.pack(_TABLE_MAGIC, len(head), _crc32(head)) + head
    _write_private(temporary, start, *columns)
    temporary.replace(state / _TABLE)


def _read_table(state: Path, header: Header) -> _Contents | None:
    """What was replayed already, up to the last of its ``sizes``; None when there is nothing."""
    try:
        with (state / _TABLE).open("rb") as file:
            magic, length, crc = _INDEX_HEAD.unpack(file.read(_INDEX_HEAD.size))
            head = file.read(length)
            if magic != _TABLE_MAGIC or _crc32(head) != crc:
                return None
            covered = msgspec.json.decode(head, type=_Covered)
            if covered.run_id != header.run_id or not _are_there(state, covered.sizes):
                return None
            table = SlotTable.load(file, covered.slots, covered.on_their_way)
    except (OSError, EOFError, StructError, msgspec.MsgspecError):
        return None
    crc = 0
    for column in table.columns():
        crc = _crc32(column, crc)
    if crc != covered.crc:
        return None
    table.forget_passes()
    table.begin_pass()
    return _Contents(
        header,
        table,
        set(covered.imported),
        sizes=covered.sizes,
        durable=_position(len(covered.sizes), covered.sizes[-1]),
    )


def _are_there(state: Path, sizes: list[int]) -> bool:
    """Whether the segments have these sizes, and the last at least what is said of it."""
    found = [_segment_path(state, n).stat().st_size for n, _ in enumerate(sizes, 1)]
    return bool(sizes) and found[:-1] == sizes[:-1] and found[-1] >= sizes[-1]


# ── files ────────────────────────────────────────────────────────────────────────────────────────


class _Sync:
    """One group of records being made durable, by whichever thread comes first."""

    def __init__(
        self,
        sealing: list[int],
        current: int,
        position: int,
        state: Path,
        fail: Callable[[str, OSError], NoReturn],
    ) -> None:
        self.position = position
        self._sealing = sealing
        self._current = current
        self._state = state
        self._fail = fail
        self._lock = threading.Lock()
        self._ended = False

    def __call__(self) -> None:
        """Do it, unless it is done. Its files stay open until then, whatever the writer does."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            try:
                for fd in (*self._sealing, self._current):
                    _make_durable(fd)
                if self._sealing:
                    _sync_directory(self._state)
            except OSError as exc:
                self._fail("fsync", exc)
            finally:
                self._close()

    def abandon(self) -> None:
        """Wait for a thread that is in it, and let no other begin."""
        with self._lock:
            self._ended = True
            self._close()

    def _close(self) -> None:
        while self._sealing:
            os.close(self._sealing.pop())


def _make_durable(fd: int) -> None:
    if sys.platform == "darwin":
        # Plain fsync there leaves the data in the drive's cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _segment_path(state: Path, number: int) -> Path:
    return state / f"journal-{number:06d}.seg"


def _segment_numbers(state: Path) -> list[int]:
    names = (path.name for path in state.glob("journal-*.seg"))
    return sorted(int(digits) for name in names if (digits := name[8:-4]).isdecimal())


def _dispose(state: Path, dispose: Callable[[Path], object]) -> None:
    """Take all segments away, the last first: a kill leaves a shorter journal, and a whole one."""
    (state / _TABLE).unlink(missing_ok=True)
    for number in reversed(_segment_numbers(state)):
        segment = _segment_path(state, number)
        if (index := segment.with_suffix(".idx")).exists():
            dispose(index)
        dispose(segment)


def _make_private(directory: Path) -> bool:
    """Whether it had to be made."""
    try:
        directory.mkdir(0o700)
    except FileExistsError:
        return False
    return True


def _write_private(path: Path, *parts: bytes | memoryview, durable: bool = False) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]
        if durable:
            _make_durable(file.fileno())


def _create_first_segment(state: Path, header: Header) -> None:
    """The first segment has its header from the moment it has its name."""
    path = _segment_path(state, 1)
    temporary = path.with_suffix(".new")
    _write_private(temporary, _frame(HEADER, msgspec.json.encode(header), 0), durable=True)
    temporary.replace(path)
    _sync_directory(state)
    _sync_directory(state.parent)


def _read_header(path: Path) -> tuple[Header, int]:
    """The header of a journal, and where the frame after it begins."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_FRAME.size)
        end = _frame_end(head, 0, size)
        frame = head + file.read(end - len(head)) if end else b""
    if not frame or not _is_whole(frame, 0, end, 0) or frame[_CRC_END] != HEADER:
        raise _damaged(path, 0)
    payload = frame[_BODY_AT:end]
    found = msgspec.json.decode(payload).get("format")
    if found != FORMAT:
        raise LocalIOError(
            f"{path}: journal format {found}; this batchrun reads format {FORMAT}",
            next_steps=("use the version of batchrun that began this run",),
        )
    return msgspec.json.decode(payload, type=Header), end


def _damaged(path: Path, offset: int) -> JournalDamaged:
    return JournalDamaged(
        f"{path}: damaged at byte {offset:,}: a record that was safely on disk is not whole",
        offset=offset,
        next_steps=(
            "restore this file from a backup, then run the same command",
            f"or move {path.parent} away to begin anew: its answers would be asked for again",
        ),
    )


def _io_error(path: Path, doing: str, error: OSError) -> LocalIOError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, then run the same command: it continues"
        return LocalIOError(f"{path}: cannot {doing}: disk full", next_steps=(advice,))
    return LocalIOError(f"{path}: cannot {doing}: {error.strerror or error}")


@contextlib.contextmanager
def _reporting(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise _io_error(Path(exc.filename or path), doing, exc) from exc


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────

LOCK = "lock"
_STATUS = "status.json"
_OWN_SUFFIX = ".batchrun"
_MADE = "made-by-batchrun"
_OWN_NAMES = ("journal-", _STATUS, "run.json")
_ATTEMPTS = 200
_PAUSE_S = 0.01


class Holder(msgspec.Struct, frozen=True):
    """The process that writes an output now."""

    pid: int
    host: str
    since_ms: int


class Lock:
    """An output's state directory, held by this process until ``release`` or its death."""

    def __init__(self, state: Path, fd: int) -> None:
        self.state = state
        self._fd = fd
        me = Holder(os.getpid(), socket.gethostname(), time.time_ns() // 1_000_000)
        with _reporting(state / LOCK, "write"):
            # Over the old text first, so that nobody ever reads an empty file.
            text = msgspec.json.encode(me) + b"\n"
            os.pwrite(fd, text, 0)
            os.ftruncate(fd, len(text))

    def remove_state(self) -> None:
        """Delete the state directory and let go of it; nothing in it may be touched afterwards.

        The lock file goes last: whoever finds it gone begins with an empty directory, and whoever
        had it open finds another file in its place. A directory that was here before us may
        hold other things: of it only the files named here go.
        """
        with _reporting(self.state, "remove"):
            whole = self.state.name.endswith(_OWN_SUFFIX) or (self.state / _MADE).exists()
            for path in sorted(self.state.iterdir(), reverse=True):
                if path.name != LOCK and (whole or path.name.startswith(_OWN_NAMES)):
                    _remove(path)
            (self.state / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.state.rmdir()
        self.release()

    def release(self) -> None:
        if self._fd >= 0:
            # A name left behind would be blamed for the next one's lock.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            fd, self._fd = self._fd, -1
            # The descriptor is gone whatever close says, and nothing of ours hangs on it.
            with contextlib.suppress(OSError):
                os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(
    state: Path,
    if_locked: IfLocked = "fail",
    *,
    poll_s: float = 1.0,
    cancelled: threading.Event | None = None,
) -> Iterator[Lock]:
    """Hold an output's state directory, made if need be; the kernel lets go when we die.

    With ``wait``, looks again every ``poll_s`` until it is free or ``cancelled`` is set. Raises
    Locked when another process has it; what ``skip`` means is the caller's to say.
    """
    wake = cancelled or threading.Event()
    with _reporting(state, "lock"):
        while (fd := _try_lock(state)) is None:
            if if_locked != "wait" or wake.wait(poll_s):
                raise _locked(state)
    held = Lock(state, fd)
    try:
        yield held
    finally:
        held.release()


def holder(state: Path) -> Holder | None:
    """Who holds this state directory now; None when nobody does. Disturbs no one."""
    with _reporting(state, "read"):
        try:
            fd = os.open(state / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return None if _flock(fd, fcntl.LOCK_SH) else _holder_named_in(fd)
        finally:
            os.close(fd)


def _try_lock(state: Path) -> int | None:
    """The lock file, open and locked; None when another run holds it."""
    for _ in range(_ATTEMPTS):
        if _make_private(state):
            with contextlib.suppress(OSError):
                _write_private(state / _MADE, b"")
        try:
            fd = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # its holder finished and removed the directory just now
        if _flock(fd, fcntl.LOCK_EX):
            if _is_still(fd, state / LOCK):
                return fd
        elif not _flock(fd, fcntl.LOCK_SH):
            os.close(fd)
            return None
        # The file was replaced, or only readers were looking at it: not taken, so try again.
        os.close(fd)
        time.sleep(_PAUSE_S * random.random())
    return None


def _flock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder_named_in(fd: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except msgspec.MsgspecError:
        return None


def _locked(state: Path) -> Locked:
    name = state.name.removesuffix(_OWN_SUFFIX)
    # Between taking the lock and writing its name a holder is nameless, or has its dead
    # predecessor's name.
    found = holder(state)
    for _ in range(_ATTEMPTS):
        if found is not None and _may_be_alive(found):
            break
        time.sleep(_PAUSE_S)
        found = holder(state)
    if found is None:
        return Locked(f"{name} was in use by another run just now; run the same command again")
    since = time.localtime(found.since_ms / 1000)
    today = time.localtime()[:3] == since[:3]
    when = time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", since)
    return Locked(f"{name} is in use by pid {found.pid} on {found.host} since {when}")


def _may_be_alive(found: Holder) -> bool:
    if found.host != socket.gethostname():
        return True
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ── the status file ──────────────────────────────────────────────────────────────────────────────


class Status(msgspec.Struct, kw_only=True):
    """What ``batchrun status`` shows of a run that is going on, or has stopped."""

    pid: int
    host: str
    started_at_ms: int
    updated_at_ms: int
    command: str = ""
    inputs: list[str] = []
    output: str = ""
    endpoint: str = ""
    model: str | None = None
    total: int | None = None
    ok: int = 0
    failed: int = 0
    pending: int = 0
    rows_per_s: float = 0.0
    in_flight: int = 0
    bound_by: str | None = None
    state: str = "running"
    exit_code: int | None = None
    reason: str | None = None


def write_status(state: Path, status: Status) -> None:
    """Replace the status file; what cannot be written is left out, for it is not the truth."""
    temporary = state / f"{_STATUS}.new"
    with contextlib.suppress(OSError):
        _write_private(temporary, msgspec.json.encode(status))
        temporary.replace(state / _STATUS)


def read_status(state: Path) -> Status | None:
    """The last status written, or None when there is none that can be read."""
    try:
        return msgspec.json.decode((state / _STATUS).read_bytes(), type=Status)
    except (OSError, msgspec.MsgspecError):
        return None
