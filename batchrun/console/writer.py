"""The one thread that writes to the terminal, so that a stopped pipe stops nothing else."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TextIO

from batchrun import terminal
from batchrun.terminal import FAREWELL_S, LABEL_WIDTH

if TYPE_CHECKING:
    from tqdm import tqdm


# The bar may be wider than texts are: its facts are worth more than a margin.
BAR_WIDTH = 100

# A terminal echoes ^C behind the bar; in the same line it can be wiped out with it.
ECHO_WIDTH = 3
MAX_LINES_BEHIND = 1_000


class Lines(NamedTuple):
    shown: list[str]
    logged: list[str]


class OpenBar(NamedTuple):
    total: int
    done: int
    width: int


class CloseBar(NamedTuple):
    pass


class Writer:
    """One thread that owns the terminal and the log file; it does what is asked in order."""

    def __init__(self, stream: TextIO | None, log_file: TextIO | None) -> None:
        self._stream = stream
        self._log_file = log_file
        self._bar: tqdm[NoReturn] | None = None
        # Shared with the caller, under the condition's lock.
        self._wake = threading.Condition()
        self._asked: deque[Lines | OpenBar | CloseBar] = deque(maxlen=MAX_LINES_BEHIND)
        self._bar_position: tuple[int, str] | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def ask(self, what: Lines | OpenBar | CloseBar) -> None:
        with self._wake:
            self._asked.append(what)
            self._start()

    def move_bar(self, done: int, tail: str) -> None:
        """Only the latest position is drawn: a slow terminal sees fewer, never stale ones."""
        with self._wake:
            self._bar_position = (done, tail)
            self._start()

    def close(self) -> None:
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(FAREWELL_S)
        else:
            self._work()

    def _start(self) -> None:
        if self._closing or (self._stream is None and self._log_file is None):
            return
        if self._thread is None:
            # A daemon, so that a terminal that never drains cannot keep the process alive.
            thread = threading.Thread(target=self._work, name="progress", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no memory for one: what is asked is written at the close
                return
            self._thread = thread
        self._wake.notify()

    def _work(self) -> None:
        closing = False
        while not closing:
            with self._wake:
                while not (self._asked or self._bar_position or self._closing):
                    self._wake.wait()
                asked, self._asked = self._asked, deque(maxlen=MAX_LINES_BEHIND)
                position, self._bar_position = self._bar_position, None
                closing = self._closing
            self._do(asked, position)
        self._guarded(self._close_bar)

    def _do(
        self,
        asked: Iterable[Lines | OpenBar | CloseBar],
        position: tuple[int, str] | None,
    ) -> None:
        for what in asked:
            if isinstance(what, Lines):
                self._write(what)
            elif isinstance(what, OpenBar):
                self._guarded(partial(self._open_bar, what))
            else:
                self._guarded(partial(self._move_bar, position))
                self._guarded(self._close_bar)
        self._guarded(partial(self._move_bar, position))

    def _guarded(self, draw: Callable[[], None]) -> None:
        """Draw, or go on without a terminal once it is gone: that must not end a paid run."""
        if self._stream is None:
            return
        try:
            draw()
        except (OSError, ValueError):
            self._stream = self._bar = None

    def _write(self, lines: Lines) -> None:
        if lines.shown:
            self._guarded(partial(self._show, lines.shown))
        if lines.logged and self._log_file is not None:
            try:
                _write_lines(self._log_file, lines.logged)
            except (OSError, ValueError) as exc:
                self._log_file = None
                why = getattr(exc, "strerror", None) or "it was closed"
                lost = f"{'note':<{LABEL_WIDTH}}the log file cannot be written: {why}"
                self._guarded(partial(self._show, [lost]))

    def _show(self, lines: list[str]) -> None:
        assert self._stream is not None
        self._wipe()
        _write_lines(self._stream, lines)
        if self._bar is not None:
            self._bar.refresh()

    def _open_bar(self, bar: OpenBar) -> None:
        assert self._stream is not None
        self._close_bar()
        self._bar = _new_bar(self._stream, bar)

    def _move_bar(self, position: tuple[int, str] | None) -> None:
        if position is not None and self._bar is not None:
            self._bar.n, tail = position
            self._bar.set_description_str(tail)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._wipe()
            self._bar.leave = self._bar.n >= (self._bar.total or 0)
            self._bar.close()
        self._bar = None

    def _wipe(self) -> None:
        """Empty the line of the bar, also of a ^C that the terminal echoed into it."""
        if self._bar is not None and self._stream is not None:
            self._stream.write(f"\r{' ' * ((self._bar.ncols or BAR_WIDTH) + ECHO_WIDTH)}\r")


def _new_bar(stream: TextIO, bar: OpenBar) -> tqdm[NoReturn]:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
        # tqdm would otherwise start a multiprocessing semaphore for its lock, and a second thread.
        monitor_interval = 0
        _lock = threading.RLock()

    return Bar(
        total=bar.total,
        initial=bar.done,
        file=stream,
        # A terminal that does not know its size says 0 by 0, and tqdm would then draw nothing.
        ncols=bar.width,
        nrows=24,
        desc=f"{bar.done:,}/{bar.total:,}",
        ascii=" #",
        bar_format="{percentage:3.0f}% |{bar:10}| {desc}",
        mininterval=0,
        leave=True,
    )


def _write_lines(stream: TextIO, lines: list[str]) -> None:
    stream.write("".join(f"{terminal.one_line(line)}\n" for line in lines))
    stream.flush()
