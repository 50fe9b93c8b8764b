"""A random sample of the rows, and from it to the whole table."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import StartMock, Submit


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(name: str, numbers: range) -> None:
    rows = [{"prompt": f"Question {n}?", "n": n} for n in numbers]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def sampled(path: str = "out.parquet") -> list[int]:
    numbers: list[int] = pq.read_table(path)["n"].to_pylist()
    return numbers


def test_a_sample_grows_to_the_whole_and_nothing_is_asked_twice(
    mock: StartMock, submit: Submit
) -> None:
    server = mock()
    write_rows("in.jsonl", range(3_000))
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet")
    assert submit(*to, "--sample", 20).code == 0
    twenty = sampled()
    assert len(twenty) == 20
    assert twenty == sorted(twenty)
    assert twenty != list(range(20))
    assert max(twenty) > 1_500
    assert submit(*to, "--sample", 50).code == 0
    assert set(sampled()) > set(twenty)
    refused = submit(*to, "--sample", 10)
    assert refused.code == 2
    assert "--sample 10 would leave out answers" in refused.err
    assert submit(*to).code == 0
    assert sampled() == list(range(3_000))
    assert server.ledger.requests == 3_000


def test_a_sample_does_not_depend_on_how_the_rows_are_stored(submit: Submit) -> None:
    write_rows("in.jsonl", range(2_500))
    Path("parts").mkdir()
    write_rows("parts/a.jsonl", range(7))
    write_rows("parts/b.jsonl", range(7, 2_500))
    assert submit("in.jsonl", "--mock", "-o", "a.parquet", "--sample", 9, "--seed", 5).code == 0
    assert submit("parts", "--mock", "-o", "b.parquet", "--sample", 9, "--seed", 5).code == 0
    pq.write_table(pa.table({"prompt": ["x"] * 2_500, "n": range(2_500)}), "in.parquet")
    assert submit("in.parquet", "--mock", "-o", "c.parquet", "--sample", 9, "--seed", 5).code == 0
    assert submit("in.jsonl", "--mock", "-o", "d.parquet", "--sample", 9, "--seed", 6).code == 0
    assert sampled("a.parquet") == sampled("b.parquet") == sampled("c.parquet")
    assert sampled("a.parquet") != sampled("d.parquet")


def test_more_than_there_are_is_all(submit: Submit) -> None:
    write_rows("in.jsonl", range(5))
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", "--sample", 100).code == 0
    assert sampled() == list(range(5))


def test_sample_and_limit_are_one_choice(submit: Submit) -> None:
    write_rows("in.jsonl", range(5))
    for options in (("--sample", 2, "--limit", 2), ("--sample", 0)):
        assert submit("in.jsonl", "--mock", *options).code == 2
