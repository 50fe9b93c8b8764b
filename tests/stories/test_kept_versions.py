"""State and outputs that earlier versions wrote must be resumed by this one, for ever.

``fixtures/v0_1`` was written by version 0.1: ``state`` by a run killed after four of six rows (one
of them rejected, two more in flight), ``out.parquet`` and ``out.jsonl`` by ``-n 4`` of the same
input. Never make these files anew: add a directory for each version that changes the format.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mock_servers import MockServerThread

from batchrun.cli.main import run_command

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
StartMock = Callable[..., MockServerThread]


@pytest.fixture(params=VERSIONS)
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with copies of what one version wrote."""
    for name in list(os.environ):
        if name.startswith("BATCHRUN_"):
            monkeypatch.delenv(name)
    shutil.copytree(FIXTURES / request.param, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    return tmp_path / "kept"


def asked(server: MockServerThread) -> set[str]:
    return {entry.prompt for entry in server.ledger.entries}


def submit(server: MockServerThread, output: str) -> int:
    command = ["submit", "in.jsonl", "--base-url", server.url, "-m", "m", "-o", output, "-q"]
    return run_command(command)


def test_a_kept_state_is_resumed(kept: Path, mock: StartMock) -> None:
    (kept / "state").rename(kept / "answers.parquet.batchrun")
    server = mock()
    assert submit(server, "answers.parquet") == 3
    assert asked(server) == {"Question 4?", "Question 5?"}
    table = pq.read_table("answers.parquet").to_pydict()
    assert table["status"] == ["ok", "error", "ok", "ok", "ok", "ok"]
    assert table["error_code"][1] == "extra_forbidden"
    assert table["response"][0] == "[synthetic] Question 0?"
    # The two that were cut off by the kill may have been billed, and are counted so.
    assert table["in_doubt_attempts"] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl"])
def test_a_kept_output_is_the_memory_of_the_next_run(
    kept: Path, mock: StartMock, output: str
) -> None:
    server = mock()
    assert submit(server, output) == 0
    assert asked(server) == {"Question 4?", "Question 5?"}
    if output.endswith(".parquet"):
        ids = pq.read_table(output)["n"].to_pylist()
    else:
        lines = [json.loads(line) for line in Path(output).read_text().splitlines()]
        ids = [line["batchrun"]["input"]["n"] for line in lines]
    assert ids == [0, 1, 2, 3, 4, 5]
