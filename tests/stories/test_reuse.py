"""Answers of other outputs are not asked for again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import StartMock, Submit


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(name: str, numbers: Iterable[int]) -> str:
    rows = [{"prompt": f"Question {n}?", "n": n} for n in numbers]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_a_table_that_was_split_is_joined_without_a_request(
    mock: StartMock, submit: Submit
) -> None:
    server = mock()
    to = ("--base-url", server.url, "-m", "m")
    assert submit(write_rows("a.jsonl", range(10)), *to, "-o", "a.parquet").code == 0
    assert submit(write_rows("b.jsonl", range(10, 20)), *to, "-o", "b.out.jsonl").code == 0
    before = {name: Path(name).read_bytes() for name in ("a.parquet", "b.out.jsonl")}
    write_rows("all.jsonl", range(22))
    files = ("--reuse", "?.parquet", "--reuse", "b.out.jsonl")
    ended = submit("all.jsonl", *to, "-o", "all.parquet", *files, "--json")
    assert ended.code == 0
    assert "20 answers are reused from other outputs" in ended.err
    assert ended.summary["rows"]["reused"] == 20
    assert server.ledger.requests == 22
    table = pq.read_table("all.parquet")
    assert table["response"].to_pylist() == [f"[synthetic] Question {n}?" for n in range(22)]
    assert {name: Path(name).read_bytes() for name in before} == before


def test_each_answer_goes_to_one_row_and_only_to_an_equal_request(
    mock: StartMock, submit: Submit
) -> None:
    server = mock()
    to = ("--base-url", server.url, "-m", "m")
    assert submit(write_rows("a.jsonl", [1, 1]), *to, "-o", "a.parquet").code == 0
    write_rows("b.jsonl", [1, 1, 1, 2])
    assert submit("b.jsonl", *to, "-o", "b.parquet", "--reuse", "a.parquet").code == 0
    assert server.ledger.requests == 4
    again = ("-o", "c.parquet", "--reuse", "a.parquet", "--temperature", 1)
    assert submit("b.jsonl", *to, *again).code == 0
    assert server.ledger.requests == 8


def test_a_budget_does_not_count_what_another_output_paid(mock: StartMock, submit: Submit) -> None:
    server = mock()
    to = ("--base-url", server.url, "-m", "m", "--max-tokens", 10)
    assert submit(write_rows("a.jsonl", range(50)), *to, "-o", "a.parquet").code == 0
    more = (*to, "-o", "b.parquet", "--reuse", "a.parquet", "--token-budget", 300)
    assert submit(write_rows("b.jsonl", range(52)), *more).code == 0
    table = pq.read_table("b.parquet")
    assert table["attempts"].to_pylist() == [0] * 50 + [1] * 2
    # Nor does it later, when they come from the output itself.
    assert submit(write_rows("b.jsonl", range(53)), *more[:-4], *more[-2:]).code == 0
    assert server.ledger.requests == 53
    assert submit(write_rows("b.jsonl", range(80)), *more).code == 75


def test_what_cannot_be_reused_is_said(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows("in.jsonl", range(2))
    pq.write_table(pa.table({"a": [1]}), "foreign.parquet")
    Path("folder").mkdir()
    assert submit("in.jsonl", "--mock", "-o", "mock.parquet").code == 0
    for name, words in {
        "gone.parquet": "no such file",
        "foreign.parquet": "not an output of batchrun",
        "folder": "not an output of batchrun",
        "mock.parquet": "holds synthetic answers",
        "in.jsonl": "not an output of batchrun",
    }.items():
        to = ("--base-url", server.url, "-m", "m", "-o", "out.parquet")
        ended = submit("in.jsonl", *to, "--reuse", name)
        assert ended.code == 2
        assert words in ended.err
    assert server.ledger.requests == 0
    assert not Path("out.parquet.batchrun").exists()
