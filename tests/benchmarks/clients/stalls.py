"""batchrun, with a watch on its event loop and on the interpreter lock.

    python stalls.py ARGUMENTS OF BATCHRUN

The last line on stderr: the CPU of the longest callback, and the longest that a thread which wakes
every millisecond had to wait for the lock and a core, both in milliseconds.
"""

import asyncio
import contextlib
import sys
import threading
import time
from typing import Any

from batchrun.cli.main import main

EVERY_S = 0.001


class Watch:
    def __init__(self) -> None:
        self._longest_callback_s = 0.0
        self._longest_wait_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wake, daemon=True)

    def start(self) -> None:
        handle: Any = asyncio.Handle
        run = handle._run

        def timed(self_: asyncio.Handle) -> None:
            started = time.thread_time()
            run(self_)
            self._longest_callback_s = max(self._longest_callback_s, time.thread_time() - started)

        handle._run = timed
        self._thread.start()

    def stop(self) -> str:
        self._over.set()
        self._thread.join()
        return f"{self._longest_callback_s * 1000:.1f} {self._longest_wait_s * 1000:.1f}"

    def _wake(self) -> None:
        while not self._over.is_set():
            asleep = time.perf_counter()
            time.sleep(EVERY_S)
            late_s = time.perf_counter() - asleep - EVERY_S
            self._longest_wait_s = max(self._longest_wait_s, late_s)


if __name__ == "__main__":
    watch = Watch()
    watch.start()
    with contextlib.suppress(SystemExit):
        main()
    print(watch.stop(), file=sys.stderr)
