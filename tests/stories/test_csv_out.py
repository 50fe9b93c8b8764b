"""Answers as CSV for spreadsheets, and what other readers make of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Submit

from batchrun.cli.main import run_command

ODD = 'a "quoted", cell\r\nwith a line\x00 ü =1+1'


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_answers_are_collected_as_csv(submit: Submit) -> None:
    rows = {
        "prompt": ["One?", ODD, None],
        "tags": [["a", "ü"], [], None],
        "yes": [True, False, None],
    }
    pq.write_table(pa.table(rows), "in.parquet")
    assert submit("in.parquet", "--mock", "-o", "out.parquet").code == 3
    assert run_command(["collect", "out.parquet", "-o", "out.csv"]) == 0
    raw = Path("out.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbfprompt,tags,yes,custom_id,status,response,")
    with open("out.csv", encoding="utf-8-sig", newline="") as file:
        read = list(csv.DictReader(file))
    table = pq.read_table("out.parquet").to_pylist()
    assert list(read[0]) == list(table[0])[:-1]  # all but response_body
    assert [row["prompt"] for row in read] == ["One?", ODD.replace("\0", "\ufffd"), ""]
    assert [row["tags"] for row in read] == ['["a","ü"]', "[]", ""]
    assert [row["yes"] for row in read] == ["true", "false", ""]
    assert [row["status"] for row in read] == ["ok", "ok", "error"]
    assert [row["response"] for row in read[:2]] == [
        (row["response"] or "").replace("\0", "\ufffd") for row in table[:2]
    ]
    assert read[0]["total_tokens"] == str(table[0]["total_tokens"])
    assert read[0]["finished_at"].startswith(str(table[0]["finished_at"].date()))


def test_pandas_polars_and_duckdb_read_it(submit: Submit) -> None:
    duckdb, pandas, polars = map(pytest.importorskip, ("duckdb", "pandas", "polars"))
    lines = [json.dumps({"prompt": f'Q{n}, "{n}"\n', "n": n}) + "\n" for n in range(50)]
    Path("in.jsonl").write_text("".join(lines))
    assert submit("in.jsonl", "--mock", "-o", "out.parquet").code == 0
    assert run_command(["collect", "out.parquet", "-o", "out.csv"]) == 0
    answers = pq.read_table("out.parquet")["response"].to_pylist()
    assert pandas.read_csv("out.csv")["response"].tolist() == answers
    assert polars.read_csv("out.csv")["response"].to_list() == answers
    found = duckdb.sql("SELECT response FROM read_csv('out.csv')").fetchall()
    assert [text for (text,) in found] == answers


def test_a_run_says_how_its_answers_become_csv(
    submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.jsonl").write_text('{"prompt": "One?"}\n')
    ended = submit("in.jsonl", "--mock", "-o", "out.csv")
    assert ended.code == 2
    assert "batchrun collect out.parquet -o out.csv" in ended.err
    assert submit("in.jsonl", "--mock", "-o", "out.parquet").code == 0
    Path("out.csv").write_text("mine")
    assert run_command(["collect", "out.parquet", "-o", "out.csv"]) == 2
    assert Path("out.csv").read_text() == "mine"
    assert "was not written by batchrun" in capsys.readouterr().err
