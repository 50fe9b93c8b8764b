"""A series stays small whatever the length of a run, and adds up."""

from __future__ import annotations

import msgspec
import pytest

from batchrun.series import MOST_POINTS, Recorder, Series


def record(seconds: int, before: Series | None = None, *, ok: int = 0) -> Series:
    recorder = Recorder(before or Series(), 1000.0, ok, 0)
    for second in range(1, seconds + 1):
        recorder.see(
            1000.0 + second,
            ok=ok + 3 * second,
            failed=second // 10,
            refused=second // 5,
            in_flight=8 if second % 2 else 16,
            bound="endpoint" if second % 4 else "quota",
        )
    return recorder.series


@pytest.mark.parametrize("seconds", [1, 7, 999, 5_000, 100_000])
def test_a_series_is_bounded_and_adds_up(seconds: int) -> None:
    series = record(seconds)
    assert len(series.points) <= 2 * MOST_POINTS
    assert sum(point.ok for point in series.points) == 3 * seconds
    assert sum(point.failed for point in series.points) == seconds // 10
    assert sum(point.refused for point in series.points) == seconds // 5
    assert sum(point.seconds for point in series.points) == pytest.approx(seconds)
    assert sum(series.bound.values()) == pytest.approx(seconds)
    if seconds > 10:
        assert series.points[0].in_flight == pytest.approx(12, abs=4)
        assert len(series.points) >= min(seconds - 1, MOST_POINTS // 2)


def test_a_later_run_goes_on_where_the_series_ended() -> None:
    first = record(100)
    text = msgspec.json.encode(first)
    both = record(50, msgspec.json.decode(text, type=Series), ok=300)
    assert len(both.points) == 150
    assert sum(point.ok for point in both.points) == 450


def test_what_comes_at_one_moment_is_not_lost() -> None:
    recorder = Recorder(Series(), 0.0, 0, 0)
    recorder.see(1.0, ok=1, failed=0, refused=0, in_flight=1, bound="loop")
    recorder.see(1.0, ok=5, failed=0, refused=0, in_flight=1, bound="loop")
    recorder.see(2.0, ok=6, failed=0, refused=0, in_flight=1, bound="loop")
    assert sum(point.ok for point in recorder.series.points) == 6
