"""What a process that sends does with orders: each in flight by its number, reports gathered.

It knows no rows, no journal and no limits, and neither where orders come from.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final

from batchrun.endpoint import ChatEndpoint
from batchrun.processes.wire import Orders, Reports
from batchrun.types import Attempt, Request

# Orders that lay about for longer (this process was stopped, say) go back: the moment at which
# they might leave is over, and many at once would break a quota.
LATE_S: Final = 1.0


class OrderDesk:
    """Sends through ``endpoint`` what is ordered; ``news`` is called when there are reports again.

    ``news`` is called once until ``reports`` takes them. Where orders come from another machine,
    ``one_clock`` is False: its monotonic clock differs from ours, by the least that was seen.
    """

    def __init__(
        self, endpoint: ChatEndpoint, news: Callable[[], object], *, one_clock: bool
    ) -> None:
        self._endpoint = endpoint
        self._news = news
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._reports: Reports = []
        self._clocks_differ_s = 0.0 if one_clock else math.inf

    def take(self, orders: Orders) -> None:
        """Send what was let go, and give up what nobody waits for."""
        for number in orders.given_up:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
        is_late = self._is_late(orders.at_s)
        for number, body in enumerate(orders.bodies, orders.first):
            if is_late:
                self._tell(number, _late())
            else:
                self._tasks[number] = self._loop.create_task(self._send(number, body))

    def _is_late(self, at_s: float) -> bool:
        differ_s = time.monotonic() - at_s
        self._clocks_differ_s = min(self._clocks_differ_s, differ_s)
        return differ_s - self._clocks_differ_s > LATE_S

    async def _send(self, number: int, body: bytes) -> None:
        request = Request(number, body, b"", 0, 0, "")
        try:
            self._tell(number, await self._endpoint.send(request))
        finally:
            del self._tasks[number]

    def _tell(self, number: int, attempt: Attempt) -> None:
        if not self._reports:
            self._news()
        self._reports.append((number, attempt))

    def reports(self) -> Reports:
        """What came of orders since the last call."""
        reports, self._reports = self._reports, []
        return reports

    async def drop(self) -> None:
        """Cut off what is on its way: nobody is left to tell."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
