"""What the journal promises: nothing written is lost, and damage is not believed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from batchrun import files
from batchrun.errors import JournalDamaged, LocalIOError
from batchrun.journal import group_sync as group_sync_room
from batchrun.journal import journal as journal_room
from batchrun.journal import kept_table as kept_table_room
from batchrun.journal.journal import SEGMENT_BYTES, Journal
from batchrun.journal.kept_table import _TABLE_MAGIC
from batchrun.journal.lock import locked
from batchrun.journal.records import LAST_OFFSET, salt_of
from batchrun.journal.recovery import create_first_segment
from batchrun.journal.segments import Header, Recovery, Segment
from batchrun.journal.slots import Held
from batchrun.journal.state import StateDir
from batchrun.types import NO_USAGE, Outcome, OutcomeKind, Usage

if TYPE_CHECKING:
    from conftest import Spawn

ROOT = Path(__file__).parents[2]
HEADER = Header(
    format=1,
    hash_version=1,
    run_id="run-1",
    created_at_ms=1_795_000_000_000,
    batchrun_version="0.1.0",
    settings={"model": "m", "params": {"seed": 1}, "body_columns": ["a"]},
    synthetic=False,
)
WHOLE = Recovery(cut_bytes=0, holes=0, hole_bytes=0)


def hash_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def outcome_of(number: int, kind: OutcomeKind = "ok", *, final: bool = True) -> Outcome:
    """An outcome unlike that of any other number."""
    return Outcome(
        hash=hash_of(number),
        occurrence=0,
        kind=kind,
        final=final,
        attempts=number + 1,
        in_doubt=0,
        http_status=200 if kind == "ok" else 400,
        code="" if kind == "ok" else "3051",
        message="" if kind == "ok" else f"row {number} — too long",
        request_id=f"req-{number}",
        model="m",
        latency_s=number / 8,
        ttft_s=None,
        finished_at_ms=1_795_000_000_000 + number,
        usage=Usage(number, 2, number + 2),
        body=b'{"n": %d}' % number,
    )


def settle(journal: Journal, number: int, kind: OutcomeKind = "ok", *, final: bool = True) -> int:
    """Send and settle the next row that asks this, as a run does."""
    slot = journal.claim(hash_of(number))
    journal.sending(hash_of(number), journal.occurrence(slot), slot)
    journal.flush()
    journal.settled(slot, outcome_of(number, kind, final=final))
    journal.flush()
    return slot


def held_numbers(journal: Journal, numbers: range) -> list[int]:
    """Which of these requests are answered; each answer must be the one that was written."""
    journal.begin_pass()
    answered = []
    for number in numbers:
        slot = journal.claim(hash_of(number))
        if journal.held(slot) is Held.OK:
            assert journal.read(slot) == outcome_of(number)
            answered.append(number)
    return answered


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "out.parquet.batchrun"


@contextlib.contextmanager
def opened(state: Path, *, segment_bytes: int = SEGMENT_BYTES) -> Iterator[Journal]:
    journal = Journal.open(StateDir(state), HEADER, segment_bytes=segment_bytes)
    try:
        yield journal
    finally:
        journal.close()


def first_segment(state: Path) -> Path:
    return state / "journal-000001.seg"


def segments(state: Path) -> list[Path]:
    return sorted(state.glob("*.seg"))


# ── keeping answers ──────────────────────────────────────────────────────────────────────────────


def test_an_outcome_comes_back_as_it_was_written(state: Path) -> None:
    every_field = Outcome(
        hash=hash_of(1),
        occurrence=0,
        kind="invalid_response",
        final=False,
        attempts=7,
        in_doubt=3,
        http_status=None,
        code="cut",
        message='a "quoted"\nline — ünïcode',
        request_id="req",
        model="m",
        latency_s=None,
        ttft_s=0.125,
        finished_at_ms=1,
        usage=Usage(1, None, 0, 2**62, 5),
        body=bytes(range(256)) * 40,
        rebuilt=True,
    )
    with opened(state) as journal:
        slot = journal.claim(every_field.hash)
        journal.settled(slot, every_field)
        journal.flush()
        assert journal.read(slot) == every_field
    with opened(state) as journal:
        assert journal.read(journal.claim(every_field.hash)) == every_field
        assert journal.header == HEADER
        assert journal.recovery == WHOLE


@pytest.mark.parametrize("body", [b"", b"x", bytes(3_000_000)], ids=["empty", "one", "3 MB"])
def test_a_body_of_any_length_comes_back(state: Path, body: bytes) -> None:
    with opened(state) as journal:
        journal.settled(journal.claim(hash_of(0)), replace(outcome_of(0), body=body))
        settle(journal, 1)
    with opened(state) as journal:
        assert journal.read(journal.claim(hash_of(0))).body == body
        assert held_numbers(journal, range(1, 2)) == [1]


def test_what_no_column_can_show_is_not_reported_rather_than_wrong(state: Path) -> None:
    hostile = replace(
        outcome_of(0),
        message="\ud800 alone",
        http_status=99_999,
        usage=Usage(2**70, -5, 7),
    )
    with opened(state) as journal:
        slot = journal.claim(hash_of(0))
        journal.settled(slot, hostile)
        journal.flush()
        found = journal.read(slot)
        assert found.message == "? alone"
        assert found.usage == Usage(None, None, 7)


def test_nothing_counts_before_it_is_written(state: Path) -> None:
    with opened(state) as journal:
        slot = journal.claim(hash_of(0))
        journal.settled(slot, outcome_of(0))
        assert journal.held(slot) is Held.NEW
        assert journal.count(Held.OK) == 0
        journal.flush()
        assert journal.held(slot) is Held.OK
        assert journal.answers == journal.count(Held.OK) == 1


def test_nothing_replaces_an_ok_answer(state: Path) -> None:
    with opened(state) as journal:
        slot = settle(journal, 0)
        journal.settled(slot, outcome_of(0, "rejected"))
        journal.reopen(slot)
        journal.flush()
        assert journal.read(slot) == outcome_of(0)
        twice = settle(journal, 1)
        journal.reopen(twice)
        # Both in one write: neither sees the other held.
        other = journal.claim(hash_of(2))
        journal.settled(other, outcome_of(2))
        journal.settled(other, outcome_of(2, "timeout", final=False))
        journal.flush()
        assert journal.held(other) is Held.OK
        assert journal.answers == journal.count(Held.OK) == 3
    with opened(state) as journal:
        assert journal.answers == journal.count(Held.OK) == 3
        assert held_numbers(journal, range(3)) == [0, 1, 2]


def test_equal_requests_get_ok_then_rejected_then_passing_then_new(state: Path) -> None:
    with opened(state) as journal:
        for outcome in (
            outcome_of(0, "timeout", final=False),
            outcome_of(0, "rejected"),
            outcome_of(0),
        ):
            journal.settled(journal.claim(hash_of(0)), outcome)
        journal.flush()
    with opened(state) as journal:
        slots = [journal.claim(hash_of(0)) for _ in range(4)]
        assert [journal.held(slot) for slot in slots] == [
            Held.OK,
            Held.REJECTED,
            Held.PASSING,
            Held.NEW,
        ]
        assert [journal.occurrence(slot) for slot in slots] == [2, 1, 0, 3]
        assert {journal.hash(slot) for slot in slots} == {hash_of(0)}
        assert journal.answers == 2


def test_a_reopened_failure_counts_as_never_settled_in_later_runs_too(state: Path) -> None:
    with opened(state) as journal:
        slot = settle(journal, 0, "rejected")
        journal.reopen(slot)
        journal.flush()
        assert journal.held(slot) is Held.NEW
        assert journal.answers == 0
    with opened(state) as journal:
        assert journal.held(journal.claim(hash_of(0))) is Held.NEW


def test_totals_are_the_same_after_reopening(state: Path) -> None:
    with opened(state, segment_bytes=2_000) as journal:
        for number in range(20):
            settle(journal, number)
        settle(journal, 20, "rejected")
        totals = [journal.count(held) for held in Held]
        assert totals == [0, 20, 1, 0]
    for _ in range(2):
        with opened(state, segment_bytes=2_000) as journal:
            assert [journal.count(held) for held in Held] == totals


# ── attempts in doubt ────────────────────────────────────────────────────────────────────────────


def test_a_sending_without_end_is_in_doubt_in_the_next_process(state: Path) -> None:
    for runs in range(3):
        with opened(state) as journal:
            slot = journal.claim(hash_of(0))
            assert journal.in_doubt(slot) == journal.attempts_in_doubt == runs
            journal.sending(hash_of(0), 0, slot)
            journal.flush()
            assert journal.in_doubt(slot) == runs


def test_an_attempt_that_ended_is_in_doubt_only_if_its_end_says_so(state: Path) -> None:
    with opened(state) as journal:
        slot = journal.claim(hash_of(0))
        for in_doubt in (False, True, False):
            journal.sending(hash_of(0), 0, slot)
            journal.failed(hash_of(0), 0, slot, in_doubt=in_doubt)
        journal.flush()
        assert journal.in_doubt(slot) == 1
    with opened(state) as journal:
        slot = journal.claim(hash_of(0))
        assert journal.in_doubt(slot) == 1
        journal.settled(slot, replace(outcome_of(0), in_doubt=2))
        journal.flush()
    with opened(state) as journal:
        assert journal.in_doubt(journal.claim(hash_of(0))) == 2


def test_what_attempts_without_an_outcome_used_is_known_until_there_is_one(state: Path) -> None:
    usage = Usage(10, 2, 12, None, 1)
    for runs in (1, 2, 3):
        with opened(state, segment_bytes=150) as journal:
            slots = [journal.claim(hash_of(number)) for number in range(2)]
            assert journal.used(slots) == ({} if runs == 1 else {slots[0]: times(usage, runs - 1)})
            journal.sending(hash_of(0), 0, slots[0])
            journal.failed(hash_of(0), 0, slots[0], in_doubt=False, usage=usage)
            journal.flush()
            assert journal.used(slots) == {slots[0]: times(usage, runs)}
            assert journal.in_doubt(slots[0]) == 0
    with opened(state) as journal:
        slots = [journal.claim(hash_of(number)) for number in range(2)]
        # An outcome has all of it; a failed one is replaced later, and gives it on.
        failed = replace(outcome_of(0, "timeout", final=False), usage=times(usage, 3))
        journal.settled(slots[0], failed)
        journal.settled(slots[1], replace(outcome_of(1), usage=usage))
        journal.flush()
        assert journal.used(slots) == {slots[0]: times(usage, 3)}
    with opened(state) as journal:
        assert journal.used(slots) == {slots[0]: times(usage, 3)}
        journal.settled(slots[0], outcome_of(0))
        journal.flush()
        assert journal.used(slots) == {}


def times(usage: Usage, number: int) -> Usage:
    return sum([usage] * number, start=NO_USAGE)


def test_tokens_no_column_can_hold_are_not_reported(state: Path) -> None:
    with opened(state) as journal:
        slot = journal.claim(hash_of(0))
        for usage in (Usage(1 << 63, 1), Usage(-5, 1), Usage(3, 4)):
            journal.failed(hash_of(0), 0, slot, in_doubt=False, usage=usage)
        journal.flush()
        assert journal.used([slot]) == {slot: Usage(3, 4)}


def test_a_reopened_row_keeps_the_attempts_that_may_have_been_billed(state: Path) -> None:
    with opened(state) as journal:
        slot = journal.claim(hash_of(0))
        journal.settled(slot, replace(outcome_of(0, "timeout"), in_doubt=3))
        journal.reopen(slot)
        journal.flush()
    with opened(state) as journal:
        assert journal.in_doubt(journal.claim(hash_of(0))) == 3


def test_doubt_is_the_same_at_every_opening_and_across_segments(state: Path) -> None:
    with opened(state, segment_bytes=400) as journal:
        for number in range(12):
            slot = journal.claim(hash_of(number))
            for again in range(number % 4):
                journal.sending(hash_of(number), 0, slot)
                journal.flush()
                if again == 1:
                    journal.failed(hash_of(number), 0, slot, in_doubt=number % 2 == 0)
                    journal.flush()
    found = []
    for _ in range(3):
        with opened(state, segment_bytes=400) as journal:
            slots = [journal.claim(hash_of(number)) for number in range(12)]
            found.append([journal.in_doubt(slot) for slot in slots])
    assert len(segments(state)) > 2
    # The third of each four: the second sending put the first in doubt, and its end says so too.
    # The fourth: its second ended without doubt, its third never ended.
    assert found == [[0, 1, 2, 2] * 3] * 3


# ── cuts, flips and holes ────────────────────────────────────────────────────────────────────────

ROWS = range(8)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("written") / "state")


class Written:
    """A journal's bytes, and where its records end: rows 0–3 durable, 4–7 only written."""

    def __init__(self, state: Path) -> None:
        self.ends: list[int] = []
        with opened(state) as journal:
            self.start = first_segment(state).stat().st_size
            for number in ROWS:
                if number == 4:
                    journal.sync()
                    self.durable = self.ends[-1]
                settle(journal, number)
                self.ends.append(first_segment(state).stat().st_size)
        self.bytes = first_segment(state).read_bytes()

    def answered_before(self, offset: int) -> list[int]:
        return [number for number in ROWS if self.ends[number] <= offset]


