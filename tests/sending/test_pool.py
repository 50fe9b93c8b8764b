"""The pool alone: fakes around it, no network, and a loop whose clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import math
import random
import selectors
import signal
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import pytest

from batchrun.errors import BatchrunError, EndpointRefused, Interrupted, LocalIOError, StoppedEarly
from batchrun.sending.feed import Feed
from batchrun.sending.patience import MAX_REFUSALS, Persistence
from batchrun.sending.pool import Pool
from batchrun.types import Attempt, Decision, Others, Request, Tries, Verdict

T = TypeVar("T")
OK = Decision("ok")
PASSING = Decision("transient", code="500")
FATAL = Decision("fatal", code="unauthorized")
REFUSED = Decision("rate_limit", code="429")
GATEWAY = Decision("transient", code="502", may_be_outage=True)


class _Jump(selectors.SelectSelector):
    """Never waits: where the loop would sleep, its clock moves on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or not timeout:
            # Without a timer only another thread can bring news.
            return ready if ready or timeout == 0 else super().select(timeout)
        self.now += timeout
        return ready


class _JumpLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_JumpLoop) as runner:
        return runner.run(main)


def request(row: int, model: str = "m") -> Request:
    return Request(row, b"{}", row.to_bytes(16, "big"), 0, row, model)


def attempt() -> Attempt:
    return Attempt(200, {}, b"{}", 0.0, 0.0, 0)


class Gates:
    """An admission with a fixed window, and for each model the instants it lets requests go."""

    def __init__(self, window: int = 4) -> None:
        self.window = window
        self.is_probing = False
        self.in_flight = 0
        self.peak = 0
        self.opens: dict[str, float] = {}
        self.pace: dict[str, float] = {}
        self.out: Counter[str] = Counter()
        self.contradicted_at = math.inf
        self.contradicted = 0

    def contradictions(self, model: str) -> int:
        return self.contradicted

    def believes_waits(self, model: str, now: float) -> bool:
        return now < self.contradicted_at

    def admit(self, request: Request, now: float) -> float:
        assert self.in_flight < self.window, "the pool asked with a full window"
        wait = self.opens.get(request.model, 0.0) - now
        if wait > 1e-9:
            return wait
        if request.model in self.pace:
            self.opens[request.model] = now + self.pace[request.model]
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        return 0.0

    def done(self, request: Request, attempt: Attempt, decision: Decision, now: float) -> None:
        self.in_flight -= 1
        self.contradicted = int(now >= self.contradicted_at)

    def withdrawn(self, request: Request, now: float) -> None:
        self.in_flight -= 1


class Patience:
    """Every failed row is tried again after ``wait_s``, for ever."""

    def __init__(self, wait_s: float = 1.0, tries: int = 1_000_000) -> None:
        self.wait_s, self.tries = wait_s, tries
        self.attempts: Counter[int] = Counter()
        self.told: list[tuple[int, Others, bool]] = []

    def after(
        self, request: Request, decision: Decision, others: Others, *, few_left: bool
    ) -> Verdict:
        self.attempts[request.row] += 1
        self.told.append((request.row, others, few_left))
        tries = Tries(self.attempts[request.row], 0)
        if self.attempts[request.row] >= self.tries:
            return Verdict(None, tries)
        return Verdict(self.wait_s, tries)

    def resent(self, request: Request, times: int) -> None: ...

    def settle(self, request: Request) -> Tries | None:
        failed = self.attempts.pop(request.row, 0)
        return Tries(failed + 1, 0) if failed else None


