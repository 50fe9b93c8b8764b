"""Each failing system call ends well: the documented exit code, one clear line, and a rerun.

``strace`` makes the n-th call of a kind fail, as it does for SQLite's and curl's own tortures. It
attaches to a process that has imported everything, so that the n-th call is one of batchrun's and
not of the interpreter's start. Threads are counted each for itself: one case may fail one call in
each.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from batchrun.mock_server import MockServerThread
from crash_harness import ROOT, Launcher, held, published, write_rows

ROWS = 12
WAIT_S = 60.0
# Where the sweep by hand is whole, the one of every day takes every so many-eth call.
STRIDE = int(os.environ.get("FAULT_STRIDE", "4"))


class Call(NamedTuple):
    """A system call, how it fails, and how many of them a small run is sure to make."""

    name: str
    error: str
    most: int


STATE = "out.parquet.batchrun"
# Of the calls on a descriptor, those on these files: not on the terminal, sockets or the loop's own.
OF_A_FILE = ("read", "pread64", "write", "pwrite64", "close", "ftruncate")
FILES = (
    *("in.jsonl", "out.parquet", ".out.parquet.{pid}.batchrun-tmp", STATE, f"{STATE}/lock"),
    *(f"{STATE}/journal-000001.seg", f"{STATE}/journal-000001.new"),
    *(f"{STATE}/status.json.new", f"{STATE}/run.json.new"),
)
CALLS = (
    Call("openat", "EIO", 48),
    Call("openat", "ENOSPC", 48),
    Call("write", "EIO", 40),
    Call("write", "ENOSPC", 40),
    Call("pwrite64", "EIO", 1),
    Call("read", "EIO", 60),
    Call("pread64", "EIO", 12),
    Call("fsync", "EIO", 6),
    Call("fdatasync", "EIO", 6),
    Call("rename", "EIO", 8),
    Call("ftruncate", "EIO", 3),
    Call("mkdir", "ENOSPC", 2),
    Call("unlink", "EIO", 8),
    Call("close", "EIO", 60),
    Call("getdents64", "EIO", 12),
    Call("flock", "EIO", 2),
)


SAYS = {"EIO": r"Input/output error|error closing file", "ENOSPC": r"disk full|No space left on device"}


def can_trace() -> str:
    """Why not, in a line; "" where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    traced = subprocess.run(
        ["strace", "-o", os.devnull, "-e", "inject=fsync:error=EIO", "true"], capture_output=True
    )
    return "" if traced.returncode == 0 else "this machine does not allow ptrace"


NO_TRACE = can_trace()


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as starting:
        yield starting


@pytest.fixture(scope="module")
def server() -> Iterator[MockServerThread]:
    with MockServerThread() as answering:
        yield answering


def asked(server: MockServerThread) -> Counter[int]:
    return Counter(int(entry.prompt.split()[1][:-1]) for entry in server.ledger.entries)


def command(server: MockServerThread) -> list[str]:
    return [
        *("submit", "in.jsonl", "-o", "out.parquet", "-c", "2", "--base-url", server.url),
        *("-m", "m", "--max-in-doubt-retries", "200"),
    ]


def faulty_run(
    launcher: Launcher, server: MockServerThread, directory: Path, call: str, how: str
) -> tuple[int, str]:
    process = launcher.start(*command(server), cwd=directory, stopped=True)
    log = directory.parent / "strace.log"
    only: list[str] = []
    if call in OF_A_FILE:
        for name in FILES:
            only += "-P", str(directory / name.format(pid=process.pid))
    tracer = subprocess.Popen(
        ["strace", "-f", "-q", "-o", log, "-p", str(process.pid), "-e", f"inject={call}:{how}", *only],
        stderr=subprocess.PIPE,
        text=True,
    )
    status = Path(f"/proc/{process.pid}/status")
    try:
        while "\nTracerPid:\t0\n" in status.read_text():
            assert tracer.poll() is None
        os.kill(process.pid, signal.SIGCONT)
        return process.wait()
    finally:
        process.kill()
        tracer.communicate(timeout=WAIT_S)


def cases() -> Iterator[tuple[str, str, int]]:
    for at, call in enumerate(CALLS):
        for n in range(1 + at % STRIDE, call.most + 1, STRIDE):
            yield call.name, call.error, n


@pytest.mark.skipif(bool(NO_TRACE), reason=NO_TRACE)
@pytest.mark.parametrize(("call", "error", "n"), list(cases()))
def test_a_failing_system_call_ends_well_and_the_rerun_repeats_nothing(
    call: str,
    error: str,
    n: int,
    launcher: Launcher,
    server: MockServerThread,
    tmp_path: Path,
) -> None:
    place = tmp_path / "run"
    place.mkdir()
    # Half was published before: its answers are at stake as well.
    numbers = list(range(ROWS))
    write_rows(place / "in.jsonl", numbers[: ROWS // 2])
    assert launcher.run(*command(server), cwd=place)[0] == 0
    write_rows(place / "in.jsonl", numbers)

    output = place / "out.parquet"
    code, said = faulty_run(launcher, server, place, call, f"error={error}:when={n}")
    assert code in (0, 74), said
    assert "Traceback" not in said
    assert "this is a bug" not in said
    if code:
        assert re.search(SAYS[error], " ".join(said.split())), said
    before = asked(server)
    answered = held(place, output, numbers)

    code, said = launcher.run(*command(server), cwd=place)
    assert code == 0, said
    again = asked(server) - before
    assert not again - (Counter(numbers) - answered)
    assert [row["n"] for row in published(output)] == numbers
    assert {row["response"] for row in published(output)} == {
        f"[synthetic] Question {n}?" for n in numbers
    }
