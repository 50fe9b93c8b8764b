"""The bar on a terminal, the line a minute elsewhere, and the notes between them.

Nothing here waits for the terminal. A paused terminal (Ctrl-S) or a full pipe blocks whoever
writes to it, and the run writes from its event loop; so every text goes to one thread that writes,
the bar is kept only in its latest form, and when the writer falls far behind the oldest lines go.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TextIO

from msgspec import Struct

from batchrun import terminal
from batchrun.types import Bound
from batchrun.words import count, duration, rate

if TYPE_CHECKING:
    from tqdm import tqdm

WIDTH = 80
# The bar may be wider than texts are: its facts are worth more than a margin.
BAR_WIDTH = 100
# A terminal echoes ^C behind the bar; in the same line it can be wiped out with it.
ECHO_WIDTH = 3
LABEL_WIDTH = 10
MINUTE_S = 60.0
# Long enough that one slow answer does not make the speed jump, short enough to show a change.
RATE_WINDOW_S = 30.0
RATE_SAMPLE_S = 1.0
# Shorter waits are ordinary pacing: to show them would make the bar flicker.
SHOWN_WAIT_S = 1.0
# Longer without any row settled, and what the run waits for is worth more than its speed.
STALL_S = 30.0
MAX_LINES_BEHIND = 1_000
# A terminal that takes nothing for this long must not keep a finished run from ending.
FAREWELL_S = 2.0


class Snapshot(Struct, frozen=True):
    """Where the run stands. ``total`` and ``done`` count the rows the bar is about."""

    total: int
    done: int
    ok: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0  # reported so far in this run
    waiting: tuple[float, str] | None = None  # seconds, "Retry-After from api.mistral.ai"
    longest_s: float | None = None  # the age of the oldest request in flight
    resting: int = 0  # rows that failed or were held back and wait for their turn
    bound_by: Bound | None = None  # what holds the next request back


class Progress:
    """Says on stderr, and in the log file, how the run goes; ``quiet`` leaves only the log file.

    Call everything from one thread. No method blocks or raises for a stream that cannot be written.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        stream: TextIO | None = None,
        is_tty: bool | None = None,
        log_file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        stream = sys.stderr if stream is None else stream  # None again where it is closed
        self.is_tty = stream is not None and stream.isatty() if is_tty is None else is_tty
        self._width = min(BAR_WIDTH, shutil.get_terminal_size().columns - ECHO_WIDTH)
        self._quiet = quiet
        self._verbose = verbose
        self._clock = clock
        self._now = now
        self._writer = _Writer(None if quiet else stream, log_file)
        self._speed = Speed()
        self._started_s = clock()
        self._next_line_s = 0.0
        self._timeout_s = math.inf
        self._moved = (0, 0.0)  # rows done, and when there were so many first

    def print_block(self, block: str, lines: Iterable[str] = ()) -> None:
        """Print ``block`` on a terminal; elsewhere, and in the log file, ``lines`` with a time."""
        stamped = [self._stamped(line) for line in lines]
        self._writer.ask(_Lines(block.split("\n") if self.is_tty else stamped, stamped))

    def note(self, text: str, *, label: str = "note") -> None:
        """Print one line under a label without breaking the bar."""
        stamped = self._stamped(f"{label} {text}")
        shown = f"{label:<{LABEL_WIDTH}}{text}" if self.is_tty else stamped
        self._writer.ask(_Lines([shown], [stamped]))

    def detail(self, text: str) -> None:
        """Like ``note``, but on the terminal only with ``-v``; the log file has it always."""
        if self._verbose:
            self.note(text, label="detail")
        else:
            self.log(f"detail {text}")

    def log(self, text: str) -> None:
        """Write a line to the log file only."""
        self._writer.ask(_Lines([], [self._stamped(text)]))

    def begin(self, total: int, done: int = 0, *, timeout_s: float = math.inf) -> None:
        """Start the clock of the bar: ``done`` of ``total`` rows need no work.

        ``timeout_s`` is what bounds the wait for an answer; a stall names it.
        """
        self._started_s = self._clock()
        self._timeout_s = timeout_s
        self._moved = (done, self._started_s)
        self._next_line_s = self._started_s + MINUTE_S
        self._speed = Speed()
        self._speed.sample(self._started_s, done, 0)
        if self.is_tty and not self._quiet and total:
            self._writer.ask(_OpenBar(total, done, self._width))

    def update(self, snapshot: Snapshot) -> None:
        """Show where the run stands; cheap enough for five times a second."""
        now_s = self._clock()
        self._speed.sample(now_s, snapshot.done, snapshot.tokens)
        if snapshot.done != self._moved[0]:
            self._moved = (snapshot.done, now_s)
        is_stalled = now_s - self._moved[1] >= STALL_S
        stall = stall_words(snapshot, self._timeout_s) if is_stalled else ()
        if self.is_tty:
            elapsed_s = now_s - self._started_s
            tail = bar_tail(snapshot, self._speed, elapsed_s, self._width, stall)
            self._writer.move_bar(snapshot.done, terminal.one_line(tail))
        if now_s >= self._next_line_s:
            self._next_line_s = now_s + MINUTE_S
            line = self._stamped(minute_line(snapshot, self._speed, stall))
            self._writer.ask(_Lines([] if self.is_tty else [line], [line]))

    def end(self) -> None:
        """Leave a full bar and go on below it, take away any other; harmless without a bar."""
        self._writer.ask(_CloseBar())

    def close(self) -> None:
        """Wait, but not for ever, until everything is written; nothing can be said afterwards."""
        self._writer.close()

    def _stamped(self, text: str) -> str:
        return f"{self._now().isoformat(timespec='seconds')} {text}"