class Book:
    """A desk that remembers what it was told."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.settled_rows: list[tuple[int, str]] = []
        self.tries: dict[int, Tries] = {}
        self.again: list[int] = []
        self.pending: list[int] = []
        self.cut: list[int] = []
        self.idled = 0

    def sending(self, request: Request) -> None:
        self.sent.append(request.row)

    def failed(
        self, request: Request, attempt: Attempt, decision: Decision, *, again: bool
    ) -> BatchrunError | None:
        (self.again if again else self.pending).append(request.row)
        return None

    def settled(
        self, request: Request, attempt: Attempt, decision: Decision, tries: Tries
    ) -> BatchrunError | None:
        self.settled_rows.append((request.row, decision.code))
        self.tries[request.row] = tries
        return None

    def resent(self, times: int) -> None: ...

    def abandoned(self, request: Request) -> None:
        self.cut.append(request.row)

    def idle(self) -> None:
        self.idled += 1


class Fake:
    """A pool with fakes around it. ``judge`` decides by row; ``latency_s`` is loop time."""

    def __init__(
        self,
        requests: Iterable[Request] = (),
        *,
        window: int = 4,
        latency_s: float = 1.0,
        judge: Callable[[Request], Decision] = lambda r: OK,
        patience: Patience | Persistence | None = None,
        drain_s: float = 25.0,
        one_model: bool = True,
        answered: int = 0,
        book: Book | None = None,
        gates: Gates | None = None,
    ) -> None:
        self.gates = gates or Gates(window)
        self.book = book or Book()
        self.feed = Feed()
        self.latency_s = latency_s
        self.started: dict[int, float] = {}
        self._judge = judge
        batch = list(requests)
        if batch:
            self.feed.put(batch)
            self.feed.end()
        self.pool = Pool(
            feed=self.feed,
            send=self.send,
            judge=lambda attempt, request: self._judge(request),
            admission=self.gates,
            persistence=patience or Patience(),
            desk=self.book,
            drain_s=drain_s,
            one_model=one_model,
            answered=answered,
            clock=asyncio.get_running_loop().time,
        )

    async def send(self, request: Request) -> Attempt:
        self.started.setdefault(request.row, self.now)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        return Attempt(200, {}, b"{}", self.now - self.latency_s, self.now, 0)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def at(self, when: float, do: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_at(when, do)


def fails_once() -> Callable[[Request], Decision]:
    seen: set[int] = set()

    def judge(request: Request) -> Decision:
        if request.row in seen:
            return OK
        seen.add(request.row)
        return PASSING

    return judge


def test_every_row_is_settled_once_and_the_window_is_kept() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(100)), window=7)
        assert await fake.pool.run() is None
        assert fake.book.sent == list(range(100))
        assert sorted(fake.book.settled_rows) == [(row, "") for row in range(100)]
        assert set(fake.book.tries.values()) == {Tries(1, 0)}
        assert fake.gates.peak == 7
        assert fake.gates.in_flight == 0
        assert fake.now == 15.0

    run(story())


def told_to_wait(row: int) -> Callable[[Request], Decision]:
    """Refuses this row once, and names a minute."""
    told: list[int] = []

    def judge(request: Request) -> Decision:
        if request.row != row or told:
            return OK
        told.append(row)
        return Decision("rate_limit", wait_s=60.0)

    return judge


@pytest.mark.parametrize(
    ("contradicted_at", "is_kept"),
    [
        pytest.param(math.inf, True, id="holds for all: kept to the letter"),
        pytest.param(0.5, False, id="known not to hold for others: the row's own back-off"),
        pytest.param(4.5, False, id="others are served later: who waits because of it goes on"),
    ],
)
def test_a_row_waits_as_long_as_was_named_unless_others_are_served_meanwhile(
    contradicted_at: float, is_kept: bool
) -> None:
    async def story() -> None:
        patience = Persistence(max_retries=5, max_in_doubt_retries=2, rng=random.Random(1))
        fake = Fake(map(request, range(10)), window=1, judge=told_to_wait(0), patience=patience)
        fake.gates.contradicted_at = contradicted_at
        assert await fake.pool.run() is None
        assert len(fake.book.settled_rows) == 10
        # Ten rows of a second each, one of them twice; a minute is what the row was told.
        assert fake.now == 62.0 if is_kept else fake.now <= 12.0

    run(story())


def test_an_empty_feed_ends_at_once() -> None:
    async def story() -> None:
        fake = Fake()
        fake.feed.end()
        assert await fake.pool.run() is None
        assert fake.now == 0.0

    run(story())


def test_rows_that_failed_go_before_new_ones() -> None:
    async def story() -> None:
        judge = fails_once()
        fake = Fake(
            map(request, range(10)),
            window=1,
            judge=lambda r: judge(r) if r.row == 0 else OK,
            patience=Patience(wait_s=2.5),
        )
        await fake.pool.run()
        # Rows 1 to 3 leave while row 0 waits: no worker sleeps on it.
        assert fake.book.sent == [0, 1, 2, 3, 0, *range(4, 10)]
        assert fake.book.tries[0] == Tries(2, 0)

    run(story())


def test_the_last_row_of_a_line_is_not_forgotten_when_it_fails() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(3)), window=3, judge=fails_once())
        fake.gates.opens["m"] = 5.0
        fake.gates.pace["m"] = 2.0
        assert await fake.pool.run() is None
        assert sorted(fake.book.settled_rows) == [(0, ""), (1, ""), (2, "")]

    run(story())


def test_a_model_that_must_wait_keeps_its_order_and_stops_no_other() -> None:
    async def story() -> None:
        rows = [request(row, "slow" if row % 2 == 0 else "fast") for row in range(20)]
        fake = Fake(rows, one_model=False)
        fake.gates.opens["slow"] = 100.0
        await fake.pool.run()
        fast, slow = list(range(1, 20, 2)), list(range(0, 20, 2))
        assert fake.book.sent == fast + slow
        assert all(fake.started[row] < 10 for row in fast)
        assert all(fake.started[row] >= 100 for row in slow)

    run(story())


def test_with_one_model_nothing_is_read_ahead_into_a_line() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(100)))
        fake.gates.opens["m"] = 100.0
        waiting: list[int] = []
        fake.at(50.0, lambda: waiting.append(fake.pool.waiting))
        await fake.pool.run()
        assert waiting == [1]

    run(story())


def test_two_paced_models_both_make_progress() -> None:
    async def story() -> None:
        rows = [request(row, "ab"[row % 2]) for row in range(40)]
        fake = Fake(rows, window=4, latency_s=0.1, one_model=False)
        fake.gates.pace = {"a": 1.0, "b": 1.0}
        await fake.pool.run()
        for model in (0, 1):
            started = [fake.started[row] for row in range(model, 40, 2)]
            assert started == pytest.approx([float(n) for n in range(20)])

    run(story())


@pytest.mark.parametrize("models", ["m", "ab"])
def test_a_pace_wakes_a_few_workers_and_not_the_window(models: str) -> None:
    async def story() -> None:
        rows = [request(row, models[row % len(models)]) for row in range(400)]
        fake = Fake(rows, window=64, latency_s=0.5, one_model=len(models) == 1)
        fake.gates.pace = dict.fromkeys(models, 0.01)
        await fake.pool.run()
        assert len(fake.book.settled_rows) == len(rows)
        # Those who woke and found nothing to send.
        assert fake.book.idled < 3 * len(rows)

    run(story())


def test_when_a_gate_opens_the_whole_window_leaves() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(64)), window=16, latency_s=5.0)
        fake.gates.opens["m"] = 30.0
        await fake.pool.run()
        assert fake.started == {row: 30.0 + row // 16 * 5 for row in range(64)}

    run(story())


def test_a_window_that_grows_is_used() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(40)), window=1, latency_s=1.0)

        def grow() -> None:
            fake.gates.window = 10
            fake.pool.staff()

        fake.at(9.5, grow)
        await fake.pool.run()
        assert fake.gates.peak == 10
        assert fake.now < 15

    run(story())


def test_a_window_that_shrinks_is_kept() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(100)), window=10)
        fake.at(2.5, lambda: setattr(fake.gates, "window", 3))
        await fake.pool.run()
        assert len(fake.book.settled_rows) == 100
        late = Counter(when for when in fake.started.values() if when > 3)
        assert max(late.values()) == 3

    run(story())


def test_no_new_row_is_taken_while_too_many_wait() -> None:
    async def story() -> None:
        fake = Fake(
            map(request, range(5000)),
            window=8,
            latency_s=0.001,
            judge=lambda r: PASSING,
            patience=Patience(wait_s=1000.0, tries=2),
        )
        most = 0

        def look() -> None:
            nonlocal most
            most = max(most, fake.pool.waiting)

        for second in range(1, 900):
            fake.at(second, look)
        await fake.pool.run()
        assert len(fake.book.settled_rows) == 5000
        assert 1000 <= most <= 1000 + 8

    run(story())


class Closing(Gates):
    """Each refusal closes the model's gate for a second, as one with Retry-After does."""

    def done(self, request: Request, attempt: Attempt, decision: Decision, now: float) -> None:
        super().done(request, attempt, decision, now)
        if decision.kind == "rate_limit":
            self.opens[request.model] = now + 1.0


