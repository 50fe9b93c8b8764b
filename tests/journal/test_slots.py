"""The compact table: the order of claims, and that it is a dict for all one can tell."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from batchrun.journal.slots import MAX_IN_DOUBT, Held, SlotTable

OK, REJECTED, PASSING, NEW = Held.OK, Held.REJECTED, Held.PASSING, Held.NEW


def hash_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def table_with(*held: Held) -> SlotTable:
    """A table with equal requests, the n-th of which holds the n-th argument."""
    table = SlotTable()
    for occurrence, state in enumerate(held):
        slot = table.find(hash_of(0), occurrence)
        if state is not NEW:
            table.settled(slot, state, 100 + occurrence, 0)
    return table


@pytest.mark.parametrize(
    ("held", "claimed"),
    [
        pytest.param([], [0, 1, 2], id="nothing held: one after the other"),
        pytest.param([OK, OK], [0, 1, 2], id="ok by occurrence, then new"),
        pytest.param([PASSING, REJECTED, OK], [2, 1, 0, 3], id="ok, rejected, passing, new"),
        pytest.param([NEW, OK], [1, 0, 2], id="never settled comes after held"),
        pytest.param([PASSING, NEW, PASSING], [0, 2, 1, 3], id="passing before never settled"),
        pytest.param([REJECTED, OK, REJECTED, OK], [1, 3, 0, 2, 4], id="mixed"),
    ],
)
def test_equal_requests_claim_the_best_held_answers_first(
    held: list[Held], claimed: list[int]
) -> None:
    table = table_with(*held)
    for _ in range(2):
        table.begin_pass()
        slots = [table.claim(hash_of(0)) for _ in claimed]
        assert [table.occurrence(slot) for slot in slots] == claimed


def test_a_slot_reopened_after_its_claim_is_not_claimed_again() -> None:
    table = table_with(REJECTED)
    table.begin_pass()
    first = table.claim(hash_of(0))
    table.reopened(first)
    assert table.claim(hash_of(0)) != first


def test_an_occurrence_held_without_the_ones_before_it_is_claimed_first() -> None:
    table = SlotTable()
    table.settled(table.find(hash_of(0), 3), OK, 7, 0)
    assert table.occurrence(table.claim(hash_of(0))) == 3
    assert [table.occurrence(table.claim(hash_of(0))) for _ in range(4)] == [0, 1, 2, 4]


def test_a_million_equal_rows_are_claimed_without_walking_a_chain() -> None:
    table = SlotTable()
    assert [table.claim(hash_of(0)) for _ in range(50_000)] == list(range(50_000))
    assert table.occurrence(49_999) == 49_999
    assert table.hash(49_999) == hash_of(0)


def test_nothing_replaces_ok() -> None:
    table = table_with(OK)
    slot = table.find(hash_of(0), 0)
    for held in (OK, REJECTED, PASSING):
        assert not table.settled(slot, held, 999, 0)
    table.reopened(slot)
    assert (table.held(slot), table.position(slot)) == (OK, 100)


def test_a_sending_without_end_is_in_doubt_once_its_process_is_gone() -> None:
    table = SlotTable()
    slot = table.find(hash_of(0), 0)
    table.sent(slot)
    assert table.in_doubt(slot) == 0
    table.sent(slot)
    assert table.in_doubt(slot) == 1
    table.process_ended()
    table.process_ended()
    assert table.in_doubt(slot) == 2


def test_attempts_in_doubt_are_never_counted_down_and_saturate() -> None:
    table = SlotTable()
    slot = table.find(hash_of(0), 0)
    table.settled(slot, PASSING, 1, 3)
    table.settled(slot, PASSING, 1, 0)
    assert table.in_doubt(slot) == 3
    for _ in range(300):
        table.failed(slot, in_doubt=True)
    assert table.in_doubt(slot) == table.total_in_doubt() == MAX_IN_DOUBT


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 40))
@settings(max_examples=50)
def test_forgetting_passes_loses_nothing(numbers: list[int], again: int) -> None:
    table = SlotTable()
    slots = [table.claim(hash_of(number)) for number in numbers]
    known = [(table.hash(slot), table.occurrence(slot)) for slot in slots]
    table.forget_passes()
    assert [(table.hash(slot), table.occurrence(slot)) for slot in slots] == known
    table.begin_pass()
    assert [table.claim(hash_of(number)) for number in numbers[:again]] == slots[:again]


class DictModel(RuleBasedStateMachine):
    """The table beside a plain dict that does the same the slow way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable()
        self.held: dict[tuple[int, int], Held] = {}
        self.positions: dict[tuple[int, int], int] = {}
        self.claimed: dict[int, set[int]] = defaultdict(set)
        self.slots: dict[int, tuple[int, int]] = {}

    def occurrences(self, number: int) -> int:
        return sum(1 for key in self.held if key[0] == number)

    def remember(self, number: int, occurrence: int, slot: int) -> None:
        for missing in range(self.occurrences(number), occurrence + 1):
            self.held[number, missing] = NEW
        assert self.slots.setdefault(slot, (number, occurrence)) == (number, occurrence)

    @rule(number=st.integers(0, 6))
    def claim(self, number: int) -> None:
        free = [o for o in range(self.occurrences(number)) if o not in self.claimed[number]]
        order = {OK: 0, REJECTED: 1, PASSING: 2, NEW: 3}
        best = min(free, key=lambda o: (order[self.held[number, o]], o), default=None)
        slot = self.table.claim(hash_of(number))
        occurrence = self.table.occurrence(slot)
        assert occurrence == (self.occurrences(number) if best is None else best)
        self.claimed[number].add(occurrence)
        self.remember(number, occurrence, slot)

    @rule(number=st.integers(0, 6), occurrence=st.integers(0, 12))
    def find(self, number: int, occurrence: int) -> None:
        self.remember(number, occurrence, self.table.find(hash_of(number), occurrence))

    @rule(
        data=st.data(), held=st.sampled_from([OK, REJECTED, PASSING]), position=st.integers(0, 99)
    )
    def settle(self, data: st.DataObject, held: Held, position: int) -> None:
        # Only rows claimed in this pass settle: the others nobody knows of yet.
        known = [(slot, key) for slot, key in self.slots.items() if key[1] in self.claimed[key[0]]]
        if not known:
            return
        slot, key = data.draw(st.sampled_from(known))
        kept = self.table.settled(slot, held, position, 0)
        assert kept == (self.held[key] is not OK)
        if kept:
            self.held[key], self.positions[key] = held, position

    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        known = [(slot, key) for slot, key in self.slots.items() if key[1] in self.claimed[key[0]]]
        if known:
            slot, key = data.draw(st.sampled_from(known))
            self.table.reopened(slot)
            if self.held[key] is not OK:
                self.held[key] = NEW

    @rule(forget=st.booleans())
    def begin_pass(self, forget: bool) -> None:
        if forget:
            self.table.forget_passes()
        self.table.begin_pass()
        self.claimed.clear()

    @rule(slots=st.sampled_from([10, 2_000]))
    def reserve(self, slots: int) -> None:
        self.table.reserve(slots)

    @invariant()
    def equal(self) -> None:
        assert len(self.table) == len(self.held)
        for slot, (number, occurrence) in self.slots.items():
            assert self.table.hash(slot) == hash_of(number)
            assert self.table.occurrence(slot) == occurrence
            assert self.table.held(slot) is self.held[number, occurrence]
            if self.table.held(slot) is not NEW:
                assert self.table.position(slot) == self.positions[number, occurrence]
        for held in Held:
            assert self.table.count(held) == list(self.held.values()).count(held)


TestDictModel = DictModel.TestCase
TestDictModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_every_key_is_found_again_while_the_table_grows() -> None:
    table = SlotTable()
    slots = [table.claim(hash_of(number)) for number in range(5_000)]
    assert slots == list(range(5_000))
    table.begin_pass()
    assert [table.claim(hash_of(number)) for number in range(5_000)] == slots
