"""N workers over one source of ready requests; those that failed once come before new ones.

A request is in one of these places, and each is bounded:

    feed ──► worker ──► settled      read ahead by one thread, so many rows and bytes
               │ ▲
       parked ─┘ │     waits out its own back-off: a timer, no task and no worker
       lines  ───┘     waits for its turn, or for its model's quota or gate

A worker asleep would be a stalled slot (5 % failures with a second's back-off halve the throughput
at 50 ms latency), so no worker ever sleeps while it holds a request. The pool knows no status code
and no file: it acts on Decisions, and everything it has to tell goes to its Desk.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol, TypeAlias

from msgspec.structs import replace

from batchrun.errors import BatchrunError
from batchrun.sending.feed import Feed
from batchrun.sending.lines import Lines, Rank
from batchrun.sending.prefixes import Prefixes
from batchrun.types import Attempt, Decision, Others, Request, Tries, Verdict

# More waiting rows than this say that the endpoint is the problem: no new row is taken.
MIN_WAITING = 1000
WAITING_PER_PLACE = 4
# So many unsettled rows, or this share of those answered, may all fail for reasons of their own.
# More that fail together at the end of a table tell of the endpoint.
FEW_LEFT = 8
FEW_LEFT_SHARE = 0.1


class Admission(Protocol):
    """What the pool asks before it sends (``limits.Limits``). ``now`` is ``time.monotonic()``."""

    @property
    def window(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def is_probing(self) -> bool: ...
    def admit(self, request: Request, now: float) -> float: ...
    def done(self, request: Request, attempt: Attempt, decision: Decision, now: float) -> None: ...
    def withdrawn(self, request: Request, now: float) -> None: ...
    def contradictions(self, model: str) -> int: ...
    def believes_waits(self, model: str, now: float) -> bool: ...


class Desk(Protocol):
    """Where the pool reports. A BatchrunError raised here ends the run at once; one that is
    returned ends it too, but what is in flight may still arrive.
    """

    def sending(self, request: Request) -> None:
        """A first byte is about to leave. Returns when that is written."""

    def failed(
        self, request: Request, attempt: Attempt, decision: Decision, *, again: bool
    ) -> BatchrunError | None:
        """An attempt ended and its row is not settled: it is tried ``again``, or stays pending."""

    def settled(
        self, request: Request, attempt: Attempt, decision: Decision, tries: Tries
    ) -> BatchrunError | None:
        """The row has its outcome."""

    def resent(self, times: int) -> None:
        """An attempt had gone out before, on connections that were dead already."""

    def abandoned(self, request: Request) -> None:
        """An attempt was cut off in flight: whether it was billed is in doubt."""

    def idle(self) -> None:
        """A worker has nothing to send: what was reported so far should be written."""


Send: TypeAlias = Callable[[Request], Awaitable[Attempt]]
Judge: TypeAlias = Callable[[Attempt, Request], Decision]


class _Parked(NamedTuple):
    """A row that waits for its next attempt."""

    request: Request
    timer: asyncio.TimerHandle
    failures: int
    waits_as_told: bool  # by the endpoint, not by our own back-off


FIRST = Tries(attempts=1, in_doubt=0)


class Persistence(Protocol):
    """Remembers the failures of unsettled rows (``patience.Persistence``)."""

    def after(
        self, request: Request, decision: Decision, others: Others, *, few_left: bool
    ) -> Verdict:
        """How a row goes on after a failed attempt; forgets it when it ends."""

    def resent(self, request: Request, times: int) -> None:
        """Count attempts that went again at once, outside every budget."""

    def settle(self, request: Request) -> Tries | None:
        """All attempts of a row that now has its answer; None when this was the first."""


class Pool:
    """Runs the feed dry, or until ``stop``. One use; called on the loop's thread only.

    ``answered`` is how many rows earlier runs have answered; with ``prefixes`` one of the rows that
    begin alike goes first.
    """

    def __init__(
        self,
        *,
        feed: Feed,
        send: Send,
        judge: Judge,
        admission: Admission,
        persistence: Persistence,
        desk: Desk,
        drain_s: float,
        one_model: bool,
        answered: int = 0,
        prefixes: Prefixes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._feed = feed
        self._send = send
        self._judge = judge
        self._admission = admission
        self._persistence = persistence
        self._desk = desk
        self._drain_s = drain_s
        self._one_model = one_model
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._lines = Lines(lambda wait_s: self._loop.call_later(wait_s, self._guarded, self.staff))
        self._prefixes = prefixes
        self._answered = answered
        self._answered_s = -math.inf
        self._parked: dict[int, _Parked] = {}
        self._idle: deque[asyncio.Future[None]] = deque()
        self._busy: dict[asyncio.Task[None], Request] = {}
        self._workers = 0
        self._group: asyncio.TaskGroup | None = None
        self._finished = asyncio.Event()
        self._cut_timer: asyncio.TimerHandle | None = None
        self._bug: BaseException | None = None
        self.cause: BatchrunError | None = None

    async def run(self) -> BatchrunError | None:
        """Send everything; what stopped the run early, or None when the feed ran dry."""
        async with asyncio.TaskGroup() as self._group:
            self.staff()
            await self._finished.wait()
            for sleeper in self._idle:
                if not sleeper.done():
                    sleeper.set_result(None)
        if self._cut_timer is not None:
            self._cut_timer.cancel()
        if self._bug is not None:
            raise self._bug
        return self.cause

    def stop(self, cause: BatchrunError, drain_s: float | None = None) -> None:
        """Start nothing new, wake the sleepers, wait for what is in flight up to the drain time.

        Of several causes the one whose exit code matters most is kept.
        """
        if self.cause is None or _rank(cause) < _rank(self.cause):
            self.cause = cause
        self._cut_after(self._drain_s if drain_s is None else drain_s)
        self._feed.close()
        for parked in self._parked.values():
            parked.timer.cancel()
        self._parked.clear()
        if self._prefixes is not None:
            self._prefixes.clear()
        self._lines.clear()
        self._check_finished()

    def _cut_after(self, drain_s: float) -> None:
        """Of several stops the earliest end of the drain counts."""
        if self._cut_timer is not None:
            if self._cut_timer.when() <= self._loop.time() + drain_s:
                return
            self._cut_timer.cancel()
        self._cut_timer = self._loop.call_later(drain_s, self._cut)

    @property
    def stopping(self) -> bool:
        return self.cause is not None

    @property
    def in_flight(self) -> int:
        return len(self._busy)

    @property
    def waiting(self) -> int:
        """Rows that failed or were refused and wait for their turn."""
        aside = 0 if self._prefixes is None else len(self._prefixes)
        return len(self._parked) + len(self._lines) + aside

    def staff(self) -> None:
        """Wake or hire a worker where the window and the work allow; it does so for the next.

        Called whenever either may have grown: the feed has more, a wait is over, the window opened.
        Not all at once: a pace lets one request go at a time, and a whole window that wakes for
        each of them does nothing else.
        """
        if self.cause is not None:
            return
        if self._feed.error is not None:
            self._reader_failed(self._feed.error)
            return
        if self._prefixes is not None and len(self._prefixes):
            self._follow(self._prefixes.overdue(self._clock()))
        if self._admission.in_flight < self._admission.window and self._has_work():
            self._wake_one()
        self._check_finished()

    def _follow(self, released: list[Request]) -> None:
        for request in released:
            self._lines.join(request, "fresh")

    def _wake_one(self) -> None:
        while self._idle:
            sleeper = self._idle.popleft()
            if not sleeper.done():
                sleeper.set_result(None)
                return
        if self._workers < self._admission.window and self._group is not None:
            self._workers += 1
            self._group.create_task(self._work())

    def _reader_failed(self, error: BaseException) -> None:
        self._feed.error = None
        if isinstance(error, BatchrunError):
            self.stop(error)
        else:
            self._bug = error
            self.stop(BatchrunError("the input could not be read on"), drain_s=0.0)

    def _has_work(self) -> bool:
        """Whether somebody who asks now may find something."""
        if self._feed.rows and self._wants_new():
            return True
        return bool(self._lines) and self._lines.has_due(self._clock())

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while True:
                request = self._take()
                if request is None:
                    if not await self._rest():
                        return
                    continue
                self._busy[task] = request
                # Only now: a request in no line and with no worker yet would not be seen.
                if self._admission.in_flight < self._admission.window:
                    self.staff()
                try:
                    self._desk.sending(request)
                    attempt = await self._send(request)
                    self._conclude(request, attempt)
                except asyncio.CancelledError:
                    self._admission.withdrawn(request, self._clock())
                    self._desk.abandoned(request)
                    if self.cause is None:
                        raise
                    return
                except BatchrunError as exc:
                    self.stop(exc, drain_s=0.0)
                finally:
                    del self._busy[task]
        finally:
            self._workers -= 1
            self._check_finished()

    def _conclude(self, request: Request, attempt: Attempt) -> None:
        decision = self._judge(attempt, request)
        if attempt.resent:
            self._persistence.resent(request, attempt.resent)
            self._desk.resent(attempt.resent)
        released: list[Request] = []
        if self._prefixes is not None:
            released = self._prefixes.ended(request, attempt.ended_s, ok=decision.kind == "ok")
            self._follow(released)
        window = self._admission.window
        was_probing = bool(self._lines) and self._admission.is_probing
        contradictions = self._admission.contradictions(request.model)
        self._admission.done(request, attempt, decision, attempt.ended_s)
        if self._admission.contradictions(request.model) > contradictions:
            self._recall(request.model)
        if decision.kind == "ok":
            self._answered += 1
            self._answered_s = attempt.ended_s
            if self._lines:
                # What held its model back may be over with this answer; what held all back, is.
                self._lines.release(None if was_probing else request.model)
            tries = self._persistence.settle(request) or FIRST
            cause = self._desk.settled(request, attempt, decision, tries)
        else:
            cause = self._go_on(request, attempt, decision)
        if cause is not None:
            self.stop(cause)
        if self._admission.window > window or was_probing or released:
            self.staff()

    def _go_on(
        self, request: Request, attempt: Attempt, decision: Decision
    ) -> BatchrunError | None:
        is_final = decision.kind in ("rejected", "invalid_answer") and not decision.again
        stays_pending = self.cause is not None and not is_final
        if decision.kind == "fatal" or stays_pending:
            return self._desk.failed(request, attempt, decision, again=False)
        others: Others = "before" if self._answered else "never"
        if self._answered_s > attempt.started_s:
            others = "now"
        is_told = decision.kind == "rate_limit" and decision.wait_s is not None
        if is_told and not self._admission.believes_waits(request.model, attempt.ended_s):
            # Others are served meanwhile: it was about a place, and one may be free much sooner.
            decision, is_told = replace(decision, wait_s=None), False
        verdict = self._persistence.after(request, decision, others, few_left=self._few_left())
        if verdict.wait_s is None:
            return self._desk.settled(request, attempt, decision, verdict.tries)
        timer = self._loop.call_later(verdict.wait_s, self._guarded, self._unpark, request.row)
        self._parked[request.row] = _Parked(request, timer, verdict.tries.attempts, is_told)
        return self._desk.failed(request, attempt, decision, again=True)

    def _few_left(self) -> bool:
        few = max(FEW_LEFT, FEW_LEFT_SHARE * self._answered)
        return self._feed.exhausted and self.waiting + len(self._busy) <= few

    def _unpark(self, row: int) -> None:
        request, _, failures, _ = self._parked.pop(row)
        self._lines.join(request, "again" if failures == 1 else "stubborn")
        self.staff()

    def _recall(self, model: str) -> None:
        """A wait that was named did not hold for others: those who wait because of it go on."""
        for row, parked in list(self._parked.items()):
            if parked.waits_as_told and parked.request.model == model:
                parked.timer.cancel()
                self._unpark(row)

    def _take(self) -> Request | None:
        """The next request that may leave now; None when there is none."""
        admission = self._admission
        if self.cause is not None or admission.in_flight >= admission.window:
            return None
        now = self._clock()
        if not self._lines:
            return self._take_new(now)
        for rank in self._lines.order(is_probing=admission.is_probing):
            request = self._take_new(now) if rank == "new" else self._from_lines(rank, now)
            if request is not None:
                self._lines.went(rank)
                return request
        return None

    def _take_new(self, now: float) -> Request | None:
        while self._wants_new():
            request = self._feed.pop()
            if request is None:
                return None
            if self._prefixes is not None and not self._prefixes.may_go(request, now):
                continue
            if self._lines and self._lines.is_held(request.model, now):
                self._lines.join(request, "fresh")
                continue
            wait_s = self._admission.admit(request, now)
            if wait_s <= 0.0:
                return request
            self._lines.join(request, "fresh")
            self._lines.hold(request.model, wait_s, now)
        return None

    def _wants_new(self) -> bool:
        if not self.waiting:
            return True
        # With one model, a second new request would only join the line.
        if self._one_model and self._lines.has_fresh():
            return False
        return self.waiting < max(MIN_WAITING, WAITING_PER_PLACE * self._admission.window)

    def _from_lines(self, rank: Rank, now: float) -> Request | None:
        for request in self._lines.heads(rank, now):
            wait_s = self._admission.admit(request, now)
            if wait_s <= 0.0:
                self._lines.leave(request, rank)
                return request
            self._lines.hold(request.model, wait_s, now)
        return None

    async def _rest(self) -> bool:
        """Sleep until there may be work; False when there will be none."""
        try:
            self._desk.idle()
        except BatchrunError as exc:
            self.stop(exc, drain_s=0.0)
        self._check_finished()
        if self._finished.is_set() or self.cause is not None:
            return False
        sleeper = self._loop.create_future()
        self._idle.append(sleeper)
        await sleeper
        return not self._finished.is_set() and self.cause is None

    def _check_finished(self) -> None:
        if self._busy or self._finished.is_set():
            return
        if self.cause is None:
            work_left = not self._feed.exhausted or self._feed.error is not None
            if work_left or self.waiting:
                return
        self._finished.set()

    def _guarded(self, act: Callable[..., None], *args: object) -> None:
        """Run a timer's callback: the loop would log a bug in it, and the run wait for ever."""
        try:
            act(*args)
        except Exception as exc:  # raised again by ``run``
            self._bug = exc
            self.stop(BatchrunError("a bug"), drain_s=0.0)

    def _cut(self) -> None:
        for task in list(self._busy):
            task.cancel()


# Where several causes end a run, the first of these gives the exit code: what makes the result
# doubtful, what only a person can mend, who wanted it to end, and last what passes by itself.
_PRECEDENCE = (1, 74, 4, 129, 130, 143, 75)


def _rank(cause: BatchrunError) -> int:
    code = cause.exit_code
    return _PRECEDENCE.index(code) if code in _PRECEDENCE else len(_PRECEDENCE)
