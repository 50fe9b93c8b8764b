"""The state directory is batchrun's own: nothing of anybody else's is ever removed or replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.cli.main import run_command
from batchrun.errors import JournalDamaged, LocalIOError, UsageError
from batchrun.journal.journal import Journal
from batchrun.journal.records import HEADER, frame_of
from batchrun.journal.state import StateDir, locate
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest

if TYPE_CHECKING:
    from conftest import Spawn, StartMock, StartRun, Submit

ROWS = 6


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write_rows(path: str = "in.jsonl", rows: int = ROWS) -> None:
    lines = (json.dumps({"n": n, "prompt": f"Question {n}?"}) for n in range(rows))
    Path(path).write_text("".join(f"{line}\n" for line in lines))


def everything(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# ── what others have there ───────────────────────────────────────────────────────────────────────

THEIRS = (
    *("thesis.tex", "stdin.jsonl", "run.json", "status.json", "lock", "journal-2026.jsonl"),
    *("journal-000001.seg", "journal-table", "made-up"),
)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory with files of somebody else, which bear the names of a state."""
    place = tmp_path / "shared"
    place.mkdir()
    for name in THEIRS:
        (place / name).write_text(f"precious {name}")
    return place


@pytest.mark.parametrize("command", ["finished", "refused", "stopped"])
def test_a_populated_directory_keeps_every_file(
    command: str, shared: Path, submit: Submit, mock: StartMock
) -> None:
    write_rows()
    before = everything(shared)
    if command == "finished":
        assert submit("in.jsonl", "--mock", "--state", shared).code == 0
        assert everything(shared) == before
    elif command == "refused":
        assert submit("missing.jsonl", "--mock", "--state", shared).code == 2
        assert everything(shared) == before
    else:
        server = mock(Knobs(models=("other",)))
        ended = submit("in.jsonl", "--base-url", server.url, "-m", "m", "--state", shared)
        assert ended.code == 4
        assert before.items() <= everything(shared).items()


def test_the_directory_with_output_and_input_may_be_the_state(
    tmp_path: Path, submit: Submit
) -> None:
    write_rows("journal-2026.jsonl")
    for name in ("run.json", "status.json", "lock"):
        Path(name).write_text("mine")
    before = everything(tmp_path)
    ended = submit("journal-2026.jsonl", "--mock", "-o", "journal-answers.parquet", "--state", ".")
    assert ended.code == 0, ended.err
    assert pq.read_table("journal-answers.parquet").num_rows == ROWS
    after = everything(tmp_path)
    del after["journal-answers.parquet"]
    assert after == before


def test_what_is_read_from_stdin_overwrites_nothing(shared: Path, running: StartRun) -> None:
    before = everything(shared)
    command = ("-", "--mock", "-o", "out.parquet", "--state", shared)
    with running(*command, stdin=subprocess.PIPE) as run:
        assert run.end('{"prompt": "a"}\n').code == 0
    assert everything(shared) == before


def test_an_empty_directory_keeps_no_prompt_after_the_run(
    tmp_path: Path, running: StartRun
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    command = ("-", "--mock", "-o", "out.parquet", "--state", state)
    with running(*command, stdin=subprocess.PIPE) as run:
        assert run.end('{"prompt": "a"}\n').code == 0
    assert list(state.iterdir()) == []


def test_a_link_in_place_of_the_state_is_refused(shared: Path, submit: Submit) -> None:
    write_rows()
    before = everything(shared)
    Path("in.mock.parquet.batchrun").symlink_to(shared)
    ended = submit("in.jsonl", "--mock")
    assert ended.code == 2
    assert "is a link" in ended.err
    assert submit("missing.jsonl", "--mock", "-o", "in.mock.parquet").code == 2
    assert everything(shared) == before
    assert not Path("in.mock.parquet").exists()


def test_a_link_with_a_name_of_ours_is_not_written_through(tmp_path: Path, submit: Submit) -> None:
    write_rows()
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    for name in ("run.json.new", "status.json.new", "run.json", "status.json"):
        state = Path("in.mock.parquet.batchrun")
        state.mkdir(0o700)
        (state / "made-by-batchrun").touch()
        (state / name).symlink_to(precious)
        assert submit("in.jsonl", "--mock").code == 0
        assert precious.read_text() == "keep me"
        for rest in state.iterdir() if state.exists() else ():
            rest.unlink()
        if state.exists():
            state.rmdir()
        Path("in.mock.parquet").unlink()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_may_write_is_refused(
    mode: int, tmp_path: Path, submit: Submit
) -> None:
    write_rows()
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(mode)
    ended = submit("in.jsonl", "--mock", "--state", state)
    assert ended.code == 2
    assert "can be written by others" in ended.err
    assert list(state.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 12345, -1)
    with pytest.raises(UsageError, match="another user"):
        locate(state, "out.parquet")


def test_what_is_no_directory_and_where_none_can_be_made_is_refused(submit: Submit) -> None:
    write_rows()
    Path("file").write_text("x")
    for place in ("file", "file/below", "missing/below", "/proc"):
        ended = submit("in.jsonl", "--mock", "--state", place)
        assert ended.code == 2, place
        assert "--state" in ended.err or "move it" in ended.err
    assert not Path("in.mock.parquet").exists()


def test_the_state_is_private(tmp_path: Path, submit: Submit, mock: StartMock) -> None:
    write_rows()
    server = mock(Knobs(models=("other",)))
    assert submit("in.jsonl", "--base-url", server.url, "-m", "m").code == 4
    state = tmp_path / "in.results.parquet.batchrun"
    assert state.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in state.iterdir()} == {0o600}


