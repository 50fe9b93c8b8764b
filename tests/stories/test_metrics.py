"""``--metrics-file``: whole at every moment, and read by the collector's own parser."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import StartMock, StartRun, Submit

from batchrun.mock.knobs import Knobs

parser = pytest.importorskip("prometheus_client.parser")
KILLS = int(os.environ.get("METRICS_KILLS", "5"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(number: int) -> None:
    rows = [{"prompt": f"Question {n}?"} for n in range(number)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: str = "run.prom") -> dict[str, float]:
    """Every sample by its name and what tells it from its neighbours."""
    found: dict[str, float] = {}
    for family in parser.text_string_to_metric_families(Path(path).read_text()):
        assert family.documentation
        for sample in family.samples:
            own = [sample.labels[key] for key in ("state", "kind") if key in sample.labels]
            found[" ".join([sample.name, *own])] = sample.value
    return found


def test_the_numbers_are_those_of_the_run(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(30)
    to = ("in.jsonl", "--base-url", server.url, "-m", 'a "model"', "-o", "out.parquet")
    assert submit(*to, "--metrics-file", "run.prom", "--price", "1,2").code == 0
    found, billed = read(), server.ledger.billed
    assert found["batchrun_rows answered"] == 30
    assert found["batchrun_rows pending"] == 0
    assert found["batchrun_attempts_total"] == 30
    assert found["batchrun_tokens_total prompt"] == billed.prompt_tokens
    assert found["batchrun_tokens_total completion"] == billed.completion_tokens
    assert found["batchrun_cost_usd_total"] > 0
    assert found["batchrun_running"] == 0
    assert found["batchrun_exit_code"] == 0
    assert abs(found["batchrun_last_update_seconds"] - time.time()) < 600
    assert os.stat("run.prom").st_mode & 0o777 == 0o644
    # Written anew by the next run, however it ends.
    assert submit(*to, "--metrics-file", "run.prom", "--temperature", 1).code == 2
    assert read()["batchrun_exit_code"] == 2


def test_a_collector_never_finds_half_a_file(mock: StartMock, running: StartRun) -> None:
    server = mock(Knobs(latency_s=0.05))
    write_rows(400)
    chance = random.Random(1)
    for _ in range(KILLS):
        to = ("--base-url", server.url, "-m", "m", "-o", "out.parquet", "--overwrite", "-c", 4)
        with running("in.jsonl", *to, "--metrics-file", "run.prom") as run:
            end = time.monotonic() + 1.2 + chance.random()
            while time.monotonic() < end:
                if Path("run.prom").exists():
                    assert "batchrun_running" in read()
            run.send_signal(signal.SIGKILL)
            run.wait()
        assert [path.name for path in Path().glob("*.prom")] in ([], ["run.prom"])


def test_what_a_killed_run_left_beside_it_goes(submit: Submit) -> None:
    write_rows(1)
    Path(".run.prom.new").write_text("half")
    assert submit("in.jsonl", "--mock", "--metrics-file", "run.prom").code == 0
    assert sorted(path.name for path in Path().iterdir()) == [
        *("in.jsonl", "in.mock.parquet", "run.prom"),
    ]


def test_a_file_of_another_program_stays(submit: Submit) -> None:
    write_rows(1)
    Path("node.prom").write_text("up 1\n")
    Path("link.prom").symlink_to("node.prom")
    for name, words in {
        "node.prom": "not written by batchrun",
        "link.prom": "not written by batchrun",
        "gone/run.prom": "there is no directory gone",
    }.items():
        ended = submit("in.jsonl", "--mock", "--metrics-file", name)
        assert ended.code == 2
        assert words in ended.err
    assert Path("node.prom").read_text() == "up 1\n"
    assert not Path("in.mock.parquet").exists()
