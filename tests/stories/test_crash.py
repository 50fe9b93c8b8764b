"""Killed at any time, started many times at once, read while it writes: nothing is lost or torn."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from crash_harness import Launched, Launcher, survive, write_rows
from mock_servers import MockServerThread

from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest

KILLS = 30
STARTS = 50


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as starting:
        yield starting


def command(server: MockServerThread) -> tuple[object, ...]:
    return ("submit", "in.jsonl", "-o", "out.parquet", "--base-url", server.url, "-m", "m")


@pytest.mark.slow
def test_killed_at_any_time_no_answer_is_lost_and_none_asked_for_again(tmp_path: Path) -> None:
    # Another story every time: what fails names its seed.
    seed = random.SystemRandom().randrange(1_000_000)
    told = survive(KILLS, seed, tmp_path, say=print)
    assert told.kills == KILLS
    # Thirty kills seldom miss one of the four kinds.
    assert len(told.moments) >= 3


# Many at once


def start_together(
    launcher: Launcher, server: MockServerThread, directory: Path, count: int
) -> list[Launched]:
    at = time.monotonic() + 0.5
    return [launcher.start(*command(server), cwd=directory, at=at) for _ in range(count)]


def test_of_many_starts_one_runs_and_the_others_name_it(launcher: Launcher, tmp_path: Path) -> None:
    go_on = threading.Event()

    def respond(request: MockRequest) -> MockReply | None:
        return None if go_on.is_set() else MockReply(raw=b"", ending="hang")

    write_rows(tmp_path / "in.jsonl", range(20))
    with MockServerThread(respond=respond) as server:
        started = start_together(launcher, server, tmp_path, STARTS)
        ended = _all_but_one(started)
        (holder,) = (process for process in started if process not in ended)
        named = (
            rf"out.parquet is in use by pid {holder.pid} on {socket.gethostname()} since \d\d:\d\d"
        )
        for process in ended:
            code, said = process.wait()
            assert code == 11, said
            assert re.search(named, " ".join(said.split())), said
        holder.kill()
        assert holder.wait()[0] == -9
        # No manual unlock: the kernel let go of what the dead held.
        go_on.set()
        code, said = launcher.run(*command(server), cwd=tmp_path)
        assert code == 0, said
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 20


def _all_but_one(started: list[Launched]) -> list[Launched]:
    end = time.monotonic() + 60
    while True:
        ended = [process for process in started if process.poll() is not None]
        if len(ended) >= len(started) - 1:
            return ended
        assert time.monotonic() < end, f"{len(started) - len(ended)} run at once"
        time.sleep(0.005)


def test_a_state_that_is_removed_never_lets_two_in(launcher: Launcher, tmp_path: Path) -> None:
    """Runs so short that others start while one removes its state: every row is asked once."""
    with MockServerThread() as server:
        for turn in range(3):
            numbers = range(turn * 100, turn * 100 + 5)
            write_rows(tmp_path / "in.jsonl", numbers)
            codes = Counter(
                process.wait()[0] for process in start_together(launcher, server, tmp_path, 12)
            )
            assert codes[0] >= 1
            assert codes.keys() <= {0, 11}
            asked = Counter(entry.prompt for entry in server.ledger.entries)
            assert set(asked.values()) == {1}
            assert pq.read_table(tmp_path / "out.parquet")["n"].to_pylist() == list(numbers)


# Read while it is written


@pytest.mark.slow
def test_readers_never_see_half_a_file(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    over = threading.Event()
    seen: list[int] = []
    wrong: list[BaseException] = []

    def read() -> None:
        while not over.is_set():
            try:
                # Opened once: by name, pyarrow opens it twice, and may get two files.
                with contextlib.suppress(FileNotFoundError), output.open("rb") as file:
                    seen.append(pq.read_table(file).num_rows)
            except BaseException as exc:
                wrong.append(exc)
                return
            time.sleep(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    sizes = [40 * turn for turn in range(1, 9)]
    try:
        with MockServerThread(Knobs(latency_s=0.001)) as server:
            for rows in sizes:
                write_rows(tmp_path / "in.jsonl", range(rows))
                code, said = launcher.run(*command(server), cwd=tmp_path)
                assert code == 0, said
    finally:
        over.set()
        reader.join()
    assert not wrong
    assert set(seen) <= set(sizes)
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


def test_the_output_has_the_mode_of_a_plain_file_and_the_state_is_private(
    launcher: Launcher, tmp_path: Path
) -> None:
    hold = threading.Event()

    def respond(request: MockRequest) -> MockReply | None:
        hold.set()
        return MockReply(raw=b"", ending="hang")

    output, state = tmp_path / "out.parquet", tmp_path / "out.parquet.batchrun"
    write_rows(tmp_path / "in.jsonl", range(3))
    with MockServerThread(respond=respond) as silent:
        process = launcher.start(*command(silent), cwd=tmp_path)
        assert hold.wait(60)
        assert state.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in state.iterdir()} == {0o600}
        process.kill()
        process.wait()
    plain = tmp_path / "plain"
    plain.touch()
    with MockServerThread() as server:
        assert launcher.run(*command(server), cwd=tmp_path)[0] == 0
        assert output.stat().st_mode == plain.stat().st_mode
        os.chmod(output, 0o640)
        write_rows(tmp_path / "in.jsonl", range(4))
        assert launcher.run(*command(server), cwd=tmp_path)[0] == 0
    assert output.stat().st_mode & 0o777 == 0o640
