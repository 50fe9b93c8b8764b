"""Append outcomes as they land, and know what is answered.

A journal is a directory of segments ``journal-000001.seg`` ..., each a sequence of records. What
was appended is written by ``flush``, and durable after a sync; opening replays the records into
the index (``slots.SlotTable``) and repairs what a kill or a power failure left behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NoReturn

from batchrun.errors import LocalIOError
from batchrun.files import (
    io_error,
    make_durable,
    make_private,
    open_regular,
    opened,
    reporting,
)
from batchrun.journal import records
from batchrun.journal.group_sync import GroupSync
from batchrun.journal.kept_table import (
    Covered,
    ends_of,
    write_table,
)
from batchrun.journal.reader import Reader
from batchrun.journal.recovery import (
    check_version,
    create_first_segment,
    repair,
    replay,
)
from batchrun.journal.segments import Contents, Header, Recovery
from batchrun.journal.slots import Held, Survey
from batchrun.journal.state import StateDir
from batchrun.types import NO_USAGE, Outcome, Usage

SEGMENT_BYTES = 256 << 20
# Fewer are replayed in no time, and a replay finds damage at once, not when a body is read.
_FEWEST_KEPT = 20_000
# Writing the table costs a thirtieth of replaying as many events.
_WORTH_KEEPING = 8
_Pending = tuple[int, int, int, int, int]  # type, slot, held, position, in doubt
_CREATE = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Journal:
    """The answers of one output. Whoever writes holds the lock; ``peek`` needs none.

    Appends go to a buffer, and nothing in it counts before ``flush`` has written it. After a failed
    write or fsync the journal takes nothing more: every further append raises the same error, and
    what is on disk is what the next ``open`` finds.
    """

    def __init__(self, state: StateDir, segment_bytes: int, *, writable: bool) -> None:
        self._state = state
        self._segment_bytes = segment_bytes
        self._writable = writable
        self._buffer = bytearray()
        self._pending: list[_Pending] = []
        self._fd = -1
        self._to_seal: list[int] = []
        self._failure: LocalIOError | None = None

    @classmethod
    def open(
        cls, state: StateDir, header: Header, *, segment_bytes: int = SEGMENT_BYTES
    ) -> Journal:
        """Continue the journal in this directory, repaired, or begin one with this header.

        Raises JournalDamaged when records that were durable are not whole, LocalIOError otherwise.
        """
        self = cls(state, segment_bytes, writable=True)
        with reporting(state.path, "open the journal"):
            make_private(state.path)
            state.finish_removal()
            contents = replay(state)
            state.forget_unfinished_table()
            # Before anything is appended: once the segments have grown, it might be believed.
            if contents is None or not contents.from_table:
                state.forget_table()
            if contents is None:
                self._begin(header)
                return self
            check_version(state, contents.header, header)
            self._adopt(contents, repair(state, contents))
            self._continue_last_segment()
            self._note_unsynced(contents.durable)
            if contents.events > max(_FEWEST_KEPT, len(self._table) // _WORTH_KEEPING):
                self.sync()
                self._remember()
        return self

    @classmethod
    def peek(cls, state: StateDir) -> Journal | None:
        """A snapshot to read from, also beside a running process; None where there is no journal.

        Repairs nothing. A torn tail is a record on its way, and not counted.
        """
        with reporting(state.path, "read the journal"):
            contents = replay(state)
        if contents is None:
            return None
        self = cls(state, SEGMENT_BYTES, writable=False)
        self._adopt(contents, Recovery())
        return self

    def _begin(self, header: Header) -> None:
        create_first_segment(self._state, header)
        size = self._state.segment(1).stat().st_size
        self._adopt(Contents(header, sizes=[size]), Recovery())
        self._continue_last_segment()

    def _adopt(self, contents: Contents, recovery: Recovery) -> None:
        self.header = contents.header
        self.recovery = recovery
        self.imported = contents.imported
        self._table = contents.table
        self._reader = Reader(self._state, contents.header.run_id, contents.table)
        self._segment = len(contents.sizes)
        self._size = contents.sizes[-1]
        self._salt = records.salt_of(self.header.run_id, self._segment)
        self._durable = contents.durable
        self._dirty = False
        self._syncing: GroupSync | None = None

    def _continue_last_segment(self) -> None:
        path = self._state.segment(self._segment)
        self._fd = open_regular(path, os.O_WRONLY | os.O_APPEND)

    def _note_unsynced(self, durable: int) -> None:
        """A killed process may have left records that are written but not yet durable."""
        segment, offset = divmod(durable, 1 << records.OFFSET_BITS)
        for number in range(max(segment, 1), self._segment):
            with opened(self._state.segment(number)) as fd:
                make_durable(fd)
        after_sync = (
            self._size - offset - len(records.frame_of(records.SYNC, records.POSITION.pack(0), 0))
        )
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

    def places(self, slots: Sequence[int], held: Collection[Held]) -> list[int]:
        """Places in ``slots`` of those with one of these."""
        return self._table.places(slots, held)

    def survey(self, slots: Sequence[int]) -> Survey:
        """What is held for these slots, in sum."""
        return self._table.survey(slots)

    def first_slot(self, hash: bytes) -> int:
        """The slot of the first of the equal requests that rows of this pass have claimed."""
        return self._table.first_of(hash)

    def lacking(self, hash: bytes) -> Iterator[int]:
        """The slots of this hash that rows of this pass have, and that hold no OK outcome."""
        table = self._table
        for slot in table.slots_of(hash):
            if table.is_claimed(slot) and table.held(slot) is not Held.OK:
                yield slot

    def settled_slots(self, hash: bytes) -> Iterator[int]:
        """The slots of this hash that hold a settled outcome, whoever has them."""
        settled = (Held.OK, Held.REJECTED)
        return (slot for slot in self._table.slots_of(hash) if self._table.held(slot) in settled)

    def unclaimed(self) -> Sequence[int]:
        """The slots with a settled outcome that no row of this pass has."""
        return self._table.unclaimed()

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

    def tried(self, slot: int) -> bool:
        """Whether an attempt for it has ended, or was cut off."""
        table = self._table
        was_in_doubt = table.in_doubt(slot) > 0
        return was_in_doubt or slot in table.used_at or table.held(slot) is not Held.NEW

    def used(self, slots: Sequence[int]) -> dict[int, Usage]:
        """What was used for those of these slots that have no answer though something was.

        Raises as ``read`` does. What this process used counts once it is flushed.
        """
        failed = [slots[at] for at in self.places(slots, (Held.REJECTED, Held.PASSING))]
        used = {
            slot: outcome.usage
            for slot, outcome in zip(failed, self.read_all(failed), strict=True)
            if outcome is not None and outcome.usage != NO_USAGE
        }
        if used_at := self._table.used_at:
            for slot in slots:
                for position in used_at.get(slot, ()):
                    used[slot] = used.get(slot, NO_USAGE) + self._reader.usage(position)
        return used

    def read(self, slot: int) -> Outcome:
        """The outcome kept for a slot that is not NEW, its checksum verified. Any thread may.

        Raises JournalDamaged when the record is not whole, or is not of this request.
        """
        return self._reader.read(slot)

    def read_all(self, slots: Sequence[int]) -> list[Outcome | None]:
        """The outcomes of several slots, in their order; None for a NEW one."""
        return self._reader.read_all(slots)

    # ── what happens ─────────────────────────────────────────────────────────────────────────────

    def sending(self, hash: bytes, occurrence: int, slot: int) -> None:
        """An attempt is about to begin; flush before its first byte leaves."""
        self._append_tried(records.SENT, hash, occurrence, 0)
        self._pending.append((records.SENT, slot, 0, 0, 0))

    def failed(
        self, hash: bytes, occurrence: int, slot: int, in_doubt: bool, usage: Usage = NO_USAGE
    ) -> None:
        """An attempt ended without settling its request; ``usage`` is what it was billed for."""
        used_at = 0
        if usage == NO_USAGE:
            self._append_tried(records.FAILED, hash, occurrence, in_doubt)
        else:
            used_at = self._end
            self._append_whole(records.failed(hash, occurrence, in_doubt, usage, self._salt))
        self._pending.append((records.FAILED, slot, 0, used_at, in_doubt))

    def settled(self, slot: int, outcome: Outcome) -> None:
        """Keep an outcome; without effect where an OK one is held. The occurrence is the slot's.

        ``outcome.in_doubt`` counts the attempts of all runs.
        """
        if self._table.held(slot) is Held.OK:
            return
        if self._failure is not None or self._fd < 0:
            self._refuse()
        buffer, position = self._buffer, self._end
        buffer += records.outcome_start(outcome, self._table.occurrence(slot), self._salt)
        buffer += outcome.body
        held = records.held_by(outcome.kind == "ok", outcome.final)
        self._pending.append((records.OUTCOME, slot, held, position, outcome.in_doubt))
        self._dirty = True

    def reopen(self, slot: int) -> None:
        """A settled failure counts as never settled. An OK answer stays."""
        self._append_tried(records.REOPEN, self._table.hash(slot), self._table.occurrence(slot), 0)
        self._pending.append((records.REOPEN, slot, 0, 0, 0))

    def note_imported(self, publication: str) -> None:
        """The answers of this published output have all been taken over."""
        self._append(records.IMPORTED, publication.encode())
        self.imported.add(publication)

    @property
    def _end(self) -> int:
        """The position of what is appended next."""
        return records.position_of(self._segment, self._size + len(self._buffer))

    def _append_tried(self, kind: int, hash: bytes, occurrence: int, in_doubt: int) -> None:
        self._append_whole(records.tried(kind, hash, occurrence, in_doubt, self._salt))

    def _append(self, kind: int, payload: bytes) -> None:
        self._append_whole(records.frame_of(kind, payload, self._salt))

    def _append_whole(self, record: bytes) -> None:
        if self._failure is not None or self._fd < 0:
            self._refuse()
        self._buffer += record
        self._dirty = True

    def _refuse(self) -> NoReturn:
        raise self._failure or LocalIOError(
            f"{self._state.path}: this journal is not open to write"
        )

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
            if kind == records.OUTCOME:
                table.settled(slot, held, position, in_doubt)
            elif kind == records.SENT:
                table.sent(slot)
            elif kind == records.FAILED:
                table.failed(slot, bool(in_doubt), position)
            elif kind == records.REOPEN:
                table.reopened(slot)

    def _fail(self, doing: str, error: OSError) -> NoReturn:
        path = self._state.segment(self._segment)
        self._failure = io_error(path, doing, error)
        raise self._failure from error

    def _begin_segment(self) -> None:
        """Go on in a new file. The full one stays open until a sync has sealed it."""
        path = self._state.segment(self._segment + 1)
        try:
            fd = os.open(path, _CREATE, 0o600)
        except OSError as exc:
            self._fail("create", exc)
        self._to_seal.append(self._fd)
        sealed_bytes = self._size
        self._fd, self._size, self._segment = fd, 0, self._segment + 1
        self._salt = records.salt_of(self.header.run_id, self._segment)
        self._write(
            records.frame_of(records.SEALED, records.POSITION.pack(sealed_bytes), self._salt)
        )

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
        self._syncing = GroupSync(
            sealing,
            self._fd,
            records.position_of(self._segment, self._size),
            self._state.path,
            self._fail,
        )
        return self._syncing

    def end_sync(self) -> None:
        """Note that the last ``begin_sync`` has been carried out."""
        if self._failure is not None:
            self._refuse()
        if self._syncing is not None:
            self._durable = self._syncing.position
            self._buffer += records.frame_of(
                records.SYNC, records.POSITION.pack(self._durable), self._salt
            )
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
        if remember:
            self._remember()
        if self._syncing is not None:
            self._syncing.abandon()
            self._syncing = None
        fds = [self._fd, *self._to_seal]
        self._fd, self._to_seal = -1, []
        self._reader.close()
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _is_settled(self) -> bool:
        """Whether all the table says is durable, and worth keeping; not of a deleted journal."""
        segment = self._durable >> records.OFFSET_BITS
        return (
            self._fd >= 0
            and segment == self._segment
            and not (self._dirty or self._buffer or self._syncing or self._failure)
            and len(self._table) >= _FEWEST_KEPT
            and os.fstat(self._fd).st_nlink > 0
        )

    def _remember(self) -> None:
        # It only saves time: where it cannot be written, the segments are read again.
        with contextlib.suppress(OSError):
            if self._is_settled():
                self._keep_table()

    def _keep_table(self) -> None:
        sealed = (self._state.segment(n) for n in range(1, self._segment))
        sizes = [*(path.stat().st_size for path in sealed), self._durable & records.LAST_OFFSET]
        covered = Covered(
            run_id=self.header.run_id,
            sizes=sizes,
            ends=ends_of(self._state, sizes),
            imported=sorted(self.imported),
            on_their_way=self._table.on_their_way,
            used_at=self._table.used_at,
            slots=len(self._table),
        )
        write_table(self._state, self._table, covered)

    # ── beginning anew ───────────────────────────────────────────────────────────────────────────

    def reset(self, header: Header) -> None:
        """Delete every record and begin with this header."""
        if not self._writable:
            self._refuse()
        self.close(remember=False)
        self._buffer, self._pending = bytearray(), []
        with reporting(self._state.path, "begin a journal"):
            self._state.clear_journal()
            self._begin(header)
