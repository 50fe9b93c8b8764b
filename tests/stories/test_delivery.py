"""How a run ends while it sends: signals, deadlines, locks, and what it says then.

The run is a process of its own; the server tells the test when requests have arrived, so nothing
here waits for a guess of how long something takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from mock_faults import fault_reply
from mock_servers import MockServerThread

from batchrun.api import make_config
from batchrun.cli.main import run_command
from batchrun.console.progress import Progress
from batchrun.errors import Interrupted, StoppedEarly
from batchrun.journal.journal import Journal
from batchrun.journal.state import StateDir
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest, Respond, completion, error_reply
from batchrun.runs.stop import Stop
from batchrun.runs.submit import run

if TYPE_CHECKING:
    from conftest import Spawn, StartMock, StartRun

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0  # for events of another process; reached only when something is broken
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        ours = name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL"))
        if ours or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    rows = (json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(40))
    Path("in.jsonl").write_text("".join(rows))


class Held:
    """A server that answers ``count`` requests; from then on replies wait for ``release``."""

    def __init__(self, mock: StartMock, count: int, arrivals: int) -> None:
        self.arrived = threading.Event()
        self._release = threading.Event()
        self._count, self._arrivals = count, count + arrivals
        self.server = mock(respond=self._respond)

    def _respond(self, request: MockRequest) -> MockReply | None:
        if request.n >= self._arrivals:
            self.arrived.set()
        if request.n <= self._count:
            return None
        return _late(completion(request), self._release)

    def wait(self) -> None:
        assert self.arrived.wait(WAIT_S)

    def release(self) -> None:
        self._release.set()


def _late(reply: MockReply, release: threading.Event) -> MockReply:
    """The same reply, of which the last byte leaves only after ``release``."""

    def parts() -> Iterator[bytes]:
        yield reply.body[:1]
        while not release.is_set():
            # Blank space before a JSON member means nothing; each piece lets the server look again.
            yield b" "
        yield reply.body[1:]

    assert reply.body.startswith(b"{")
    return MockReply(
        headers=reply.headers,
        parts=parts(),
        framing="chunked",
        pause_s=0.02,
        billed=reply.billed,
        whole=True,
    )


def options(server: MockServerThread, *, concurrency: int = 4) -> tuple[object, ...]:
    return "--base-url", server.url, "-m", "m", "-c", concurrency


def held_answers() -> int:
    book = Journal.peek(StateDir(Path("in.results.parquet.batchrun")))
    assert book is not None
    with contextlib.closing(book):
        return book.answers


@pytest.mark.parametrize(("signum", "code"), SIGNALS.items(), ids=lambda s: getattr(s, "name", s))
def test_a_signal_waits_for_the_answers_on_their_way(
    signum: signal.Signals, code: int, mock: StartMock, running: StartRun
) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running("in.jsonl", *options(held.server)) as process:
        held.wait()
        process.send_signal(signum)
        process.says("on their way")
        held.release()
        ended = process.end()
    assert ended.code == code
    assert "Traceback" not in ended.err
    assert "same command" in ended.err
    assert held_answers() == 9
    assert held.server.ledger.requests == 9
    assert not Path("in.results.parquet").exists()
    again = mock()
    assert run_command(["submit", "in.jsonl", *map(str, options(again))]) == 0
    assert again.ledger.requests == 31


def test_what_the_drain_does_not_wait_for_is_in_doubt(mock: StartMock, running: StartRun) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running("in.jsonl", *options(held.server), "--drain", "0.1", "--json") as process:
        held.wait()
        process.terminate()
        ended = process.end()
    assert ended.code == 143
    summary = json.loads(ended.out)
    assert summary["rows"]["ok"] == 5
    assert summary["rows"]["pending"] == 35
    assert summary["this_run"]["in_doubt"] == 4


def test_a_second_signal_ends_it_at_once(mock: StartMock, running: StartRun) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running("in.jsonl", *options(held.server), "--drain", "3600", "--json") as process:
        held.wait()
        process.send_signal(signal.SIGINT)
        process.says("on their way")
        # A repeat within moments is taken for an echo of the first.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        ended = process.end()
    assert ended.code == 130
    assert held_answers() == 5
    summary = ended.summary
    assert summary["reason"] == "stopped at once by SIGINT"
    assert (summary["rows"]["ok"], summary["this_run"]["cut_off"]) == (5, 4)
    assert summary["next_steps"][0] == "the same command continues; nothing is paid twice"
    assert summary["request_models"] == ["m"]
    assert "at once: 5 of 40 rows answered and saved, 35 waiting" in ended.err
    assert "4 requests were on their way and may be billed without an answer" in ended.err


@pytest.mark.parametrize("first", ["signal", "deadline"])
def test_a_signal_outranks_a_deadline(first: str) -> None:
    stop = Stop(Progress(quiet=True))
    causes = [partial(stop.on_signal, signal.SIGINT), partial(stop.tell, StoppedEarly("too late"))]
    for act in causes if first == "signal" else causes[::-1]:
        act()
    with pytest.raises(Interrupted):
        stop.check()


def test_a_second_signal_leaves_a_clean_terminal(mock: StartMock, running: StartRun) -> None:
    held = Held(mock, count=5, arrivals=4)
    ours, theirs = pty.openpty()
    with (
        io.FileIO(ours) as screen,
        running("in.jsonl", *options(held.server), "--drain", "1h", stderr=theirs) as process,
    ):
        os.close(theirs)
        held.wait()
        process.send_signal(signal.SIGINT)
        text = read_until(screen, b"stop now")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        text += read_until(screen, b"exit code 130\r\n")
        assert process.wait(WAIT_S) == 130
    last = text.decode().rpartition("stopped   ")[0].rpartition("\n")[2]
    # The bar is wiped out, and the text begins where it stood.
    assert last.endswith("\r")
    assert not last.rstrip("\r").rpartition("\r")[2].strip()


HANGING = """
import asyncio, functools, signal
from batchrun import process

