"""How a run ends while it sends: signals, deadlines, locks, and what it says then.

The run is a process of its own; the server tells the test when requests have arrived, so nothing
here waits for a guess of how long something takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.parquet as pq
import pytest

from batchrun.cli import run_command
from batchrun.journal import Journal
from batchrun.mock_server import (
    Knobs,
    MockReply,
    MockRequest,
    MockServerThread,
    Respond,
    completion,
    error_reply,
)

ROOT = Path(__file__).parent.parent
WAIT_S = 30.0  # for events of another process; reached only when something is broken
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class StartMock(Protocol):
    def __call__(
        self, knobs: Knobs | None = None, *, respond: Respond | None = None
    ) -> MockServerThread: ...


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        ours = name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL"))
        if ours or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    rows = (json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(40))
    Path("in.jsonl").write_text("".join(rows))


@contextlib.contextmanager
def running(*args: object, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """``batchrun submit in.jsonl …`` as a process of its own; killed if it is there at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "batchrun", "submit", "in.jsonl", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **more,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=WAIT_S)
    return Ended(process.returncode, out, err)


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
    book = Journal.peek(Path("in.results.parquet.batchrun"))
    assert book is not None
    with contextlib.closing(book):
        return book.answers


@pytest.mark.parametrize(("signum", "code"), SIGNALS.items(), ids=lambda s: getattr(s, "name", s))
def test_a_signal_waits_for_the_answers_on_their_way(
    signum: signal.Signals, code: int, mock: StartMock
) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running(*options(held.server)) as process:
        held.wait()
        process.send_signal(signum)
        assert process.stderr is not None
        for line in process.stderr:
            if "on their way" in line:
                break
        held.release()
        ended = end_of(process)
    assert ended.code == code
    assert "Traceback" not in ended.err
    assert "same command" in ended.err
    assert held_answers() == 9
    assert held.server.ledger.requests == 9
    assert not Path("in.results.parquet").exists()
    again = mock()
    assert run_command(["submit", "in.jsonl", *map(str, options(again))]) == 0
    assert again.ledger.requests == 31


def test_what_the_drain_does_not_wait_for_is_in_doubt(mock: StartMock) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running(*options(held.server), "--drain", "0.1", "--json") as process:
        held.wait()
        process.terminate()
        ended = end_of(process)
    assert ended.code == 143
    summary = json.loads(ended.out)
    assert summary["rows"]["ok"] == 5
    assert summary["rows"]["pending"] == 35
    assert summary["this_run"]["in_doubt"] == 4


def test_a_second_signal_ends_it_at_once(mock: StartMock) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running(*options(held.server), "--drain", "3600") as process:
        held.wait()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        for line in process.stderr:
            if "on their way" in line:
                break
        # A repeat within moments is taken for an echo of the first.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
    assert held_answers() == 5


def test_a_signal_ignored_at_the_start_stays_ignored(mock: StartMock) -> None:
    held = Held(mock, count=5, arrivals=4)

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with running(*options(held.server), preexec_fn=nohup) as process:
        held.wait()
        process.send_signal(signal.SIGHUP)
        held.release()
        assert end_of(process).code == 0


def test_a_run_that_only_waits_stops_at_once(mock: StartMock) -> None:
    arrived = threading.Event()

    def respond(request: MockRequest) -> MockReply | None:
        arrived.set()
        return error_reply(429, "slow", code="rate_limited", headers={"Retry-After": "300"})

    with running(*options(mock(respond=respond), concurrency=1)) as process:
        assert arrived.wait(WAIT_S)
        process.terminate()
        ended = end_of(process)
    assert ended.code == 143


def test_a_deadline_stops_the_run(mock: StartMock) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running(*options(held.server), "--deadline", "1", "--drain", "0", "--json") as process:
        ended = end_of(process)
    assert ended.code == 75
    summary = json.loads(ended.out)
    assert "deadline" in summary["reason"]
    assert summary["rows"]["pending"] == 40 - held_answers()
    assert not Path("in.results.parquet").exists()


def test_a_deadline_far_away_does_nothing(mock: StartMock) -> None:
    with running(*options(mock()), "--deadline", "1h") as process:
        assert end_of(process).code == 0


# Two at once


def test_two_at_once_are_one_too_many(mock: StartMock, capsys: pytest.CaptureFixture[str]) -> None:
    held = Held(mock, count=5, arrivals=4)
    command = ["submit", "in.jsonl", *map(str, options(held.server))]
    with running(*options(held.server)) as process:
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
        with running(*options(held.server), "--if-locked", "wait") as waiting:
            held.release()
            assert end_of(process).code == 0
            assert end_of(waiting).code == 0
    assert held.server.ledger.requests == 40


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux about handlers")
def test_a_run_that_waits_for_the_lock_can_be_interrupted(mock: StartMock) -> None:
    held = Held(mock, count=5, arrivals=4)
    with running(*options(held.server)):
        held.wait()
        with running(*options(held.server), "--if-locked", "wait") as waiting:
            while not handles(waiting.pid, signal.SIGTERM):
                pass
            waiting.terminate()
            assert end_of(waiting).code == 143
        held.release()


def handles(pid: int, signum: signal.Signals) -> bool:
    """Whether a process has a handler for ``signum``: it has come as far as the lock."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signum - 1) & 1)


# What is said


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
    Path("broken.parquet").write_text("no")
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
