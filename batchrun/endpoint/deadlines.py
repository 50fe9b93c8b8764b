"""Ends attempts whose time is over, counting only the time in which this process ran.

A process that was stopped (SIGSTOP, a laptop that slept, a frozen container) wakes up with every
deadline past and with the replies lying in its sockets. That time was not the endpoint's: it is
taken out, and the loop reads its sockets before anything ends.
"""

from __future__ import annotations

import asyncio

# The longest part of a pause that may be taken for the endpoint's time.
HEARTBEAT_S = 0.25
# A busy loop is late by some milliseconds, always; that is not worth a correction.
LATE_S = 0.1


class Deadlines:
    """All attempts have the same time, so they end in the order in which they began.

    One timer serves all of them, and costs each nothing but a place in a dict.
    """

    def __init__(self, allowed_s: float) -> None:
        self.allowed_s = allowed_s
        self.lost_s = 0.0  # time in which this process did not run
        self._due: dict[asyncio.Timeout, float] = {}
        self._ran_s = 0.0
        self._looked_s = 0.0
        self._planned_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, limit: asyncio.Timeout, now: float) -> None:
        """``limit`` expires after the allowed time from ``now`` on, unless ``end`` comes first."""
        if self._timer is None:
            self._looked_s = now
        self._due[limit] = self._ran_s + now - self._looked_s + self.allowed_s
        if self._timer is None:
            self._plan()

    def end(self, limit: asyncio.Timeout) -> None:
        """``limit`` is over in time, or never began."""
        self._due.pop(limit, None)

    def _plan(self, at_least_s: float = 0.0) -> None:
        until_s = next(iter(self._due.values())) - self._ran_s
        self._planned_s = max(at_least_s, min(HEARTBEAT_S, until_s))
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._planned_s, self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        late_s = now - self._looked_s - self._planned_s
        was_paused = late_s > LATE_S
        self._ran_s += self._planned_s if was_paused else now - self._looked_s
        self._looked_s = now
        self._timer = None
        if was_paused:
            self.lost_s += late_s
        else:
            self._expire(now)
        if self._due:
            # After a pause nothing ends before the sockets were read, more than once.
            self._plan(LATE_S if was_paused else 0.0)

    def _expire(self, now: float) -> None:
        over = []
        for limit, due_s in self._due.items():
            if due_s > self._ran_s:
                break
            over.append(limit)
        for limit in over:
            del self._due[limit]
            limit.reschedule(now)
