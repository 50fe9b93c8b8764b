"""One process of a crew as the run sees it: what it has in flight, and whether it is heard of."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from batchrun.processes.wire import Orders, Reports
from batchrun.types import Attempt

# Told once, by a member that ended though nobody had asked it to, how it did.
Vacate = Callable[["Member", str], None]


class Member(ABC):
    """Orders of one turn of the loop go together; every order has its answer in the end."""

    def __init__(self, vacate: Vacate) -> None:
        self.is_ready = False
        self.silent_beats = 0  # since it was last heard of
        self._vacate = vacate
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Attempt | None]] = {}
        self._orders = Orders(0.0, 0, [], [])
        self._next = 0
        self._is_leaving = False

    # For the crew

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

    @abstractmethod
    def kill(self) -> None:
        """End it, whatever it does."""

    @abstractmethod
    async def leave(self) -> None:
        """Let it end by itself, for a while."""

    # For what it is

    @abstractmethod
    def tell(self, orders: Orders) -> None:
        """Take these orders to the process."""

    def came(self, reports: Reports) -> None:
        """Take what the process said."""
        self.is_ready = True
        self.silent_beats = 0
        for number, attempt in reports:
            answer = self._waiting.pop(number, None)
            if answer is not None and not answer.done():
                answer.set_result(attempt)

    def gone(self, ending: str) -> None:
        """The process is gone; what it had in flight is in doubt."""
        if not self._is_leaving:
            self._vacate(self, ending)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result(None)
        self._waiting.clear()

    def _soon(self) -> Orders:
        """The orders that leave at the end of this turn of the loop."""
        if not self._orders.bodies and not self._orders.given_up:
            self._loop.call_soon(self._flush)
        return self._orders

    def _flush(self) -> None:
        orders, self._orders = self._orders, Orders(0.0, 0, [], [])
        orders.at_s = time.monotonic()
        orders.first = self._next - len(orders.bodies)
        self.tell(orders)


class Starter(Protocol):
    """Where processes come from: this machine, or a cluster."""

    async def start(self, vacate: Vacate) -> Member:
        """Another process, perhaps not ready yet; OSError where the system has none to give."""
