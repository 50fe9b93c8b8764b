"""What a run asks of its process: signals, open files, and a patient garbage collector."""

from __future__ import annotations

import gc
import io
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO, cast

from batchrun.errors import UsageError

if TYPE_CHECKING:
    import asyncio

# timeout(1) and some shells signal the process and then its whole group: that is one wish.
ECHO_S = 0.3

# A second signal cuts off what is in flight and writes down what is known; longer than this, and
# something hangs that nobody wants to wait for.
LEAVE_S = 2.0

# Files besides the sockets: journal, inputs, the event loop's own.
SPARE_FILES = 64

# How soon a signal is noticed while stdin brings nothing.
LOOK_S = 0.1

# The collector would look through every live object again and again; a run makes no cycles.
GC_THRESHOLD = 200_000


@contextmanager
def signals(
    ask_to_stop: Callable[[int], None],
    stop_at_once: Callable[[], None],
    last_words: Callable[[], None],
) -> Iterator[None]:
    """First SIGINT, SIGTERM or SIGHUP: ``ask_to_stop(signum)``. Second: ``stop_at_once()``.

    Where that does not end it within ``LEAVE_S``, or at a third signal, the process says its
    ``last_words()`` and is gone: safe at any moment, for the journal is valid after every write.
    A signal that was ignored at the start (nohup, background jobs) stays ignored.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    first_s: float | None = None
    leaving: asyncio.TimerHandle | None = None

    def leave(signum: int) -> None:
        last_words()
        os._exit(128 + signum)

    def on_signal(signum: int) -> None:
        nonlocal first_s, leaving
        if first_s is None:
            first_s = time.monotonic()
            ask_to_stop(signum)
        elif time.monotonic() - first_s <= ECHO_S:
            return
        elif leaving is None:
            leaving = loop.call_later(LEAVE_S, leave, signum)
            stop_at_once()
        else:
            leave(signum)

    caught = [
        signum
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(signum) is not signal.SIG_IGN
    ]
    for signum in caught:
        loop.add_signal_handler(signum, on_signal, signum)
    try:
        yield
    finally:
        if leaving is not None:
            leaving.cancel()
        for signum in caught:
            loop.remove_signal_handler(signum)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let imports come to their end before a Ctrl-C in them is a KeyboardInterrupt.

    Libraries that are interrupted half-way raise whatever they like. A second Ctrl-C cuts in.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _is_main_thread():
        yield
        return
    held = False

    def hold(_signum: int, _frame: FrameType | None) -> None:
        nonlocal held
        held = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if held:
        raise KeyboardInterrupt


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class _LeftAlone:
    """Finds nothing for pyarrow, which can do without; everybody else finds both."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name in ("numpy", "pandas") and _importer() in ("batchrun", "pyarrow"):
            raise ModuleNotFoundError(f"{name} is left alone", name=name)


def _importer() -> str:
    """The package whose code runs the import; compiled code counts as whoever called it."""
    frame: FrameType | None = sys._getframe(2)
    while frame and frame.f_globals.get("__name__", "").startswith("importlib."):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0] if frame else ""


def without_numpy_and_pandas() -> None:
    """Spare this process two imports: pyarrow looks for them, and we use nothing that needs them.

    For programs of our own only: whoever shares a process with us may want pyarrow with both.
    """
    sys.meta_path.insert(0, _LeftAlone)


def hold_standard_streams() -> None:
    """Put nothing in the place of a closed stdin, stdout or stderr.

    Otherwise the next file that is opened gets its number, and with it whatever anybody prints.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def stdout() -> BinaryIO:
    """Standard output for bytes; UsageError when it is closed."""
    if sys.stdout is None:
        raise UsageError("-o -: standard output is closed")
    return sys.stdout.buffer


def stdin(check: Callable[[], None]) -> BinaryIO:
    """Standard input, whose reads end with whatever ``check`` raises, also while nothing comes."""
    if sys.stdin is None:
        raise UsageError("-: standard input is closed")
    try:
        fd = sys.stdin.fileno()
    except (OSError, ValueError):  # somebody replaced it by something in memory
        return sys.stdin.buffer
    return cast("BinaryIO", io.BufferedReader(_Watched(fd, check)))


class _Watched(io.RawIOBase):
    """A file descriptor that is read only when there is something to read."""

    def __init__(self, fd: int, check: Callable[[], None]) -> None:
        self._fd = fd
        self._check = check

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # of all buffers, this is ours
        self._check()
        while not select.select([self._fd], [], [], LOOK_S)[0]:
            self._check()
        piece = os.read(self._fd, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def room_for_sockets(wanted: int) -> int:
    """Raise the soft limit on open files as needed; how many sockets there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - SPARE_FILES))


@contextmanager
def patient_collector() -> Iterator[None]:
    """Leave what is alive now out of every collection, and collect rarely."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
