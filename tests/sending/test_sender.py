"""The sender whole, with an endpoint and a desk that are made up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from batchrun.config import RunConfig
from batchrun.console.progress import Progress
from batchrun.errors import BatchrunError, Interrupted, StoppedEarly
from batchrun.sending.feed import Feed
from batchrun.sending.sender import EarlyEnd, Sender, read_ahead
from batchrun.sending.typed import asked
from batchrun.types import Attempt, Decision, Request, Tries

ROWS = 20


class Silent:
    """An endpoint that never answers; it says when all its places are taken."""

    host, room, notes = "silent", 4, ()

    def __init__(self) -> None:
        self.sent = 0
        self.is_full = asyncio.Event()

    async def send(self, request: Request) -> Attempt:
        self.sent += 1
        if self.sent == self.room:
            self.is_full.set()
        await asyncio.Event().wait()
        raise AssertionError


class Doubts:
    """A desk that counts what was cut off."""

    def __init__(self) -> None:
        self.abandoned_rows: list[int] = []

    def sending(self, request: Request) -> None: ...

    def failed(
        self, request: Request, attempt: Attempt, decision: Decision, *, again: bool
    ) -> None: ...

    def settled(
        self, request: Request, attempt: Attempt, decision: Decision, tries: Tries
    ) -> None: ...

    def resent(self, times: int) -> None: ...

    def abandoned(self, request: Request) -> None:
        self.abandoned_rows.append(request.row)

    def idle(self) -> None: ...


def sender(endpoint: Silent, desk: Doubts) -> Sender:
    config = RunConfig(inputs=(), output="-", concurrency=100, drain_s=3600.0)
    how = asked(endpoint.send, config, lambda: False)
    return Sender(config, endpoint, desk, Progress(quiet=True), how, one_model=True)


def rows() -> list[Request]:
    return [Request(row, b"{}", row.to_bytes(16, "big"), 0, row, "m") for row in range(ROWS)]


def test_an_end_that_was_told_before_lets_nothing_leave() -> None:
    async def story() -> None:
        end, endpoint, enough = EarlyEnd(), Silent(), StoppedEarly("enough")
        end.tell(enough)
        fill = read_ahead(iter([rows()]))
        assert await sender(endpoint, Doubts()).run(fill, end) is enough
        assert endpoint.sent == 0

    asyncio.run(story())


def test_an_urgent_end_cuts_off_what_a_first_one_waits_for() -> None:
    async def story() -> BatchrunError | None:
        end, endpoint, desk = EarlyEnd(), Silent(), Doubts()

        async def hurry() -> None:
            await endpoint.is_full.wait()
            end.tell(StoppedEarly("the deadline"))
            await asyncio.sleep(0)
            end.tell(Interrupted(signal.SIGINT), urgent=True)

        cause = await sender(endpoint, desk).run(read_ahead(iter([rows()])), end, hurry())
        assert sorted(desk.abandoned_rows) == list(range(endpoint.room))
        return cause

    assert isinstance(asyncio.run(story()), Interrupted)


def test_a_filling_that_would_go_on_ends_with_the_sending() -> None:
    async def story() -> None:
        end, enough = EarlyEnd(), StoppedEarly("enough")
        cancelled = False

        async def fill(feed: Feed, staff: Callable[[], None]) -> None:
            nonlocal cancelled
            end.tell(enough)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled = True
                raise

        assert await sender(Silent(), Doubts()).run(fill, end) is enough
        assert cancelled

    asyncio.run(story())
