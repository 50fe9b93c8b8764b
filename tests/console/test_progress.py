"""What the bar and the log say, and that neither can hold up or end a run."""

from __future__ import annotations

import io
import os
import pty
import re
import threading
from datetime import datetime, timedelta, timezone

import msgspec
import pytest

from batchrun.console.progress import (
    MINUTE_S,
    STALL_S,
    Progress,
    Snapshot,
    Speed,
    bar_tail,
    minute_line,
    stall_words,
)
from batchrun.console.writer import BAR_WIDTH, ECHO_WIDTH
from batchrun.terminal import WIDTH

NOW = datetime(2026, 11, 21, 2, 0, tzinfo=timezone(timedelta(hours=1)))
STAMP = "2026-11-21T02:00:00+01:00 "


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _speed(rows: int, tokens: int, elapsed_s: float) -> Speed:
    speed = Speed()
    speed.sample(0.0, 0, 0)
    speed.sample(elapsed_s, rows, tokens)
    return speed


def _progress(
    stream: io.StringIO,
    clock: Clock | None = None,
    *,
    is_tty: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    log_file: io.StringIO | None = None,
) -> Progress:
    return Progress(
        stream=stream,
        is_tty=is_tty,
        quiet=quiet,
        verbose=verbose,
        log_file=log_file,
        clock=clock or Clock(),
        now=lambda: NOW,
    )


def test_the_bar_says_rates_time_left_and_failures() -> None:
    snapshot = Snapshot(total=2000, done=1260, ok=1258, failed=2, in_flight=48, tokens=700_000)
    tail = bar_tail(snapshot, _speed(1260, 700_000, 41.0), 41.0, BAR_WIDTH)
    assert tail == "1,260/2,000 [0:41<0:24] 30.7 rows/s 17k tok/s 48 in flight 2 failed"
    tail = bar_tail(snapshot, _speed(1260, 700_000, 41.0), 41.0, 80 - ECHO_WIDTH)
    assert tail == "1,260/2,000 [0:41<0:24] 30.7 rows/s 48 in flight 2 failed"


def test_a_long_bar_drops_the_least_important_facts_first() -> None:
    snapshot = Snapshot(total=9_999_999, done=8_765_432, failed=12_345, in_flight=512, tokens=1)
    tail = bar_tail(snapshot, _speed(8_765_432, 10**9, 36_000.0), 36_000.0)
    assert len(tail) <= 62
    assert tail.startswith("8,765,432/9,999,999 ")
    assert tail.endswith("12,345 failed")
    assert "tok/s" not in tail


def test_the_bar_says_what_it_waits_for() -> None:
    snapshot = Snapshot(2000, 1260, waiting=(38.2, "Retry-After from api.mistral.ai"))
    tail = bar_tail(snapshot, Speed(), 1.0)
    assert tail == "1,260/2,000 waiting 38 s: Retry-After from api.mistral.ai"


def test_ordinary_pacing_is_not_shown_as_waiting() -> None:
    snapshot = Snapshot(2000, 1260, waiting=(0.03, "100 requests a second"))
    assert "waiting" not in bar_tail(snapshot, Speed(), 1.0)


def test_a_log_line_fits_its_width_beside_the_time() -> None:
    moving = Snapshot(12_672, 1_848, tokens=1_020_000)
    line = minute_line(moving, _speed(1_848, 1_020_000, 60.0))
    assert line == "1,848/12,672 30.8 rows/s 17k tok/s 0 failed ETA 5m51s"
    waiting = Snapshot(12_672, 2_960, waiting=(40.0, "Retry-After from api.mistral.ai"))
    assert minute_line(waiting, Speed()) == "2,960/12,672 waiting 40 s: Retry-After, 0 failed"


def test_the_rate_is_that_of_the_whole_run_and_the_time_left_that_of_its_last_half_minute() -> None:
    speed = Speed()
    for second in range(100):
        speed.sample(float(second), 7 + second * 10, 0)
    for second in range(100, 131):
        speed.sample(float(second), 997, 0)
    assert speed.rows_per_s == pytest.approx(990 / 130)
    assert speed.remaining_s(10) is None
    speed.sample(160.0, 1_057, 0)
    assert speed.remaining_s(120) == pytest.approx(60.0)


def test_a_log_gets_one_line_a_minute_also_while_nothing_moves() -> None:
    stream, clock = io.StringIO(), Clock()
    talk = _progress(stream, clock)
    talk.begin(100, 0)
    for step in range(int(2.5 * MINUTE_S * 5)):
        clock.now_s = step / 5
        talk.update(Snapshot(100, 0, in_flight=1, longest_s=clock.now_s))
    talk.end()
    talk.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        f"{STAMP}0/100 waits for 1 answer, the longest for 1m, 0 failed",
        f"{STAMP}0/100 waits for 1 answer, the longest for 2m, 0 failed",
    ]


