"""A process that sends: orders in, reports out, until the run's process closes the socket.

It knows no rows, no journal and no limits. The signals that end a run are for the run's process,
which tells what to do by what it orders, or by its end.
"""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket
import time
from typing import Final

from batchrun import process
from batchrun.endpoint import ChatEndpoint
from batchrun.processes.wire import HEARTBEAT_S, Frames, Orders, Reports, Terms, orders_decoder
from batchrun.types import Attempt, Request

# Orders that lay about for longer (this process was stopped, say) go back: the moment at which
# they might leave is over, and many at once would break a quota.
LATE_S: Final = 1.0


def main(fd: int) -> None:
    """Send what is ordered through the socket ``fd`` until its other end is closed."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    asyncio.run(_serve(socket.socket(fileno=fd)))


async def _serve(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    orders = _Orders()
    await loop.create_connection(lambda: orders, sock=connection)
    terms = await orders.terms
    if terms is None:
        return
    process.room_for_sockets(terms.room)
    with process.patient_collector():
        async with terms.endpoint_here() as endpoint:
            orders.serve(endpoint)
            while not orders.is_over:
                orders.report()
                await asyncio.wait([orders.over], timeout=HEARTBEAT_S)
        await orders.drop()


class _Orders(Frames):
    """Takes orders and makes reports; those of one turn of the loop go together."""

    def __init__(self) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self.terms: asyncio.Future[Terms | None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._endpoint: ChatEndpoint | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._reports: Reports = []

    @property
    def is_over(self) -> bool:
        return self.over.done()

    def serve(self, endpoint: ChatEndpoint) -> None:
        """Send through ``endpoint`` from now on."""
        self._endpoint = endpoint

    async def drop(self) -> None:
        """Cut off what is on its way: nobody is left to tell."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def report(self) -> None:
        """Say what came of the orders so far; with nothing to say, that this process is alive."""
        reports, self._reports = self._reports, []
        self.say(reports)

    def heard(self, frame: memoryview) -> None:
        if self._endpoint is None:
            self.terms.set_result(pickle.loads(frame))  # by the run's own process
            return
        orders = orders_decoder.decode(frame)
        self._take(orders, is_late=time.monotonic() - orders.at_s > LATE_S)

    def _take(self, orders: Orders, *, is_late: bool) -> None:
        for number in orders.given_up:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
        for number, body in enumerate(orders.bodies, orders.first):
            if is_late:
                self._tell(number, _late())
            else:
                self._tasks[number] = self._loop.create_task(self._send(number, body))

    async def _send(self, number: int, body: bytes) -> None:
        assert self._endpoint is not None
        request = Request(number, body, b"", 0, 0, "")
        try:
            self._tell(number, await self._endpoint.send(request))
        finally:
            del self._tasks[number]

    def _tell(self, number: int, attempt: Attempt) -> None:
        if not self._reports:
            self._loop.call_soon(self.report)
        self._reports.append((number, attempt))

    def lost(self) -> None:
        if not self.terms.done():
            self.terms.set_result(None)
        self.over.set_result(None)


def _late() -> Attempt:
    now_s = time.monotonic()
    return Attempt(
        status=None,
        headers={},
        body=b"",
        started_s=now_s,
        ended_s=now_s,
        finished_at_ms=int(time.time() * 1000),
        failure="connect",
        detail="the process that was to send it had been stopped",
        sent=False,
    )
