"""Send what is pending: the pool, the limits, the endpoint and the journal, working together.

The order of writes is the promise: a SENT record is in the journal before a request's first byte
leaves, an outcome is in the journal before it counts, and one write serves both (the outcome of a
worker's last row and the SENT of its next). fdatasync runs once a second in a thread of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from batchrun import answers, retry
from batchrun.accounting import RunTally
from batchrun.config import RunConfig
from batchrun.endpoint import ChatEndpoint
from batchrun.errors import BatchrunError, EndpointRefused
from batchrun.journal import Held, Journal
from batchrun.limits import Limits, LimitSettings
from batchrun.pool import Feed, Pool
from batchrun.progress import Progress, Snapshot
from batchrun.types import (
    NO_USAGE,
    Attempt,
    Bound,
    Decision,
    Outcome,
    Reply,
    Request,
    Tries,
)

TICK_S = 0.2
SYNC_S = 1.0
# An endpoint's error page is kept for the record; beyond this it is somebody's web site.
MAX_ERROR_BODY = 2**20
# The share of wall time this process may compute before it, not the endpoint, is the bottleneck.
BUSY_SHARE = 0.9
REQUEST_ID_HEADERS = (
    *("x-request-id", "mistral-correlation-id", "request-id", "x-litellm-call-id", "cf-ray"),
)


class Delivered(NamedTuple):
    """What sending amounted to; ``cause`` is what ended it early, None when nothing did."""

    cause: BatchrunError | None
    tally: RunTally
    bound_by: Bound
    reopened: int  # rows that failed alike and are pending again
    wrong_model: bool


class Totals(NamedTuple):
    """The rows of the whole output, for the bar: those settled before count as done."""

    total: int
    ok: int
    failed: int


class Watch(Protocol):
    """Asked about once a second with what a second process may want to know."""

    def __call__(self, snapshot: Snapshot, bound_by: Bound) -> None: ...


async def deliver(
    config: RunConfig,
    endpoint: ChatEndpoint,
    host: str,
    requests: Iterator[list[Request]],
    journal: Journal,
    before: Totals,
    talk: Progress,
    *,
    room: int,
    one_model: bool,
    on_pool: Callable[[Pool], None],
    watch: Watch,
) -> Delivered:
    """Send ``requests`` until they are settled or something ends the run.

    ``room`` is how many connections this process can open. ``on_pool`` is given the pool before
    anything is sent: whoever catches signals stops it.
    """
    limits = admission_for(config, host, room)
    limits.on_change = talk.detail
    desk = _Desk(config, journal, host)
    feed = Feed()
    pool = Pool(
        feed=feed,
        send=endpoint.send,
        judge=retry.classify,
        admission=limits,
        persistence=persistence_for(config),
        desk=desk,
        drain_s=config.drain_s,
        one_model=one_model,
    )
    desk.stop = pool.stop
    on_pool(pool)
    loop = asyncio.get_running_loop()

    meter = _Meter(limits, feed, pool, desk.tally, before)
    with (
        ThreadPoolExecutor(1, "batchrun-read") as reader,
        ThreadPoolExecutor(1, "batchrun-sync") as syncer,
    ):
        reading = loop.run_in_executor(reader, _read_ahead, requests, feed, loop, pool)
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(watch_limits(limits, pool, lambda: talk.update(meter.sample()))),
                group.create_task(_keep_durable(journal, pool, syncer, meter, watch)),
            ]
            try:
                cause = await pool.run()
            finally:
                feed.close()
                for helper in helpers:
                    helper.cancel()
                await reading
    if cause is None or cause.exit_code != 74:
        desk.idle()
        await asyncio.to_thread(journal.sync)
    talk.update(meter.snapshot())
    return Delivered(cause, desk.tally, meter.bound_by(), desk.reopened, desk.wrong_model)


def admission_for(config: RunConfig, host: str, room: int) -> Limits:
    """``room`` is how many requests may be in flight at the very most."""
    settings = LimitSettings(
        concurrency=config.concurrency and min(config.concurrency, room),
        max_concurrency=room,
        rpm=config.rpm,
        tpm=config.tpm,
        max_wait_s=config.max_wait_s,
        max_outage_s=config.max_outage_s,
    )
    return Limits(settings, host=host)


def persistence_for(config: RunConfig) -> retry.Persistence:
    return retry.Persistence(
        max_retries=config.max_retries,
        max_in_doubt_retries=config.max_in_doubt_retries,
        max_wait_s=config.max_wait_s,
    )


def refusal(host: str, decision: Decision) -> EndpointRefused:
    """What a fatal decision ends the run with; its reason reads on after the host's name."""
    advice = retry.NEXT_STEPS.get(decision.code)
    return EndpointRefused(f"{host} {decision.reason}", next_steps=(advice,) if advice else ())


