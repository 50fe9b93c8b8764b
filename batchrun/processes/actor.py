"""What runs on a node of a Ray cluster: orders in, reports out, until Ray ends it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from batchrun import process
from batchrun.config import VERSION
from batchrun.processes.desk import OrderDesk
from batchrun.processes.wire import HEARTBEAT_S, Terms, encode, orders_decoder


class Worker:
    """An actor. Ray runs its methods on one event loop, many at a time."""

    def __init__(self, terms: Terms, version: str) -> None:
        if version != VERSION:
            raise RuntimeError(f"batchrun {VERSION} is installed on the node, not {version}")
        self._terms = terms
        self._news = asyncio.Event()
        self._open: asyncio.Task[OrderDesk] | None = None
        self._stack = AsyncExitStack()  # open as long as this process is

    async def _desk(self) -> OrderDesk:
        if self._open is None:
            self._open = asyncio.create_task(self._opened())
        return await self._open

    async def _opened(self) -> OrderDesk:
        process.room_for_sockets(self._terms.room)
        endpoint = await self._stack.enter_async_context(self._terms.endpoint_here())
        return OrderDesk(endpoint, self._news.set, one_clock=False)

    async def take(self, orders: bytes) -> None:
        """Send what is ordered."""
        (await self._desk()).take(orders_decoder.decode(orders))

    async def reports(self) -> bytes:
        """What came of orders, as soon as there is anything, or that nothing came for a second."""
        desk = await self._desk()
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()
        return encode(desk.reports())
