"""The process that Ray is in: it carries messages between the run's process and actors on nodes."""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket
from typing import Any

import ray

from batchrun.config import VERSION
from batchrun.processes.actor import Worker
from batchrun.processes.wire import (
    CONNECTED,
    GONE,
    NO_PLACE,
    ORDERS,
    REPORTS,
    START,
    Frames,
    Terms,
    marked,
    unmarked,
)


def main(fd: int) -> None:
    """Carry messages through the socket ``fd`` until its other end is closed."""
    asyncio.run(_serve(socket.socket(fileno=fd)))
    ray.shutdown()


async def _serve(connection: socket.socket) -> None:
    line = _Line()
    await asyncio.get_running_loop().create_connection(lambda: line, sock=connection)
    try:
        await _connect(await line.address)
    except Exception as exc:
        line.say(marked(NO_PLACE, GONE, _in_a_line(exc).encode()))
        line.close_line()
    else:
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        line.say(marked(NO_PLACE, CONNECTED, nodes.to_bytes(4, "big")))
        line.serve()
    await line.over


async def _connect(address: str | None) -> None:
    if address is None:
        # Not what RAY_ADDRESS names: prompts go to a cluster that was asked for.
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=address, log_to_driver=False)
    # The signals that end a run are for the run's process. They are not ignored, for what Ray
    # starts would inherit that.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: None)


class _Line(Frames):
    """The socket's end, and the actors by their places."""

    def __init__(self) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self.address: asyncio.Future[str | None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self._unserved: list[bytes] | None = []
        self._actors: dict[int, Any] = {}
        self._listening: set[asyncio.Task[None]] = set()

    def heard(self, frame: memoryview) -> None:
        if not self.address.done():
            self.address.set_result(pickle.loads(frame))  # by the run's own process
        elif self._unserved is not None:
            self._unserved.append(bytes(frame))
        else:
            self._do(frame)

    def serve(self) -> None:
        """Do what was asked so far, and from now on at once."""
        unserved, self._unserved = self._unserved or [], None
        for frame in unserved:
            with memoryview(frame) as view:
                self._do(view)

    def _do(self, frame: memoryview) -> None:
        place, kind, content = unmarked(frame)
        if kind == START:
            self._start(place, pickle.loads(content))
        elif (actor := self._actors.get(place)) is None:
            return
        elif kind == ORDERS:
            actor.take.remote(bytes(content))
        else:
            ray.kill(actor)

    def _start(self, place: int, terms: Terms) -> None:
        # One that died is not restarted by Ray: another takes its place, perhaps elsewhere.
        worker = ray.remote(Worker).options(
            num_cpus=1, max_restarts=0, max_concurrency=1000, scheduling_strategy="SPREAD"
        )
        actor = worker.remote(terms, VERSION)
        self._actors[place] = actor
        task = asyncio.get_running_loop().create_task(self._listen(place, actor))
        self._listening.add(task)
        task.add_done_callback(self._listening.discard)

    async def _listen(self, place: int, actor: Any) -> None:
        try:
            while True:
                self.say(marked(place, REPORTS, await actor.reports.remote()))
        except Exception as exc:
            del self._actors[place]
            self.say(marked(place, GONE, _in_a_line(exc).encode()))

    def lost(self) -> None:
        if not self.address.done():
            self.address.cancel()
        self.over.set_result(None)


def _in_a_line(exc: Exception) -> str:
    """Why, where Ray says it in many."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__
