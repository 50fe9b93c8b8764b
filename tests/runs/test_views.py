"""Looking without sending: validate, status, collect and models, as on the command line."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow.parquet as pq
import pytest
from mock_servers import MockServerThread

from batchrun.cli.main import run_command
from batchrun.cli.watch import watch
from batchrun.console import StatusFacts
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest
from batchrun.runs import status

if TYPE_CHECKING:
    from conftest import StartRun

WAIT_S = 30.0
StartMock = Callable[..., MockServerThread]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def batchrun(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """``batchrun("status", "out.parquet")`` in an empty directory, without anybody's key."""
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Ended:
        return Ended(run_command([str(arg) for arg in args]), *capsys.readouterr())

    return run


def write_rows(count: int, path: str = "in.jsonl") -> None:
    lines = (json.dumps({"n": n, "prompt": f"Question {n}?"}) for n in range(count))
    Path(path).write_text("".join(f"{line}\n" for line in lines))


class Halfway:
    """A server that answers the first requests and keeps all others waiting.

    ``reached`` when both workers of a run wait: what was answered is journaled by then.
    """

    def __init__(self, mock: StartMock, answered: int) -> None:
        self.reached = threading.Event()
        self._answered = answered
        self.server = mock(respond=self._respond)

    def _respond(self, request: MockRequest) -> MockReply | None:
        if request.n <= self._answered:
            return None
        if request.n >= self._answered + 2:
            self.reached.set()
        return MockReply(raw=b"", ending="hang")


def test_validate_names_every_bad_row_and_repeats_and_sends_nothing(batchrun: Command) -> None:
    Path("in.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": null}\nnot json\n{"prompt": "a"}\n{"prompt": "b"}\n'
    )
    ended = batchrun("validate", "in.jsonl", "--mock")
    assert ended.code == 3
    assert 'line 2     "prompt" is null' in ended.err
    assert "line 3     broken JSON at column" in ended.err
    assert "repeats   1 row" in ended.err
    assert list(Path().iterdir()) == [Path("in.jsonl")]


def test_validate_shows_the_first_bodies_on_stdout(batchrun: Command) -> None:
    write_rows(5)
    ended = batchrun("validate", "in.jsonl", "--show", 2, "-m", "m", "--system", "Be brief.")
    bodies = [json.loads(line) for line in ended.out.splitlines()]
    assert [body["messages"][1]["content"] for body in bodies] == ["Question 0?", "Question 1?"]
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert ended.code == 0


def test_status_of_nothing_is_a_usage_error(batchrun: Command) -> None:
    ended = batchrun("status", "out.parquet")
    assert ended.code == 2
    assert "no run and no output" in ended.err


def test_status_and_collect_while_another_process_runs(
    batchrun: Command, mock: StartMock, running: StartRun
) -> None:
    halfway = Halfway(mock, answered=6)
    write_rows(10)
    with running("in.jsonl", "--base-url", halfway.server.url, "-m", "m", "-c", 2) as process:
        assert halfway.reached.wait(WAIT_S)
        found = batchrun("status", "in.results.parquet", "--json")
        assert found.code == 11
        facts = json.loads(found.out)
        assert (facts["state"], facts["pid"]) == ("running", process.pid)

        partial = batchrun("collect", "in.results.parquet")
        assert partial.code == 0
        table = pq.read_table("in.results.partial.parquet").to_pydict()
        assert table["n"] == [0, 1, 2, 3, 4, 5]
        assert set(table["status"]) == {"ok"}
    stopped = batchrun("status", "in.results.parquet")
    assert stopped.code == 75
    assert "6 of 10 answered, 0 failed, 4 waiting" in stopped.err
    assert "batchrun submit in.jsonl" in stopped.err


