"""The bill: through the command line, against the server's own books."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import StartMock, Submit
from mock_servers import MockServerThread

from batchrun.cli.main import run_command
from batchrun.mock.replies import MockReply, MockRequest, completion
from batchrun.types import NO_USAGE


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(number: int) -> None:
    rows = [{"prompt": f"Question {n}? " + "x" * n, "n": n} for n in range(number)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def bill_of(server: MockServerThread, of_prompt: float, of_completion: float) -> float:
    """What the server's own books make of its tokens."""
    billed = server.ledger.billed
    return (
        (billed.prompt_tokens or 0) * of_prompt + (billed.completion_tokens or 0) * of_completion
    ) / 1e6


def costs(output: str) -> list[float]:
    if output.endswith(".parquet"):
        told: list[float] = pq.read_table(output)["cost_usd"].to_pylist()
        return told
    lines = Path(output).read_text().splitlines()
    return [json.loads(line)["batchrun"]["cost_usd"] for line in lines]


@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl"])
def test_the_bill_is_that_of_the_server(mock: StartMock, submit: Submit, output: str) -> None:
    server = mock()
    write_rows(40)
    command = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", output, "--json")
    ended = submit(*command, "--price", "2,8")
    bill = bill_of(server, 2, 8)
    assert sum(costs(output)) == pytest.approx(bill)
    totals = ended.summary["output_totals"]["tokens"]
    assert totals["cost_usd"] == pytest.approx(bill)
    assert ended.summary["this_run"]["tokens"]["cost_usd"] == pytest.approx(bill)
    # Remembered, also when rows are added; another price asks for nothing.
    write_rows(41)
    ended = submit(*command)
    assert ended.summary["output_totals"]["tokens"]["cost_usd"] > bill
    dearer = submit(*command, "--price", "20,80").summary
    bill = bill_of(server, 20, 80)
    assert dearer["output_totals"]["tokens"]["cost_usd"] == pytest.approx(bill)
    assert server.ledger.requests == 41


def test_without_a_price_nothing_is_said_to_be_free(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(3)
    ended = submit("in.jsonl", "--base-url", server.url, "-m", "m", "--json")
    assert ended.summary["output_totals"]["tokens"]["cost_usd"] is None


def test_rows_without_usage_are_not_in_the_bill_and_counted(
    mock: StartMock, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        return completion(request, usage=NO_USAGE) if b"Question 1?" in request.body else None

    server = mock(respond=respond)
    write_rows(3)
    to = ("--base-url", server.url, "-m", "m", "-o", "out.parquet", "--price", "1,1")
    assert submit("in.jsonl", *to).code == 0
    assert run_command(["status", "out.parquet"]) == 0
    said = capsys.readouterr().err
    assert "cost      $" in said
    assert "1 row reported no usage" in said
    assert [cost is None for cost in costs("out.parquet")] == [False, True, False]


@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl"])
def test_answers_that_did_not_fit_stay_in_the_bill_of_the_next_run(
    mock: StartMock, submit: Submit, output: str
) -> None:
    Path("s.json").write_text('{"type": "object", "properties": {"n": {"type": "integer"}}}')

    def respond(request: MockRequest) -> MockReply:
        return completion(request, content='{"n": 7}' if b"assistant" in request.body else "{")

    server = mock(respond=respond)
    write_rows(3)
    command = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", output, "-c", 1)
    typed = (*command, "--schema", "s.json", "--max-tokens", 90, "--price", "2,8", "--json")
    for rows in (3, 4):
        write_rows(rows)
        ended = submit(*typed)
        assert (ended.code, server.ledger.requests) == (0, 2 * rows)
        assert ended.summary["output_totals"]["tokens"]["cost_usd"] == pytest.approx(
            bill_of(server, 2, 8)
        )
        assert sum(costs(output)) == pytest.approx(bill_of(server, 2, 8))
