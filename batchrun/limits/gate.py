"""One model's gate, opening and quota, and the places that refusals keep."""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from batchrun.limits.headers import NEVER
from batchrun.limits.quota import Quota

# How often to look whether a question was answered.
MIN_LOOK_S = 0.05
# Until the first answer nobody knows a quota, and a whole window at once is a burst of refusals
# where there is one. At this pace a first window takes half a second, and an answer ends it sooner:
# a small job on a slow endpoint hardly notices.
OPENING_PACE_S = 1 / 64
# Below this an instant server would see the whole window within a millisecond of the reopening.
MIN_REOPENING_S = 1.0
# Shorter waits are how some gateways say "busy"; longer ones are a quota that nobody published.
QUOTA_WAIT_S = 1.0
# A timeout this close to the usual latency is the server's queue; far beyond it is the row's own.
TIMEOUT_LATENCIES = 3.0
# Refusals for each answer that hold no place: a gateway that refuses one request in ten, whatever
# the load, would cost a tenth of the throughput. More, and too many in flight are refused much more
# often than once a service time.
FREE_REFUSALS = 0.2
MAX_FREE_REFUSALS = 8.0
# A rate in headers that makes a request wait this long may be about something else than a minute.
DOUBTED_WAIT_S = 0.9
# A wait found not to hold for all binds the refused only, until so many more are refused than
# answered, or a whole window: fewer, and chance closes the gate; more, and a real limit costs more.
MIN_CREDIT = 16


class Flight(Struct, gc=False):
    """A request in flight, and what it found when it left."""

    admitted_at: float
    delivered: int  # answers until then
    ahead: int  # those in flight before it that are not known to be refused


class Model:
    """The gate of one model, and its quota: providers count every model apart."""

    __slots__ = (
        "_credit",
        "_is_opening",
        "_kept",
        "_pace_s",
        "asks_rate",
        "asks_wait",
        "clock_ms",
        "closed_until",
        "contradictions",
        "is_doubtful",
        "is_quota",
        "named_s",
        "quota",
        "ready_at",
        "refused_at",
        "reopening_until",
    )

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.asks_wait = _Question()
        self.asks_rate = _Question()
        self.is_doubtful = False  # whether an answer may contradict what was said before
        self.ready_at = 0.0  # before it, no admission: gate closed, or opening step by step
        self.closed_until = 0.0
        self.contradictions = 0  # waits that did not hold for all
        self.refused_at = 0.0  # when the request left whose refusal closed the gate
        self.named_s = 0.0  # by that refusal
        self.is_quota = False  # what closed it last
        self.reopening_until = 0.0
        self.clock_ms = 0.0  # of the wall, at zero of ours
        self._is_opening = False
        self._pace_s = 0.0
        self._kept = 0  # waits kept so far
        self._credit = 0  # answers against refusals since a wait was found not to hold for all

    def open_slowly(self) -> None:
        """Let requests go one by one until an answer shows what the endpoint allows."""
        self._is_opening = True
        self.reopening_until = NEVER
        self._pace_s = OPENING_PACE_S

    def opened(self) -> None:
        """An answer is there: no more reason to go slowly."""
        if self._is_opening:
            self._is_opening = False
            self.ready_at = self.reopening_until = 0.0

    def believes_wait(self, now: float) -> bool:
        """Whether a wait just named holds for all; it does, as long as nothing contradicts it."""
        self.is_doubtful = True
        if self._credit:
            self._credit -= 1
        return self._credit == 0

    def close(
        self, now: float, wait_s: float, reopening_s: float, window: int, latency_s: float
    ) -> None:
        """Let nothing go for so long; unless a quota paces, reopen step by step.

        Where refusals go on after a wait was kept, one request goes to see whether the next holds
        for more than those refused.
        """
        until = now + wait_s
        if until <= self.closed_until:
            return
        self.named_s = wait_s
        if now >= self.closed_until:
            self._kept += 1
            if self._kept > 1:
                self.asks_wait.arises(now, latency_s)
        self._is_opening = False
        self.ready_at = self.closed_until = until
        # A known quota paces by itself.
        self.quota.empty(until)
        if not self.quota.is_known:
            self.reopening_until = until + reopening_s
            self._pace_s = reopening_s / window

    def answered(
        self, flight: int, admitted_at: float, window: int, latency_s: float, now: float
    ) -> None:
        """An answer: does it contradict what was said?

        One to what left after the refused request does. One to what left before says that others
        had a place when it had none, which may be all that there was to say: a question is worth
        asking.
        """
        self.asks_wait.answered(flight)
        if self._credit:
            self._credit = min(max(MIN_CREDIT, window), self._credit + 1)
        if now < self.closed_until:
            if admitted_at > self.refused_at:
                self._credit = max(MIN_CREDIT, window)
                self.contradictions += 1
                self.ready_at = self.closed_until = 0.0
                self.reopening_until = now + latency_s
                self._pace_s = max(OPENING_PACE_S, latency_s / window)
                self.quota.reopen(now)
            elif not self.asks_wait.is_pending:
                self.asks_wait.arises(now, latency_s)
        if self.asks_rate.answered(flight):
            self.quota.contradicted()

    def leaves(self, flight: int) -> None:
        self.asks_wait.leaves(flight)
        self.asks_rate.leaves(flight)

    def refused(self, flight: int, wait_s: float | None, now: float) -> bool:
        """Whether a wait that it names is news: a question only hears again what it asked about."""
        self.asks_rate.refused(flight, now)
        was_asked = self.asks_wait.refused(flight, now)
        if was_asked:
            self.asks_wait.rests()
        again = wait_s is None or wait_s <= self.named_s
        return not (was_asked and again and now < self.closed_until)

    def withdrawn(self, flight: int) -> None:
        self.asks_wait.withdrawn(flight)
        self.asks_rate.withdrawn(flight)

    def pace_reopening(self, now: float) -> None:
        if now < self.reopening_until:
            self.ready_at = max(self.ready_at, now + self._pace_s)
        else:
            self.reopening_until = 0.0


