"""What a run would cost, said beforehand, and held against the bill of the server."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import StartMock, Submit

from batchrun.cli.main import run_command
from batchrun.mock.replies import MockReply, MockRequest, completion
from batchrun.types import Usage

MOST = 400
ROWS = 500
PRICE = ("--price", "1,4")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Job:
    """A table of prompts and answers of very unequal lengths, and the command that asks it."""

    def __init__(
        self, mock: StartMock, capsys: pytest.CaptureFixture[str], seed: int = 0, rows: int = ROWS
    ) -> None:
        chance = random.Random(seed)
        self._answers: dict[str, int] = {}
        lines = []
        for n in range(rows):
            prompt = f"{n}: " + "word " * chance.randrange(200)
            self._answers[prompt] = min(MOST, 1 + int(chance.lognormvariate(3, 1)))
            lines.append(json.dumps({"prompt": prompt}) + "\n")
        Path("in.jsonl").write_text("".join(lines))
        self.server = mock(respond=self._respond)
        self._capsys = capsys
        to = ("--base-url", self.server.url, "-m", "m", "-o", "out.parquet")
        self.command = ("in.jsonl", *to, "--max-tokens", MOST, *PRICE)

    def _respond(self, request: MockRequest) -> MockReply:
        prompt = json.loads(request.body)["messages"][-1]["content"]
        usage = Usage(9 + len(prompt) // 5, self._answers[prompt])
        return completion(request, usage=usage)

    def estimate(self, *more: object) -> dict[str, Any]:
        assert run_command(["estimate", *map(str, self.command), "--json", *map(str, more)]) == 0
        found: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return found

    @property
    def bill(self) -> float:
        billed = self.server.ledger.billed
        return ((billed.prompt_tokens or 0) + 4 * (billed.completion_tokens or 0)) / 1e6


@pytest.mark.parametrize("seed", range(12))
def test_the_bill_is_within_what_was_said(
    mock: StartMock, submit: Submit, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    job = Job(mock, capsys, seed)
    rough = job.estimate()
    assert job.server.ledger.requests == 0
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]
    assert (rough["to_send"], rough["measured"]) == (ROWS, 0)
    measured = job.estimate("--sample", 30)
    assert job.server.ledger.requests == 30
    assert (measured["to_send"], measured["answered_before"]) == (ROWS - 30, 30)
    paid = job.bill
    assert submit(*job.command).code == 0
    assert job.server.ledger.requests == ROWS
    rest = job.bill - paid
    assert measured["cost_usd"]["low"] <= rest <= measured["cost_usd"]["high"]
    assert rough["cost_usd"]["low"] <= job.bill <= rough["cost_usd"]["high"]
    narrower = measured["cost_usd"]["high"] - measured["cost_usd"]["low"]
    assert narrower < rough["cost_usd"]["high"] - rough["cost_usd"]["low"]
    done = job.estimate()
    assert (done["to_send"], done["answered_before"]) == (0, ROWS)
    assert done["cost_usd"]["about"] == 0


def test_what_an_unfinished_run_holds_is_not_paid_again(
    mock: StartMock, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(mock, capsys, rows=200)
    assert submit(*job.command, "-c", 4, "--token-budget", 15_000).code == 75
    asked = job.server.ledger.requests
    capsys.readouterr()
    found = job.estimate()
    assert 0 < asked < 200
    assert (found["to_send"], found["answered_before"]) == (200 - asked, asked)
    assert job.server.ledger.requests == asked
    # With other settings none of it counts.
    other = job.estimate("--temperature", 1)
    assert other["to_send"] == 200


def test_answers_elsewhere_are_held_and_every_choice_is_bounded(
    mock: StartMock, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(mock, capsys, rows=20)
    assert submit(*job.command).code == 0
    lines = Path("in.jsonl").read_text().splitlines(keepends=True)
    Path("in.jsonl").write_text("".join(lines[:5]))
    assert submit(*job.command).code == 0
    Path("in.jsonl").write_text("".join(lines))
    capsys.readouterr()
    # Fifteen are set aside beside the output; another output has them all from elsewhere.
    assert job.estimate()["to_send"] == 0
    other = ("--base-url", job.server.url, "-m", "m", "-o", "new.parquet", "--max-tokens", MOST)
    job.command = ("in.jsonl", *other, *PRICE)
    assert job.estimate()["to_send"] == 20
    assert job.estimate("--reuse", "out.*parquet")["to_send"] == 0
    three = job.estimate("--param", "n=3")
    assert three["completion_tokens"]["high"] == 20 * 3 * MOST
    assert job.server.ledger.requests == 20


def test_what_is_not_known_is_said(
    mock: StartMock, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.jsonl").write_text('{"prompt": "One?"}\n{"prompt": null}\n')
    assert run_command(["estimate", "in.jsonl", "--mock"]) == 0
    said = capsys.readouterr().err
    assert "rows      1 to send (1 bad, 0 answered before)" in said
    assert "unknown: name a price" in said
    assert "without bound" in said
    assert run_command(["estimate", "in.jsonl", "--mock", *PRICE, "--rpm", "1"]) == 0
    said = capsys.readouterr().err
    assert "--max-tokens sets one" in said
    assert "time      about 1 min at --rpm 1" in said
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


def test_no_key_is_needed_to_know(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.jsonl").write_text('{"prompt": "One?"}\n')
    assert run_command(["estimate", "in.jsonl"]) == 0
    assert "1 to send" in capsys.readouterr().err
    assert run_command(["estimate", "in.jsonl", "--sample", "1"]) == 2
    assert "key" in capsys.readouterr().err
