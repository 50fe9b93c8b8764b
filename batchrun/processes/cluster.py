"""Processes of a Ray cluster: Ray places them on its nodes, carries messages and says who died.

Files, journal and limits stay with the run's own process: nodes share no storage, and need nothing
but batchrun and a way to the endpoint. Ray itself runs in a process of its own (``bridge``): it
prints where it likes, takes signals over, and ends the process that it is in when its cluster goes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import msgspec

from batchrun.errors import StoppedEarly, UsageError
from batchrun.processes.here import END_S, LEAVE_S, ended, ending, started
from batchrun.processes.member import Member, Vacate
from batchrun.processes.wire import (
    CONNECTED,
    GONE,
    KILL,
    NO_PLACE,
    ORDERS,
    START,
    Frames,
    Orders,
    Terms,
    encode,
    marked,
    reports_decoder,
    unmarked,
)
from batchrun.types import Attempt
from batchrun.words import duration

CONNECT_S: Final = 90.0
KNOCK_S: Final = 10.0
LOOK_S: Final = 0.02


def check_ray() -> None:
    """UsageError where Ray is not installed."""
    try:
        found = importlib.util.find_spec("ray")
    except ValueError:
        found = None
    if found is None:
        raise UsageError(
            "--engine ray needs Ray, which is not installed: pip install 'batchrun[ray]'"
        )


class Cluster:
    """A Ray cluster behind a bridge, which is built again when it breaks."""

    def __init__(self, address: str | None) -> None:
        self.nodes = 0  # when it was connected to
        self._address = address
        self._bridge: _Bridge | None = None
        self._places = 0

    async def ready(self, check: Callable[[], None]) -> None:
        """Wait for the connection; StoppedEarly when there will be none."""
        where = f"at {self._address}" if self._address is not None else "on this machine"
        try:
            await asyncio.to_thread(_knock, self._address)
        except OSError as exc:
            raise StoppedEarly(f"no Ray cluster {where}: {exc.strerror or exc}") from exc
        bridge = await self._built()
        for _ in range(int(CONNECT_S / LOOK_S)):
            if bridge.nodes:
                self.nodes = bridge.nodes
                return
            if bridge.ending is not None:
                raise StoppedEarly(f"no Ray cluster {where}: {bridge.ending}")
            await asyncio.sleep(LOOK_S)
            check()
        raise StoppedEarly(f"no Ray cluster {where} within {duration(CONNECT_S)}")

    async def close(self) -> None:
        """Give the connection up; a cluster that was started for it ends."""
        if self._bridge is not None:
            await self._bridge.close()

    async def _built(self) -> _Bridge:
        if self._bridge is None or self._bridge.ending is not None:
            ours, process = started("bridge", quiet=True)
            bridge = _Bridge(process)
            await asyncio.get_running_loop().create_connection(lambda: bridge, sock=ours)
            bridge.say(pickle.dumps(self._address))
            self._bridge = bridge
        return self._bridge

    async def start(self, terms: Terms, vacate: Vacate) -> Member:
        """A process somewhere on the cluster, ready as soon as Ray has found a place for it."""
        bridge = await self._built()
        self._places += 1
        remote = _Remote(vacate, bridge, self._places)
        bridge.remotes[self._places] = remote
        bridge.say(marked(self._places, START, pickle.dumps(terms)))
        return remote


class OnNodes:
    """Starts processes on a cluster."""

    def __init__(self, cluster: Cluster, terms: Terms) -> None:
        self._cluster = cluster
        self._terms = terms

    async def start(self, vacate: Vacate) -> Member:
        return await self._cluster.start(self._terms, vacate)


@asynccontextmanager
async def cluster(address: str | None, check: Callable[[], None]) -> AsyncIterator[Cluster]:
    """The Ray cluster at ``address``, or one of this machine alone, for the block.

    StoppedEarly where no cluster can be reached; whatever ``check`` raises ends the waiting.
    """
    connection = Cluster(address)
    try:
        await connection.ready(check)
        yield connection
    finally:
        await connection.close()


def _knock(address: str | None) -> None:
    """OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=KNOCK_S):
            pass


class _Bridge(Frames):
    """The process that Ray is in, as the run sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__()
        self.nodes = 0
        self.ending: str | None = None
        self.remotes: dict[int, _Remote] = {}
        self._process = process
        self._said_last = ""

    def heard(self, frame: memoryview) -> None:
        place, kind, content = unmarked(frame)
        if kind == CONNECTED:
            self.nodes = int.from_bytes(content, "big")
        elif kind == GONE:
            self._said_last = str(content, "utf-8", "replace")
            if place != NO_PLACE and (remote := self.remotes.pop(place, None)) is not None:
                remote.gone(self._said_last)
        elif (remote := self.remotes.get(place)) is not None:
            remote.heard(content)

    def lost(self) -> None:
        with suppress(subprocess.TimeoutExpired):  # it may hang in its last words
            self._process.wait(END_S)
        self._process.kill()
        code = self._process.wait()
        self.ending = self._said_last or ending(code)
        remotes, self.remotes = self.remotes, {}
        for remote in remotes.values():
            remote.gone(self.ending)

    async def close(self) -> None:
        self.close_line()
        await ended(self._process, LEAVE_S * 5)


class _Remote(Member):
    """A process on a node."""

    def __init__(self, vacate: Vacate, bridge: _Bridge, place: int) -> None:
        super().__init__(vacate)
        self._bridge = bridge
        self._place = place

    def heard(self, content: memoryview) -> None:
        """Reports, as if they had ended when they came: clocks of two machines do not agree."""
        received_s = time.monotonic()
        reports = reports_decoder.decode(content)
        self.came([(number, _ended_at(attempt, received_s)) for number, attempt in reports])

    def tell(self, orders: Orders) -> None:
        self._bridge.say(marked(self._place, ORDERS, encode(orders)))

    def kill(self) -> None:
        self._bridge.say(marked(self._place, KILL, b""))

    async def leave(self) -> None:
        self._is_leaving = True
        self.kill()


def _ended_at(attempt: Attempt, received_s: float) -> Attempt:
    took_s = attempt.ended_s - attempt.started_s
    return msgspec.structs.replace(attempt, started_s=received_s - took_s, ended_s=received_s)
