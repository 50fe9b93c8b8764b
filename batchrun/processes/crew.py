"""The processes that send for this one, behind the door of one endpoint.

Whatever becomes of a process, every request gets its Attempt: when a process dies, what it had in
flight is in doubt and another process takes its place; one that is silent gets nothing new, and
when it stays silent for longer than any answer may take it is killed.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import subprocess
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from batchrun.errors import StoppedEarly
from batchrun.processes.wire import HEARTBEAT_S, Frames, Orders, Terms, reports_decoder
from batchrun.types import Attempt, Request
from batchrun.words import count

# Heartbeats missed before a process gets nothing new.
SILENT_BEATS: Final = 3
# Seconds on top of the timeout of an answer before a silent process is killed.
PATIENCE_S: Final = 60.0
# A place whose processes end so many times before they are ready is given up.
FALSE_STARTS: Final = 3
LEAVE_S: Final = 2.0
END_S: Final = 0.2

_START: Final = """\
import sys
fd, *sys.path[:] = sys.argv[1:]
from batchrun.processes.child import main
main(int(fd))
"""


class Crew:
    """``processes`` processes that send on the same ``terms``. Use as an async context manager.

    It is an ``OpenEndpoint``: ``send`` never raises but for cancellation. Entering raises
    StoppedEarly when no process can be started. ``notes`` says what happened to processes.
    """

    def __init__(self, terms: Terms, processes: int) -> None:
        self.host = terms.endpoint.host
        self.room = terms.room * processes
        self._terms = terms
        self._places = [_Place(terms) for _ in range(processes)]

    async def __aenter__(self) -> Self:
        try:
            for place in self._places:
                await place.start()
            await self._first_ready()
        except BaseException:
            await self._close()
            raise
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def _first_ready(self) -> None:
        """Wait until somebody can send; StoppedEarly when nobody will."""
        while not any(place.is_ready for place in self._places):
            if all(place.is_given_up for place in self._places):
                raise StoppedEarly(
                    "no process that sends could be started"
                    f" (last try: {self._places[-1].last_death})",
                    next_steps=("run with --processes 1",),
                )
            await asyncio.sleep(0.01)
            for place in self._places:
                if place.is_empty:
                    await place.start()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._keeper.cancel()
        with suppress(asyncio.CancelledError):
            await self._keeper
        await self._close()

    async def _close(self) -> None:
        await asyncio.gather(*(place.close() for place in self._places))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of processes that ended or hung, a line each."""
        deaths = sum(place.deaths for place in self._places)
        if not deaths:
            return ()
        last = next(place.last_death for place in self._places if place.deaths)
        return (f"a sending process died and was replaced, {count(deaths, 'time')} (last: {last})",)

    async def send(self, request: Request) -> Attempt:
        """Make one request in the process that has the least to do; see ``ChatEndpoint.send``."""
        started_s = time.monotonic()
        ready = [place for place in self._places if place.takes_more]
        if not ready:
            return _failed(started_s, "no process to send it", sent=False)
        place = min(ready, key=_Place.in_flight)
        number, answer = place.order(request.body)
        try:
            attempt = await answer
        except asyncio.CancelledError:
            place.give_up(number)
            raise
        if attempt is None:
            return _failed(started_s, "the process that sent it ended", sent=True)
        return attempt

    async def _keep(self) -> None:
        """Once a second: fill places, and end processes that hang."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for place in self._places:
                if place.is_empty and not place.is_given_up:
                    await place.start()
                else:
                    place.beat(self._terms.timeout_s + PATIENCE_S)


class _Place:
    """Where a process is, or will be again."""

    def __init__(self, terms: Terms) -> None:
        self.deaths = 0
        self.last_death = ""
        self._terms = terms
        self._member: _Member | None = None
        self._false_starts = 0

    @property
    def is_empty(self) -> bool:
        return self._member is None

    @property
    def is_ready(self) -> bool:
        return self._member is not None and self._member.is_ready

    @property
    def is_given_up(self) -> bool:
        return self._false_starts >= FALSE_STARTS

    @property
    def takes_more(self) -> bool:
        member = self._member
        return member is not None and member.is_ready and member.silent_beats < SILENT_BEATS

    async def start(self) -> None:
        """Put a process here; where the system has none to give, that is a false start."""
        try:
            ours, started = _started()
        except OSError as exc:
            self._false_starts += 1
            self._note(exc.strerror or type(exc).__name__)
            return
        member = _Member(self, started)
        self._member = member
        await asyncio.get_running_loop().create_connection(lambda: member, sock=ours)
        member.say(pickle.dumps(self._terms))

    def vacate(self, member: _Member, ending: str) -> None:
        """Told by a process that it is gone."""
        self._member = None
        if member.is_ready:
            self._false_starts = 0
        else:
            self._false_starts += 1
        self._note(ending)

    def _note(self, ending: str) -> None:
        self.deaths += 1
        self.last_death = ending

    def in_flight(self) -> int:
        assert self._member is not None
        return self._member.in_flight

    def order(self, body: bytes) -> tuple[int, asyncio.Future[Attempt | None]]:
        assert self._member is not None
        return self._member.order(body)

    def give_up(self, number: int) -> None:
        if self._member is not None:
            self._member.give_up(number)

    def beat(self, patience_s: float) -> None:
        """A second has passed, in which this process ran."""
        if self._member is not None:
            self._member.silent_beats += 1
            if self._member.silent_beats * HEARTBEAT_S > patience_s:
                self._member.kill()

    async def close(self) -> None:
        if self._member is not None:
            await self._member.leave()


def _started() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A process, and our end of the socket through which it learns all, the key among it."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return ours, subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # a Ctrl-C is for the run's process
            )
        except BaseException:
            ours.close()
            raise


class _Member(Frames):
    """One process, and what it has in flight. Orders of one turn of the loop go together."""

    def __init__(self, place: _Place, started: subprocess.Popen[bytes]) -> None:
        super().__init__()
        self.is_ready = False
        self.silent_beats = 0
        self._place = place
        self._process = started
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Attempt | None]] = {}
        self._orders = Orders(0.0, 0, [], [])
        self._next = 0
        self._is_leaving = False

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    def order(self, body: bytes) -> tuple[int, asyncio.Future[Attempt | None]]:
        """Have ``body`` sent: its number, and what will be its Attempt; None if nobody can tell."""
        number, self._next = self._next, self._next + 1
        answer: asyncio.Future[Attempt | None] = self._loop.create_future()
        self._waiting[number] = answer
        self._soon().bodies.append(body)
        return number, answer

    def give_up(self, number: int) -> None:
        """Nobody waits for this one any more."""
        if self._waiting.pop(number, None) is not None:
            self._soon().given_up.append(number)

    def _soon(self) -> Orders:
        """The orders that leave at the end of this turn of the loop."""
        if not self._orders.bodies and not self._orders.given_up:
            self._loop.call_soon(self._flush)
        return self._orders

    def _flush(self) -> None:
        orders, self._orders = self._orders, Orders(0.0, 0, [], [])
        orders.at_s = time.monotonic()
        orders.first = self._next - len(orders.bodies)
        self.say(orders)

    def heard(self, frame: memoryview) -> None:
        self.is_ready = True
        self.silent_beats = 0
        for number, attempt in reports_decoder.decode(frame):
            answer = self._waiting.pop(number, None)
            if answer is not None and not answer.done():
                answer.set_result(attempt)

    def lost(self) -> None:
        if not self._is_leaving:
            with suppress(subprocess.TimeoutExpired):  # it may hang in its last words
                self._process.wait(END_S)
            self.kill()
            self._place.vacate(self, _ending(self._process.wait()))
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result(None)
        self._waiting.clear()

    def kill(self) -> None:
        self._process.kill()

    async def leave(self) -> None:
        """Let it end by itself, for a while."""
        self._is_leaving = True
        self.close()
        for _ in range(int(LEAVE_S / 0.01)):
            if self._process.poll() is not None:
                return
            await asyncio.sleep(0.01)
        self._process.kill()
        self._process.wait()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _failed(started_s: float, detail: str, *, sent: bool) -> Attempt:
    return Attempt(
        status=None,
        headers={},
        body=b"",
        started_s=started_s,
        ended_s=time.monotonic(),
        finished_at_ms=int(time.time() * 1000),
        failure="disconnected" if sent else "connect",
        detail=detail,
        sent=sent,
    )
