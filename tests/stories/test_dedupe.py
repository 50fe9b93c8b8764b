"""Rows that ask the same are sent once with ``--dedupe``, and every one has the answer."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import StartMock, StartRun, Submit
from test_run import Holding

import batchrun
from batchrun.mock.replies import MockReply, MockRequest, completion, error_reply

LETTERS = "abacabad"  # four questions in eight rows


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(letters: Sequence[str] = LETTERS) -> None:
    rows = [{"prompt": f"{each}?", "custom_id": f"{n}{each}"} for n, each in enumerate(letters)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: str = "out.parquet") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def payers(path: str = "out.parquet") -> list[str | None]:
    return [row["paid_by"] for row in read(path)]


def numbered(request: MockRequest) -> MockReply:
    return completion(request, content=f"{request.prompt} #{request.n}")


PAID = [None, None, "0a", None, "0a", "1b", "0a", None]


def test_equal_rows_are_sent_once_and_counted_once(mock: StartMock, submit: Submit) -> None:
    server = mock(respond=numbered)
    write_rows()
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "--dedupe")
    ended = submit(*to, "--price", "1,2", "--json")
    assert (ended.code, server.ledger.requests) == (0, 4)
    rows = read()
    assert [row["paid_by"] for row in rows] == PAID
    assert len({row["response"] for row in rows}) == 4
    assert all(row["response"].startswith(row["custom_id"][1:]) for row in rows)
    billed, summary = server.ledger.billed, ended.summary
    told = summary["output_totals"]["tokens"]
    assert (told["prompt"], told["completion"]) == (billed.prompt_tokens, billed.completion_tokens)
    assert sum(row["prompt_tokens"] or 0 for row in rows) == billed.prompt_tokens
    assert sum(row["cost_usd"] or 0 for row in rows) == pytest.approx(told["cost_usd"])
    assert sum(row["attempts"] for row in rows) == 4
    assert told["rows_without_usage"] == 0
    assert (summary["rows"]["ok"], summary["rows"]["copied"]) == (8, 4)
    assert summary["rows"]["duplicate"] == 4
    # Again, at another price, with other rows around: nothing is asked twice.
    assert submit(*to).code == 0
    dearer = submit(*to, "--price", "10,20", "--json").summary
    assert dearer["output_totals"]["tokens"]["cost_usd"] == pytest.approx(10 * told["cost_usd"])
    write_rows("dbacabaad")
    assert submit(*to).code == 0
    assert server.ledger.requests == 4
    assert payers() == [None, None, None, None, "2a", "1b", "2a", "2a", "0d"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_what_was_published_is_read_back_without_the_copies(
    mock: StartMock, submit: Submit, cli: Submit, name: str
) -> None:
    server = mock(respond=numbered)
    write_rows()
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", name)
    assert submit(*to, "--dedupe").code == 0
    assert cli("collect", name, "-o", "copy.parquet").code == 0
    assert payers("copy.parquet") == PAID
    assert sum(row["total_tokens"] or 0 for row in read("copy.parquet")) == (
        server.ledger.billed.total_tokens
    )
    # Without --dedupe each row is asked for itself, and keeps that answer with it again.
    assert submit(*to).code == 0
    assert server.ledger.requests == 8
    ended = submit(*to, "--dedupe", "--json")
    assert server.ledger.requests == 8
    assert ended.summary["rows"]["copied"] == 0
    # Of a deleted leader the answer stays with those that follow.
    write_rows("bacabad")
    assert submit(*to, "--dedupe").code == 0
    assert server.ledger.requests == 8


def test_copies_fail_as_the_first_one_and_are_tried_again_with_it(
    mock: StartMock, submit: Submit
) -> None:
    healed = False

    def respond(request: MockRequest) -> MockReply | None:
        if b"a?" in request.body and not healed:
            return error_reply(400, "nothing like a")
        return None

    server = mock(respond=respond)
    write_rows()
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "--dedupe")
    ended = submit(*to, "--json")
    assert (ended.code, ended.summary["rows"]["error"]) == (3, 4)
    failed = [row for row in read() if row["status"] == "error"]
    assert [row["custom_id"] for row in failed] == ["0a", "2a", "4a", "6a"]
    assert len({(row["error_code"], row["error_message"]) for row in failed}) == 1
    assert submit(*to).code == 3
    assert server.ledger.requests == 4
    healed = True
    assert submit(*to, "--retry-failed").code == 0
    assert server.ledger.requests == 5
    assert payers() == PAID


def test_an_answer_held_for_a_later_row_serves_the_first(mock: StartMock, submit: Submit) -> None:
    failing = True

    def respond(request: MockRequest) -> MockReply | None:
        return error_reply(400, "no") if failing and request.n == 1 else None

    server = mock(respond=respond)
    write_rows("aa")
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "-c", 1)
    assert submit(*to).code == 3
    failing = False
    ended = submit(*to, "--dedupe", "--json")
    assert (ended.code, server.ledger.requests) == (0, 2)
    assert payers() == [None, "0a"]
    assert read()[0]["status"] == "ok"


def test_samples_are_no_copies_of_each_other(mock: StartMock, submit: Submit) -> None:
    server = mock(respond=numbered)
    write_rows()
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "--dedupe")
    assert submit(*to, "--samples", 3).code == 0
    assert server.ledger.requests == 12
    rows = read()
    by_place = {(row["custom_id"], row["sample"]): row["response"] for row in rows}
    assert len(set(by_place.values())) == 12
    for row in rows:
        if row["paid_by"] is not None:
            assert row["response"] == by_place[row["paid_by"], row["sample"]]
    assert [row["paid_by"] for row in rows][::3] == PAID
    assert submit(*to, "--samples", 4).code == 0
    assert server.ledger.requests == 16


def test_each_shard_asks_once_and_merging_keeps_the_payers(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    server = mock(respond=numbered)
    write_rows()
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "--dedupe")
    for part in ("1/2", "2/2"):
        assert submit(*to, "--shard", part).code == 0
    assert server.ledger.requests == 3 + 3
    assert cli("merge", "out.parquet").code == 0
    assert payers() == [None, None, "0a", None, None, None, "4a", None]
    assert sum(row["total_tokens"] or 0 for row in read()) == server.ledger.billed.total_tokens
    assert submit(*to).code == 0
    # Divided otherwise, what another part asked is not asked again.
    for part in ("1/3", "2/3", "3/3"):
        assert submit(*to, "--shard", part).code == 0
    assert server.ledger.requests == 6


def test_a_run_divided_after_it_was_whole_asks_for_nothing(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    server = mock(respond=numbered)
    write_rows()
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "--dedupe")
    assert submit(*to).code == 0
    for part in ("1/2", "2/2"):
        assert submit(*to, "--shard", part).code == 0
    assert server.ledger.requests == 4
    assert cli("merge", "out.parquet").code == 0
    assert sum(row["total_tokens"] or 0 for row in read()) == server.ledger.billed.total_tokens


def test_what_is_to_be_paid_is_counted_once_beforehand(submit: Submit, cli: Submit) -> None:
    write_rows()
    told = cli("estimate", "in.jsonl", "--mock", "--dedupe", "--json").summary
    assert (told["rows"], told["to_send"], told["copies"]) == (8, 4, 4)
    assert cli("estimate", "in.jsonl", "--mock", "--json").summary["to_send"] == 8
    assert "4 rows repeat an earlier request (not sent: --dedupe)" in "".join(
        cli("validate", "in.jsonl", "--mock", "--dedupe")[1:]
    )


def test_a_budget_counts_an_answer_once(submit: Submit, cli: Submit) -> None:
    write_rows()
    to = ("in.jsonl", "--mock", "--max-tokens", 8, "-o", "out.parquet", "--dedupe")
    spent = submit(*to, "--json").summary["output_totals"]["tokens"]["total"]
    write_rows([*LETTERS, "z"])
    body = cli("validate", "in.jsonl", "--mock", "--max-tokens", 8, "--show", 1).out.strip()
    # One request more at its worst, and no room for the copies' tokens.
    assert submit(*to, "--token-budget", spent + len(body) + 8 + 2).code == 0


@pytest.mark.slow
def test_after_kill_9_no_answer_is_asked_again_for_any_copy(
    mock: StartMock, submit: Submit, running: StartRun
) -> None:
    letters = [f"q{n % 120}" for n in range(400)]
    write_rows(letters)
    holding = Holding(mock, 50, more=4)
    to = ("-m", "m", "-o", "out.parquet", "--dedupe")
    with running("in.jsonl", "--base-url", holding.server.url, *to, "-c", 4) as process:
        holding.wait()
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = mock()
    ended = submit("in.jsonl", "--base-url", again.url, *to, "--json")
    assert (ended.code, again.ledger.requests) == (0, 70)
    rows = ended.summary["rows"]
    assert (rows["ok"], rows["copied"]) == (400, 280)
    paid = {row["prompt"]: row["custom_id"] for row in reversed(read())}
    assert all(row["paid_by"] in (None, paid[row["prompt"]]) for row in read())
    assert {row["custom_id"] for row in read() if row["paid_by"] is None} == {*paid.values()}


def test_a_stopped_run_tells_copies_whose_answer_is_there(mock: StartMock, submit: Submit) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        return error_reply(401, "no such key") if b"c?" in request.body else None

    server = mock(respond=respond)
    write_rows()
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "-c", 1)
    ended = submit(*to, "--dedupe", "--json")
    rows = ended.summary["rows"]
    assert (ended.code, rows["ok"], rows["pending"]) == (4, 6, 2)


def test_an_input_column_of_that_name_gives_way_only_to_ours(submit: Submit) -> None:
    Path("in.jsonl").write_text('{"prompt": "a?", "paid_by": "me"}\n' * 2)
    assert submit("in.jsonl", "--mock", "-o", "out.parquet").code == 0
    assert payers() == ["me", "me"]
    # Those are no copies of ours: both answers are read back.
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", "--dedupe").code == 0
    assert [row["input_paid_by"] for row in read()] == ["me", "me"]
    assert payers() == [None, None]


def test_python_has_it_with_and_without_a_file(mock: StartMock) -> None:
    server = mock(respond=numbered)
    rows = [{"prompt": f"{each}?", "custom_id": f"{n}{each}"} for n, each in enumerate(LETTERS)]
    options: dict[str, Any] = {"base_url": server.url, "model": "m", "dedupe": True}
    summary = batchrun.submit(rows, "out.parquet", **options)
    assert (summary.rows.ok, summary.rows.copied, server.ledger.requests) == (8, 4, 4)

    async def collect() -> list[batchrun.Result]:
        async with batchrun.complete(rows, **options) as results:
            return [result async for result in results]

    results = {result.custom_id: result for result in asyncio.run(collect())}
    assert server.ledger.requests == 8
    assert [results[str(row["custom_id"])].paid_by for row in rows] == PAID
    for result in results.values():
        first = results[result.paid_by or result.custom_id]
        assert result.response == first.response
        assert (result.attempts, result.usage.total_tokens is None) == (
            (1, False) if result is first else (0, True)
        )


@pytest.mark.parametrize("tries", [1, 2])
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_what_copies_were_billed_for_before_stays_in_the_bill(
    mock: StartMock, submit: Submit, cli: Submit, name: str, tries: int
) -> None:
    """Answers that did not fit were paid: by rows that then took an equal row's answer.

    They are as long as those that fit: with one try a row's own bill equals that of the other.
    """
    Path("s.json").write_text('{"type": "object", "properties": {"n": {"type": "integer"}}}')

    def respond(request: MockRequest) -> MockReply:
        end = "]" if request.n <= 3 * tries else "}"
        return completion(request, content=f'{{"w": "{"word " * 9_000}", "n": 7{end}')

    server = mock(respond=respond)
    write_rows("aab")
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", name, "--price", "1,2")
    more = ("--schema", "s.json", "--max-schema-retries", tries - 1, "--max-tokens", 90, "-c", 1)
    typed = (*to, *more)
    assert submit(*typed).code == 3
    asked = 3 * tries + 2
    again = submit(*typed, "--retry-failed", "--dedupe", "--json")
    assert (again.code, server.ledger.requests) == (0, asked)

    def agrees(summary: dict[str, Any]) -> None:
        told = summary["output_totals"]["tokens"]
        assert told["total"] == server.ledger.billed.total_tokens
        assert told["rows_without_usage"] == 0
        assert (summary["rows"]["ok"], summary["rows"]["copied"]) == (3, 1)
        Path("copy.parquet").unlink(missing_ok=True)
        assert cli("collect", name, "-o", "copy.parquet").code == 0
        rows = read("copy.parquet")
        assert payers("copy.parquet") == [None, "0a", None]
        assert sum(row["total_tokens"] for row in rows) == server.ledger.billed.total_tokens
        assert sum(row["cost_usd"] for row in rows) == pytest.approx(told["cost_usd"])
        assert [row["status"] for row in rows] == ["ok"] * 3
        assert rows[1]["attempts"] == tries

    agrees(again.summary)
    # And when the next run begins with what that one published.
    Path("in.jsonl").write_text(Path("in.jsonl").read_text().replace("}", ', "new": 1}'))
    agrees(submit(*typed, "--dedupe", "--json").summary)
    assert "new" in read("copy.parquet")[0]
    spent = server.ledger.billed.total_tokens or 0
    write_rows("aabd")
    # Without what the copy was billed there would be room for one more.
    refused = submit(*typed, "--dedupe", "--token-budget", spent - 1, "--json")
    assert (refused.code, server.ledger.requests) == (75, asked)


def test_a_stopped_run_tells_copies_of_a_failure_that_passes(
    mock: StartMock, submit: Submit
) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        if b"c?" in request.body:
            return error_reply(401, "no such key")
        return error_reply(500, "try again") if b"a?" in request.body else None

    server = mock(respond=respond)
    write_rows()
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "-c", 1)
    ended = submit(*to, "--dedupe", "--max-retries", 0, "--json")
    rows = ended.summary["rows"]
    assert (ended.code, rows["ok"], rows["error"], rows["pending"]) == (4, 2, 4, 2)
    assert rows["passing"] == 4


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_copy_of_a_failure_is_a_row_of_its_own_again_without_dedupe(
    mock: StartMock, submit: Submit, name: str
) -> None:
    Path("s.json").write_text('{"type": "object", "properties": {"n": {"type": "integer"}}}')

    def respond(request: MockRequest) -> MockReply:
        replies = {1: completion(request, content="{"), 2: error_reply(500, "try again")}
        return replies.get(request.n) or completion(request, content='{"n": 7}')

    server = mock(respond=respond)
    write_rows("aa")
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", name, "-c", 1)
    typed = (*to, "--schema", "s.json", "--max-schema-retries", 0, "--max-retries", 0)
    assert submit(*typed).code == 3
    copied = submit(*typed, "--dedupe", "--json")
    assert (copied.code, copied.summary["rows"]["copied"], server.ledger.requests) == (3, 1, 2)
    ended = submit(*typed, "--json")
    assert (ended.summary["rows"]["ok"], ended.summary["rows"]["error"]) == (1, 1)
    assert server.ledger.requests == 3
    told = sum(total or 0 for total in batchrun.read(name)["total_tokens"].to_pylist())
    assert told == ended.summary["output_totals"]["tokens"]["total"]
    assert told == server.ledger.billed.total_tokens
