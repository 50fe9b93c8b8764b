"""Several processes send as one run: one table, one quota, one end, whoever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.api import Options
from batchrun.mock.knobs import Knobs

if TYPE_CHECKING:
    from conftest import Run, StartMock, StartRun, Submit
    from mock_servers import MockServerThread

ROWS = 300
IN_FLIGHT = 16
SOCKETS_AT_REST = 3  # of a process without connections: its orders, and the loop's own two
WAIT_S = 60.0  # for events of other processes; reached only when something is broken
# What tells one run from another: times, and the request ids of the endpoint.
OF_THE_RUN = ("latency_s", "ttft_s", "finished_at", "request_id")

pytestmark = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="/proc tells the children"
)


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"n": n, "prompt": f"Question {n}?"}) for n in range(ROWS)]
    Path("in.jsonl").write_text("\n".join(lines))


def to(server: MockServerThread, *more: object) -> tuple[object, ...]:
    """Arguments of a run to ``server`` in two processes."""
    at = ("--base-url", server.url, "-m", "m", "-o", "out.parquet")
    return ("in.jsonl", *at, "-c", IN_FLIGHT, "--processes", 2, *more)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    """Whether it runs no more, though perhaps nobody has asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def at_work(run: Run, server: MockServerThread, requests: int) -> list[int]:
    """Wait until so many requests were made, and both processes make some; which those are."""
    until(lambda: server.ledger.requests >= requests)
    pids = children(run.pid)
    assert len(pids) == 2
    until(lambda: all(sockets(pid) > SOCKETS_AT_REST for pid in pids))
    return pids


def sockets(pid: int) -> int:
    found = Path(f"/proc/{pid}/fd").iterdir()
    return sum(os.readlink(fd).startswith("socket:") for fd in found)


def check_table(rows: int = ROWS) -> None:
    answers = pq.read_table("out.parquet")
    assert answers["n"].to_pylist() == list(range(rows))
    assert answers["response"].to_pylist() == [f"[synthetic] Question {n}?" for n in range(rows)]


@pytest.mark.parametrize("streams", [False, True])
def test_the_table_is_that_of_one_process(
    mock: StartMock, submit: Submit, *, streams: bool
) -> None:
    how = ("in.jsonl", "-m", "m", *(("--stream",) if streams else ()))
    tables, summaries = [], []
    for processes in (1, 3):
        name = f"out-{processes}.parquet"
        server = mock(Knobs(faults={"400": 0.05}, seed=3))
        ended = submit(
            *(*how, "--base-url", server.url, "-o", name, "--processes", processes),
            *("--allow-failures", "10%", "--json"),
        )
        assert ended.code == 0, ended.err
        tables.append(pq.read_table(name).drop_columns(list(OF_THE_RUN)))
        summaries.append(ended.summary)
    one, three = tables
    assert one.schema == three.schema
    assert [name for name in one.column_names if one[name] != three[name]] == []
    assert summaries[0]["rows"] == summaries[1]["rows"]
    assert summaries[0]["rows"]["error"] > 0
    assert summaries[0]["output_totals"] == summaries[1]["output_totals"]


def test_a_killed_process_costs_what_it_had_in_flight(mock: StartMock, running: StartRun) -> None:
    server = mock(Knobs(latency_s=0.05))
    with running(*to(server, "--json")) as run:
        os.kill(random.choice(at_work(run, server, 60)), signal.SIGKILL)
        ended = run.end()
    assert ended.code == 0, ended.err
    assert "a sending process died and was replaced, 1 time (last: signal 9)" in ended.err
    assert ended.summary["rows"]["ok"] == ROWS
    in_doubt = ended.summary["this_run"]["in_doubt"]
    assert in_doubt <= IN_FLIGHT
    assert ROWS <= server.ledger.requests <= ROWS + in_doubt
    check_table()


def test_a_killed_run_takes_its_processes_along_and_goes_on_later(
    mock: StartMock, running: StartRun, submit: Submit
) -> None:
    server = mock(Knobs(latency_s=0.05))
    with running(*to(server)) as run:
        pids = at_work(run, server, 60)
        run.kill()
        run.wait()
        until(lambda: all(map(is_gone, pids)))
    assert submit(*to(server)).code == 0
    assert server.ledger.requests <= ROWS + IN_FLIGHT
    check_table()


KILLS = 20
MANY = 1_200


