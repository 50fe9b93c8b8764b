"""Rows that begin alike: who leads, who follows, and that nobody waits for ever."""

from __future__ import annotations

from batchrun.sending.prefixes import (
    FIRST_PATIENCE_S,
    LEVELS,
    MOST_ASIDE,
    MOST_KNOWN,
    PATIENCE,
    Prefixes,
)
from batchrun.types import Request

SYSTEM = b"s" * LEVELS[0]


def request(row: int, body: bytes, model: str = "m") -> Request:
    return Request(row, body, row.to_bytes(16, "big"), 0, row, model)


def test_one_leads_and_the_others_follow_its_answer() -> None:
    prefixes = Prefixes()
    rows = [request(n, SYSTEM + b"%d" % n) for n in range(5)]
    assert prefixes.may_go(rows[0], 0.0)
    assert not any(prefixes.may_go(row, 0.0) for row in rows[1:4])
    assert len(prefixes) == 3
    assert prefixes.ended(rows[0], 1.0, ok=True) == rows[1:4]
    assert len(prefixes) == 0
    assert prefixes.may_go(rows[4], 1.0)
    assert prefixes.ended(rows[4], 2.0, ok=True) == []


def test_short_rows_other_prefixes_and_other_models_go() -> None:
    prefixes = Prefixes()
    assert prefixes.may_go(request(0, SYSTEM), 0.0)
    assert prefixes.may_go(request(1, b"short"), 0.0)
    assert prefixes.may_go(request(2, b"t" * LEVELS[0]), 0.0)
    assert prefixes.may_go(request(3, SYSTEM, "other"), 0.0)
    assert not prefixes.may_go(request(4, SYSTEM), 0.0)


def test_a_document_after_the_instructions_is_led_on_its_own() -> None:
    prefixes = Prefixes()
    a, b = (SYSTEM + letter * LEVELS[1] for letter in (b"a", b"b"))
    first, second, third, fourth = (
        request(n, body + b"%d" % n) for n, body in enumerate((a, b, a, b))
    )
    assert prefixes.may_go(first, 0.0)
    assert not prefixes.may_go(second, 0.0)  # the instructions are not there yet
    assert prefixes.ended(first, 1.0, ok=True) == [second]
    assert prefixes.may_go(third, 1.0)
    assert prefixes.may_go(fourth, 1.0)
    assert not prefixes.may_go(second, 1.0)


def test_whoever_fails_lets_its_followers_go() -> None:
    prefixes = Prefixes()
    rows = [request(n, SYSTEM) for n in range(3)]
    assert [prefixes.may_go(row, 0.0) for row in rows] == [True, False, False]
    assert prefixes.ended(rows[0], 1.0, ok=False) == rows[1:]
    # Nothing is cached yet: the next new row leads again.
    assert prefixes.may_go(request(3, SYSTEM), 1.0)
    assert not prefixes.may_go(request(4, SYSTEM), 1.0)


def test_a_leader_that_takes_too_long_is_not_waited_for() -> None:
    prefixes = Prefixes()
    lead, follower, other, late = (request(n, SYSTEM) for n in range(4))
    assert prefixes.may_go(lead, 0.0)
    assert not prefixes.may_go(follower, 0.0)
    assert prefixes.overdue(FIRST_PATIENCE_S) == []
    assert prefixes.overdue(FIRST_PATIENCE_S + 1) == [follower]
    assert prefixes.ended(lead, 100.0, ok=True) == []
    # Once answers are known to take two seconds, it is less.
    other, late = request(4, b"x" * LEVELS[0]), request(5, b"x" * LEVELS[0])
    usual = request(6, b"y" * LEVELS[0])
    assert prefixes.may_go(usual, 0.0)
    prefixes.ended(usual, 2.0, ok=True)
    assert prefixes.may_go(other, 10.0)
    assert not prefixes.may_go(late, 10.0)
    assert prefixes.overdue(10.0 + 2 * PATIENCE) == []
    assert prefixes.overdue(10.1 + 2 * PATIENCE) == [late]


def test_no_more_stand_aside_and_are_remembered_than_is_bounded() -> None:
    prefixes = Prefixes()
    assert prefixes.may_go(request(0, SYSTEM), 0.0)
    went = [prefixes.may_go(request(n, SYSTEM), 0.0) for n in range(1, MOST_ASIDE + 11)]
    assert went == [False] * MOST_ASIDE + [True] * 10
    prefixes.clear()
    assert len(prefixes) == 0
    for n in range(MOST_KNOWN + 100):
        row = request(n, b"%08d" % n * (LEVELS[0] // 8))
        assert prefixes.may_go(row, 0.0)
        prefixes.ended(row, 0.0, ok=True)
    assert len(prefixes._known) == MOST_KNOWN