def test_an_input_in_the_state_is_refused(tmp_path: Path, submit: Submit, mock: StartMock) -> None:
    server = mock(Knobs(models=("other",)))
    write_rows()
    to = ("--base-url", server.url, "-m", "m", "-o", "out.parquet", "--state", "state")
    assert submit("in.jsonl", *to).code == 4
    write_rows("state/stdin.jsonl")
    ended = submit("state/stdin.jsonl", *to)
    assert ended.code == 2
    assert Path("state/stdin.jsonl").exists()


# ── one run of an output at a time ───────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_another_state_is_no_way_around_the_lock_of_an_output(
    tmp_path: Path, submit: Submit, running: StartRun, mock: StartMock
) -> None:
    def hang(_: MockRequest) -> MockReply:
        return MockReply(raw=b"", ending="hang")

    server = mock(respond=hang)
    write_rows()
    Path("link.parquet").symlink_to("out.parquet")
    to = ("--base-url", server.url, "-m", "m")
    for first, second in (((), ("--state", "b")), (("--state", "a"), ("--state", "b"))):
        with running("in.jsonl", *to, "-o", "out.parquet", *first) as run:
            while not Path("a" if first else "out.parquet.batchrun", "run.json").exists():
                assert run.poll() is None
            for name in ("out.parquet", "link.parquet"):
                ended = submit("in.jsonl", *to, "-o", name, *second)
                assert ended.code == 11, ended.err
                assert f"out.parquet is in use by pid {run.pid}" in ended.err
            assert not Path("b").exists()
            while run.poll() is None:
                run.send_signal(signal.SIGINT)
                time.sleep(0.05)
    assert submit("in.jsonl", "--mock", "-o", "x.parquet", "--state", "c").code == 0
    assert not Path("x.parquet.batchrun").exists()
    assert not Path("c").exists()


# ── killed while a finished state is removed ─────────────────────────────────────────────────────

