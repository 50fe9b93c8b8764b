"""A process that sends: orders in, reports out, until the run's process closes the socket.

The signals that end a run are for the run's process, which tells what to do by what it orders, or
by its end.
"""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket

from batchrun import process
from batchrun.processes.desk import OrderDesk
from batchrun.processes.wire import HEARTBEAT_S, Frames, Terms, encode, orders_decoder


def main(fd: int) -> None:
    """Send what is ordered through the socket ``fd`` until its other end is closed."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    asyncio.run(_serve(socket.socket(fileno=fd)))


async def _serve(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    line = _Line()
    await loop.create_connection(lambda: line, sock=connection)
    terms = await line.terms
    if terms is None:
        return
    process.room_for_sockets(terms.room)
    with process.patient_collector():
        async with terms.endpoint_here() as endpoint:
            desk = OrderDesk(endpoint, news=lambda: loop.call_soon(line.report), one_clock=True)
            line.desk = desk
            while not line.over.done():
                line.report()
                await asyncio.wait([line.over], timeout=HEARTBEAT_S)
        await desk.drop()


class _Line(Frames):
    """The socket's end; reports of one turn of the loop go together."""

    def __init__(self) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self.desk: OrderDesk | None = None
        self.terms: asyncio.Future[Terms | None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()

    def report(self) -> None:
        """Say what came of the orders so far; with nothing to say, that this process is alive."""
        assert self.desk is not None
        self.say(encode(self.desk.reports()))

    def heard(self, frame: memoryview) -> None:
        if self.desk is None:
            self.terms.set_result(pickle.loads(frame))  # by the run's own process
        else:
            self.desk.take(orders_decoder.decode(frame))

    def lost(self) -> None:
        if not self.terms.done():
            self.terms.set_result(None)
        self.over.set_result(None)