def lay(state: Path, data: bytes) -> None:
    state.mkdir(exist_ok=True)
    first_segment(state).write_bytes(data)


@pytest.mark.slow
def test_a_cut_at_any_byte_keeps_every_record_before_it(state: Path, written: Written) -> None:
    for offset in range(written.start, len(written.bytes)):
        lay(state, written.bytes[:offset])
        with opened(state) as journal:
            assert held_numbers(journal, ROWS) == written.answered_before(offset)
            kept = offset - journal.recovery.cut_bytes
            assert journal.recovery == Recovery(offset - kept, 0, 0)
            assert kept == first_segment(state).stat().st_size
            settle(journal, 99)
        with opened(state) as journal:
            assert journal.recovery == WHOLE
            assert held_numbers(journal, range(99, 100)) == [99]


def test_a_cut_in_the_header_is_damage(state: Path, written: Written) -> None:
    for offset in range(written.start):
        lay(state, written.bytes[:offset])
        with pytest.raises(JournalDamaged) as caught:
            Journal.open(StateDir(state), HEADER)
        assert caught.value.offset == 0


def flipped(data: bytes, offset: int) -> bytes:
    return b"%b%c%b" % (data[:offset], data[offset] ^ 1 << offset % 8, data[offset + 1 :])


def test_a_flipped_bit_anywhere_is_found(state: Path, written: Written) -> None:
    """Before the last SYNC it is damage; after it one record is lost, and counted."""
    for offset in range(len(written.bytes)):
        lay(state, flipped(written.bytes, offset))
        if offset < written.durable:
            with pytest.raises(JournalDamaged) as caught:
                Journal.open(StateDir(state), HEADER)
            assert caught.value.offset <= offset
            with pytest.raises(JournalDamaged):
                Journal.peek(StateDir(state))
            continue
        with opened(state) as journal:
            lost = set(ROWS) - set(held_numbers(journal, ROWS))
            assert len(lost) <= 1
            assert lost <= {4, 5, 6, 7}
            assert journal.recovery != WHOLE
        with opened(state) as journal:
            assert journal.recovery == WHOLE