def test_rows_that_are_refused_whatever_happens_keep_no_other_from_leaving() -> None:
    async def story() -> None:
        fake = Fake(
            map(request, range(30)),
            window=1,
            latency_s=0.01,
            judge=lambda r: REFUSED if r.row < 3 else OK,
            gates=Closing(1),
        )
        fake.at(100.0, lambda: fake.pool.stop(StoppedEarly("enough")))
        await fake.pool.run()
        assert sorted(row for row, _ in fake.book.settled_rows) == list(range(3, 30))
        assert max(fake.started.values()) < 40.0
        # Nor are they forgotten.
        assert len(fake.book.sent) > 60

    run(story())


def persistence(max_retries: int = 5) -> Persistence:
    return Persistence(max_retries=max_retries, max_in_doubt_retries=2, rng=random.Random(7))


@pytest.mark.parametrize("alone", [{150}, {299}, {0, 150, 299}, set(range(20))])
@pytest.mark.parametrize("wait_s", [None, 1.0], ids=["bare", "Retry-After"])
def test_a_row_refused_for_ever_ends_when_the_others_are_done(
    wait_s: float | None, alone: set[int]
) -> None:
    async def story() -> None:
        refused = Decision("rate_limit", code="429", wait_s=wait_s)
        fake = Fake(
            map(request, range(300)),
            judge=lambda r: refused if r.row in alone else OK,
            patience=persistence(),
        )
        assert await fake.pool.run() is None
        assert {row for row, code in fake.book.settled_rows if code == "429"} == alone
        assert all(fake.book.tries[row].attempts >= MAX_REFUSALS for row in alone)
        assert fake.now < 200.0

    run(story())


