"""Feed, limits, pool and endpoint, put together before anything leaves.

``deliver`` sends so with a journal at the desk, ``complete`` with a caller who waits for results.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

from batchrun.config import RunConfig
from batchrun.console import Progress
from batchrun.errors import BatchrunError, Interrupted
from batchrun.limits import Budget, Limits, LimitSettings
from batchrun.sending.feed import Feed
from batchrun.sending.patience import Persistence
from batchrun.sending.pool import Desk, Pool
from batchrun.sending.prefixes import Prefixes
from batchrun.sending.typed import Asked
from batchrun.types import Attempt, Request
from batchrun.words import count, duration, verb

TICK_S = 0.2
# Puts requests into the feed until it is closed or at its end, and calls the second for each batch.
Fill: TypeAlias = Callable[[Feed, Callable[[], None]], Coroutine[Any, Any, None]]


class OpenEndpoint(Protocol):
    """Where requests go (``endpoint.ChatEndpoint``)."""

    @property
    def host(self) -> str:
        """Its name for people."""

    @property
    def room(self) -> int:
        """How many requests may be in flight at the very most."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of how sending went, so far: a line each."""

    async def send(self, request: Request) -> Attempt:
        """Make one request and say what came of it; only cancellation raises."""


class EarlyEnd:
    """Whether and why work should end early: made first, given to all who cause or heed it.

    ``tell`` on the loop's thread; ``check`` and ``requested`` from any.
    """

    def __init__(self) -> None:
        self.cause: BatchrunError | None = None
        self.is_urgent = False  # what is in flight is cut off, not waited for
        self.requested = threading.Event()
        self._news = asyncio.Event()

    def tell(self, cause: BatchrunError, *, urgent: bool = False) -> None:
        """End with ``cause``; told again, a signal outranks whatever came first."""
        if self.cause is None or isinstance(cause, Interrupted):
            self.cause = cause
        self.is_urgent |= urgent
        self.requested.set()
        self._news.set()

    async def news(self) -> BatchrunError:
        """The cause, as soon as it was told (again) since the last call. For one who waits."""
        await self._news.wait()
        self._news.clear()
        assert self.cause is not None
        return self.cause

    def check(self) -> None:
        """Raise the cause; called by passes over many rows, once a batch."""
        if self.cause is not None:
            raise self.cause


def limit_settings(config: RunConfig, room: int) -> LimitSettings:
    """What the user said about speed; at most ``room`` requests can be in flight."""
    return LimitSettings(
        concurrency=config.concurrency and min(config.concurrency, room),
        max_concurrency=room,
        rpm=config.rpm,
        tpm=config.tpm,
        max_wait_s=config.max_wait_s,
        max_outage_s=config.max_outage_s,
        share=1.0 if config.shard is None else 1.0 / config.shard.of,
    )


class Sender:
    """Sends to one endpoint what fills the feed, and reports to ``desk``. One use.

    ``talk`` hears why the pace changes, and of answers that an early end waits for. ``answered`` is
    how many rows earlier runs have answered.
    """

    def __init__(
        self,
        config: RunConfig,
        endpoint: OpenEndpoint,
        desk: Desk,
        talk: Progress,
        asked: Asked,
        *,
        one_model: bool,
        answered: int = 0,
        budget: Budget | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        settings = limit_settings(config, endpoint.room)
        self.limits = Limits(settings, host=endpoint.host, budget=budget, on_change=talk.detail)
        self.feed = Feed()
        self.pool = Pool(
            feed=self.feed,
            send=asked.send,
            judge=asked.judge,
            admission=self.limits,
            persistence=Persistence(
                max_retries=config.max_retries,
                max_in_doubt_retries=config.max_in_doubt_retries,
                max_wait_s=config.max_wait_s,
            ),
            desk=desk,
            drain_s=config.drain_s,
            one_model=one_model,
            answered=answered,
            prefixes=prefixes,
        )
        self._drain_s = config.drain_s
        self._talk = talk

    async def run(
        self, fill: Fill, end: EarlyEnd, *beside: Coroutine[Any, Any, None]
    ) -> BatchrunError | None:
        """Send until the feed is at its end, or say what ended it before: ``end`` or the limits.

        ``beside`` goes on meanwhile, and is cancelled with the filling when sending is over.
        """
        async with asyncio.TaskGroup() as group:
            work = (self._heed(end), fill(self.feed, self.pool.staff), self._tick(), *beside)
            helpers = [group.create_task(each) for each in work]
            try:
                return await self.pool.run()
            finally:
                self.feed.close()
                for helper in helpers:
                    helper.cancel()

    async def _heed(self, end: EarlyEnd) -> None:
        while True:
            cause = await end.news()
            if not end.is_urgent and (number := self.pool.in_flight):
                its = "its" if number == 1 else "their"
                coming = f"{count(number, 'answer')} {verb(number, 'are')} on {its} way"
                how = " (Ctrl-C: stop now)" if isinstance(cause, Interrupted) else ""
                self._talk.note(
                    f"{coming}, waiting up to {duration(self._drain_s)}{how}", label="stopping"
                )
            self.pool.stop(cause, drain_s=0.0 if end.is_urgent else None)

    async def _tick(self) -> None:
        """Ask the limits five times a second whether going on is of use."""
        while True:
            await asyncio.sleep(TICK_S)
            verdict = self.limits.stop(time.monotonic())
            if verdict is not None and not self.pool.stopping:
                self.pool.stop(verdict)
            self.pool.staff()


def read_ahead(batches: Iterator[list[Request]]) -> Fill:
    """Fill a feed from a thread that iterates ``batches``, as far ahead as the feed has room."""

    async def fill(feed: Feed, staff: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def read() -> None:
            error: BaseException | None = None
            try:
                for batch in batches:
                    if not feed.put(batch):
                        break
                    loop.call_soon_threadsafe(staff)
            except BaseException as exc:  # raised again by the pool, on the loop's thread
                error = exc
            feed.end(error)
            loop.call_soon_threadsafe(staff)

        with ThreadPoolExecutor(1, "batchrun-read") as reader:
            reading = loop.run_in_executor(reader, read)
            try:
                await asyncio.shield(reading)
            finally:
                # The feed is closed by now: its thread lets go of the input.
                await reading

    return fill
