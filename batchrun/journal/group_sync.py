"""One group of records made durable, apart from whoever appends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from batchrun.files import make_durable, sync_directory


class GroupSync:
    """Done once, by whichever thread comes first; all up to ``position`` is durable then."""

    def __init__(
        self,
        sealing: list[int],
        current: int,
        position: int,
        state: Path,
        fail: Callable[[str, OSError], NoReturn],
    ) -> None:
        self.position = position
        self._sealing = sealing
        self._current = current
        self._state = state
        self._fail = fail
        self._lock = threading.Lock()
        self._ended = False

    def __call__(self) -> None:
        """Do it, unless it is done. Its files stay open until then, whatever the writer does."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            try:
                for fd in (*self._sealing, self._current):
                    make_durable(fd)
                if self._sealing:
                    sync_directory(self._state)
            except OSError as exc:
                self._fail("fsync", exc)
            finally:
                self._close()

    def abandon(self) -> None:
        """Wait for a thread that is in it, and let no other begin."""
        with self._lock:
            self._ended = True
            self._close()

    def _close(self) -> None:
        while self._sealing:
            os.close(self._sealing.pop())