def test_watch_shows_a_run_until_it_has_ended(
    batchrun: Command,
    mock: StartMock,
    running: StartRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    halfway = Halfway(mock, answered=6)
    write_rows(10)
    to = ("--base-url", halfway.server.url, "-m", "m", "-c", 2, "--drain", 0)
    with running("in.jsonl", *to) as process:
        assert halfway.reached.wait(WAIT_S)
        looks: list[str] = []

        def look() -> list[StatusFacts]:
            if looks[1:]:
                process.terminate()
                process.wait()
            found = status("in.results.parquet")
            looks.append(found.state)
            return [found]

        assert [each.state for each in watch(look, every_s=0.0)] == ["stopped"]
    assert looks == ["running", "running", "stopped"]
    said = capsys.readouterr().err
    assert said.startswith(f"running   pid {process.pid}")
    assert said.count("answered") == 1
    ended = batchrun("status", "--watch", "in.results.parquet")
    assert ended.code == 75
    assert ended.err.count("6 of 10 answered") == 1
    assert batchrun("submit", "in.jsonl", "--mock", "-o", "done.parquet").code == 0
    assert batchrun("status", "done.parquet", "in.results.parquet").code == 75


@pytest.mark.parametrize("columns", [200, 60, 40])
def test_watch_draws_over_its_lines_and_ends_at_ctrl_c(
    batchrun: Command, mock: StartMock, running: StartRun, columns: int
) -> None:
    halfway = Halfway(mock, answered=6)
    write_rows(10)
    assert batchrun("submit", "in.jsonl", "--mock", "-o", "done.parquet").code == 0
    with running("in.jsonl", "--base-url", halfway.server.url, "-m", "m", "-c", 2):
        assert halfway.reached.wait(WAIT_S)
        assert batchrun("status", "done.parquet", "in.results.parquet").code == 11
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        command = ("status", "--watch", "done.parquet", "in.results.parquet")
        with (
            os.fdopen(ours, "rb", buffering=0) as terminal,
            subprocess.Popen(
                [sys.executable, "-m", "batchrun", *command],
                stderr=theirs,
                env={**os.environ, "TERM": "xterm"},
                # Under nohup it would be ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            ) as watching,
        ):
            os.close(theirs)
            drawn = b""
            while not (up := re.search(rb"\x1b\[(\d+)A", drawn)):
                drawn += terminal.read(4_096)
            watching.send_signal(signal.SIGINT)
            assert watching.wait(WAIT_S) == 130
    first = re.sub("\x1b\\[[?\\dA-Z]+[lhKJ]?", "", drawn[: up.start()].decode())
    lines = first.replace("\r", "").splitlines()
    assert len(lines) == int(up[1])
    # No terminal cuts a number in two: lines are as long as it is wide.
    assert all(len(line) <= columns for line in lines)
    said = " ".join(" ".join(lines).split())
    assert "done.parquet finished 10 of 10 answered" in said
    # What the other process says of itself is up to a second old.
    answered = re.search(r"in.results.parquet running (\d+) of 10 answered", said)
    assert answered is not None
    assert f"together running {10 + int(answered[1])} of 20 answered" in said


def test_status_of_several_runs_ends_as_the_one_that_needs_somebody(batchrun: Command) -> None:
    write_rows(3)
    for name in ("a.parquet", "b.parquet"):
        assert batchrun("submit", "in.jsonl", "--mock", "-o", name).code == 0
    both = batchrun("status", "a.parquet", "b.parquet")
    assert both.code == 0
    assert [line for line in both.err.splitlines() if line.endswith(".parquet")] == [
        "a.parquet",
        "b.parquet",
    ]
    told = batchrun("status", "a.parquet", "b.parquet", "--json")
    assert [json.loads(line)["output"] for line in told.out.splitlines()] == [
        "a.parquet",
        "b.parquet",
    ]
    assert batchrun("status", "a.parquet", "--watch", "--json").code == 2
    assert batchrun("status", "a.parquet", "b.parquet", "--state", "x").code == 2


def test_status_of_a_stopped_run_counts_as_the_run_did(
    batchrun: Command, mock: StartMock, running: StartRun
) -> None:
    halfway = Halfway(mock, answered=6)
    write_rows(10)
    with Path("in.jsonl").open("a") as file:
        file.write('{"prompt": null}\n')
    url = halfway.server.url
    options = ("-m", "m", "-c", 2, "--drain", 0, "--json")
    with running("in.jsonl", "--base-url", url, *options) as process:
        assert halfway.reached.wait(WAIT_S)
        process.terminate()
        rows = process.end().summary["rows"]
    found = batchrun("status", "in.results.parquet", "--json")
    assert found.code == 75
    told = json.loads(found.out)["rows"]
    assert [told[name] for name in ("ok", "error", "pending")] == [6, 1, 4]
    assert [rows[name] for name in ("ok", "error", "pending")] == [6, 1, 4]


def test_the_finished_output_takes_its_own_partial_file_away_and_no_other(
    batchrun: Command, mock: StartMock, running: StartRun
) -> None:
    halfway = Halfway(mock, answered=6)
    write_rows(10)
    partial, kept = Path("in.results.partial.parquet"), Path("kept.parquet")
    with running("in.jsonl", "--base-url", halfway.server.url, "-m", "m", "-c", 2):
        assert halfway.reached.wait(WAIT_S)
        assert batchrun("collect", "in.results.parquet").code == 0
    partial.rename(kept)
    partial.symlink_to(kept)
    endpoint = ("--base-url", mock().url, "-m", "m")
    assert batchrun("submit", "in.jsonl", *endpoint).code == 0
    assert partial.is_symlink()
    partial.unlink()
    # Of an earlier run: it is named, not removed.
    kept.rename(partial)
    write_rows(11)
    ended = batchrun("submit", "in.jsonl", *endpoint)
    assert ended.code == 0
    assert f"{partial} is older than this output" in ended.err
    assert partial.exists()

    halfway = Halfway(mock, answered=6)
    write_rows(30)
    with running("in.jsonl", "--base-url", halfway.server.url, "-m", "m", "-c", 2):
        assert halfway.reached.wait(WAIT_S)
        assert batchrun("collect", "in.results.parquet").code == 0
    assert batchrun("submit", "in.jsonl", *endpoint).code == 0
    assert not partial.exists()


def test_what_was_collected_is_never_taken_for_the_finished_output(
    batchrun: Command, mock: StartMock
) -> None:
    server = mock(Knobs())
    write_rows(4)
    endpoint = ("--base-url", server.url, "-m", "m")
    assert batchrun("submit", "in.jsonl", *endpoint, "-n", 2).code == 0
    assert batchrun("collect", "in.results.parquet", "-o", "copy.jsonl").code == 0
    lines = [json.loads(line) for line in Path("copy.jsonl").read_text().splitlines()]
    assert [line["batchrun"]["input"]["n"] for line in lines] == [0, 1]


def test_a_finished_output_converts_both_ways(batchrun: Command) -> None:
    write_rows(3)
    with Path("in.jsonl").open("a") as file:
        file.write('{"n": 3, "prompt": null}\n')
    assert batchrun("submit", "in.jsonl", "--mock").code == 3
    assert batchrun("collect", "in.mock.parquet", "-o", "lines.jsonl").code == 0
    assert batchrun("collect", "lines.jsonl", "-o", "again.parquet").code == 0
    first = pq.read_table("in.mock.parquet")
    again = pq.read_table("again.parquet")
    assert first.schema == again.schema
    for name in first.schema.names:
        if name != "request_id":
            assert first[name].to_pylist() == again[name].to_pylist(), name


def test_status_of_a_finished_output_tells_what_failed(batchrun: Command) -> None:
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')
    batchrun("submit", "in.jsonl", "--mock")
    ended = batchrun("status", "in.mock.parquet")
    assert ended.code == 0
    assert "1 answered, 1 failed (1 invalid_input)" in ended.err


def test_collect_refuses_to_write_over_the_output(batchrun: Command) -> None:
    write_rows(1)
    batchrun("submit", "in.jsonl", "--mock")
    ended = batchrun("collect", "in.mock.parquet", "-o", "in.mock.parquet")
    assert ended.code == 2
    assert "name another file" in ended.err


def test_collect_replaces_what_it_wrote_of_this_output_and_no_other(batchrun: Command) -> None:
    write_rows(2)
    Path("other.jsonl").write_text('{"prompt": "a"}\n')
    for name in ("in.jsonl", "other.jsonl"):
        assert batchrun("submit", name, "--mock").code == 0
    other = Path("other.mock.parquet")
    whole = other.read_bytes()
    ended = batchrun("collect", "in.mock.parquet", "-o", str(other))
    assert ended.code == 2
    assert "another output" in ended.err
    assert other.read_bytes() == whole
    # Its own copy follows the output, over runs.
    assert batchrun("collect", "in.mock.parquet", "-o", "copy.jsonl").code == 0
    assert batchrun("collect", "in.mock.parquet", "-o", "copy.jsonl").code == 0
    write_rows(3)
    assert batchrun("submit", "in.jsonl", "--mock").code == 0
    assert batchrun("collect", "in.mock.parquet", "-o", "copy.jsonl").code == 0
    assert len(Path("copy.jsonl").read_text().splitlines()) == 3
    assert batchrun("collect", str(other), "-o", "copy.jsonl").code == 2


def test_models_lists_what_the_endpoint_offers(batchrun: Command, mock: StartMock) -> None:
    server = mock(Knobs(models=("small", "large")))
    ended = batchrun("models", "--base-url", server.url)
    assert (ended.code, ended.out) == (0, "small\nlarge\n")


def test_collect_of_a_run_without_any_answer_is_an_empty_table(
    batchrun: Command, mock: StartMock, running: StartRun
) -> None:
    halfway = Halfway(mock, answered=0)
    write_rows(10)
    with running("in.jsonl", "--base-url", halfway.server.url, "-m", "m", "-c", 2):
        assert halfway.reached.wait(WAIT_S)
    ended = batchrun("collect", "in.results.parquet")
    assert ended.code == 0
    table = pq.read_table("in.results.partial.parquet")
    assert (table.num_rows, table.schema.names[:2]) == (0, ["n", "prompt"])
