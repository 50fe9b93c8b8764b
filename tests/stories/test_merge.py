"""A run divided by hand: parts on their own, and the one file they become."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import StartMock, StartRun, Submit

import batchrun
from batchrun.journal import StateDir, locked
from batchrun.mock.replies import error_reply
from batchrun.money import Price
from batchrun.sending.sender import limit_settings

ROWS = 50
# What differs from one asking to the next.
OF_THE_ASKING = ("latency_s", "ttft_s", "finished_at", "request_id", "response_body")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(numbers: Sequence[int], name: str = "in.jsonl") -> None:
    # Columns whose type only the whole table tells, equal requests, and a row that is none.
    rows = [{"prompt": f"Question {n % 40}?", "n": n if n < 30 else n + 0.5} for n in numbers]
    for n, row in zip(numbers, rows, strict=True):
        row |= {"x": n} if n > 44 else {}
    lines = [json.dumps(row) for row in rows]
    lines[3] = '{"prompt": 7}'
    Path(name).write_text("\n".join(lines) + "\n")


def shards(submit: Submit, of: int, numbers: Iterable[int], *options: object) -> list[int]:
    return [
        submit("in.jsonl", "-o", "out.parquet", "--shard", f"{number}/{of}", *options).code
        for number in numbers
    ]


def test_parts_become_the_file_that_one_run_makes(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    server = mock()
    to = ("--base-url", server.url, "-m", "m", "--allow-failures", 1)
    write_rows(range(ROWS))
    assert shards(submit, 4, [3, 1, 4, 2], *to) == [0, 0, 0, 0]
    assert server.ledger.requests == ROWS - 1
    merged = cli("merge", "out.parquet", "--allow-failures", 1)
    assert merged.code == 0
    assert "49 of 50 answered, 1 failed" in merged.out + merged.err
    assert submit("in.jsonl", "-o", "one.parquet", *to).code == 0
    parts, one = pq.read_table("out.parquet"), pq.read_table("one.parquet")
    assert parts.schema.equals(one.schema)
    assert parts.drop_columns(OF_THE_ASKING).equals(one.drop_columns(OF_THE_ASKING))
    # The whole run finds its answers there, and the parts may be merged again.
    before = server.ledger.requests
    assert submit("in.jsonl", "-o", "out.parquet", *to).code == 0
    assert server.ledger.requests == before
    assert cli("merge", "out.parquet").code == 3


def test_a_part_that_is_missing_or_of_another_input_is_named(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    to = ("--base-url", mock().url, "-m", "m", "--allow-failures", 1)
    write_rows(range(ROWS))
    assert cli("merge", "out.parquet").code == 2
    assert shards(submit, 3, [1, 3], *to) == [0, 0]
    missing = cli("merge", "out.parquet")
    assert missing.code == 75
    assert "1 part is missing: 2/3" in missing.err
    assert not Path("out.parquet").exists()
    write_rows(range(ROWS + 1))
    assert shards(submit, 3, [2], *to) == [0]
    other = cli("merge", "out.parquet")
    assert other.code == 75
    assert "was made from other inputs" in other.err
    assert shards(submit, 3, [1, 3], *to) == [0, 0]
    assert cli("merge", "out.parquet", "--allow-failures", 1).code == 0
    assert pq.read_table("out.parquet").num_rows == ROWS + 1


def test_another_division_asks_for_nothing_again(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    server = mock()
    to = ("--base-url", server.url, "-m", "m", "--allow-failures", 1)
    write_rows(range(ROWS))
    assert shards(submit, 4, [1, 2, 3, 4], *to) == [0, 0, 0, 0]
    assert cli("merge", "out.parquet", "--allow-failures", 1).code == 0
    before = pq.read_table("out.parquet")
    assert shards(submit, 2, [2, 1], *to) == [0, 0]
    assert server.ledger.requests == ROWS - 1
    assert cli("merge", "out.parquet", "--allow-failures", 1).code == 0
    # Each answer in its own place, also where rows of different parts ask the same.
    assert pq.read_table("out.parquet").equals(before)
    assert [*Path().glob("*.parquet.batchrun")] == []


def test_parts_of_python_and_of_other_columns(submit: Submit, cli: Submit) -> None:
    write_rows(range(10))
    for part in (batchrun.Shard(1, 2), batchrun.Shard(2, 2)):
        summary = batchrun.submit("in.jsonl", "out.parquet", mock=True, shard=part)
        assert summary.output == f"out.shard-{part.number}-of-2.parquet"
    assert shards(submit, 2, [2], "--mock", "--no-response-body") == [0]
    other = cli("merge", "out.parquet")
    assert other.code == 75
    assert "has other columns" in other.err
    asked_otherwise = ("--mock", "--temperature", 1, "--overwrite")
    assert shards(submit, 2, [2], *asked_otherwise) == [0]
    assert "was made with other settings" in cli("merge", "out.parquet").err
    several = ("in.jsonl", "in.jsonl", "--mock", "--shard", "1/2")
    assert cli("estimate", *several).code == 0


def test_rows_that_an_edit_moves_to_another_part_are_not_asked_again(
    mock: StartMock, submit: Submit
) -> None:
    server = mock()
    to = ("--base-url", server.url, "-m", "m", "--allow-failures", 1)
    write_rows(range(100, 120))
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    before = Path("in.jsonl").read_text()
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n' + before)
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    assert server.ledger.requests == 19 + 2


def test_an_unfinished_run_of_the_output_is_not_published_over(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    to = ("--base-url", mock().url, "-m", "m", "--allow-failures", 1, "--max-tokens", 5)
    write_rows(range(ROWS))
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    assert submit("in.jsonl", *to, "-o", "out.parquet", "--token-budget", 100).code == 75
    refused = cli("merge", "out.parquet")
    assert refused.code == 2
    assert "an unfinished run" in refused.err
    assert cli("status", "out.parquet").code == 75


def test_a_foreign_file_in_the_place_of_the_output_stays(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    to = ("--base-url", mock().url, "-m", "m", "--allow-failures", 1)
    write_rows(range(ROWS))
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    Path("out.parquet").write_bytes(b"mine")
    assert cli("merge", "out.parquet").code == 2
    assert Path("out.parquet").read_bytes() == b"mine"


def test_an_output_is_kept_only_where_the_parts_lack_an_answer_of_it(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    fails = set[int]()
    server = mock(respond=lambda asked: error_reply(500, "no") if asked.n in fails else None)
    to = ("--base-url", server.url, "-m", "m", "--allow-failures", 1)
    kept = Path("out.parquet.bak")
    write_rows(range(10))
    fails.add(5)
    assert submit("in.jsonl", "-o", "out.parquet", *to, "--max-retries", 0).code == 3
    fails.clear()
    write_rows(range(20))
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    assert cli("merge", "out.parquet", "--allow-failures", 1).code == 0
    assert pq.read_table("out.parquet").num_rows == 20
    assert not kept.exists()
    # The same settings and inputs, and yet asked again: these answers were paid, too.
    Path("out.parquet").unlink()
    assert submit("in.jsonl", "-o", "out.parquet", *to).code == 0
    asked_again = Path("out.parquet").read_bytes()
    assert cli("merge", "out.parquet", "--allow-failures", 1).code == 0
    assert kept.read_bytes() == asked_again


def test_rejected_rows_are_not_asked_again_by_another_division(
    mock: StartMock, submit: Submit
) -> None:
    server = mock(respond=lambda request: error_reply(400, "no") if request.n > 2 else None)
    to = ("--base-url", server.url, "-m", "m", "--allow-failures", "100%", "-c", 1)
    write_rows(range(8))
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    assert shards(submit, 3, [1, 2, 3], *to) == [0, 0, 0]
    assert server.ledger.requests == 7


def test_a_part_is_a_run_that_stops_is_collected_and_goes_on(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    server = mock()
    write_rows(range(ROWS))
    to = ("--base-url", server.url, "-m", "m", "--max-tokens", 5, "-c", 1)
    assert shards(submit, 2, [2], *to, "--token-budget", 400) == [75]
    assert 0 < server.ledger.requests < ROWS // 2
    part = "out.shard-2-of-2.parquet"
    assert cli("status", part).code == 75
    assert cli("collect", part).code == 0
    collected = pq.read_table("out.shard-2-of-2.partial.parquet")
    ids = [str(number) for number in range(26, 51)]
    assert collected["custom_id"].to_pylist() == ids[: server.ledger.requests]
    assert shards(submit, 2, [2], *to, "--token-budget", 400_000) == [0]
    assert server.ledger.requests == ROWS // 2
    assert pq.read_table(part)["custom_id"].to_pylist() == ids


def test_parts_run_beside_each_other_and_each_only_once(
    mock: StartMock, running: StartRun, submit: Submit, cli: Submit
) -> None:
    server = mock()
    write_rows(range(ROWS))
    to = ("--base-url", server.url, "-m", "m", "--allow-failures", 1, "-o", "out.parquet")
    with (
        running("in.jsonl", *to, "--shard", "1/2") as first,
        running("in.jsonl", *to, "--shard", "2/2") as second,
    ):
        assert [first.end().code, second.end().code] == [0, 0]
    assert server.ledger.requests == ROWS - 1
    assert cli("merge", "out.parquet", "--allow-failures", 1).code == 0
    with locked(StateDir(Path("out.shard-2-of-2.parquet.batchrun"))):
        assert submit("in.jsonl", *to, "--shard", "2/2").code == 11
        assert submit("in.jsonl", *to, "--shard", "1/2").code == 0


def test_a_share_is_never_too_small_to_be_one(submit: Submit) -> None:
    write_rows(range(5))
    bound = ("--token-budget", 3, "--max-tokens", 5)
    ended = submit("in.jsonl", "--mock", "-o", "out.parquet", "--shard", "1/4", *bound)
    assert ended.code == 75
    shard = batchrun.Shard(1, 4)
    config = batchrun.make_config(
        *("in.jsonl", "out.parquet"),
        mock=True,
        shard=shard,
        rpm=100,
        tpm=1_000,
        max_cost=2.0,
        price=Price(1, 1),
    )
    assert (config.rpm, config.tpm, config.max_cost) == (25, 250, 0.5)
    assert limit_settings(config, room=8).share == 0.25
    with pytest.raises(batchrun.UsageError, match="--shard 5/4"):
        batchrun.submit("in.jsonl", "out.parquet", mock=True, shard=batchrun.Shard(5, 4))


def test_each_part_has_its_share_of_what_all_may_spend(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(range(ROWS))
    bound = ("--token-budget", 400, "--max-tokens", 5)
    to = ("--base-url", server.url, "-m", "m", *bound)
    assert shards(submit, 2, [1, 2], *to) == [75, 75]
    assert 0 < server.ledger.requests < 2 * 200 // 10


@pytest.mark.parametrize(
    "options", [("--limit", 3), ("--sample", 3), ("-o", "out.jsonl"), ("--shard", "3/2")]
)
def test_what_does_not_go_with_a_shard_is_said(submit: Submit, options: tuple[object, ...]) -> None:
    write_rows(range(5))
    ended = submit("in.jsonl", "--mock", "-o", "out.parquet", "--shard", "1/2", *options)
    assert ended.code == 2
    assert "--shard" in ended.err
