"""Never two runs at once, and what others may know of the one that runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from batchrun.errors import LocalIOError, Locked
from batchrun.journal import lock as lock_room
from batchrun.journal.lock import Holder, _flock, holder, locked
from batchrun.journal.state import StateDir
from batchrun.journal.status_file import Status, read_status, write_status

if TYPE_CHECKING:
    from conftest import Spawn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "out.parquet.batchrun"


HOLD = """
import sys
from pathlib import Path
from batchrun.errors import Locked
from batchrun.journal.lock import locked
from batchrun.journal.state import StateDir
try:
    with locked(StateDir(Path(sys.argv[1]))):
        print("held", flush=True)
        sys.stdin.read()
except Locked as error:
    print(error, flush=True)
"""


def test_a_second_run_is_told_who_has_the_output_and_since_when(state: Path, spawn: Spawn) -> None:
    with spawn(HOLD, state) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(
                Locked, match=rf"^out\.parquet is in use by pid {first.pid} on .+ since \d\d:\d\d$"
            ),
            locked(StateDir(state)),
        ):
            pass
        found = holder(StateDir(state))
        assert found is not None
        assert found.pid == first.pid
        first.communicate("")
    assert holder(StateDir(state)) is None
    with locked(StateDir(state)):
        assert holder(StateDir(state)) is not None


def test_after_a_kill_the_next_start_needs_no_unlocking(state: Path, spawn: Spawn) -> None:
    with spawn(HOLD, state) as first:
        assert first.stdout is not None
        first.stdout.readline()
        first.send_signal(signal.SIGKILL)
        first.wait(30)
    assert holder(StateDir(state)) is None
    with locked(StateDir(state)):
        found = holder(StateDir(state))
        assert found is not None
        assert found.pid == os.getpid()


@pytest.mark.slow
def test_of_twenty_simultaneous_starts_one_runs(state: Path, spawn: Spawn) -> None:
    with contextlib.ExitStack() as stack:
        starts = [stack.enter_context(spawn(HOLD, state)) for _ in range(20)]
        said = [start.stdout.readline().strip() for start in starts if start.stdout is not None]
        assert said.count("held") == 1
        winner = starts[said.index("held")]
        assert {line for line in said if line != "held"} == {
            next(line for line in said if line != "held")
        }
        assert all(f"pid {winner.pid} on" in line for line in said if line != "held")


RACE = """
import os, sys
from pathlib import Path
from batchrun.errors import Locked
from batchrun.journal.lock import locked
from batchrun.journal.state import StateDir
state, inside = Path(sys.argv[1]), Path(sys.argv[2])
runs = 0
while runs < 60:
    try:
        with locked(StateDir(state)) as held:
            fd = os.open(inside, os.O_CREAT | os.O_EXCL)  # fails when another is in here too
            os.close(fd)
            (state / "journal-000001.seg").write_bytes(b"x")
            os.unlink(inside)
            held.remove_state()
        runs += 1
    except Locked:
        pass
"""


@pytest.mark.slow
def test_removing_the_state_under_the_lock_never_lets_two_in(
    state: Path, tmp_path: Path, spawn: Spawn
) -> None:
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(spawn(RACE, state, tmp_path / "inside")) for _ in range(3)]
        for racer in racers:
            _, problems = racer.communicate(timeout=60)
            assert (racer.returncode, problems) == (0, "")
    assert not state.exists()


def test_a_lock_file_that_was_removed_while_we_opened_it_is_no_lock(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run ends exactly between the second one's open and its flock."""
    flock = _flock
    with locked(StateDir(state)) as first:

        def flock_too_late(fd: int, how: int) -> bool:
            monkeypatch.setattr(lock_room, "_flock", flock)
            first.remove_state()
            return flock(fd, how)

        monkeypatch.setattr(lock_room, "_flock", flock_too_late)
        with locked(StateDir(state)):
            with pytest.raises(Locked), locked(StateDir(state)):
                pass
            assert holder(StateDir(state)) is not None