KILLED = """
import os, signal, sys
from batchrun.cli import run_command
from batchrun.journal import Journal

Journal.open.__func__.__kwdefaults__["segment_bytes"] = 4_000
at, seen = int(sys.argv[1]), 0

def kill(event, args):
    global seen
    if event == "os.rename" and str(args[1]) == "journal-void" or seen and event in STEPS:
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

STEPS = ("os.rename", "os.remove", "os.rmdir")
sys.addaudithook(kill)
sys.exit(run_command(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_at_any_step_of_removing_a_finished_state_nothing_is_asked_again(
    tmp_path: Path, spawn: Spawn, submit: Submit, mock: StartMock
) -> None:
    rows = 20
    write_rows(rows=rows)
    output = Path("in.results.parquet")
    most_segments = 0
    for step in count(1):
        server = mock()
        command = ("submit", "in.jsonl", "--base-url", server.url, "-m", "m")
        with spawn(KILLED, step, *command) as run:
            _, said = run.communicate(timeout=60)
        assert server.ledger.requests == rows, said
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, said
        names = os.listdir("in.results.parquet.batchrun")
        most_segments = max(most_segments, Counter(name[-4:] for name in names)[".seg"])
        assert submit(*command[1:]).code == 0
        assert server.ledger.requests == rows
        # Also when more is asked for, and the journal is opened.
        write_rows(rows=rows + 1)
        with spawn(KILLED, 1_000, *command) as run:
            assert run.wait(60) == 0
        assert server.ledger.requests == rows + 1
        write_rows(rows=rows)
        output.unlink()
    assert most_segments >= 3
    assert step > 6
    assert sorted(os.listdir()) == ["in.jsonl", "in.results.parquet"]


def test_a_void_journal_is_none_and_the_published_file_is_taken(
    tmp_path: Path, submit: Submit, mock: StartMock, spawn: Spawn
) -> None:
    server = mock()
    write_rows(rows=20)
    command = ("submit", "in.jsonl", "--base-url", server.url, "-m", "m")
    with spawn(KILLED, 3, *command) as run:
        run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    state = StateDir(tmp_path / "in.results.parquet.batchrun")
    assert not state.has_journal()
    assert Journal.peek(state) is None
    write_rows(rows=21)
    ended = submit(*command[1:])
    assert ended.code == 0
    assert server.ledger.requests == 21
    assert not state.path.exists()


# ── a state that is not as it should be ──────────────────────────────────────────────────────────


def stopped(submit: Submit, mock: StartMock) -> StateDir:
    """The state of a run that was refused at once."""
    write_rows()
    server = mock(Knobs(models=("other",)))
    assert submit("in.jsonl", "--base-url", server.url, "-m", "m").code == 4
    return StateDir(Path("in.results.parquet.batchrun"))


@pytest.mark.parametrize("name", ["status.json", "run.json", "journal-000001.seg", "journal-table"])
def test_a_fifo_in_the_state_hangs_nobody(
    name: str, submit: Submit, mock: StartMock, capsys: pytest.CaptureFixture[str]
) -> None:
    state = stopped(submit, mock)
    (state.path / name).unlink(missing_ok=True)
    os.mkfifo(state.path / name)
    for command in ("status", "collect"):
        assert run_command([command, "in.results.parquet"]) in (0, 2, 74, 75)
    assert submit("in.jsonl", "--mock", "-o", "in.results.parquet").code in (0, 2, 74)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["status.json", "run.json"])
def test_deeply_nested_json_in_the_state_is_nothing_to_read(
    name: str, submit: Submit, mock: StartMock
) -> None:
    state = stopped(submit, mock)
    (state.path / name).write_text('{"params": ' + '{"a":' * 100_000 + "1" + "}" * 100_001)
    for command in ("status", "collect"):
        assert run_command([command, "in.results.parquet"]) in (0, 2, 75)


@pytest.mark.parametrize("payload", [[1], {"format": 1}, {}, "x", {"format": 1, "settings": 3}])
def test_a_header_of_another_shape_is_damage(payload: Any, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    frame = frame_of(HEADER, msgspec.json.encode(payload), 0)
    (state / "journal-000001.seg").write_bytes(frame)
    with pytest.raises(JournalDamaged):
        Journal.peek(StateDir(state))


@pytest.mark.parametrize("missing", [1, 2])
def test_a_segment_that_is_missing_is_called_so(missing: int, tmp_path: Path) -> None:
    for number in {1, 2, 3} - {missing}:
        (tmp_path / f"journal-{number:06d}.seg").write_bytes(b"")
    with pytest.raises(LocalIOError, match=rf"journal-00000{missing}\.seg: is missing") as caught:
        Journal.peek(StateDir(tmp_path))
    assert caught.value.next_steps


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_fifo_as_output_is_refused(more: tuple[str, ...], submit: Submit) -> None:
    write_rows()
    os.mkfifo("out.parquet")
    ended = submit("in.jsonl", "--mock", "-o", "out.parquet", *more)
    assert ended.code == 2
    assert "not a regular file" in ended.err


# ── what appears at the output, and what collect may replace ─────────────────────────────────────


def when_asked(do: Callable[[], object]) -> Callable[[MockRequest], MockReply | None]:
    """A server's habit: something happens when the third request comes."""

    def respond(request: MockRequest) -> MockReply | None:
        if request.n == 3:
            do()
        return None

    return respond


