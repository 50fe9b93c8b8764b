"""A budget binds by the server's own books: whatever comes back, and whoever is killed."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Ended, StartMock, StartRun, Submit
from mock_servers import MockServerThread

from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest, completion, error_reply
from batchrun.types import Usage

MOST = 50  # tokens of an answer
ROWS = 600


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(number: int = ROWS) -> None:
    rows = [{"prompt": f"Question {n}? " + "x" * (n % 97)} for n in range(number)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Server:
    """Bills nearly a token a byte, answers of very unequal lengths, and much that is cut off."""

    def __init__(self, mock: StartMock, seed: int, *, faults: bool = True) -> None:
        self._random = random.Random(seed)
        self._faults = faults
        self.server: MockServerThread = mock(Knobs(), respond=self._respond)

    def _respond(self, request: MockRequest) -> MockReply:
        chance = self._random
        usage = Usage(len(request.body) - 20, chance.choice((1, 2, 3, MOST)))
        answer = completion(request, usage=usage)
        if not self._faults or chance.random() < 0.8:
            return answer
        billed = Usage(usage.prompt_tokens, MOST)
        cut = MockReply(
            body=answer.body,
            headers=answer.headers,
            claims_bytes=len(answer.body) + 10,
            ending="reset",
            billed=billed,
        )
        return chance.choice((error_reply(429, "slower"), error_reply(503, "away"), cut))

    @property
    def billed(self) -> int:
        billed = self.server.ledger.billed
        return (billed.prompt_tokens or 0) + (billed.completion_tokens or 0)

    def command(self, *more: object) -> tuple[object, ...]:
        to = ("--base-url", self.server.url, "-m", "m", "-o", "out.parquet", "-c", 256)
        return ("in.jsonl", *to, "--max-tokens", MOST, "--json", *more)


@pytest.mark.parametrize("seed", range(20))
def test_a_token_budget_is_never_exceeded(
    mock: StartMock, submit: Submit, running: StartRun, seed: int
) -> None:
    server = Server(mock, seed)
    write_rows()
    chance = random.Random(seed)
    budget = chance.randrange(20_000, 60_000)
    command = server.command("--token-budget", budget, "--max-retries", 1)
    with running(*command) as run:
        time.sleep(0.5 + chance.random() * 0.5)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert server.billed <= budget
    ended = submit(*command)
    assert ended.code == 75, ended.err
    assert server.billed <= budget
    assert "could be exceeded" in ended.summary["reason"]


def finish(submit: Submit, server: Server, *more: object) -> Ended:
    return submit(*server.command(*more))


def test_a_budget_is_used_up_and_a_higher_one_continues(mock: StartMock, submit: Submit) -> None:
    server = Server(mock, 0, faults=False)
    write_rows()
    ended = finish(submit, server, "--token-budget", 50_000)
    assert ended.code == 75
    assert 0.9 * 50_000 <= server.billed <= 50_000
    sent = server.server.ledger.requests
    assert ended.summary["rows"]["ok"] == sent
    assert not Path("out.parquet").exists()
    again = finish(submit, server, "--token-budget", 50_000)
    assert again.code == 75
    assert server.billed <= 50_000
    last = finish(submit, server, "--token-budget", 1_000_000)
    assert last.code == 0
    assert server.server.ledger.requests == ROWS


def test_a_budget_in_dollars_binds_by_its_price(mock: StartMock, submit: Submit) -> None:
    server = Server(mock, 1, faults=False)
    write_rows()
    ended = finish(submit, server, "--max-cost", 0.05, "--price", "1,10")
    assert ended.code == 75
    billed = server.server.ledger.billed
    cost = ((billed.prompt_tokens or 0) + 10 * (billed.completion_tokens or 0)) / 1e6
    assert 0.045 <= cost <= 0.05
    assert ended.summary["this_run"]["tokens"]["cost_usd"] == pytest.approx(cost)
    # What the published answers cost is part of it too.
    assert finish(submit, server, "--price", "1,10").code == 0
    asked = server.server.ledger.requests
    write_rows(ROWS + 5)
    assert finish(submit, server, "--max-cost", 0.05).code == 75
    assert server.server.ledger.requests == asked


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-cost", 1), "no price is known"),
        (("--max-cost", 0, "--price", "1,1"), "greater than 0"),
        (("--max-cost", 1, "--price", "1,1", "--escalate", "x"), "two prices"),
        (("--token-budget", 100), "row 1 may take any number of tokens"),
    ],
)
def test_a_budget_that_cannot_bind_is_refused(
    mock: StartMock, submit: Submit, options: tuple[object, ...], words: str
) -> None:
    server = mock()
    write_rows(3)
    ended = submit("in.jsonl", "--base-url", server.url, "-m", "m", *options)
    assert ended.code == 2, ended.err
    assert words in ended.err
    assert server.ledger.requests == 0
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "file", "file": {"file_id": "f"}}, "it has a file"),
        ({"type": "document_url", "document_url": "https://x/y.pdf"}, "it has a document"),
        ({"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}, "it has a video"),
    ],
)
def test_what_may_be_of_any_length_is_refused(
    mock: StartMock, submit: Submit, part: object, words: str
) -> None:
    server = mock()
    # The same words in a text bind nobody.
    texts = [{"type": "text", "text": json.dumps(part)}]
    rows = [{"messages": [{"role": "user", "content": parts}]} for parts in (texts, [part])]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "--max-tokens", 9)
    ended = submit(*to, "--token-budget", 10**6)
    assert ended.code == 2
    assert f"row 2 may take any number of tokens: {words}" in " ".join(ended.err.split())
    assert server.ledger.requests == 0


def test_answers_that_do_not_tell_their_tokens_stay_at_their_worst(
    mock: StartMock, submit: Submit
) -> None:
    server = mock(Knobs(stream_usage="none"))
    write_rows(100)
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "--max-tokens", MOST, "--stream")
    command = (*to, "--token-budget", 10_000, "--json")
    assert submit(*command).code == 75
    asked = server.ledger.requests
    assert 0 < asked < 80
    # Neither the next run nor one over the published answers knows better.
    assert submit(*command).code == 75
    write_rows(asked)
    assert submit(*command).code == 0
    write_rows(100)
    assert submit(*command).code == 75
    assert server.ledger.requests == asked


def test_who_bills_more_than_was_sent_is_believed(mock: StartMock, submit: Submit) -> None:
    hidden = 5_000  # tokens that an endpoint adds to every prompt

    def respond(request: MockRequest) -> MockReply:
        return completion(request, usage=Usage(hidden, 5))

    server = mock(respond=respond)
    write_rows(300)
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "--max-tokens", 5, "-c", 4)
    assert submit(*to, "--token-budget", 200_000).code == 75
    assert 150_000 < (server.ledger.billed.prompt_tokens or 0) <= 200_000


def test_typed_answers_are_bound_too(mock: StartMock, submit: Submit) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    Path("schema.json").write_text(json.dumps(schema))

    def respond(request: MockRequest) -> MockReply:
        usage = Usage(len(request.body), MOST)
        return completion(request, content="not that" if request.n % 2 else "{}", usage=usage)

    server = mock(respond=respond)
    write_rows(100)
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "--max-tokens", MOST)
    ended = submit(*to, "--schema", "schema.json", "--token-budget", 40_000, "--json")
    assert ended.code == 75
    billed = server.ledger.billed
    assert (billed.prompt_tokens or 0) + (billed.completion_tokens or 0) <= 40_000


def test_answers_that_did_not_fit_are_paid_for_though_their_rows_go_on(
    mock: StartMock, submit: Submit
) -> None:
    Path("schema.json").write_text(json.dumps({"type": "object", "required": ["a"]}))

    def respond(request: MockRequest) -> MockReply:
        usage = Usage(len(request.body) - 20, MOST)
        return completion(request, content="not that", usage=usage)

    server = mock(respond=respond)
    write_rows(100)
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "--max-tokens", MOST, "-c", 32)
    command = (*to, "--schema", "schema.json", "--schema-dialect", "prompt", "--json")
    for _ in range(4):
        assert submit(*command, "--token-budget", 20_000).code == 75
        billed = server.ledger.billed
        assert (billed.prompt_tokens or 0) + (billed.completion_tokens or 0) <= 20_000
    ended = submit(*command)
    assert ended.code == 3
    # What earlier runs paid for a row is part of what it cost.
    tokens = ended.summary["output_totals"]["tokens"]
    billed = server.ledger.billed
    assert (tokens["prompt"], tokens["completion"]) == (
        billed.prompt_tokens,
        billed.completion_tokens,
    )
    asked = server.ledger.requests
    again = submit(*command, "--retry-failed", "--token-budget", 20_000)
    assert again.code == 75
    assert server.ledger.requests == asked
    assert submit(*command, "--retry-failed").code == 3
    assert server.ledger.requests == asked + 300
    billed = server.ledger.billed
    table = pq.read_table("in.results.parquet")
    assert sum(table["prompt_tokens"].to_pylist()) == billed.prompt_tokens


def test_a_long_name_of_the_stronger_model_is_counted(mock: StartMock, submit: Submit) -> None:
    strong = "strong-" + "x" * 400

    def respond(request: MockRequest) -> MockReply:
        content = "yes" if strong.encode() in request.body else ""
        return completion(request, content=content, usage=Usage(len(request.body), MOST))

    server = mock(respond=respond)
    write_rows(100)
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "--max-tokens", MOST, "-c", 64)
    ended = submit(*to, "--escalate", strong, "--token-budget", 20_000)
    assert ended.code == 75
    billed = server.ledger.billed
    assert (billed.prompt_tokens or 0) + (billed.completion_tokens or 0) <= 20_000