STALLS = {
    "answers": (
        Snapshot(90, 0, in_flight=12, longest_s=190.0),
        "waits for 12 answers, the longest for 3m10s (timeout 10m)",
    ),
    "one answer": (
        Snapshot(90, 0, in_flight=1, longest_s=31.0),
        "waits for 1 answer, the longest for 31s (timeout 10m)",
    ),
    "the quota": (Snapshot(90, 0, resting=88, bound_by="quota"), "waits for the quota"),
    "other tries": (
        Snapshot(90, 0, resting=1_000, bound_by="endpoint"),
        "waits to send 1,000 rows again",
    ),
    "the input": (Snapshot(90, 0, bound_by="input"), "waits for the input"),
}


@pytest.mark.parametrize("case", STALLS)
def test_a_stall_says_what_it_waits_for(case: str) -> None:
    snapshot, words = STALLS[case]
    stall = stall_words(snapshot, 600.0)
    assert stall[0] == words
    assert bar_tail(snapshot, Speed(), 60.0, stall=stall) == f"0/90 {words}"


def test_what_is_known_of_a_wait_is_said_rather_than_the_stall() -> None:
    snapshot = Snapshot(100, 0, resting=9, waiting=(40.0, "Retry-After from api.mistral.ai"))
    stall = stall_words(snapshot, 600.0)
    assert bar_tail(snapshot, Speed(), 60.0, stall=stall).startswith("0/100 waiting 40 s: Retry-")
    assert minute_line(snapshot, Speed(), stall) == "0/100 waiting 40 s: Retry-After, 0 failed"