def test_a_row_refused_for_ever_ends_though_nothing_else_is_left_to_send() -> None:
    async def story(answered: int) -> float:
        fake = Fake(
            [request(0)], judge=lambda r: REFUSED, patience=persistence(), answered=answered
        )
        fake.at(1000.0, lambda: fake.pool.stop(StoppedEarly("enough")))
        await fake.pool.run()
        return fake.now

    assert run(story(299)) < 120.0
    # Where nothing was ever answered, it may be the endpoint.
    assert run(story(0)) == 1000.0


def test_a_failing_row_is_known_to_be_alone_or_not() -> None:
    async def story() -> list[tuple[int, Others, bool]]:
        patience = Patience(wait_s=30.0, tries=2)
        fake = Fake(
            map(request, range(100)),
            window=1,
            judge=lambda r: PASSING if r.row in {0, 40, 99} else OK,
            patience=patience,
        )
        await fake.pool.run()
        return patience.told

    assert run(story()) == [
        (0, "never", False),
        (0, "before", False),
        (40, "before", False),
        (40, "before", False),
        (99, "before", True),
        (99, "before", True),
    ]


@pytest.mark.parametrize("decision", [GATEWAY, Decision("transient", unreachable=True)])
def test_an_outage_in_the_middle_ends_no_row(decision: Decision) -> None:
    async def story() -> None:
        fake = Fake(
            map(request, range(400)),
            latency_s=0.1,
            judge=lambda r: decision if 3.0 < fake.now < 60.0 else OK,
            patience=persistence(max_retries=1),
        )
        assert await fake.pool.run() is None
        assert sorted(fake.book.settled_rows) == [(row, "") for row in range(400)]

    run(story())