def test_a_file_that_appears_at_the_output_during_the_run_is_not_replaced(
    submit: Submit, mock: StartMock
) -> None:
    write_rows()
    output = Path("in.results.parquet")
    server = mock(respond=when_asked(lambda: output.write_text("precious")))
    to = ("in.jsonl", "--base-url", server.url, "-m", "m")
    ended = submit(*to)
    assert ended.code == 74
    assert "in the meantime" in ended.err
    assert output.read_text() == "precious"
    assert submit(*to).code == 2
    assert submit(*to, "--overwrite").code == 0
    assert Path("in.results.parquet.bak").read_text() == "precious"
    assert pq.read_table(output).num_rows == ROWS
    assert server.ledger.requests == ROWS


def test_an_output_that_changes_during_the_run_is_not_replaced(
    submit: Submit, mock: StartMock
) -> None:
    output = Path("out.parquet")
    write_rows("other.jsonl", 2)
    write_rows()
    other = mock()
    assert submit("other.jsonl", "--base-url", other.url, "-m", "m", "-o", "new.parquet").code == 0
    server = mock(respond=when_asked(lambda: Path("new.parquet").replace(output)))
    to = ("--base-url", server.url, "-m", "m", "-o", "out.parquet")
    assert submit("other.jsonl", *to).code == 0
    before = server.ledger.requests
    assert submit("in.jsonl", *to).code == 74
    assert pq.read_table(output)["n"].to_pylist() == [0, 1]
    assert submit("in.jsonl", *to).code == 0
    assert server.ledger.requests == before + ROWS - 2


def test_an_output_that_goes_during_the_run_is_written_anew(
    submit: Submit, mock: StartMock
) -> None:
    write_rows(rows=2)
    server = mock(respond=when_asked(lambda: Path("in.results.parquet").unlink()))
    to = ("in.jsonl", "--base-url", server.url, "-m", "m")
    assert submit(*to).code == 0
    write_rows()
    assert submit(*to).code == 0
    assert pq.read_table("in.results.parquet").num_rows == ROWS
    assert sorted(os.listdir()) == ["in.jsonl", "in.results.parquet"]


def test_collect_replaces_neither_an_input_nor_a_file_of_somebody_else(
    submit: Submit, mock: StartMock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows()
    Path("theirs.parquet").write_text("precious")
    Path("in.mock.partial.parquet").write_text("precious")
    Path("link.jsonl").symlink_to("in.jsonl")
    os.mkfifo("fifo.parquet")
    before = everything(tmp_path)
    assert submit("in.jsonl", "--mock").code == 0
    stopped(submit, mock)
    for output in ("in.mock.parquet", "in.results.parquet"):
        for target in ("in.jsonl", "link.jsonl", "theirs.parquet", "fifo.parquet"):
            assert run_command(["collect", output, "-o", target]) == 2, target
            assert "name another" in " ".join(capsys.readouterr().err.split())
    assert run_command(["collect", "in.mock.parquet"]) == 2
    assert before.items() <= everything(tmp_path).items()
    for _ in range(2):
        assert run_command(["collect", "in.mock.parquet", "-o", "copy.jsonl"]) == 0


@pytest.mark.parametrize("again", ["collect", "submit"])
def test_a_killed_collect_leaves_nothing_for_good(
    again: str, submit: Submit, mock: StartMock, tmp_path: Path, spawn: Spawn
) -> None:
    state = stopped(submit, mock)
    killed = "\n".join(
        (
            "import os, signal, sys",
            "from batchrun import cli",
            "from batchrun.outputs import target",
            "target.make_durable = lambda fd: os.kill(os.getpid(), signal.SIGKILL)",
            "cli.run_command(['collect', 'in.results.parquet'])",
        )
    )
    with spawn(killed) as run:
        assert run.wait(60) == -signal.SIGKILL
    assert list(tmp_path.glob(".*batchrun-tmp"))
    if again == "collect":
        assert run_command(["collect", "in.results.parquet"]) == 0
    else:
        server = mock()
        assert submit("in.jsonl", "--base-url", server.url, "-m", "m").code == 0
        assert not state.path.exists()
    assert not list(tmp_path.glob(".*batchrun-tmp"))


def test_a_stopped_run_of_dicts_can_be_collected(mock: StartMock) -> None:
    server = mock(Knobs(models=("other",)))
    rows = [{"n": n, "prompt": f"Question {n}?"} for n in range(ROWS)]
    for given in (rows, pa.Table.from_pylist(rows)):
        summary = batchrun.submit(given, "out.parquet", base_url=server.url, model="m")
        assert summary.exit_code == 4
        assert run_command(["collect", "out.parquet"]) == 0
        assert pq.read_table("out.partial.parquet").schema.names[:2] == ["n", "prompt"]
