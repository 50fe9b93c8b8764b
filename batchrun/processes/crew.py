"""The processes that send for this one, behind the door of one endpoint.

Whatever becomes of a process, every request gets its Attempt: when a process dies, what it had in
flight is in doubt and another process takes its place; one that is silent gets nothing new, and
when it stays silent for longer than any answer may take it is killed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from batchrun.errors import BatchrunError, StoppedEarly
from batchrun.processes.member import Member, Starter
from batchrun.processes.wire import HEARTBEAT_S, Terms
from batchrun.types import Attempt, Request
from batchrun.words import count, duration, verb

# Heartbeats missed before a process gets nothing new.
SILENT_BEATS: Final = 3
# Seconds on top of the timeout of an answer before a silent process is killed.
PATIENCE_S: Final = 60.0
# A place whose processes end so many times before they are ready is given up.
FALSE_STARTS: Final = 3
# A cluster may have to bring up a machine first.
READY_S: Final = 300.0
LOOK_S: Final = 0.01


class Crew:
    """``processes`` processes that send on the same ``terms``. Use as an async context manager.

    It is an ``OpenEndpoint``: ``send`` never raises but for cancellation. Entering raises
    StoppedEarly when no process can be started, or whatever ``check`` raises before; when later
    none can be any more, ``end`` is told so. ``notes`` says what happened to processes.
    """

    def __init__(
        self,
        terms: Terms,
        processes: int,
        starter: Starter,
        check: Callable[[], None],
        end: Callable[[BatchrunError], None],
    ) -> None:
        self.host = terms.endpoint.host
        self.room = terms.room * processes
        self._terms = terms
        self._check = check
        self._end = end
        self._places = [_Place(starter) for _ in range(processes)]

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
        looks = 0
        while not any(place.is_ready for place in self._places):
            if self._is_given_up:
                raise self._nobody()
            if looks * LOOK_S > READY_S:
                raise StoppedEarly(f"no process that sends was ready within {duration(READY_S)}")
            await asyncio.sleep(LOOK_S)
            self._check()
            looks += 1
            for place in self._places:
                if place.is_empty and not place.is_given_up:
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
    def _is_given_up(self) -> bool:
        return all(place.is_given_up for place in self._places)

    def _nobody(self) -> StoppedEarly:
        last = self._places[-1].last_death
        return StoppedEarly(
            f"no process that sends could be started (last try: {last})",
            next_steps=("run with --processes 1",),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of processes that ended or hung, a line each."""
        deaths = sum(place.deaths for place in self._places)
        if not deaths:
            return ()
        last = next(place.last_death for place in self._places if place.deaths)
        left = sum(not place.is_given_up for place in self._places)
        times = f"{count(deaths, 'time')} (last: {last})"
        if (places := len(self._places)) == left:
            return (f"a sending process died and was replaced, {times}",)
        return (f"sending processes died {times}; {left} of {places} {verb(left, 'are')} left",)

    async def send(self, request: Request) -> Attempt:
        """Make one request in the process that has the least to do; see ``ChatEndpoint.send``."""
        started_s = time.monotonic()
        ready = [member for place in self._places if (member := place.takes_more) is not None]
        if not ready:
            return _failed(started_s, "no process to send it", sent=False)
        member = min(ready, key=_in_flight)
        number, answer = member.order(request.body)
        try:
            attempt = await answer
        except asyncio.CancelledError:
            member.give_up(number)
            raise
        if attempt is None:
            return _failed(started_s, "the process that sent it ended", sent=True)
        return attempt

    async def _keep(self) -> None:
        """Once a second: fill places, and end processes that hang."""
        while not self._is_given_up:
            await asyncio.sleep(HEARTBEAT_S)
            for place in self._places:
                if place.is_empty and not place.is_given_up:
                    await place.start()
                else:
                    place.beat(self._terms.timeout_s + PATIENCE_S)
        self._end(self._nobody())


def _in_flight(member: Member) -> int:
    return member.in_flight


class _Place:
    """Where a process is, or will be again."""

    def __init__(self, starter: Starter) -> None:
        self.deaths = 0
        self.last_death = ""
        self._starter = starter
        self._member: Member | None = None
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
    def takes_more(self) -> Member | None:
        """The process here, if it is one that more may be given to."""
        member = self._member
        if member is None or not member.is_ready or member.silent_beats >= SILENT_BEATS:
            return None
        return member

    async def start(self) -> None:
        """Put a process here; where the system has none to give, that is a false start."""
        try:
            self._member = await self._starter.start(self._vacate)
        except OSError as exc:
            self._false_starts += 1
            self._note(exc.strerror or type(exc).__name__)

    def _vacate(self, member: Member, ending: str) -> None:
        self._member = None
        self._false_starts = 0 if member.is_ready else self._false_starts + 1
        self._note(ending)

    def _note(self, ending: str) -> None:
        self.deaths += 1
        self.last_death = ending

    def beat(self, patience_s: float) -> None:
        """A second has passed, in which this process ran."""
        member = self._member
        if member is not None and member.is_ready:
            member.silent_beats += 1
            if member.silent_beats * HEARTBEAT_S > patience_s:
                member.kill()

    async def close(self) -> None:
        if self._member is not None:
            await self._member.leave()


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