def test_a_gateway_that_fails_one_row_while_others_are_answered_ends_it() -> None:
    async def story() -> None:
        fake = Fake(
            map(request, range(300)),
            judge=lambda r: GATEWAY if r.row == 7 else OK,
            patience=persistence(max_retries=3),
        )
        assert await fake.pool.run() is None
        assert (7, "502") in fake.book.settled_rows
        assert fake.book.tries[7].attempts == 4

    run(story())


def test_while_the_endpoint_seems_to_be_away_rows_that_never_failed_go_first() -> None:
    async def story() -> None:
        fake = Fake(
            map(request, range(20)),
            window=1,
            judge=lambda r: PASSING if fake.now < 6.5 else OK,
            patience=Patience(wait_s=0.5),
        )
        fake.at(1.5, lambda: setattr(fake.gates, "is_probing", True))
        fake.at(8.5, lambda: setattr(fake.gates, "is_probing", False))
        await fake.pool.run()
        assert fake.book.sent[:8] == list(range(8))
        assert len(fake.book.settled_rows) == 20

    run(story())


def test_an_answer_lets_its_model_ask_again_before_its_time() -> None:
    class Contradicted(Gates):
        def done(self, request: Request, attempt: Attempt, decision: Decision, now: float) -> None:
            super().done(request, attempt, decision, now)
            self.opens.clear()

    async def story() -> None:
        fake = Fake(map(request, range(8)), window=2, latency_s=1.0, gates=Contradicted(2))
        fake.gates.pace["m"] = 1000.0
        await fake.pool.run()
        assert fake.now == 8.0

    run(story())


def test_there_are_as_many_tasks_as_workers_however_many_rows() -> None:
    async def story() -> int:
        rows = 100_000
        fake = Fake(window=32, latency_s=0.0)
        sent, most = 0, 0

        async def send(request: Request) -> Attempt:
            nonlocal sent, most
            sent += 1
            if sent % 1000 == 0:
                most = max(most, len(asyncio.all_tasks()))
                await asyncio.sleep(0)
            return attempt()

        fake.pool._send = send
        loop = asyncio.get_running_loop()
        reader = threading.Thread(target=feed_rows, args=(fake, loop, rows))
        reader.start()
        assert await fake.pool.run() is None
        reader.join()
        assert len(fake.book.settled_rows) == rows
        return most

    assert run(story()) <= 32 + 2


def feed_rows(fake: Fake, loop: asyncio.AbstractEventLoop, rows: int) -> None:
    for first in range(0, rows, 256):
        assert fake.feed.put([request(row) for row in range(first, min(first + 256, rows))])
        loop.call_soon_threadsafe(fake.pool.staff)
    fake.feed.end()
    loop.call_soon_threadsafe(fake.pool.staff)


def test_a_feed_is_bounded_in_rows_and_in_bytes() -> None:
    feed = Feed(max_rows=10, max_bytes=100)
    assert feed.put([request(row) for row in range(10)])
    done = threading.Event()

    def put_more() -> None:
        feed.put([request(10)])
        done.set()

    reader = threading.Thread(target=put_more, daemon=True)
    reader.start()
    assert not done.wait(0.05)
    while (popped := feed.pop()) is not None and popped.row < 9:
        pass
    assert done.wait(10)
    feed.close()
    assert not feed.put([request(11)])
    # A request larger than the bound still goes, alone.
    large = Feed(max_bytes=10)
    assert large.put([Request(0, b"x" * 1000, bytes(16), 0, 0, "m")])


