"""A run divided by hand: parts on their own, and the one file they become."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import StartMock, Submit

import batchrun

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
    write_rows(range(40))
    assert shards(submit, 4, [1, 2, 3, 4], *to) == [0, 0, 0, 0]
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    assert server.ledger.requests == 39
    assert set(pq.read_table("out.shard-1-of-2.parquet")["attempts"].to_pylist()) == {1, 0}
    assert cli("merge", "out.parquet", "--allow-failures", 1).code == 0
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
    several = ("in.jsonl", "in.jsonl", "--mock", "--shard", "1/2")
    assert cli("estimate", *several).code == 0


def test_a_foreign_file_in_the_place_of_the_output_stays(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    to = ("--base-url", mock().url, "-m", "m", "--allow-failures", 1)
    write_rows(range(ROWS))
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    Path("out.parquet").write_bytes(b"mine")
    assert cli("merge", "out.parquet").code == 2
    assert Path("out.parquet").read_bytes() == b"mine"


def test_an_output_with_other_answers_is_kept_beside_the_merged_one(
    mock: StartMock, submit: Submit, cli: Submit
) -> None:
    to = ("--base-url", mock().url, "-m", "m", "--allow-failures", 1)
    write_rows(range(10))
    assert submit("in.jsonl", "-o", "out.parquet", *to).code == 0
    write_rows(range(20))
    assert shards(submit, 2, [1, 2], *to) == [0, 0]
    assert cli("merge", "out.parquet", "--allow-failures", 1).code == 0
    assert pq.read_table("out.parquet").num_rows == 20
    assert pq.read_table("out.parquet.bak").num_rows == 10


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
