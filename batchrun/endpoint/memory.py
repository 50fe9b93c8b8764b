"""What the replies under way may hold together, so that hostile ones cannot fill the memory."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import aiohttp

# Larger than any completion with its log probabilities; a gzip bomb of 300 MB stops here.
MAX_BODY_BYTES = 24 * 2**20
# What a reply may hold without asking anybody; all of a usual one.
OWN_BYTES = 64 * 2**10
# What all larger ones share: 64 streams of 50,000 tokens each fit in.
SHARED_BYTES = 12 * 2**20
# Read, unpacked and asked for at a time, once a reply is no usual one.
STEP_BYTES = 64 * 2**10


class TooLarge(aiohttp.ClientError):
    """More bytes than MAX_BODY_BYTES, compressed or not."""


class Space:
    """Memory for the replies in flight: what keeps a run small when every one of them is huge.

    The law. Each reply holds up to OWN_BYTES that nobody counts. Beyond, it takes from SHARED_BYTES
    while they last; when they do not, one reply at a time may hold up to MAX_BODY_BYTES all the
    same, and the others wait, with their reading paused, until a reply ends or their attempt's own
    time does. So all of them hold at most SHARED_BYTES + MAX_BODY_BYTES + OWN_BYTES each, beside
    what aiohttp has read ahead of us. None fails for the company it is in: whoever may hold
    everything waits for nobody, so the line always moves.
    """

    def __init__(self) -> None:
        self.free_bytes = SHARED_BYTES
        self.largest: Share | None = None  # the one that need not wait
        self.freed = asyncio.Event()


class Share:
    """What one reply holds of a space; use with ``with``."""

    def __init__(self, space: Space) -> None:
        self.bytes = OWN_BYTES
        self._space = space
        self._taken_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        space = self._space
        space.free_bytes += self._taken_bytes
        if space.largest is self:
            space.largest = None
        if self.bytes > OWN_BYTES:
            space.freed.set()

    async def grow(self, size_bytes: int) -> None:
        """Wait until the reply may hold so much, or until its attempt's time is over."""
        if size_bytes > MAX_BODY_BYTES:
            raise TooLarge
        wanted_bytes = min(size_bytes + STEP_BYTES, MAX_BODY_BYTES)
        while not self._take(wanted_bytes - self.bytes):
            self._space.freed.clear()
            await self._space.freed.wait()
        self.bytes = wanted_bytes

    def _take(self, more_bytes: int) -> bool:
        space = self._space
        if space.largest is self:
            return True
        if more_bytes <= space.free_bytes:
            space.free_bytes -= more_bytes
            self._taken_bytes += more_bytes
            return True
        if space.largest is None:
            space.largest = self
            return True
        return False
