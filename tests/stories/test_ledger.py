"""The two sides' books agree: what the server billed, batchrun has as an answer or in doubt.

Jepsen's way: the server keeps a ledger of its own, and over many seeds of storms and faults it is
compared with what the client claims. A seed decides which sending of which row meets what, so a
failure names the seed that shows it again. Runs of many seeds share one event loop, for most of
their time is back-off.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from conftest import WAIT_S, StartMock, StartRun, Submit
from crash_harness import write_rows
from mock_servers import mock_server

from batchrun.config import RunConfig
from batchrun.mock.knobs import Knobs
from batchrun.mock.ledger import Entry, Ledger
from batchrun.mock.replies import MockReply, MockRequest
from batchrun.providers import resolve
from batchrun.runs.submit import run
from batchrun.summary import RunSummary
from batchrun.types import Usage

SEEDS = int(os.environ.get("LEDGER_SEEDS", "40"))
TOGETHER = 20
ROWS = 40
# What a hanging attempt costs, twice; a slow machine must not make a time-out of an answer.
TIMEOUT_S = 1.0
# Of each storm a few kinds are taken; together they are this share of all requests.
FAULTS = (
    *("429", "429-ms", "429-capacity", "400", "content_filter"),
    *("500", "502", "503", "504", "520", "524", "529", "408", "502-html"),
    *("disconnect", "reset", "close-after", "reset-after"),
    *("cut", "cut-chunk", "cut-silent", "truncated_json"),
    *("garbage", "html", "empty", "no_choices", "error-200", "blank_lines"),
    *("hang", "deep_json", "bad_head", "huge_header", "invalid_utf8"),
)
STREAM_FAULTS = ("stream-error", "stream-cut", "stream-no-finish", "stream-eof")


class Books(NamedTuple):
    """What both sides say about one run."""

    seed: int
    knobs: Knobs
    ledger: Ledger
    summary: RunSummary
    rows: list[dict[str, Any]]


def storm(seed: int) -> tuple[Knobs, bool]:
    """The server's behaviour, and whether the run streams."""
    chance = random.Random(seed)
    streams = chance.random() < 0.3
    kinds = chance.sample(FAULTS, chance.randrange(1, 8))
    if streams:
        kinds += chance.sample(STREAM_FAULTS, 2)
    share = chance.choice((0.05, 0.2, 0.4))
    return Knobs(
        seed=seed,
        faults={kind: share / len(kinds) for kind in kinds},
        retry_after_s=0.005,
        latency_jitter_s=chance.choice((0.0, 0.01)),
        stream_usage=chance.choice(("auto", "every_chunk", "final_choice")),
        # A reset overtakes what is still in the kernel: after one write the client has it all.
        stream_split_bytes=None if "reset-after" in kinds else chance.choice((None, 7)),
    ), streams


async def weather(seed: int, directory: Path) -> Books:
    """One run through one storm."""
    directory.mkdir()
    write_rows(directory / "in.jsonl", range(ROWS))
    knobs, streams = storm(seed)
    output = directory / "out.parquet"
    async with mock_server(knobs, keep_entries=True) as server:
        config = RunConfig(
            inputs=(str(directory / "in.jsonl"),),
            output=str(output),
            model="m",
            endpoint=resolve(
                provider=None,
                base_url=server.url,
                api_key_env=None,
                api_key_file=None,
                allow_http=False,
                environ={},
            ),
            stream=streams,
            concurrency=8,
            max_retries=2,
            timeout_s=TIMEOUT_S,
            connect_timeout_s=TIMEOUT_S,
            abort_after=0,
        )
        summary = await run(config)
    # Leaving the server has ended every connection: nothing about the ledger can change any more.
    rows: list[dict[str, Any]] = pq.read_table(output).to_pylist() if output.exists() else []
    return Books(seed, knobs, server.ledger, summary, rows)