def test_a_bit_flipped_while_running_is_found_when_read(state: Path, written: Written) -> None:
    lay(state, written.bytes)
    with opened(state) as journal:
        slots = [journal.claim(hash_of(number)) for number in ROWS]
        for offset in range(written.start, len(written.bytes)):
            lay(state, flipped(written.bytes, offset))
            damaged = 0
            for number, slot in zip(ROWS, slots, strict=True):
                try:
                    found = journal.read(slot)
                except JournalDamaged:
                    damaged += 1
                else:
                    assert found == outcome_of(number)
            assert damaged <= 1


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_zeros_in_the_unsynced_window_lose_what_they_cover(
    tmp_path_factory: pytest.TempPathFactory, written: Written, data: st.DataObject
) -> None:
    size = len(written.bytes)
    start = data.draw(st.integers(written.ends[3], size - 1))
    end = data.draw(st.integers(start + 1, size))
    holed = written.bytes[:start] + bytes(end - start) + written.bytes[end:]
    state = tmp_path_factory.mktemp("holes") / "state"
    lay(state, holed)
    # A record's frames run from the end of the one before (its SENT and itself).
    untouched = [
        number
        for number in ROWS
        if written.ends[number] <= start or (number and written.ends[number - 1] >= end)
    ]
    with opened(state) as journal:
        assert set(untouched) <= set(held_numbers(journal, ROWS))
        found = journal.recovery
        # Zeros over zeros harm nothing.
        harmed = len(written.bytes[start:end].strip(b"\0"))
        assert found.cut_bytes + found.hole_bytes >= harmed or found == WHOLE
        settle(journal, 99)
        journal.sync()
    with opened(state) as journal:
        assert journal.recovery == WHOLE
        assert set(untouched) <= set(held_numbers(journal, ROWS))


