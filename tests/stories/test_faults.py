"""Each failing system call ends well: the documented exit code, one clear line, and a rerun.

``strace`` makes the n-th call of a kind fail, as it does for SQLite's and curl's own tortures. It
attaches to a process that has imported everything, so that the n-th call is one of batchrun's and
not of the interpreter's start. Threads are counted each for itself: one case may fail one call in
each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from crash_harness import ROOT, Launcher, held, published, write_rows
from mock_servers import MockServerThread

ROWS = 12
WAIT_S = 60.0
# Where the sweep by hand is whole, the one of every day takes every so many-eth call.
STRIDE = int(os.environ.get("FAULT_STRIDE", "6"))


class Call(NamedTuple):
    """A system call, how it fails, and how many of them one thread of a small run makes."""

    name: str
    error: str
    most: int


STATE = "out.parquet.batchrun"
# Of the calls on a descriptor, those on these files: not on the terminal, a socket or the loop's.
# Not on the lock either: its closing comes when all is done.
OF_A_FILE = ("read", "pread64", "write", "pwrite64", "close", "ftruncate")
FILES = (
    *("in.jsonl", "out.parquet", ".out.parquet.{pid}.batchrun-tmp", STATE),
    *(f"{STATE}/journal-000001.seg", f"{STATE}/journal-000001.new"),
    *(f"{STATE}/status.json.new", f"{STATE}/run.json.new"),
)
CALLS = (
    Call("openat", "EIO", 22),
    Call("openat", "ENOSPC", 22),
    Call("write", "EIO", 11),
    Call("write", "ENOSPC", 11),
    Call("fsync", "EIO", 2),
    Call("fsync", "ENOSPC", 2),
    Call("fdatasync", "EIO", 2),
    Call("fdatasync", "ENOSPC", 2),
    Call("rename", "EIO", 3),
    Call("rename", "ENOSPC", 3),
    Call("close", "EIO", 13),
    Call("read", "EIO", 8),
    Call("pread64", "EIO", 25),
    Call("pwrite64", "ENOSPC", 1),
    Call("ftruncate", "EIO", 1),
    Call("mkdir", "ENOSPC", 1),
    Call("renameat", "EIO", 1),
    Call("unlink", "EIO", 2),
    Call("unlinkat", "EIO", 5),
    Call("rmdir", "EIO", 1),
    Call("getdents64", "EIO", 12),
    Call("flock", "EIO", 1),
)
SAYS = {
    "EIO": r"Input/output error|error closing file",
    "ENOSPC": r"disk full|No space left on device",
}


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
    status = Path(f"/proc/{process.pid}/status")
    _wait_for(status, "\nState:\tT (stopped)\n")
    log = directory.parent / "strace.log"
    only: list[str] = []
    if call in OF_A_FILE:
        for name in FILES:
            only += "-P", str(directory / name.format(pid=process.pid))
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-q",
            "-o",
            log,
            "-p",
            str(process.pid),
            "-e",
            f"inject={call}:{how}",
            *only,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait_for(status, f"\nTracerPid:\t{tracer.pid}\n")
        os.kill(process.pid, signal.SIGCONT)
        return process.wait()
    finally:
        process.kill()
        tracer.communicate(timeout=WAIT_S)


def _wait_for(status: Path, line: str) -> None:
    end = time.monotonic() + WAIT_S
    while line not in status.read_text():
        assert time.monotonic() < end, f"no {line.strip()}"


def cases() -> Iterator[tuple[str, str, int]]:
    for at, call in enumerate(CALLS):
        for n in range(1 + at % STRIDE, call.most + 1, STRIDE):
            yield call.name, call.error, n


@pytest.mark.skipif(bool(NO_TRACE), reason=NO_TRACE)
@pytest.mark.parametrize(("call", "error", "n"), list(cases()))
@pytest.mark.slow
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
    if call in ("fsync", "fdatasync"):
        assert code == 74, "a failed sync is final"
    if code:
        assert re.search(SAYS[error], " ".join(said.split())), said
    before = asked(server)
    answered = held(output, numbers)

    code, said = launcher.run(*command(server), cwd=place)
    assert code == 0, said
    again = asked(server) - before
    assert not again - (Counter(numbers) - answered)
    assert [row["n"] for row in published(output)] == numbers
    assert {row["response"] for row in published(output)} == {
        f"[synthetic] Question {n}?" for n in numbers
    }


@pytest.mark.parametrize("limit_bytes", [2_000, 4_000, 6_000, 8_000, 10_000])
def test_a_full_disk_names_the_file_and_leaves_the_earlier_output_as_it_was(
    limit_bytes: int, launcher: Launcher, server: MockServerThread, tmp_path: Path
) -> None:
    """``RLIMIT_FSIZE`` makes writing fail where a file would grow beyond it."""
    numbers = list(range(ROWS))
    output = tmp_path / "out.parquet"
    write_rows(tmp_path / "in.jsonl", numbers[: ROWS // 2])
    assert launcher.run(*command(server), cwd=tmp_path)[0] == 0
    write_rows(tmp_path / "in.jsonl", numbers)
    earlier = output.read_bytes()

    limited = launcher.start(*command(server), cwd=tmp_path, file_limit_bytes=limit_bytes)
    code, said = limited.wait()
    assert code == 74, said
    assert "out.parquet" in said
    assert "File too large" in said
    assert "Traceback" not in said
    assert output.read_bytes() == earlier
    assert not list(tmp_path.glob(".*.batchrun-tmp"))
    before = asked(server)
    answered = held(output, numbers)
    assert launcher.run(*command(server), cwd=tmp_path)[0] == 0
    assert not (asked(server) - before) - (Counter(numbers) - answered)
    assert [row["n"] for row in published(output)] == numbers


# Power loss


@pytest.mark.skipif(bool(NO_TRACE), reason=NO_TRACE)
@pytest.mark.slow
def test_the_answers_of_a_second_share_one_fdatasync(
    server: MockServerThread, tmp_path: Path
) -> None:
    per_s, rows = 200, 600
    write_rows(tmp_path / "in.jsonl", range(rows))
    log = tmp_path / "strace.log"
    done = subprocess.run(
        [
            *("strace", "-f", "-qq", "-e", "trace=fdatasync", "-o", log),
            *(sys.executable, "-m", "batchrun", *command(server)),
            *("--rpm", str(60 * per_s), "--json"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    seconds = json.loads(done.stdout)["wall_s"]
    assert seconds > rows / per_s - 1
    # One more when the journal is begun, one when all is sent, one for the output itself.
    calls = [line for line in log.read_text().splitlines() if line.endswith("= 0")]
    assert seconds / 2 <= len(calls) <= 1.1 * seconds + 3, log.read_text()