def test_stop_drains_what_is_in_flight_and_wakes_the_sleepers() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(100)), window=4, latency_s=10.0)
        stopped = StoppedEarly("enough")
        fake.at(15.0, lambda: fake.pool.stop(stopped))
        assert await fake.pool.run() is stopped
        assert sorted(row for row, _ in fake.book.settled_rows) == list(range(8))
        assert fake.book.cut == []
        assert fake.now == 20.0

    run(story())


def test_what_is_still_in_flight_after_the_drain_is_in_doubt() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(100)), window=4, latency_s=1000.0, drain_s=5.0)
        fake.at(15.0, lambda: fake.pool.stop(StoppedEarly("enough")))
        assert isinstance(await fake.pool.run(), StoppedEarly)
        assert sorted(fake.book.cut) == [0, 1, 2, 3]
        assert fake.book.settled_rows == []
        assert fake.gates.in_flight == 0
        assert fake.now == 20.0

    run(story())


def test_a_run_in_which_everybody_waits_stops_at_once() -> None:
    async def story() -> None:
        fake = Fake(
            map(request, range(8)), judge=lambda r: PASSING, patience=Patience(wait_s=300.0)
        )
        fake.at(50.0, lambda: fake.pool.stop(StoppedEarly("enough")))
        await fake.pool.run()
        assert fake.now == 50.0
        assert fake.pool.waiting == 0
        behind_a_gate = Fake(map(request, range(8)))
        behind_a_gate.gates.opens["m"] = 1000.0
        behind_a_gate.at(60.0, lambda: behind_a_gate.pool.stop(StoppedEarly("enough")))
        await behind_a_gate.pool.run()
        assert fake.now == 60.0
        assert behind_a_gate.book.sent == []
        # No timer is left that would look for a row later.
        late: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: late.append(context))
        await asyncio.sleep(2000.0)
        assert late == []

    run(story())


def test_stop_before_the_start_sends_nothing() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(8)))
        fake.pool.stop(StoppedEarly("enough"))
        assert isinstance(await fake.pool.run(), StoppedEarly)
        assert fake.book.sent == []

    run(story())


def test_answers_that_come_while_draining_are_kept_and_failures_stay_pending() -> None:
    async def story() -> None:
        fake = Fake(
            map(request, range(4)), latency_s=10.0, judge=lambda r: PASSING if r.row == 2 else OK
        )
        fake.at(5.0, lambda: fake.pool.stop(StoppedEarly("enough")))
        await fake.pool.run()
        assert sorted(row for row, _ in fake.book.settled_rows) == [0, 1, 3]
        assert fake.book.pending == [2]
        assert fake.book.again == []

    run(story())


def test_a_fatal_decision_settles_nothing() -> None:
    class Stopping(Book):
        def failed(
            self, request: Request, attempt: Attempt, decision: Decision, *, again: bool
        ) -> BatchrunError | None:
            super().failed(request, attempt, decision, again=again)
            return EndpointRefused("no")

    async def story() -> None:
        book = Stopping()
        fake = Fake(map(request, range(100)), judge=lambda r: FATAL, book=book)
        assert isinstance(await fake.pool.run(), EndpointRefused)
        assert book.sent == [0, 1, 2, 3]
        assert sorted(book.pending) == [0, 1, 2, 3]
        assert book.settled_rows == []

    run(story())


