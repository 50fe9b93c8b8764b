"""Requests read ahead, between the thread that reads and the loop that sends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from batchrun.types import Request

# A feed this deep hides a file read of a few hundred milliseconds at 10,000 requests/s.
FEED_ROWS = 4096
FEED_BYTES = 32 * 2**20


class Feed:
    """Requests from a reading thread to the loop, bounded in rows and bytes."""

    def __init__(self, *, max_rows: int = FEED_ROWS, max_bytes: int = FEED_BYTES) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._current: deque[Request] = deque()
        self._batches: deque[deque[Request]] = deque()
        self._rows = 0
        self._bytes = 0
        self._room = threading.Condition()
        self._closed = False
        self.ended = False
        self.error: BaseException | None = None

    def put(self, batch: Iterable[Request], *, wait: bool = True) -> bool:
        """Called by the reader: waits for room; False when nobody wants more.

        Without ``wait`` it is for a reader on the loop's thread, who knows other bounds.
        """
        requests = deque(batch)
        size = sum(len(r.body) for r in requests)
        with self._room:
            while wait and not self._closed and self._rows and self._full(len(requests), size):
                self._room.wait()
            if self._closed:
                return False
            self._batches.append(requests)
            self._rows += len(requests)
            self._bytes += size
        return True

    def end(self, error: BaseException | None = None) -> None:
        """Called by the reader when the input is at its end, or cannot be read further."""
        self.error = error
        self.ended = True

    def pop(self) -> Request | None:
        """The next request, None when there is none at the moment."""
        if not self._current and not self._next_batch():
            return None
        return self._current.popleft()

    @property
    def rows(self) -> int:
        """How many are ready to be popped."""
        return self._rows + len(self._current)

    @property
    def exhausted(self) -> bool:
        return self.ended and not self._current and not self._batches

    @property
    def starved(self) -> bool:
        """The reader is behind: it, not the endpoint, holds the run back."""
        return not self.ended and not self._current and not self._batches

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._batches.clear()
            self._current.clear()
            self._room.notify_all()

    def _full(self, rows: int, size: int) -> bool:
        return self._rows + rows > self._max_rows or self._bytes + size > self._max_bytes

    def _next_batch(self) -> bool:
        with self._room:
            if not self._batches:
                return False
            self._current = self._batches.popleft()
            self._rows -= len(self._current)
            self._bytes -= sum(len(r.body) for r in self._current)
            self._room.notify()
        return bool(self._current)
