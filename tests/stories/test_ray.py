"""A Ray cluster sends for one run: nodes share nothing, and may go away."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from test_processes import until

from batchrun.mock.knobs import Knobs

if TYPE_CHECKING:
    from conftest import StartMock, StartRun, Submit
    from mock_servers import MockServerThread

NODES = Path(__file__).resolve().parent.parent / "support" / "ray_nodes.py"
ROWS = 300
IN_FLIGHT = 16

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("BATCHRUN_", "RAY_")) or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"n": n, "prompt": f"Question {n}?"}) for n in range(ROWS)]
    Path("in.jsonl").write_text("\n".join(lines))


@contextmanager
def two_nodes() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a cluster, and who takes a node away when written a line."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(NODES)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as nodes:
        assert nodes.stdout is not None
        assert nodes.stdin is not None
        try:
            yield next(line for line in nodes.stdout if line[:1].isdecimal()).strip(), nodes
        finally:
            nodes.stdin.close()
            nodes.wait(60)


def to(server: MockServerThread, *more: object) -> tuple[object, ...]:
    at = ("--base-url", server.url, "-m", "m", "-o", "out.parquet", "-c", IN_FLIGHT)
    return ("in.jsonl", *at, "--engine", "ray", *more)


def check_table() -> None:
    answers = pq.read_table("out.parquet")
    assert answers["n"].to_pylist() == list(range(ROWS))
    assert answers["response"].to_pylist() == [f"[synthetic] Question {n}?" for n in range(ROWS)]


@with_ray
@pytest.mark.slow
def test_a_node_is_taken_away_in_the_middle(mock: StartMock, running: StartRun) -> None:
    server = mock(Knobs(latency_s=0.3))
    with two_nodes() as (address, nodes):
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        with running(*to(server, "--ray-address", address, "--json")) as run:
            until(lambda: server.ledger.requests >= 60)
            nodes.stdin.write("\n")
            nodes.stdin.flush()
            assert nodes.stdout.readline() == "gone\n"
            ended = run.end()
    assert ended.code == 0, ended.err
    assert "a sending process died and was replaced" in ended.err
    assert ended.summary["rows"]["ok"] == ROWS
    assert server.ledger.requests <= ROWS + IN_FLIGHT
    check_table()


@with_ray
@pytest.mark.slow
def test_without_a_cluster_one_of_this_machine_sends(
    mock: StartMock, running: StartRun, submit: Submit
) -> None:
    """Killed, it leaves nothing behind that sends; the same command goes on."""
    key = "canary-91be77"
    server = mock(Knobs(latency_s=0.1, key=key))
    how = to(server, "--processes", 2, "--allow-http")
    with running(*how, environ={"BATCHRUN_API_KEY": key}) as run:
        until(lambda: server.ledger.requests >= 60)
        run.kill()
        run.wait()
        until(lambda: server.ledger.in_flight == 0)
    with running(*how, environ={"BATCHRUN_API_KEY": key}) as run:
        ended = run.end()
    assert ended.code == 0, ended.err
    # Nothing but what a run says: Ray keeps its ways to itself.
    assert {line.split("T")[0][:3] for line in ended.err.splitlines()} == {"202"}
    assert key not in ended.err
    assert server.ledger.requests <= ROWS + IN_FLIGHT
    check_table()


@with_ray
def test_no_cluster_at_the_address(mock: StartMock, running: StartRun) -> None:
    server = mock()
    with running(*to(server, "--ray-address", "127.0.0.1:9")) as run:
        ended = run.end()
    assert ended.code == 75
    assert "no Ray cluster at 127.0.0.1:9: Connection refused" in ended.err
    assert server.ledger.requests == 0


def test_ray_that_is_not_installed_is_said(
    mock: StartMock, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = submit(*to(mock()))
    assert ended.code == 2
    assert "Ray, which is not installed: pip install" in ended.err


def test_an_address_without_ray_is_refused(submit: Submit) -> None:
    ended = submit("in.jsonl", "--mock", "--ray-address", "127.0.0.1:6379")
    assert ended.code == 2
    assert "--ray-address is of --engine ray" in ended.err
