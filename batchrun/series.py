"""How a run went over time: a bounded series, kept beside the journal and in the published file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec import Struct, field

# Twice as many are kept before neighbours are put together.
MOST_POINTS: Final = 500
FIRST_STEP_S: Final = 1.0


class Point(Struct, array_like=True):
    """A stretch of time in which requests were sent: what became of them in it."""

    until: float  # Unix seconds
    seconds: float
    ok: int
    failed: int
    refused: int  # answers that said no for now: 429 and the like
    in_flight: float  # on average


class Series(Struct):
    """At most 1,000 points, whatever the length of the run, over all runs of one output."""

    points: list[Point] = []
    bound: dict[str, float] = field(default_factory=dict)  # seconds, by what set the pace
    step_s: float = FIRST_STEP_S  # how long a point is at the least


class Recorder:
    """Adds what a run has come to, about once a second, to the series of those before it."""

    def __init__(self, before: Series, now: float, ok: int, failed: int) -> None:
        """``now`` in Unix seconds; ``ok`` and ``failed`` were settled before this run."""
        self.series = before
        self._open: Point | None = None
        self._seen = (now, ok, failed, 0)

    def see(
        self, now: float, *, ok: int, failed: int, refused: int, in_flight: int, bound: str
    ) -> None:
        """How the run stands ``now``: rows settled, refusals so far, requests in flight."""
        seen_s, seen_ok, seen_failed, seen_refused = self._seen
        seconds = now - seen_s
        if seconds <= 0:
            return
        self._seen = (now, ok, failed, refused)
        self.series.bound[bound] = self.series.bound.get(bound, 0.0) + seconds
        point = Point(
            now, seconds, ok - seen_ok, failed - seen_failed, refused - seen_refused, in_flight
        )
        if self._open is None:
            self.series.points.append(point)
            self._open = point
        else:
            _put_together(self._open, point)
        # A second is seldom a whole one.
        if self._open.seconds >= 0.8 * self.series.step_s:
            self._open = None
            self._make_room()

    def _make_room(self) -> None:
        points = self.series.points
        if len(points) >= 2 * MOST_POINTS:
            self.series.points = list(_in_pairs(points))
            self.series.step_s *= 2


def _in_pairs(points: list[Point]) -> Iterator[Point]:
    for first, second in zip(points[::2], points[1::2], strict=False):
        _put_together(first, second)
        yield first
    if len(points) % 2:
        yield points[-1]


def _put_together(point: Point, later: Point) -> None:
    together_s = point.seconds + later.seconds
    point.in_flight = (
        point.in_flight * point.seconds + later.in_flight * later.seconds
    ) / together_s
    point.until, point.seconds = later.until, together_s
    point.ok += later.ok
    point.failed += later.failed
    point.refused += later.refused