def test_of_several_causes_the_gravest_is_kept() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(100)), latency_s=10.0)
        full = LocalIOError("disk full")
        for when, cause in ((1.0, StoppedEarly("a")), (2.0, full), (3.0, EndpointRefused("b"))):
            fake.at(when, lambda cause=cause: fake.pool.stop(cause))  # type: ignore[misc]
        assert await fake.pool.run() is full

    run(story())


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_refusal_outranks_a_signal_and_a_signal_an_early_stop(signum: signal.Signals) -> None:
    async def kept(*causes: BatchrunError) -> BatchrunError | None:
        fake = Fake(map(request, range(100)), latency_s=10.0)
        for when, cause in enumerate(causes, start=1):
            fake.at(float(when), lambda cause=cause: fake.pool.stop(cause))  # type: ignore[misc]
        return await fake.pool.run()

    stopped, signalled, refused = StoppedEarly("a"), Interrupted(signum), EndpointRefused("b")
    assert run(kept(signalled, refused)) is run(kept(refused, signalled)) is refused
    assert run(kept(stopped, signalled)) is run(kept(signalled, stopped)) is signalled


def test_a_journal_that_cannot_be_written_ends_the_run_at_once() -> None:
    class Full(Book):
        def sending(self, request: Request) -> None:
            super().sending(request)
            if request.row == 10:
                raise LocalIOError("disk full")

    async def story() -> None:
        fake = Fake(map(request, range(100)), latency_s=10.0, book=Full())
        assert isinstance(await fake.pool.run(), LocalIOError)
        # Row 10 would have left at 20 s; nothing is waited for after that.
        assert fake.now == 20.0
        assert len(fake.book.sent) <= 12

    run(story())


@pytest.mark.parametrize("first", [0, 10])
def test_a_journal_that_stays_full_is_no_bug(first: int) -> None:
    class Full(Book):
        def sending(self, request: Request) -> None:
            super().sending(request)
            if request.row >= first > 0:
                self.idle()

        def idle(self) -> None:
            raise LocalIOError("disk full")

    async def story() -> None:
        fake = Fake(map(request, range(20)), latency_s=10.0, book=Full())
        assert isinstance(await fake.pool.run(), LocalIOError)

    run(story())


def test_a_bug_is_not_swallowed() -> None:
    def judge(request: Request) -> Decision:
        if request.row == 5:
            raise ZeroDivisionError
        return OK

    async def story() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            await Fake(map(request, range(100)), judge=judge).pool.run()
        assert caught.group_contains(ZeroDivisionError)

    run(story())


@pytest.mark.parametrize("waits_for", ["its own turn", "its model's"])
def test_a_bug_in_a_timer_ends_the_run(waits_for: str) -> None:
    """The loop would only log it, and the row be waited for without end."""

    class Broken(Gates):
        def __getattribute__(self, name: str) -> object:
            if name == "window" and asyncio.get_running_loop().time() >= 5.0:
                raise ZeroDivisionError
            return super().__getattribute__(name)

    async def story() -> None:
        gates = Broken()
        fake = Fake([request(0)], judge=lambda r: PASSING, patience=Patience(9.0), gates=gates)
        if waits_for == "its model's":
            gates.opens["m"] = 9.0
        fake.at(99.0, lambda: fake.pool.stop(StoppedEarly("nothing happened")))
        with pytest.raises(ZeroDivisionError):
            await fake.pool.run()

    run(story())


@pytest.mark.parametrize("error", [StoppedEarly("changed"), ZeroDivisionError()])
def test_a_reader_that_fails_ends_the_run(error: Exception) -> None:
    async def story() -> None:
        fake = Fake()
        fake.feed.put(map(request, range(4)))
        fake.feed.end(error)
        if isinstance(error, BatchrunError):
            assert await fake.pool.run() is error
        else:
            with pytest.raises(ZeroDivisionError):
                await fake.pool.run()

    run(story())


def test_cancelling_the_run_abandons_what_is_in_flight() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(100)), latency_s=10.0)
        running = asyncio.ensure_future(fake.pool.run())
        await asyncio.sleep(5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert sorted(fake.book.cut) == [0, 1, 2, 3]
        assert fake.gates.in_flight == 0

    run(story())


def test_a_worker_without_work_has_its_news_written() -> None:
    async def story() -> None:
        fake = Fake(map(request, range(3)), window=8)
        await fake.pool.run()
        assert fake.book.idled >= 1

    run(story())