class _Question:
    """A request that goes in spite of a wait, to see whether there is a reason for it.

    Answered, the next may go at once, and twice as many; refused, each waits twice as long.
    """

    __slots__ = ("_answered", "_at", "_delay_s", "_is_due", "_out")

    def __init__(self) -> None:
        self._at = NEVER
        self._delay_s = 0.0
        self._out: set[int] = set()
        self._answered = 0
        self._is_due = False  # the request that is being admitted goes as one

    def arises(self, now: float, latency_s: float) -> None:
        self._delay_s = max(self._delay_s, latency_s)
        self._at = now + self._delay_s

    def rests(self) -> None:
        """Ask no more until there is a new reason to."""
        self._at = NEVER

    @property
    def is_pending(self) -> bool:
        return self._at < NEVER

    def may_go(self, now: float) -> bool:
        self._is_due = now >= self._at and len(self._out) <= self._answered
        return self._is_due

    def wait(self, wait_s: float, now: float) -> float:
        """Seconds until asking again is worth it."""
        return min(wait_s, max(self._at - now, MIN_LOOK_S))

    def leaves(self, flight: int) -> None:
        """Whatever goes while a question is due is the question."""
        if self._is_due:
            self._is_due = False
            self._out.add(flight)

    def answered(self, flight: int) -> bool:
        if flight not in self._out:
            return False
        self._out.discard(flight)
        self._answered += 1
        self._delay_s = 0.0
        return True

    def refused(self, flight: int, now: float) -> bool:
        if flight not in self._out:
            return False
        self._out.discard(flight)
        self._answered = 0
        if now >= self._at:  # one burst counts once
            self._delay_s = max(2 * self._delay_s, MIN_LOOK_S)
            self._at = now + self._delay_s
        return True

    def withdrawn(self, flight: int) -> None:
        self._out.discard(flight)


class Places:
    """Places of refused attempts, held for as long as an answer would have taken."""

    __slots__ = ("_delivered", "_free", "held")

    def __init__(self) -> None:
        self.held: deque[float] = deque()
        self._free = 0.0  # refusals that hold no place
        self._delivered = 0

    def refused(self, until: float, delivered: int, now: float) -> None:
        earned = FREE_REFUSALS * (delivered - self._delivered)
        self._free = min(MAX_FREE_REFUSALS, self._free + earned)
        self._delivered = delivered
        if self._free >= 1.0:
            self._free -= 1.0
        elif until > now:
            self.held.append(until)

    def wait(self, free: int, now: float) -> float:
        while self.held and self.held[0] <= now:
            self.held.popleft()
        return self.held[0] - now if len(self.held) >= free and self.held else 0.0