def _read_ahead(
    requests: Iterator[list[Request]], feed: Feed, loop: asyncio.AbstractEventLoop, pool: Pool
) -> None:
    """The reader's thread: fill the feed until the input ends or nobody wants more."""
    error: BaseException | None = None
    try:
        for batch in requests:
            if not feed.put(batch):
                break
            loop.call_soon_threadsafe(pool.staff)
    except BaseException as exc:  # raised again by the pool, on the loop's thread
        error = exc
    feed.end(error)
    loop.call_soon_threadsafe(pool.staff)


async def watch_limits(
    limits: Limits, pool: Pool, each_tick: Callable[[], None] = lambda: None
) -> None:
    """Ask the limits five times a second whether going on is of use; runs until cancelled."""
    while True:
        await asyncio.sleep(TICK_S)
        verdict = limits.stop(time.monotonic())
        if verdict is not None and not pool.stopping:
            pool.stop(verdict)
        pool.staff()
        each_tick()


async def _keep_durable(
    journal: Journal, pool: Pool, syncer: ThreadPoolExecutor, meter: _Meter, watch: Watch
) -> None:
    """One fdatasync a second at most: the answers a power loss may cost."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SYNC_S)
        try:
            if (sync := journal.begin_sync()) is not None:
                await loop.run_in_executor(syncer, sync)
                journal.end_sync()
        except BatchrunError as exc:
            pool.stop(exc, drain_s=0.0)
            return
        await loop.run_in_executor(syncer, watch, meter.snapshot(), meter.bound_by())


class _Desk:
    """Journals what the pool reports, then counts it, and ends a run that fails from its start."""

    def __init__(self, config: RunConfig, journal: Journal, host: str) -> None:
        self.tally = RunTally()
        self.reopened = 0
        self.wrong_model = False
        self.stop: Callable[[BatchrunError], None] = _no_pool_yet
        self._journal = journal
        self._host = host
        self._unwritten: list[tuple[Outcome, Reply | None, int]] = []
        self._abort_after = config.abort_after
        self._ever_ok = journal.count(Held.OK) > 0
        self._alike: dict[str, list[int]] = {}

    def sending(self, request: Request) -> None:
        self._journal.sending(request.hash, request.occurrence, request.slot)
        self._write()

    def failed(self, request: Request, decision: Decision, *, again: bool) -> None:
        self._journal.failed(
            request.hash, request.occurrence, request.slot, in_doubt=decision.in_doubt
        )
        self.tally.attempt_failed(decision, again=again)
        if decision.kind == "fatal":
            self.wrong_model = decision.code == "model_not_found"
            self.stop(refusal(self._host, decision))

    def settled(self, request: Request, attempt: Attempt, decision: Decision, tries: Tries) -> None:
        outcome = outcome_of(request, attempt, decision, tries)
        self._journal.settled(request.slot, outcome)
        self._unwritten.append((outcome, attempt.reply, request.row))
        if decision.kind == "ok":
            self._ever_ok = True
            return
        self.tally.attempt_failed(decision, again=False)
        # Rows that may have been billed so often are not opened again for a next run to pay for.
        may_compare = self._abort_after and decision.alike and not tries.doubt_spent
        if may_compare and not self._ever_ok:
            self._compare(request.slot, decision)

    def resent(self, times: int) -> None:
        self.tally.resent(times)

    def abandoned(self, request: Request) -> None:
        # The SENT record without an end says so in the journal.
        self.tally.withdrawn()

    def idle(self) -> None:
        self._write()

    def _write(self) -> None:
        self._journal.flush()
        if self._unwritten:
            for outcome, reply, row in self._unwritten:
                self.tally.add(outcome, reply, row)
            self._unwritten.clear()

    def _compare(self, slot: int, decision: Decision) -> None:
        if self.reopened:
            # Those in flight when the run was ended: of the same cause, or no better known.
            self._journal.reopen(slot)
            self.reopened += 1
            return
        slots = self._alike.setdefault(decision.alike, [])
        slots.append(slot)
        if len(slots) < self._abort_after:
            return
        for refused in slots:
            self._journal.reopen(refused)
        self.reopened = len(slots)
        first = f"{len(slots):,} rows all failed the same way" if slots[1:] else "row failed"
        self.stop(EndpointRefused(f"the first {first}: {decision.reason}"))


def _no_pool_yet(cause: BatchrunError) -> None:
    raise cause


def outcome_of(request: Request, attempt: Attempt, decision: Decision, tries: Tries) -> Outcome:
    """What the journal keeps of a settled request."""
    kind = decision.kind
    assert kind != "fatal"
    reply = attempt.reply
    body = attempt.body
    ok = kind == "ok"
    if not ok and len(body) > MAX_ERROR_BODY:
        body = b""
    return Outcome(
        hash=request.hash,
        occurrence=request.occurrence,
        kind=kind,
        final=ok or kind == "rejected" or tries.doubt_spent,
        attempts=tries.attempts,
        in_doubt=request.in_doubt + tries.in_doubt,
        http_status=attempt.status,
        code="" if ok else decision.code,
        message="" if ok else decision.reason,
        request_id=_request_id(attempt),
        model=request.model,
        latency_s=attempt.ended_s - attempt.started_s,
        ttft_s=attempt.ttft_s,
        finished_at_ms=attempt.finished_at_ms,
        # Tokens that a broken answer mentions belong to an attempt in doubt, not to an answer.
        usage=reply.usage if ok and reply is not None else NO_USAGE,
        body=body,
    )


def _request_id(attempt: Attempt) -> str:
    headers = attempt.headers
    for name in REQUEST_ID_HEADERS:
        if value := headers.get(name):
            return value
    return answers.request_id(attempt.body)


class _Meter:
    """Measures the run for the bar, the status file and the question what bounds it."""

    def __init__(
        self, limits: Limits, feed: Feed, pool: Pool, tally: RunTally, before: Totals
    ) -> None:
        self._limits = limits
        self._feed = feed
        self._pool = pool
        self._tally = tally
        self._before = before
        self._votes: Counter[Bound] = Counter()
        self._wall_s = time.monotonic()
        self._cpu_s = time.process_time()

    def snapshot(self) -> Snapshot:
        tally, before, now = self._tally, self._before, time.monotonic()
        return Snapshot(
            total=before.total,
            done=before.ok + before.failed + tally.done,
            ok=before.ok + tally.ok,
            failed=before.failed + tally.failed,
            in_flight=self._limits.in_flight,
            tokens=tally.tokens_spent,
            waiting=self._limits.waiting(now),
            longest_s=self._limits.longest_s(now),
            resting=self._pool.waiting,
            bound_by=self._limits.bound_by(),
        )

    def sample(self) -> Snapshot:
        """Take one vote on what bounds the run, and its picture."""
        wall_s, cpu_s = time.monotonic(), time.process_time()
        busy = (cpu_s - self._cpu_s) / max(wall_s - self._wall_s, 1e-9)
        self._wall_s, self._cpu_s = wall_s, cpu_s
        if self._feed.starved and not self._pool.waiting:
            self._votes["input"] += 1
        elif busy > BUSY_SHARE:
            self._votes["loop"] += 1
        else:
            self._votes[self._limits.bound_by()] += 1
        return self.snapshot()

    def bound_by(self) -> Bound:
        return self._votes.most_common(1)[0][0] if self._votes else "endpoint"