say = functools.partial(print, flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)

async def hang():
    with process.signals(lambda _: say("first"), lambda: say("second"), lambda: say("last words")):
        say("ready")
        await asyncio.sleep(3600)

process.LEAVE_S = 3600.0 if {third} else 0.1
asyncio.run(hang())
"""


@pytest.mark.parametrize("third", [True, False], ids=["third signal", "in vain for a while"])
def test_a_run_that_hangs_is_left_all_the_same(third: bool, spawn: Spawn) -> None:
    with spawn(HANGING.format(third=third)) as process:
        assert process.stdout is not None
        for words in ("ready", "first", "second"):
            assert process.stdout.readline() == f"{words}\n"
            # Signals within moments of the first are taken for its echo.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5 if words == "first" else 0.0)
            if words != "second" or third:
                process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "last words\n"
        assert process.wait(WAIT_S) == 130


def test_the_bar_and_the_last_line_tell_one_speed(mock: StartMock, running: StartRun) -> None:
    server = mock(Knobs(latency_s=0.2))
    ours, theirs = pty.openpty()
    with (
        io.FileIO(ours) as screen,
        running("in.jsonl", *options(server), stderr=theirs) as process,
    ):
        os.close(theirs)
        text = read_until(screen, b"head -n 3\r\n").decode()
        assert process.wait(WAIT_S) == 0
    bar, done = re.findall(r"([\d.]+) rows/s", text)[-2:]
    assert float(bar) == pytest.approx(float(done), rel=0.05)


def read_until(screen: io.FileIO, words: bytes) -> bytes:
    text = b""
    while words not in text:
        piece = screen.read(4_096)
        assert piece, text
        text += piece
    return text


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ignored_at_the_start_stays_ignored(
    signum: signal.Signals, mock: StartMock, running: StartRun
) -> None:
    """``nohup`` ignores SIGHUP, a shell SIGINT for what it starts with ``&``."""
    held = Held(mock, count=5, arrivals=4)
    nohup = partial(signal.signal, signum, signal.SIG_IGN)
    with running("in.jsonl", *options(held.server), preexec_fn=nohup) as process:
        held.wait()
        process.send_signal(signum)
        held.release()
        assert process.end().code == 0


def refusing(status: int) -> Respond:
    headers = {"Retry-After": "300"}
    return lambda request: error_reply(status, "slow", code="rate_limited", headers=headers)


def lost(request: MockRequest) -> MockReply | None:
    return None if request.n <= 5 else MockReply(raw=b"", ending="close")


WAITS: dict[str, tuple[Respond, int, tuple[str, ...]]] = {
    "a gate": (refusing(429), 1, ()),
    "rows that rest": (refusing(503), 4, ()),
    "a pace": (lambda request: None, 1, ("--rpm", "0.1")),
    "an outage": (lost, 9, ("--max-outage", "1h", "--max-retries", "1000")),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_run_that_only_waits_stops_at_once(wait: str, mock: StartMock, running: StartRun) -> None:
    """What it waits for would take minutes; so would the drain, if there were anything in it."""
    respond, arrivals, more = WAITS[wait]
    server = mock(respond=respond)
    with running("in.jsonl", *options(server), *more, "--drain", "1h", "--json") as process:
        wait_until(lambda: server.ledger.requests >= arrivals)
        process.terminate()
        ended = process.end()
    assert ended.code == 143
    assert ended.summary["rows"]["pending"] >= 25


def test_a_deadline_stops_the_run(mock: StartMock, running: StartRun) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running(
        "in.jsonl", *options(held.server), "--deadline", "1", "--drain", "0", "--json"
    ) as process:
        ended = process.end()
    assert ended.code == 75
    summary = json.loads(ended.out)
    assert "deadline" in summary["reason"]
    assert summary["rows"]["pending"] == 40 - held_answers()
    assert not Path("in.results.parquet").exists()


def test_a_deadline_far_away_does_nothing(mock: StartMock, running: StartRun) -> None:
    with running("in.jsonl", *options(mock()), "--deadline", "1h") as process:
        assert process.end().code == 0


# A wall clock that jumps

JUMPING = """
import itertools, time
wall, moments = time.time, itertools.count()
time.time = lambda: wall() + 3600 * (next(moments) // {every} % 3 - 1)
"""


@pytest.fixture
def jumping(tmp_path: Path) -> dict[str, str]:
    """The environment of a run whose wall clock goes back and forth by hours while it runs."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "sitecustomize.py").write_text(JUMPING.format(every=7))
    return {"PYTHONPATH": os.pathsep.join((str(place), str(ROOT)))}


def test_a_wall_clock_that_jumps_changes_nothing(
    jumping: dict[str, str], mock: StartMock, running: StartRun
) -> None:
    """Back-off, pauses that are named, pacing and what an attempt takes go by another clock."""
    kinds = ("429-ms", "429-date", "500", "503-retry-after", "disconnect", "hang")
    knobs = Knobs(retry_after_s=0.2)

    def respond(request: MockRequest) -> MockReply | None:
        met = dict(enumerate(kinds, start=5)).get(request.n)
        return None if met is None else fault_reply(met, request, knobs)

    server = mock(respond=respond)
    more = (
        "--timeout",
        "1",
        "--connect-timeout",
        "1",
        "--rpm",
        "6000",
        "--max-wait",
        "60",
        "--max-outage",
        "60",
    )
    with running("in.jsonl", *options(server), *more, "--json", environ=jumping) as process:
        ended = process.end()
    assert ended.code == 0, ended.err
    assert ended.summary["rows"]["ok"] == 40
    assert server.ledger.requests == 40 + len(kinds)
    latencies = pq.read_table("in.results.parquet").column("latency_s").to_pylist()
    assert all(0.0 <= latency_s < WAIT_S for latency_s in latencies)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_date_that_a_wrong_clock_makes_far_away_is_waited_for_no_longer_than_max_wait(
    hours: int, mock: StartMock, running: StartRun, tmp_path: Path
) -> None:
    """A date without the endpoint's own time beside it can only be read by our clock."""

    def respond(request: MockRequest) -> MockReply | None:
        if request.n > 1:
            return None
        date = formatdate(time.time() + 1, usegmt=True)
        return error_reply(429, "slow", code="rate_limited", headers={"Retry-After": date})

    shifted = f"import time\nwall = time.time\ntime.time = lambda: wall() + {hours * 3600}\n"
    (tmp_path / "sitecustomize.py").write_text(shifted)
    environ = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    more = ("--max-wait", "60", "--json")
    with running("in.jsonl", *options(mock(respond=respond)), *more, environ=environ) as process:
        ended = process.end()
    # Slow by an hour, the date seems to be an hour away: the run stops and can be run again. Fast
    # by an hour, it seems to be over, and the row is tried again as if none had been named.
    assert ended.code == (75 if hours < 0 else 0), ended.err


# Two at once


def test_two_at_once_are_one_too_many(
    mock: StartMock, capsys: pytest.CaptureFixture[str], running: StartRun
) -> None:
    held = Held(mock, count=5, arrivals=4)
    command = ["submit", "in.jsonl", *map(str, options(held.server))]
    with running("in.jsonl", *options(held.server)) as process:
        held.wait()
        before = held.server.ledger.requests
        assert run_command(command) == 11
        said = capsys.readouterr().err
        assert f"pid {process.pid}" in said
        assert socket.gethostname() in said
        assert run_command([*command, "--if-locked", "skip"]) == 0
        assert run_command([*command, "--if-locked", "skip", "--json"]) == 0
        assert "pid" in json.loads(capsys.readouterr().out)["reason"]
        assert held.server.ledger.requests == before
        with running("in.jsonl", *options(held.server), "--if-locked", "wait") as waiting:
            held.release()
            assert process.end().code == 0
            assert waiting.end().code == 0
    assert held.server.ledger.requests == 40


def test_a_run_that_waits_for_the_lock_can_be_interrupted(
    mock: StartMock, running: StartRun
) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running("in.jsonl", *options(held.server)):
        held.wait()
        with running("in.jsonl", *options(held.server), "--if-locked", "wait") as waiting:
            waiting.says("is in use by pid")
            waiting.terminate()
            assert waiting.end().code == 143
        held.release()


# Stdin


@pytest.mark.parametrize(("signum", "code"), SIGNALS.items(), ids=lambda s: getattr(s, "name", s))
def test_a_signal_while_stdin_is_read_ends_it_and_leaves_nothing(
    signum: signal.Signals, code: int, mock: StartMock, running: StartRun
) -> None:
    server = mock()
    with running("-", "-o", "x.parquet", *options(server), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write('{"prompt": "Question 0?"}\n')
        process.stdin.flush()
        wait_until(lambda: any(Path().glob("x.parquet.batchrun/.spool-*")))
        process.send_signal(signum)
        # Stdin stays open, as it does when its writer is slow.
        assert process.wait(WAIT_S) == code
        assert process.stderr is not None
        assert process.stderr.read() == f"batchrun: stopped by {signum.name}\n"
    assert server.ledger.requests == 0
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


def test_a_signal_while_stdin_is_read_keeps_the_answers_of_earlier_runs(
    mock: StartMock, running: StartRun
) -> None:
    rows = Path("in.jsonl").read_text()
    held = Held(mock, count=5, arrivals=4)
    command = ("-", "-o", "in.results.parquet", *options(held.server))
    with running(*command, "--drain", "0", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(rows)
        process.stdin.close()
        process.stdin = None
        held.wait()
        process.terminate()
        assert process.end().code == 143
    with running(*command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write('{"prompt": "Another?"}\n')
        process.stdin.flush()
        wait_until(lambda: any(Path().glob("in.results.parquet.batchrun/.spool-*")))
        process.terminate()
        assert process.wait(WAIT_S) == 143
    assert held_answers() == 5
    assert not any(Path().glob("in.results.parquet.batchrun/.spool-*"))
    again = mock()
    with running(*command[:3], *options(again), stdin=subprocess.PIPE) as process:
        assert process.end(rows).code == 0
    assert again.ledger.requests == 35


def test_a_deadline_counts_while_stdin_is_read(running: StartRun) -> None:
    command = ("-", "-o", "x.parquet", "--mock", "--deadline", "0.2")
    with running(*command, stdin=subprocess.PIPE) as process:
        assert process.wait(WAIT_S) == 75


def test_a_closed_stdin_is_no_empty_input(running: StartRun) -> None:
    close = partial(os.close, 0)
    with running("-", "-o", "x.parquet", "--mock", preexec_fn=close) as process:
        ended = process.end()
    assert ended.code == 2
    assert "standard input is closed" in ended.err


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end


# What is said


@pytest.mark.parametrize(("rows", "code"), [(1, 0), (2, 3), (0, 2)])
def test_whoever_does_not_read_what_is_said_keeps_no_run_from_ending(
    rows: int, code: int, running: StartRun
) -> None:
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n'[: 16 + 17 * (rows - 1)])
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 512)
    os.set_blocking(writing, True)
    command = ("in.jsonl", "--mock", *(() if rows else ("--temperature", "hot")))
    with running(*command, stderr=writing) as process:
        assert process.wait(WAIT_S) == code
    os.close(reading)
    os.close(writing)


def test_a_stall_says_what_it_waits_for(mock: StartMock) -> None:
    held = Held(mock, count=5, arrivals=4)
    said: list[str] = []

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            said.append(text)
            if "waits for 4 answers" in text:
                held.release()
            return len(text)

    # A clock on which the stall and the minute come within moments.
    talk = Progress(stream=Terminal(), is_tty=False, clock=lambda: 1_000 * time.monotonic())
    config = make_config(
        "in.jsonl",
        base_url=held.server.url,
        model="m",
        concurrency=4,
        limit=9,
        timeout_s=5.0,
        connect_timeout_s=1.0,
        max_retries=0,
    )
    summary = asyncio.run(run(config, talk))
    talk.close()
    assert summary.exit_code == 0
    assert re.search(r"5/9 waits for 4 answers, the longest for \d+s", "".join(said))


def test_quiet_is_silent_on_0_and_says_the_end_otherwise(
    mock: StartMock, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["submit", "in.jsonl", *map(str, options(mock())), "--quiet"]
    assert run_command(command) == 0
    assert capsys.readouterr() == ("", "")
    assert run_command(command) == 0
    assert capsys.readouterr() == ("", "")
    refusing = ["--base-url", mock(Knobs(key="other")).url, "-m", "m"]
    assert run_command(["submit", "in.jsonl", *refusing, "-o", "x.parquet", "--quiet"]) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("stopped ")
    assert "exit code 4" in said.err


@pytest.mark.parametrize(
    ("args", "code", "state"),
    [
        (["in.jsonl"], 0, "finished"),
        (["missing.jsonl"], 2, "error"),
        (["in.jsonl", "--max-retries", "-1"], 2, "error"),
        (["broken.parquet"], 74, "error"),
        (["in.jsonl", "-o", "nowhere/x.parquet"], 2, "error"),
        (["in.jsonl", "--shape", "messages"], 2, "error"),
        (["bad.jsonl"], 3, "finished"),
    ],
)
def test_json_is_one_object_on_stdout_at_every_exit(
    args: list[str], code: int, state: str, mock: StartMock, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.parquet").write_text("PAR1 and no end")
    Path("bad.jsonl").write_text('{"prompt": 1}\n{"prompt": "a"}\n')
    assert run_command(["submit", *args, *map(str, options(mock())), "--json"]) == code
    summary = json.loads(capsys.readouterr().out)
    assert summary["exit_code"] == code
    assert summary["state"] == state
    assert (summary["reason"] is None) == (code == 0)


def test_a_run_leaves_the_output_and_nothing_else(mock: StartMock) -> None:
    assert run_command(["submit", "in.jsonl", *map(str, options(mock())), "-q"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "in.results.parquet"]
    mask = os.umask(0)
    os.umask(mask)
    assert Path("in.results.parquet").stat().st_mode & 0o777 == 0o666 & ~mask
    assert pq.read_metadata("in.results.parquet").num_rows == 40