@pytest.fixture
def _many_rows() -> None:
    lines = [json.dumps({"n": n, "prompt": f"Question {n}?"}) for n in range(MANY)]
    Path("in.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.usefixtures("_many_rows")
def test_a_run_that_is_killed_twenty_times_pays_for_what_was_in_flight(
    mock: StartMock, running: StartRun, submit: Submit
) -> None:
    server = mock(Knobs(latency_s=0.05))
    chance = random.Random(7)
    how = to(server, "--max-in-doubt-retries", KILLS)
    for _ in range(KILLS):
        with running(*how) as run:
            target = server.ledger.requests + chance.randrange(1, 50)
            until(lambda target=target: server.ledger.requests >= target)  # type: ignore[misc]
            run.kill()
            run.wait()
    assert submit(*how).code == 0
    assert server.ledger.requests <= MANY + KILLS * IN_FLIGHT
    check_table(MANY)


@pytest.mark.slow
@pytest.mark.usefixtures("_many_rows")
def test_processes_killed_twenty_times_cost_what_they_had_in_flight(
    mock: StartMock, running: StartRun
) -> None:
    server = mock(Knobs(latency_s=0.4))
    chance = random.Random(7)
    killed: set[int] = set()
    persistent = ("--max-retries", KILLS, "--max-in-doubt-retries", KILLS)
    with running(*to(server, *persistent)) as run:
        at_work(run, server, 20)
        for _ in range(KILLS):
            target = server.ledger.requests + chance.randrange(1, 30)
            until(lambda target=target: server.ledger.requests >= target)  # type: ignore[misc]
            ready = [
                pid
                for pid in children(run.pid)
                if pid not in killed and sockets(pid) > SOCKETS_AT_REST
            ]
            assert ready
            killed.add(victim := chance.choice(ready))
            os.kill(victim, signal.SIGKILL)
        ended = run.end()
    assert ended.code == 0, ended.err
    assert f"{KILLS} times (last: signal 9)" in ended.err
    assert server.ledger.requests <= MANY + KILLS * IN_FLIGHT
    check_table(MANY)


@pytest.mark.parametrize("to_the_group", [False, True])
def test_a_signal_lets_the_answers_arrive(
    mock: StartMock, running: StartRun, submit: Submit, *, to_the_group: bool
) -> None:
    server = mock(Knobs(latency_s=0.05))
    with running(*to(server), start_new_session=True) as run:
        pids = at_work(run, server, 60)
        if to_the_group:
            os.killpg(run.pid, signal.SIGINT)
        else:
            for pid in (*pids, run.pid):
                os.kill(pid, signal.SIGINT)
        assert run.end().code == 130
        assert all(map(is_gone, pids))
    assert submit(*to(server)).code == 0
    assert server.ledger.requests == ROWS
    check_table()


def test_a_process_that_is_stopped_for_a_while_has_nothing_asked_twice(
    mock: StartMock, running: StartRun
) -> None:
    server = mock(Knobs(latency_s=0.05))
    with running(*to(server, "--json")) as run:
        stopped = at_work(run, server, 60)[0]
        os.kill(stopped, signal.SIGSTOP)
        # Half of the places stay taken until it goes on; the other half does the rest.
        until(lambda: server.ledger.requests >= 250)
        os.kill(stopped, signal.SIGCONT)
        ended = run.end()
    assert ended.code == 0, ended.err
    assert ended.summary["this_run"]["in_doubt"] == 0
    assert server.ledger.requests == ROWS
    check_table()


def test_all_of_them_keep_to_one_quota(mock: StartMock, submit: Submit) -> None:
    server = mock(Knobs(rpm=6000, limit_headers="openai"))
    assert submit(*to(server, "--rpm", 6000)).code == 0
    assert server.ledger.statuses == {200: ROWS}


def test_one_budget_binds_them_all(mock: StartMock, submit: Submit) -> None:
    server = mock(Knobs(completion_tokens=50, latency_s=0.01))
    params = ("--param", "max_tokens=50")
    ended = submit(*to(server, *params, "--token-budget", 5_000, "--json"))
    assert ended.code == 75
    billed = server.ledger.billed.total_tokens
    assert billed is not None
    assert 2_500 < billed <= 5_000
    assert submit(*to(server, *params, "--token-budget", 1_000_000)).code == 0
    assert server.ledger.requests == ROWS


def test_where_no_process_can_be_started_the_run_stops_before_it_pays(
    mock: StartMock, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mock()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        ended = submit(*to(server))
    assert ended.code == 75
    assert "no process that sends could be started (last try: exit code 1)" in ended.err
    assert server.ledger.requests == 0
    assert submit(*to(server)).code == 0
    check_table()


def test_where_no_process_stays_alive_any_more_the_run_stops(
    mock: StartMock, submit: Submit, running: StartRun
) -> None:
    server = mock(Knobs(latency_s=0.05))
    with running(*to(server)) as run:
        at_work(run, server, 40)

        def dead() -> bool:
            with suppress(OSError):  # it ends meanwhile
                for pid in children(run.pid):
                    os.kill(pid, signal.SIGKILL)
            return run.poll() is not None

        until(dead)
        ended = run.end()
        assert ended.code == 75
        assert "no process that sends could be started (last try: signal 9)" in ended.err
        assert "(last: signal 9); 0 of 2 are left" in ended.err
        asked = server.ledger.requests
    assert submit(*to(server)).code == 0
    assert server.ledger.requests <= ROWS + 2 * IN_FLIGHT
    assert asked < ROWS
    check_table()


def test_a_wrong_key_ends_the_run_as_in_one_process(
    mock: StartMock, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHRUN_API_KEY", "canary-77aa01")
    ended = submit(*to(mock(Knobs(key="another")), "--allow-http"))
    assert ended.code == 4
    assert "canary-77aa01" not in ended.err


def test_the_stand_in_inside_serves_several_processes(submit: Submit) -> None:
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", "--processes", 2).code == 0
    check_table()


@pytest.mark.asyncio
async def test_python_programs_have_several_processes_too(mock: StartMock) -> None:
    how: Options = {"base_url": mock().url, "model": "m", "processes": 2}
    prompts = [f"Question {n}?" for n in range(50)]
    async with batchrun.complete(prompts, **how) as results:
        answers = {result.response async for result in results}
    assert answers == {f"[synthetic] {prompt}" for prompt in prompts}