def test_a_hole_between_whole_records_is_counted_once(state: Path, written: Written) -> None:
    start, end = written.ends[4], written.ends[5]
    lay(state, written.bytes[:start] + bytes(end - start) + written.bytes[end:])
    with opened(state) as journal:
        assert journal.recovery == Recovery(0, holes=1, hole_bytes=end - start)
        assert held_numbers(journal, ROWS) == [0, 1, 2, 3, 4, 6, 7]
        journal.sync()
    with opened(state) as journal:
        assert journal.recovery == WHOLE


def test_damage_before_a_sync_names_the_byte_and_what_to_do(state: Path, written: Written) -> None:
    lay(state, flipped(written.bytes, written.ends[1] + 30))
    with pytest.raises(JournalDamaged) as caught:
        Journal.open(StateDir(state), HEADER)
    assert caught.value.offset == written.ends[1]
    assert str(first_segment(state)) in str(caught.value)
    assert caught.value.next_steps
    assert caught.value.exit_code == 74


def test_a_reply_that_holds_a_whole_frame_is_not_believed(state: Path, tmp_path: Path) -> None:
    """Even when a hole swallows the head of the record that carries it."""
    with opened(tmp_path / "other", segment_bytes=10_000) as other:
        other.header = replace(HEADER, run_id="another run")
        other._salt = salt_of("another run", 1)
        settle(other, 1)
    forged = first_segment(tmp_path / "other").read_bytes()
    with opened(state) as journal:
        start = first_segment(state).stat().st_size
        slot = journal.claim(hash_of(0))
        journal.settled(slot, replace(outcome_of(0), body=forged))
        journal.flush()
        settle(journal, 2)
    data = bytearray(first_segment(state).read_bytes())
    data[start : start + 20] = bytes(20)
    lay(state, bytes(data))
    with opened(state) as journal:
        assert held_numbers(journal, range(3)) == [2]
        assert journal.recovery.holes == 1


# ── segments ─────────────────────────────────────────────────────────────────────────────────────

MANY = range(60)


def fill(state: Path) -> None:
    with opened(state, segment_bytes=2_000) as journal:
        for number in MANY:
            settle(journal, number)
        journal.sync()


def test_segments_are_of_their_size_and_all_are_read(state: Path) -> None:
    fill(state)
    assert len(segments(state)) > 5
    assert all(2_000 <= path.stat().st_size < 2_500 for path in segments(state)[:-1])
    with opened(state, segment_bytes=2_000) as journal:
        assert held_numbers(journal, MANY) == list(MANY)
        assert journal.recovery == WHOLE


def test_a_missing_or_shortened_sealed_segment_is_damage(state: Path) -> None:
    fill(state)
    second = segments(state)[1]
    data = second.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 0):
        second.write_bytes(data[:length])
        with pytest.raises(JournalDamaged, match=second.name):
            Journal.open(StateDir(state), HEADER)
    second.unlink()
    with pytest.raises(JournalDamaged, match=second.name):
        Journal.open(StateDir(state), HEADER)


def test_a_segment_lost_to_a_power_failure_before_any_sync_is_a_hole(state: Path) -> None:
    with opened(state, segment_bytes=2_000) as journal:
        for number in MANY:
            settle(journal, number)
    second = segments(state)[1]
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    with opened(state, segment_bytes=2_000) as journal:
        assert journal.recovery.holes == 1
        kept = held_numbers(journal, MANY)
        assert 0 < len(MANY) - len(kept) < 10
        journal.sync()
    with opened(state, segment_bytes=2_000) as journal:
        assert journal.recovery == WHOLE
        assert held_numbers(journal, MANY) == kept


# ── the kept table ───────────────────────────────────────────────────────────────────────────────


