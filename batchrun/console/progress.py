"""The bar on a terminal, the line a minute elsewhere, and the notes between them.

Nothing here waits for the terminal. A paused terminal (Ctrl-S) or a full pipe blocks whoever
writes to it, and the run writes from its event loop; so every text goes to one thread that writes,
the bar is kept only in its latest form, and when the writer falls far behind the oldest lines go.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TextIO

import msgspec
from msgspec import Struct

from batchrun import terminal
from batchrun.console.writer import (
    BAR_WIDTH,
    ECHO_WIDTH,
    CloseBar,
    Lines,
    OpenBar,
    Writer,
)
from batchrun.summary import TokenCounts
from batchrun.terminal import LABEL_WIDTH, WIDTH
from batchrun.types import Bound
from batchrun.words import count, duration, rate, stopwatch

MINUTE_S = 60.0

# Long enough that one slow answer does not make the speed jump, short enough to show a change.
RATE_WINDOW_S = 30.0
RATE_SAMPLE_S = 1.0

# Shorter waits are ordinary pacing: to show them would make the bar flicker.
SHOWN_WAIT_S = 1.0

# Longer without any row settled, and what the run waits for is worth more than its speed.
STALL_S = 30.0


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
    attempts: int = 0  # of this run, as the three that follow
    retries: int = 0
    rate_limited: int = 0
    in_doubt: int = 0
    spent: TokenCounts = msgspec.field(default_factory=TokenCounts)


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
        self.names: Mapping[str, str] = {}  # what is said instead of some words
        self._quiet = quiet
        self._verbose = verbose
        self._clock = clock
        self._now = now
        self._writer = Writer(None if quiet else stream, log_file)
        self._speed = Speed()
        self._started_s = clock()
        self._next_line_s = 0.0
        self._timeout_s = math.inf
        self._moved = (0, 0.0)  # rows done, and when there were so many first

    def print_block(self, block: str, lines: Iterable[str] = ()) -> None:
        """Print ``block`` on a terminal; elsewhere, and in the log file, ``lines`` with a time."""
        stamped = [self._stamped(line) for line in lines]
        self._writer.ask(
            Lines(self._renamed(block).split("\n") if self.is_tty else stamped, stamped)
        )

    def note(self, text: str, *, label: str = "note") -> None:
        """Print one line under a label without breaking the bar."""
        stamped = self._stamped(f"{label} {text}")
        shown = f"{label:<{LABEL_WIDTH}}{self._renamed(text)}" if self.is_tty else stamped
        self._writer.ask(Lines([shown], [stamped]))

    def detail(self, text: str) -> None:
        """Like ``note``, but on the terminal only with ``-v``; the log file has it always."""
        if self._verbose:
            self.note(text, label="detail")
        else:
            self.log(f"detail {text}")

    def log(self, text: str) -> None:
        """Write a line to the log file only."""
        self._writer.ask(Lines([], [self._stamped(text)]))

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
            self._writer.ask(OpenBar(total, done, self._width))

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
            self._writer.ask(Lines([] if self.is_tty else [line], [line]))

    def end(self) -> None:
        """Leave a full bar and go on below it, take away any other; harmless without a bar."""
        self._writer.ask(CloseBar())

    def close(self) -> None:
        """Wait, but not for ever, until everything is written; nothing can be said afterwards."""
        self._writer.close()

    def _renamed(self, text: str) -> str:
        for name, shown in self.names.items():
            text = text.replace(name, shown)
        return text

    def _stamped(self, text: str) -> str:
        return f"{self._now().isoformat(timespec='seconds')} {self._renamed(text)}"


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
        (3, f"[{stopwatch(elapsed_s)}<{stopwatch(remaining_s)}]"),
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