@pytest.mark.parametrize("rows", [100, 12_672, 98_765_432])
@pytest.mark.parametrize("case", STALLS)
def test_a_stall_fits_its_line(case: str, rows: int) -> None:
    snapshot = msgspec.structs.replace(STALLS[case][0], total=rows, done=rows - 1, failed=rows // 2)
    stall = stall_words(snapshot, 600.0)
    line = STAMP + minute_line(snapshot, Speed(), stall)
    assert len(line) <= WIDTH
    assert "wait" in line
    assert len(" 63% |######    | " + bar_tail(snapshot, Speed(), 60.0, stall=stall)) <= WIDTH


def test_a_line_of_a_stall_says_as_much_as_fits() -> None:
    snapshot = Snapshot(12_672, 2_960, failed=2, in_flight=12, longest_s=190.0)
    line = minute_line(snapshot, Speed(), stall_words(snapshot, 600.0))
    assert line == "2,960/12,672 waits for 12 answers (3m10s of 10m)"
    line = minute_line(msgspec.structs.replace(snapshot, total=100, done=0), Speed(), ())
    assert line == "0/100 0.0 rows/s 0 tok/s 2 failed"


@pytest.mark.parametrize("is_tty", [True, False])
def test_only_a_run_that_does_not_move_is_stalled(is_tty: bool) -> None:
    stream, clock = io.StringIO(), Clock()
    talk = _progress(stream, clock, is_tty=is_tty)
    talk.begin(100, 0, timeout_s=600.0)
    for second in range(int(2 * MINUTE_S) + 1):
        clock.now_s = float(second)
        done = second if second < MINUTE_S + STALL_S else int(MINUTE_S + STALL_S)
        talk.update(Snapshot(100, done, in_flight=3, longest_s=45.0))
    talk.end()
    talk.close()
    moving, _, stalled = stream.getvalue().rpartition("rows/s")
    assert "waits" not in moving
    assert "waits for 3 answers" in stalled


def test_a_terminal_gets_a_bar_and_notes_above_it() -> None:
    stream, clock = io.StringIO(), Clock()
    talk = _progress(stream, clock, is_tty=True)
    talk.print_block("a -> b\nrows      2,000", ["start a -> b"])
    talk.begin(2000, 1000)
    clock.now_s = 10.0
    talk.update(Snapshot(2000, 1260, in_flight=48))
    talk.note("the key changed")
    talk.end()
    talk.print_block("done      2,000")
    talk.close()
    text = stream.getvalue()
    assert text.startswith("a -> b\nrows      2,000\n")
    assert "note      the key changed\n" in text
    assert re.search(r"\r 63% \|######    \| 1,260/2,000 \[0:10<0:28\] 26\.0 rows/s", text)
    assert text.endswith("\rdone      2,000\n")
    assert STAMP not in text


def shown(text: str) -> list[str]:
    """The lines of a terminal that has taken ``text``."""
    lines, column = [""], 0
    for char in text:
        if char == "\n":
            lines.append("")
        elif char != "\r":
            lines[-1] = lines[-1][:column].ljust(column) + char + lines[-1][column + 1 :]
        column = 0 if char in "\r\n" else column + 1
    return [line.rstrip() for line in lines]


class EchoingTerminal(io.StringIO):
    """A terminal whose user types Ctrl-C behind the bar, every time one is drawn."""

    def write(self, text: str) -> int:
        echo = "^C" if text.rstrip().endswith("failed") else ""
        super().write(text + echo)
        return len(text)


@pytest.mark.parametrize("done", [1_260, 2_000])
def test_no_bar_and_no_echo_of_a_key_stays_in_a_line_of_text(done: int) -> None:
    stream, clock = EchoingTerminal(), Clock()
    talk = _progress(stream, clock, is_tty=True)
    talk.begin(2000, 1000)
    clock.now_s = 10.0
    talk.update(Snapshot(2000, done, in_flight=48))
    talk.note("short", label="stopping")
    talk.end()
    talk.print_block("stopped   1,260 of 2,000")
    talk.close()
    lines = shown(stream.getvalue())
    bar = [line for line in lines if "%" in line]
    assert [line for line in lines if line not in bar] == [
        "stopping  short",
        "stopped   1,260 of 2,000",
        "",
    ]
    # Only a full bar stays.
    assert len(bar) == (done == 2_000)


def test_a_terminal_that_does_not_know_its_size_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as reading, os.fdopen(theirs, "w") as stream:
        talk = Progress(stream=stream, clock=Clock())
        talk.begin(100, 50)
        talk.end()
        talk.close()
        assert talk.is_tty
        assert " 50% |#####     | 50/100" in reading.read(4_096).decode()


def test_off_a_terminal_everything_has_its_time() -> None:
    stream = io.StringIO()
    talk = _progress(stream)
    talk.print_block("a -> b\nrows      2,000", ["start a -> b, 2,000 rows"])
    talk.note("48 answers are on their way", label="stopping")
    talk.close()
    assert stream.getvalue().splitlines() == [
        f"{STAMP}start a -> b, 2,000 rows",
        f"{STAMP}stopping 48 answers are on their way",
    ]


def test_quiet_says_nothing_but_keeps_the_log_file() -> None:
    stream, log_file = io.StringIO(), io.StringIO()
    talk = _progress(stream, is_tty=True, quiet=True, log_file=log_file)
    talk.print_block("a -> b", ["start a -> b"])
    talk.begin(10, 0)
    talk.update(Snapshot(10, 1))
    talk.note("hello")
    talk.end()
    talk.close()
    assert stream.getvalue() == ""
    assert log_file.getvalue() == f"{STAMP}start a -> b\n{STAMP}note hello\n"


@pytest.mark.parametrize("verbose", [True, False])
def test_details_are_shown_only_when_asked_for_and_always_logged(verbose: bool) -> None:
    stream, log_file = io.StringIO(), io.StringIO()
    talk = _progress(stream, is_tty=True, verbose=verbose, log_file=log_file)
    talk.detail("window 32 -> 64")
    talk.close()
    assert ("window 32 -> 64" in stream.getvalue()) is verbose
    assert log_file.getvalue() == f"{STAMP}detail window 32 -> 64\n"


def test_a_closed_terminal_does_not_end_the_run_or_the_log() -> None:
    stream, log_file = io.StringIO(), io.StringIO()
    stream.close()
    talk = _progress(stream, is_tty=True, log_file=log_file)
    talk.begin(10, 0)
    talk.update(Snapshot(10, 1))
    talk.note("still here")
    talk.close()
    assert log_file.getvalue() == f"{STAMP}note still here\n"


class PausedTerminal(io.StringIO):
    """Takes nothing until released, as a terminal after Ctrl-S."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def write(self, text: str) -> int:
        self.released.wait()
        return super().write(text)


def test_a_paused_terminal_holds_up_nobody() -> None:
    stream = PausedTerminal()
    talk = _progress(stream)
    for number in range(5_000):
        talk.note(f"n{number}")
    stream.released.set()
    talk.close()
    lines = stream.getvalue().splitlines()
    assert lines[-1] == f"{STAMP}note n4999"
    # What the terminal could not take in time is dropped, oldest first.
    assert len(lines) < 5_000