def known(state: Path) -> list[object]:
    """All that a journal says of the requests 0 to 29 and of itself."""
    journal = Journal.peek(StateDir(state))
    assert journal is not None
    slots = [journal.claim(hash_of(number)) for number in range(30)]
    outcomes = journal.read_all(slots)
    of_slots = [(journal.held(s), journal.in_doubt(s), journal.occurrence(s)) for s in slots]
    totals = [journal.count(held) for held in Held]
    used = journal.used(slots)
    return [of_slots, outcomes, totals, journal.imported, journal.attempts_in_doubt, used]


def live(journal: Journal, first: int) -> None:
    """A stretch of a run: answers, failures, one taken back, a repeat, one cut off in flight."""
    for number in range(first, first + 5):
        settle(journal, number)
    settle(journal, first)
    journal.begin_pass()
    failed = settle(journal, first + 5, "timeout", final=False)
    again = settle(journal, first + 6, "rejected")
    journal.failed(hash_of(first + 5), 0, failed, in_doubt=True)
    journal.failed(hash_of(first + 5), 0, failed, in_doubt=False, usage=Usage(7, 8))
    journal.reopen(again)
    journal.sending(hash_of(first + 7), 0, journal.claim(hash_of(first + 7)))
    journal.note_imported(f"run-before-{first}")
    journal.sync()