def check(books: Books) -> None:
    ledger, rows, summary = books.ledger, books.rows, books.summary
    assert summary.state == "finished", summary.reason
    assert [row["n"] for row in rows] == list(range(ROWS))
    assert {row["status"] for row in rows} <= {"ok", "error"}
    assert all((row["error_kind"] is None) == (row["status"] == "ok") for row in rows)
    assert sum((usage_of(row) for row in rows), start=Usage()) == ledger.delivered
    assert sum(row["status"] == "ok" for row in rows) == ledger.delivered_answers
    assert summary.output_totals is not None
    assert summary.this_run is not None
    for totals in (summary.output_totals.tokens, summary.this_run.tokens):
        assert (totals.total or 0) == (ledger.delivered.total_tokens or 0)
    of_row: dict[str, list[Entry]] = {row["prompt"]: [] for row in rows}
    for entry in ledger.entries:
        of_row[entry.prompt].append(entry)
    for row in rows:
        entries = of_row[row["prompt"]]
        assert sum(entry.delivered for entry in entries) == (row["status"] == "ok")
        in_doubt = sum(entry.billed is not None and not entry.delivered for entry in entries)
        assert in_doubt <= row["in_doubt_attempts"] <= row["attempts"]
        assert len(entries) <= row["attempts"]
    assert summary.this_run.in_doubt == sum(row["in_doubt_attempts"] for row in rows)
    assert summary.this_run.attempts == sum(row["attempts"] for row in rows)
    assert summary.this_run.rate_limited == ledger.statuses[429]


def usage_of(row: dict[str, Any]) -> Usage:
    names = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")
    return Usage(*(row[name] for name in (*names, "reasoning_tokens")))


async def weather_all(seeds: range, directory: Path) -> list[Books]:
    return await asyncio.gather(*(weather(seed, directory / str(seed)) for seed in seeds))


@pytest.mark.parametrize("first", range(0, SEEDS, TOGETHER))
def test_the_ledger_balances(first: int, tmp_path: Path) -> None:
    met = Counter[str]()
    for books in asyncio.run(weather_all(range(first, first + TOGETHER), tmp_path)):
        try:
            check(books)
        except AssertionError as exc:
            exc.add_note(f"seed {books.seed}: {books.knobs.faults}")
            raise
        met += books.ledger.faults
    # A fault that no request met proves nothing.
    assert len(met) >= len(FAULTS) // 2


# In doubt, over all runs of an output


def test_a_row_killed_in_flight_is_sent_so_often_and_then_only_on_demand(
    mock: StartMock, running: StartRun, submit: Submit, tmp_path: Path
) -> None:
    doubtful = "answer 1"
    hung = threading.Semaphore(0)
    hangs = True

    def respond(request: MockRequest) -> MockReply | None:
        if not hangs or request.prompt != doubtful:
            return None
        hung.release()
        return MockReply(raw=b"", ending="hang")

    server = mock(respond=respond)
    (tmp_path / "in.jsonl").write_text('{"prompt": "answer 1"}\n{"prompt": "answer 2"}\n')
    arguments = (
        *(tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet", "--base-url", server.url),
        *("-m", "m", "--max-in-doubt-retries", 1, "--json"),
    )
    for _ in range(2):  # the first sending, and the one repetition
        with running(*arguments) as process:
            assert hung.acquire(timeout=WAIT_S)
            process.kill()
            process.wait()
    sent = [entry.prompt for entry in server.ledger.entries].count(doubtful)
    assert sent == 2

    ended = submit(*arguments)
    assert ended.code == 3
    assert [entry.prompt for entry in server.ledger.entries].count(doubtful) == sent
    row, other = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (row["status"], row["error_code"], row["in_doubt_attempts"]) == (
        "error",
        "interrupted",
        2,
    )
    assert other["status"] == "ok"
    (error,) = ended.summary["errors"]
    assert (error["code"], error["rows"], error["retried_on_rerun"]) == ("interrupted", 1, False)

    assert submit(*arguments).code == 3
    assert [entry.prompt for entry in server.ledger.entries].count(doubtful) == sent

    hangs = False
    assert submit(*arguments, "--retry-failed").code == 0
    assert [entry.prompt for entry in server.ledger.entries].count(doubtful) == sent + 1