class Speed:
    """Rows and tokens a second since the first sample: the speed that the end of the run tells.

    What is left is judged by the last half minute: it shows what the run has become.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._first = self._latest = (0.0, 0, 0)

    def sample(self, now_s: float, rows: int, tokens: int) -> None:
        self._latest = (now_s, rows, tokens)
        if not self._samples:
            self._first = self._latest
        if not self._samples or now_s - self._samples[-1][0] >= RATE_SAMPLE_S:
            self._samples.append((now_s, rows))
        # The oldest sample kept is the newest that is at least a window old.
        while len(self._samples) > 1 and now_s - self._samples[1][0] >= RATE_WINDOW_S:
            self._samples.popleft()

    @property
    def rows_per_s(self) -> float:
        return self._per_s(1)

    @property
    def tokens_per_s(self) -> float:
        return self._per_s(2)

    def _per_s(self, field: int) -> float:
        elapsed_s = self._latest[0] - self._first[0]
        return (self._latest[field] - self._first[field]) / elapsed_s if elapsed_s > 0 else 0.0

    def remaining_s(self, rows: int) -> float | None:
        """How long ``rows`` more will take; None while nothing moves."""
        if not self._samples:
            return None
        since_s, before = self._samples[0]
        moved = self._latest[1] - before
        return rows * (self._latest[0] - since_s) / moved if moved > 0 else None


def stall_words(snapshot: Snapshot, timeout_s: float) -> Sequence[str]:
    """What a run in which nothing settles waits for, the fullest wording first."""
    if snapshot.in_flight and snapshot.longest_s is not None:
        answers = count(snapshot.in_flight, "answer")
        age = duration(snapshot.longest_s, compact=True)
        most = duration(timeout_s, compact=True) if math.isfinite(timeout_s) else "none"
        return (
            f"waits for {answers}, the longest for {age} (timeout {most})",
            f"waits for {answers}, the longest for {age}",
            f"waits for {answers} ({age} of {most})",
            f"waits for {answers}",
        )
    if snapshot.bound_by == "quota":
        return ("waits for the quota",)
    if snapshot.resting:
        return (f"waits to send {count(snapshot.resting, 'row')} again",)
    return ("waits for the input",)


def bar_tail(
    snapshot: Snapshot,
    speed: Speed,
    elapsed_s: float,
    width: int = WIDTH,
    stall: Sequence[str] = (),
) -> str:
    """What stands right of the bar: as many facts as fit, the most important kept longest."""
    done = f"{snapshot.done:,}/{snapshot.total:,}"
    room = width - len(" 63% |######    | ")
    if (waiting := _waiting(snapshot)) is not None:
        return _fitted(f"{done} {waiting}", room)
    if stall:
        return _fitted(_first_that_fits((f"{done} {words}" for words in stall), room), room)
    remaining_s = speed.remaining_s(snapshot.total - snapshot.done)
    parts = [
        (0, done),
        (3, f"[{_clock_time(elapsed_s)}<{_clock_time(remaining_s)}]"),
        (2, f"{rate(speed.rows_per_s)} rows/s"),
        (5, f"{_short(speed.tokens_per_s)} tok/s"),
        (4, f"{snapshot.in_flight:,} in flight"),
        (1, f"{snapshot.failed:,} failed"),
    ]
    while len(parts) > 1 and len(" ".join(text for _, text in parts)) > room:
        parts.remove(max(parts))
    return " ".join(text for _, text in parts)


def minute_line(snapshot: Snapshot, speed: Speed, stall: Sequence[str] = ()) -> str:
    """The line of a log, without its time."""
    done = f"{snapshot.done:,}/{snapshot.total:,}"
    failed = f"{snapshot.failed:,} failed"
    if (waiting := _waiting(snapshot)) is not None:
        stall = (waiting, waiting.partition(" from ")[0])
    if stall:
        room = WIDTH - len("2026-11-21T02:00:00+01:00 ")
        lines = [f"{done} {words}, {failed}" for words in stall[:3]]
        return _first_that_fits([*lines, *(f"{done} {words}" for words in stall)], room)
    remaining_s = speed.remaining_s(snapshot.total - snapshot.done)
    eta = "" if remaining_s is None else f" ETA {duration(remaining_s, compact=True)}"
    rates = f"{rate(speed.rows_per_s)} rows/s {_short(speed.tokens_per_s)} tok/s"
    return f"{done} {rates} {failed}{eta}"


def _waiting(snapshot: Snapshot) -> str | None:
    if snapshot.waiting is None or snapshot.waiting[0] < SHOWN_WAIT_S:
        return None
    seconds, reason = snapshot.waiting
    return f"waiting {seconds:.0f} s: {reason}"


def _first_that_fits(texts: Iterable[str], room: int) -> str:
    """The first that fits, else the last."""
    text = ""
    for text in texts:
        if len(text) <= room:
            break
    return text


def _fitted(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 3] + "..."


def _short(number: float) -> str:
    if number < 1_000:
        return f"{number:.0f}"
    if number < 999_500:
        return f"{number / 1e3:.0f}k"
    return f"{number / 1e6:.1f}M"


def _clock_time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Lines(NamedTuple):
    shown: list[str]
    logged: list[str]


class _OpenBar(NamedTuple):
    total: int
    done: int
    width: int


class _CloseBar(NamedTuple):
    pass


class _Writer:
    """One thread that owns the terminal and the log file; it does what is asked in order."""

    def __init__(self, stream: TextIO | None, log_file: TextIO | None) -> None:
        self._stream = stream
        self._log_file = log_file
        self._bar: tqdm[NoReturn] | None = None
        # Shared with the caller, under the condition's lock.
        self._wake = threading.Condition()
        self._asked: deque[_Lines | _OpenBar | _CloseBar] = deque(maxlen=MAX_LINES_BEHIND)
        self._bar_position: tuple[int, str] | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def ask(self, what: _Lines | _OpenBar | _CloseBar) -> None:
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

    def _start(self) -> None:
        if self._closing:
            return
        if self._thread is None:
            # A daemon, so that a terminal that never drains cannot keep the process alive.
            self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
            self._thread.start()
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
        asked: Iterable[_Lines | _OpenBar | _CloseBar],
        position: tuple[int, str] | None,
    ) -> None:
        for what in asked:
            if isinstance(what, _Lines):
                self._write(what)
            elif isinstance(what, _OpenBar):
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

    def _write(self, lines: _Lines) -> None:
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

    def _open_bar(self, bar: _OpenBar) -> None:
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


def _new_bar(stream: TextIO, bar: _OpenBar) -> tqdm[NoReturn]:
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