@pytest.mark.parametrize("segment_bytes", [900, 1_500, 2_100, SEGMENT_BYTES])
@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed later"])
def test_a_kept_table_says_what_the_segments_say(
    state: Path, monkeypatch: pytest.MonkeyPatch, segment_bytes: int, killed: bool
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    with opened(state, segment_bytes=segment_bytes) as journal:
        live(journal, 0)
    with opened(state, segment_bytes=segment_bytes) as journal:
        live(journal, 10)
        if killed:
            journal.close(remember=False)
    # What this one leaves beside the segments must hold without the table, too.
    with opened(state, segment_bytes=segment_bytes) as journal:
        journal.close(remember=False)
    with_table = known(state)
    (state / "journal-table").unlink()
    assert with_table == known(state)


def test_a_kept_table_spares_reading_the_records(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    with opened(state) as journal:
        live(journal, 0)
    before = known(state)
    monkeypatch.setattr(Segment, "replay", lambda self, table: None)
    assert known(state) == before


def test_what_was_replayed_at_length_is_kept_at_once(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(state)
    right = known(state)
    assert not (state / "journal-table").exists()
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    monkeypatch.setattr(kept_table_room, "_END_BYTES", 8)
    with opened(state) as journal:
        # A kill: nothing is done on leaving.
        journal.close(remember=False)
    middle = segments(state)[2]
    whole = middle.read_bytes()
    # With the records unreadable, what is known can only come from the table.
    middle.write_bytes(bytes(len(whole) - 8) + whole[-8:])
    with opened(state) as journal:
        assert journal.count(Held.OK) == len(MANY)
        with pytest.raises(JournalDamaged):
            held_numbers(journal, MANY)
    middle.write_bytes(whole)
    assert known(state) == right


def test_a_table_is_not_written_again_for_a_few_more_records(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    fill(state)
    table = (state / "journal-table").read_bytes()
    with opened(state) as journal:
        settle(journal, 60)
        journal.close(remember=False)
    with opened(state) as journal:
        journal.close(remember=False)
    assert (state / "journal-table").read_bytes() == table


def test_index_files_of_earlier_versions_are_left_alone_and_go_with_the_segments(
    state: Path,
) -> None:
    fill(state)
    index = state / "journal-000002.idx"
    index.write_bytes(b"whatever")
    with opened(state) as journal:
        assert held_numbers(journal, MANY) == list(MANY)
        assert index.read_bytes() == b"whatever"
        journal.reset(HEADER)
    assert not index.exists()


def test_a_kept_table_harmed_anywhere_changes_nothing(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    with opened(state, segment_bytes=2_000) as journal:
        live(journal, 0)
        live(journal, 10)
    path = state / "journal-table"
    whole = path.read_bytes()
    path.unlink()
    right = known(state)
    # Of 17 slots no column is as long as these steps, except for the one-byte ones.
    harmed = [whole[:at] for at in range(0, len(whole), 5)]
    harmed += [flipped(whole, at) for at in range(0, len(whole), 3)]
    for data in (*harmed, whole + b"\0", b""):
        path.write_bytes(data)
        assert known(state) == right
    path.write_bytes(whole)
    assert known(state) == right


@pytest.mark.parametrize(
    "lie",
    [
        {"slots": -1},
        {"slots": 0},
        {"slots": 1 << 31},
        {"slots": 1 << 62},
        {"sizes": []},
        {"sizes": [0]},
        {"sizes": [-1]},
        {"sizes": [1, 2, 3]},
        {"sizes": [1 << 80]},
        {"on_their_way": [-1]},
        {"on_their_way": [10**9]},
        {"on_their_way": "all"},
        {"run_id": "run-2"},
        {"crc": 0},
        {"ends": 0},
        {"ends": None},
    ],
    ids=str,
)
def test_a_kept_table_that_says_what_cannot_be_is_not_believed(
    state: Path, monkeypatch: pytest.MonkeyPatch, lie: dict[str, object]
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    with opened(state) as journal:
        live(journal, 0)
    right = known(state)
    path = state / "journal-table"
    data = path.read_bytes()
    prefix = struct.Struct("<4sII")
    magic, length, _ = prefix.unpack_from(data)
    head = json.loads(data[prefix.size : prefix.size + length])
    assert lie.keys() <= head.keys()
    said = json.dumps({**head, **lie}).encode()
    start = prefix.pack(magic, len(said), zlib.crc32(said))
    path.write_bytes(start + said + data[prefix.size + length :])
    assert known(state) == right


def test_a_kept_table_makes_nobody_read_more_than_there_is(state: Path) -> None:
    fill(state)
    (state / "journal-table").write_bytes(struct.pack("<4sII", _TABLE_MAGIC, 1 << 30, 0))
    tracemalloc.start()
    try:
        known(state)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def regrown(state: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Leave a journal that lost its end and grew past it in another order; the table from before.

    As when a backup of a segment is restored, as the message about damage advises.
    """
    with opened(state) as journal:
        for number in range(5):
            settle(journal, number)
        journal.sync()
    segment = first_segment(state)
    backup = segment.read_bytes()
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    with opened(state) as journal:
        for number in range(5, 20):
            settle(journal, number)
        journal.sync()
    table = (state / "journal-table").read_bytes()
    segment.write_bytes(backup)
    monkeypatch.undo()
    with opened(state) as journal:
        for number in range(25, 2, -1):
            settle(journal, number)
        journal.sync()
        journal.close(remember=False)
    return table


def test_a_table_that_was_not_believed_is_gone_before_anything_is_written(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regrown(state, monkeypatch)
    assert not (state / "journal-table").exists()
    with opened(state) as journal:
        assert held_numbers(journal, range(30)) == list(range(26))


def test_a_table_of_other_records_in_the_same_place_is_not_believed(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (state / "journal-table").write_bytes(regrown(state, monkeypatch))
    with opened(state) as journal:
        assert held_numbers(journal, range(30)) == list(range(26))


def test_the_outcome_of_another_request_is_never_given_out(state: Path) -> None:
    with opened(state) as journal:
        first, second, third = (settle(journal, number) for number in (0, 1, 0))
        assert journal.occurrence(third) == 1
        places = journal._table._position
        for other in (second, third):
            places[first], places[other] = places[other], places[first]
            offset = places[first] & LAST_OFFSET
            with pytest.raises(JournalDamaged) as caught:
                journal.read_all([first, second, third])
            assert caught.value.offset == offset
            for slot in (first, other):
                with pytest.raises(JournalDamaged) as caught:
                    journal.read(slot)
                assert caught.value.offset == places[slot] & LAST_OFFSET
                assert str(first_segment(state)) in str(caught.value)
                assert "journal-table" in caught.value.next_steps[0]
            places[first], places[other] = places[other], places[first]
        assert journal.read_all([second, first]) == [outcome_of(1), outcome_of(0)]


def test_what_a_killed_or_failed_writer_of_a_table_left_is_taken_away(state: Path) -> None:
    fill(state)
    (state / "journal-table").mkdir()
    left = state / "journal-table.new"
    left.write_bytes(b"half of it")
    with opened(state) as journal:
        assert not left.exists()
        assert held_numbers(journal, MANY) == list(MANY)
    left.mkdir()
    with opened(state) as journal:
        assert held_numbers(journal, MANY) == list(MANY)


def test_a_table_is_not_kept_where_answers_may_need_the_space(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    monkeypatch.setattr(kept_table_room, "_LEAST_FREE", 1 << 60)
    fill(state)
    assert {path.suffix for path in state.iterdir()} == {".seg"}


NO_ROOM_FOR_A_TABLE = """
import resource, sys
from pathlib import Path
from batchrun.journal import StateDir
from batchrun.journal import journal as room
from test_journal import HEADER, MANY, held_numbers, opened, settle
state = Path(sys.argv[1])
with opened(state, segment_bytes=500) as journal:
    for number in MANY:
        settle(journal, number)
room._FEWEST_KEPT = 1
# Segments are shorter, the table is longer.
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500, resource.RLIM_INFINITY))
journal = room.Journal.open(StateDir(state), HEADER, segment_bytes=500)
assert held_numbers(journal, MANY) == list(MANY)
settle(journal, 60)
journal.sync()
journal.close()
"""


def test_a_table_that_cannot_be_written_leaves_nothing_behind(state: Path) -> None:
    """RLIMIT_FSIZE makes the write fail half-way, as a full disk does."""
    result = run_python(NO_ROOM_FOR_A_TABLE, state)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.suffix for path in state.iterdir()} == {".seg"}


def test_replaying_a_long_outcome_holds_it_in_memory_once(state: Path) -> None:
    size = 8 << 20
    with opened(state) as journal:
        journal.settled(journal.claim(hash_of(0)), replace(outcome_of(0), body=bytes(size)))
        settle(journal, 1)
    tracemalloc.start()
    try:
        with opened(state) as journal:
            assert tracemalloc.get_traced_memory()[1] < size * 1.5
            tracemalloc.reset_peak()
            body = journal.read(journal.claim(hash_of(0))).body
            # The record and the body that is cut from it.
            assert tracemalloc.get_traced_memory()[1] < size * 2.5
            assert len(body) == size
            assert held_numbers(journal, range(1, 2)) == [1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("harm", ["flip", "cut", "another run's", "segment cut"])
def test_a_kept_table_that_is_not_whole_is_not_believed(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    with opened(state) as journal:
        live(journal, 0)
    right = known(state)
    table = state / "journal-table"
    data = bytearray(table.read_bytes())
    if harm == "flip":
        data[-3] ^= 1
    elif harm == "cut":
        del data[-3:]
    elif harm == "another run's":
        other = Journal.open(StateDir(tmp_path / "other"), replace(HEADER, run_id="run-2"))
        live(other, 20)
        other.close()
        data[:] = (tmp_path / "other" / "journal-table").read_bytes()
    else:
        segment = first_segment(state)
        segment.write_bytes(segment.read_bytes()[:-200])
    table.write_bytes(data)
    found = known(state)
    assert (found == right) is (harm != "segment cut")
    table.unlink()
    assert found == known(state)


def test_a_kept_table_covers_only_what_was_made_durable(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    with opened(state) as journal:
        live(journal, 0)
    segment = first_segment(state)
    # The record that says so is not itself durable: a power failure may take it.
    segment.write_bytes(segment.read_bytes()[:-21] + bytes(21))
    with opened(state) as journal:
        assert journal.recovery == Recovery(cut_bytes=21, holes=0, hole_bytes=0)


def test_what_is_not_durable_and_what_is_deleted_leave_no_table(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_room, "_FEWEST_KEPT", 1)
    with opened(state) as journal:
        settle(journal, 0)
    assert not (state / "journal-table").exists()
    deleted = tmp_path / "deleted"
    with opened(deleted) as journal:
        live(journal, 0)
        first_segment(deleted).unlink()
    assert not (deleted / "journal-table").exists()


# ── syncing ──────────────────────────────────────────────────────────────────────────────────────


def test_there_is_nothing_to_sync_twice(state: Path) -> None:
    with opened(state) as journal:
        assert journal.begin_sync() is None
        settle(journal, 0)
        make_durable = journal.begin_sync()
        assert make_durable is not None
        thread = threading.Thread(target=make_durable)
        thread.start()
        thread.join()
        journal.end_sync()
        journal.flush()
        assert journal.begin_sync() is None


def test_a_sync_begun_before_segments_change_is_safe(state: Path) -> None:
    with opened(state, segment_bytes=1_000) as journal:
        for number in range(6):
            settle(journal, number)
        make_durable = journal.begin_sync()
        assert make_durable is not None
        for number in range(6, 20):
            settle(journal, number)
        make_durable()
        journal.end_sync()
        journal.sync()
    with opened(state) as journal:
        assert held_numbers(journal, range(20)) == list(range(20))


def test_a_sync_that_was_begun_and_never_run_does_not_stop_the_last_one(state: Path) -> None:
    with opened(state) as journal:
        settle(journal, 0)
        assert journal.begin_sync() is not None
        settle(journal, 1)
        journal.sync()
        assert journal.begin_sync() is None
    damaged = flipped(first_segment(state).read_bytes(), first_segment(state).stat().st_size - 60)
    lay(state, damaged)
    with pytest.raises(JournalDamaged):
        Journal.open(StateDir(state), HEADER)


def test_what_a_killed_process_left_is_made_durable_by_the_next(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(state, segment_bytes=1_000) as journal:
        for number in range(20):
            settle(journal, number)
    names = {path.stat().st_ino: path.name for path in segments(state)}
    assert len(names) > 2
    synced = set()
    make_durable = files.make_durable

    def watched(fd: int) -> None:
        synced.add(names.get(os.fstat(fd).st_ino))
        make_durable(fd)

    for room in (journal_room, group_sync_room):
        monkeypatch.setattr(room, "make_durable", watched)
    with opened(state) as journal:
        journal.sync()
        assert set(names.values()) <= synced
    with opened(state) as journal:
        assert journal.begin_sync() is None


def test_a_failed_fsync_is_final(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken_disk(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(state) as journal:
        slot = settle(journal, 0)
        monkeypatch.setattr(group_sync_room, "make_durable", broken_disk)
        with pytest.raises(LocalIOError, match="fsync"):
            journal.sync()
        for again in (journal.sync, lambda: settle(journal, 1), journal.end_sync):
            with pytest.raises(LocalIOError, match="fsync"):
                again()
        assert len(calls) == 1
        assert journal.read(slot) == outcome_of(0)


# ── disks ────────────────────────────────────────────────────────────────────────────────────────


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/journal'}"},
    )


FULL_DISK = """
import resource, sys
from pathlib import Path
from batchrun.errors import LocalIOError
from batchrun.journal import Held, Journal, StateDir
from test_journal import HEADER, hash_of, outcome_of
state = Path(sys.argv[1])
journal = Journal.open(StateDir(state), HEADER)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
written = 0
try:
    for number in range(100):
        slot = journal.claim(hash_of(number))
        journal.settled(slot, outcome_of(number))
        journal.flush()
        written += 1
except LocalIOError as error:
    assert error.exit_code == 74 and str(state) in str(error), error
    assert journal.held(slot) is Held.NEW
    assert journal.count(Held.OK) == written
    try:
        journal.settled(slot, outcome_of(0))
        raise SystemExit("took more after a failed write")
    except LocalIOError:
        pass
    journal.close()
    print(written)
"""


def test_a_full_disk_ends_the_run_and_loses_no_answer(state: Path) -> None:
    """RLIMIT_FSIZE makes the write fail half-way, as a full disk does."""
    result = run_python(FULL_DISK, state)
    assert (result.returncode, result.stderr) == (0, "")
    written = int(result.stdout)
    assert first_segment(state).stat().st_size == 5_000
    with opened(state) as journal:
        assert held_numbers(journal, range(100)) == list(range(written))
        assert journal.recovery.cut_bytes > 0
        journal.begin_pass()
        settle(journal, written)
    with opened(state) as journal:
        assert held_numbers(journal, range(100)) == list(range(written + 1))


def test_a_full_disk_is_called_so(tmp_path: Path) -> None:
    error = files.io_error(tmp_path / "x", "write", OSError(errno.ENOSPC, "No space left"))
    assert str(error) == f"{tmp_path / 'x'}: cannot write: disk full"
    assert "free some space" in error.next_steps[0]


def test_a_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(LocalIOError, match="No such file or directory"):
        Journal.open(StateDir(tmp_path / "absent" / "state"), HEADER)
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalIOError):
        Journal.open(StateDir(tmp_path / "file"), HEADER)
    with pytest.raises(LocalIOError), locked(StateDir(tmp_path / "file")):
        pass


def test_state_is_private_whatever_the_umask(state: Path) -> None:
    before = os.umask(0)
    try:
        with locked(StateDir(state)):
            fill(state)
            with opened(state):
                pass
    finally:
        os.umask(before)
    assert state.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in state.iterdir()} == {0o600}


def test_a_symbolic_link_is_not_written_through(state: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    state.mkdir()
    (state / "journal-000001.new").symlink_to(precious)
    with pytest.raises(LocalIOError):
        Journal.open(StateDir(state), HEADER)
    assert precious.read_text() == "keep me"


def test_a_newer_format_is_refused_with_advice(state: Path) -> None:
    state.mkdir()
    create_first_segment(StateDir(state), replace(HEADER, format=2))
    with pytest.raises(LocalIOError, match="format 2") as caught:
        Journal.open(StateDir(state), HEADER)
    assert not isinstance(caught.value, JournalDamaged)
    assert caught.value.next_steps


def test_a_journal_of_other_hashes_is_refused_and_left_as_it_is(state: Path) -> None:
    with opened(state) as journal:
        live(journal, 0)
    before = (state / "journal-000001.seg").read_bytes()
    with pytest.raises(LocalIOError, match="hashed as of version 1") as caught:
        Journal.open(StateDir(state), replace(HEADER, hash_version=2))
    assert "use the version of batchrun" in caught.value.next_steps[0]
    assert (state / "journal-000001.seg").read_bytes() == before


# ── beginning anew ───────────────────────────────────────────────────────────────────────────────


def test_reset_begins_with_the_new_header_and_nothing_held(state: Path) -> None:
    fill(state)
    other = replace(HEADER, run_id="run-2", settings={"model": "other"})
    with opened(state) as journal:
        journal.reset(other)
        assert journal.header == other
        assert journal.count(Held.OK) == 0
        settle(journal, 3)
    with opened(state) as journal:
        assert journal.header == other
        assert held_numbers(journal, MANY) == [3]
    assert len(segments(state)) == 1
    assert not (state / "journal-table").exists()


def test_imported_runs_are_remembered(state: Path) -> None:
    for segment_bytes in (1_000_000, 200, 200):
        with opened(state, segment_bytes=segment_bytes) as journal:
            journal.note_imported("run-0")
            journal.flush()
            settle(journal, 1)
            settle(journal, 2)
    with opened(state) as journal:
        assert journal.imported == {"run-0"}
        assert len(segments(state)) > 1


# ── readers ──────────────────────────────────────────────────────────────────────────────────────


def test_peek_finds_nothing_where_there_is_nothing(state: Path) -> None:
    assert Journal.peek(StateDir(state)) is None
    state.mkdir()
    assert Journal.peek(StateDir(state)) is None


def test_peek_repairs_nothing_and_takes_no_records(state: Path, written: Written) -> None:
    torn = written.bytes[:-3]
    lay(state, torn)
    journal = Journal.peek(StateDir(state))
    assert journal is not None
    assert held_numbers(journal, ROWS) == list(ROWS[:-1])
    assert first_segment(state).read_bytes() == torn
    with pytest.raises(LocalIOError, match="not open to write"):
        journal.settled(journal.claim(hash_of(7)), outcome_of(7))
    with pytest.raises(LocalIOError):
        journal.reset(HEADER)
    journal.close()


WRITER = """
import sys
from pathlib import Path
from batchrun.journal import Journal, StateDir
from test_journal import HEADER, settle
journal = Journal.open(StateDir(Path(sys.argv[1])), HEADER, segment_bytes=20_000)
for number in range(600):
    settle(journal, number)
    if number == 0:
        print("begun", flush=True)
journal.sync()
"""


def test_peek_beside_a_running_writer_sees_whole_answers_only(state: Path, spawn: Spawn) -> None:
    with spawn(WRITER, state) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        seen = 0
        while seen < 600:
            ended = writer.poll() is not None
            journal = Journal.peek(StateDir(state))
            assert journal is not None
            answered = held_numbers(journal, range(600))
            journal.close()
            assert answered == list(range(len(answered)))
            assert len(answered) >= seen
            seen = len(answered)
            assert not ended or seen == 600
        assert writer.wait(30) == 0
