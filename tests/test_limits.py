"""The laws of admission, each on a simulated clock: a run of a minute takes a fraction of a second.

``Run`` is a discrete-event simulation of the pool's side (one line for those told to wait, parked
rows that go before new ones) against ``Server``: K slots, a queue, a distribution of service times,
and a token bucket where a law needs one. Nothing sleeps; nothing reads a clock.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from batchrun.errors import EXIT_STOPPED
from batchrun.limits import Limits, LimitSettings, Quota, duration_s, quota_named
from batchrun.types import Attempt, Decision, Reply, Request, Usage

HOST = "api.example.org"
MODEL = "m"
EPOCH_MS = 1_700_000_000_000
RTT_S = 0.001

OK = Decision(kind="ok")
REFUSED = Decision(kind="rate_limit", code="429", scope="model", pushback="rate")
OVERLOADED = Decision(kind="rate_limit", code="3505", scope="model", pushback="capacity")
REJECTED = Decision(kind="rejected", code="400")
BROKEN = Decision(kind="transient", code="500", reason="500 Internal Server Error")
REFUSED_CONNECTION = Decision(
    kind="transient", code="connect", reason="could not connect: refused", unreachable=True
)


def named_wait(seconds: float) -> Decision:
    return Decision(kind="rate_limit", code="429", wait_s=seconds, scope="model", pushback="rate")


def request(row: int = 0, *, model: str = MODEL, size_bytes: int = 100) -> Request:
    return Request(row, b"x" * size_bytes, b"", 0, row, model)


def attempt(
    *,
    now: float = 0.0,
    status: int | None = 200,
    headers: dict[str, str] | None = None,
    tokens: tuple[int, int] | None = None,
) -> Attempt:
    usage = Usage(tokens[0], tokens[1], sum(tokens)) if tokens else Usage()
    reply = Reply(True, choices=1, usage=usage)
    ms = EPOCH_MS + int(now * 1000)
    return Attempt(status, headers or {}, b"", now, now, ms, reply=reply)


ANSWER = attempt()
NO_ANSWER = attempt(status=None)


class Server:
    """K slots and a queue of ``queue`` places (None: without bound) before it says 429."""

    def __init__(
        self,
        slots: int = 1_000_000,
        *,
        service_s: Callable[[], float] | float = 0.25,
        queue: int | None = None,
        rate: float | None = None,
        depth: float = 1.0,
        headers: Callable[[Server], dict[str, str]] | None = None,
        refusal: Decision = REFUSED,
        refuses_at_random: float = 0.0,
    ) -> None:
        self.slots = slots
        self.queue = queue
        self.rate = rate
        self.depth = depth
        self.tokens = depth
        self.refilled_at = 0.0
        self.headers = headers
        self.refusal = refusal
        self.refuses_at_random = refuses_at_random
        self.is_up = True
        self.busy = 0
        self.line: deque[Callable[[], None]] = deque()
        self._rng = random.Random(7)
        self._service_s = service_s

    def service_s(self) -> float:
        return self._service_s() if callable(self._service_s) else self._service_s

    def refill(self, now: float) -> None:
        if self.rate is not None:
            self.tokens = min(self.depth, self.tokens + self.rate * (now - self.refilled_at))
            self.refilled_at = now

    def refuses(self, now: float) -> bool:
        if self.refuses_at_random and self._rng.random() < self.refuses_at_random:
            return True
        if self.queue is not None and self.busy + len(self.line) >= self.slots + self.queue:
            return True
        if self.rate is None:
            return False
        self.refill(now)
        if self.tokens < 1.0:
            return True
        self.tokens -= 1.0
        return False


class Run:
    """The pool's side: rows without end, unless ``rows`` bounds them."""

    def __init__(
        self,
        server: Server,
        settings: LimitSettings | None = None,
        *,
        rows: int | None = None,
        late_s: float = 0.0,
        sizes: Iterator[int] | None = None,
    ) -> None:
        self.server = server
        self.limits = Limits(settings or LimitSettings(), host=HOST)
        self.changes: list[tuple[float, str]] = []
        self.limits.on_change = lambda change: self.changes.append((self.now, change))
        self.now = 0.0
        self.sent: list[float] = []
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.windows: list[tuple[float, int]] = []
        self._late_s = late_s  # how late the loop's timers come
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._rows = iter(range(rows)) if rows is not None else count()
        self._sizes = sizes
        self._line: deque[Request] = deque()
        self._due = 0.0
        self._ready: deque[Request] = deque()
        self._tries: dict[int, int] = {}
        self._rng = random.Random(1)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def until(self, end: float) -> Run:
        self.staff()
        while self._events and self._events[0][0] <= end:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = end
        return self

    def staff(self) -> None:
        limits = self.limits
        while limits.in_flight < limits.window and (row := self._next()) is not None:
            self._send(row)

    def rate(self, begin: float, end: float) -> float:
        """Answers a second."""
        answered = self.answered
        return (bisect_left(answered, end) - bisect_left(answered, begin)) / (end - begin)

    def _next(self) -> Request | None:
        if self._line:
            if self._due > self.now or not self._admitted(self._line[0]):
                return None
            return self._line.popleft()
        if self._ready:
            candidate = self._ready.popleft()
        elif (row := next(self._rows, None)) is not None:
            candidate = request(row, size_bytes=next(self._sizes) if self._sizes else 100)
        else:
            return None
        if self._admitted(candidate):
            return candidate
        self._line.append(candidate)
        return None

    def _admitted(self, candidate: Request) -> bool:
        wait_s = self.limits.admit(candidate, self.now)
        if wait_s <= 0.0:
            return True
        self._due = self.now + wait_s
        self.at(self._due + self._late_s, self.staff)
        return False

    def _send(self, row: Request) -> None:
        self.sent.append(self.now)
        self.at(self.now + RTT_S / 2, lambda: self._arrive(row))

    def _arrive(self, row: Request) -> None:
        server = self.server
        if not server.is_up:
            self._reply(row, NO_ANSWER, REFUSED_CONNECTION)
        elif server.refuses(self.now):
            self._reply(row, None, server.refusal)
        elif server.busy < server.slots:
            self._serve(row)
        else:
            server.line.append(lambda: self._serve(row))

    def _serve(self, row: Request) -> None:
        self.server.busy += 1
        self.at(self.now + self.server.service_s(), lambda: self._served(row))

    def _served(self, row: Request) -> None:
        self.server.busy -= 1
        while self.server.line and self.server.busy < self.server.slots:
            self.server.line.popleft()()
        self._reply(row, None, OK)

    def _reply(self, row: Request, brought: Attempt | None, decision: Decision) -> None:
        if brought is None:
            headers = self.server.headers(self.server) if self.server.headers else {}
            brought = attempt(now=self.now, headers=headers) if headers else ANSWER
        self.at(self.now + RTT_S / 2, lambda: self._done(row, brought, decision))

    def _done(self, row: Request, brought: Attempt, decision: Decision) -> None:
        self.limits.done(row, brought, decision, self.now)
        self.windows.append((self.now, self.limits.window))
        if decision.kind == "ok":
            self.answered.append(self.now)
        else:
            if decision.kind == "rate_limit":
                self.refused.append(self.now)
            tries = self._tries[row.row] = self._tries.get(row.row, 0) + 1
            named = decision.wait_s
            jitter = self._rng.uniform(0, min(30.0, 0.5 * 2.0 ** min(tries, 8)))
            self.at(self.now + (jitter if named is None else named), lambda: self._again(row))
        self.staff()

    def _again(self, row: Request) -> None:
        self._ready.append(row)
        self.staff()


def exponential(mean_s: float, seed: int = 3) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: rng.expovariate(1 / mean_s)


def even(mean_s: float, seed: int = 3) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: rng.uniform(0.8 * mean_s, 1.2 * mean_s)