def test_the_lock_is_held_until_its_file_is_gone(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink
    tried = []

    def unlink_while_another_starts(name: str, *, dir_fd: int) -> None:
        with pytest.raises(Locked), locked(StateDir(state)):
            pass
        tried.append(name)
        unlink(name, dir_fd=dir_fd)

    with locked(StateDir(state)) as held:
        (state / "journal-000001.seg").touch()
        monkeypatch.setattr(os, "unlink", unlink_while_another_starts)
        held.remove_state()
    assert tried[-1] == "lock"
    assert not state.exists()


def test_a_holder_without_a_name_yet_is_not_taken_for_its_dead_predecessor(
    state: Path, monkeypatch: pytest.MonkeyPatch, spawn: Spawn
) -> None:
    with spawn(HOLD, state) as dead:
        assert dead.stdout is not None
        dead.stdout.readline()
    dead.wait()
    fd = os.open(state / "lock", os.O_RDWR)
    assert json.loads(os.pread(fd, 1000, 0))["pid"] == dead.pid
    fcntl.flock(fd, fcntl.LOCK_EX)
    name = msgspec.json.encode(Holder(pid=os.getpid(), host=socket.gethostname(), since_ms=0))

    def write_the_name(_: float) -> None:
        os.pwrite(fd, name, 0)
        os.ftruncate(fd, len(name))

    monkeypatch.setattr(time, "sleep", write_the_name)
    with pytest.raises(Locked, match=f"pid {os.getpid()} on .* since 19"), locked(StateDir(state)):
        pass
    os.close(fd)


def test_readers_of_the_lock_do_not_keep_a_run_out(state: Path) -> None:
    with locked(StateDir(state)):
        pass
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            holder(StateDir(state))

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(50):
            with locked(StateDir(state)):
                pass
    finally:
        stop.set()
        for reader in readers:
            reader.join()


def test_waiting_ends_when_the_output_is_free_or_the_wait_is_cancelled(
    state: Path, spawn: Spawn
) -> None:
    with spawn(HOLD, state) as first:
        assert first.stdout is not None
        first.stdout.readline()
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(Locked), locked(StateDir(state), "wait", cancelled=cancelled):
            pass
        assert first.stdin is not None
        first.stdin.close()
        with locked(StateDir(state), "wait", poll_s=0.01):
            found = holder(StateDir(state))
            assert found is not None
            assert found.pid == os.getpid()


def test_a_symbolic_link_is_not_followed(state: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    state.mkdir()
    (state / "lock").symlink_to(precious)
    with pytest.raises(LocalIOError), locked(StateDir(state)):
        pass
    with pytest.raises(LocalIOError):
        holder(StateDir(state))
    assert precious.read_text() == "keep me"


def test_a_directory_of_the_users_keeps_what_is_not_ours(tmp_path: Path) -> None:
    state = tmp_path / "shared"
    state.mkdir()
    (state / "thesis.tex").write_text("precious")
    with locked(StateDir(state)) as held:
        (state / "journal-000001.seg").touch()
        write_status(StateDir(state), status())
        held.remove_state()
    assert [path.name for path in state.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["out.parquet.batchrun", "given-with-state"])
def test_the_directory_we_made_goes_when_nobody_else_uses_it(tmp_path: Path, name: str) -> None:
    state = tmp_path / name
    with locked(StateDir(state)):
        pass
    with locked(StateDir(state)) as held:
        (state / "journal-000001.seg").touch()
        held.remove_state()
        assert not state.exists()
    with locked(StateDir(state)) as held:
        (state / "anything").mkdir()
        held.remove_state()
        assert [path.name for path in state.iterdir()] == ["anything"]


def test_an_empty_directory_of_the_users_stays(tmp_path: Path) -> None:
    state = tmp_path / "given-with-state"
    state.mkdir()
    with locked(StateDir(state)):
        pass
    with locked(StateDir(state)) as held:
        held.remove_state()
    assert list(state.iterdir()) == []


def test_a_fifo_in_place_of_the_lock_holds_nobody_up(state: Path) -> None:
    state.mkdir()
    os.mkfifo(state / "lock")
    with pytest.raises(LocalIOError, match="not a regular file"), locked(StateDir(state)):
        pass
    with pytest.raises(LocalIOError, match="not a regular file"):
        holder(StateDir(state))


# ── the status file ──────────────────────────────────────────────────────────────────────────────


def status() -> Status:
    return Status(pid=1, host="etl-3", started_at_ms=1, updated_at_ms=2, inputs=["a"], ok=3)


def test_a_status_is_read_as_it_was_written(state: Path) -> None:
    assert read_status(StateDir(state)) is None
    write_status(StateDir(state), status())
    assert read_status(StateDir(state)) is None
    state.mkdir()
    write_status(StateDir(state), status())
    assert read_status(StateDir(state)) == status()
    assert [path.name for path in state.iterdir()] == ["status.json"]
    (state / "status.json").write_text("{")
    assert read_status(StateDir(state)) is None


def test_a_holder_is_written_as_json(state: Path) -> None:
    with locked(StateDir(state)):
        written = json.loads((state / "lock").read_text())
        assert Holder(**written) == holder(StateDir(state))
