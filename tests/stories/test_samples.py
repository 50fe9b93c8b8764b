"""Each row asked several times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import StartMock, Submit

from batchrun.mock.replies import MockReply, MockRequest, completion


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def respond(request: MockRequest) -> MockReply:
    return completion(request, content=f"{request.prompt} #{request.n}")


def read(path: str = "out.parquet") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_each_row_has_its_answers_side_by_side(mock: StartMock, submit: Submit, name: str) -> None:
    server = mock(respond=respond)
    rows = [{"prompt": f"Q{n}", "n": n} for n in range(700)]
    if name == "in.jsonl":
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), name)
    to = (name, "--base-url", server.url, "-m", "m", "-o", "out.parquet")
    assert submit(*to, "--samples", 3).code == 0
    three = read()
    assert [(row["n"], row["sample"], row["custom_id"]) for row in three] == [
        (n, k, str(n + 1)) for n in range(700) for k in range(3)
    ]
    assert all(row["response"].startswith(f"{row['prompt']} #") for row in three)
    assert len({row["response"] for row in three}) == 2_100
    # More ask only for the new ones, fewer keep the others.
    assert submit(*to, "--samples", 5).code == 0
    assert server.ledger.requests == 3_500
    assert {row["response"] for row in read()} > {row["response"] for row in three}
    assert submit(*to).code == 0
    assert "sample" not in read()[0]
    assert submit(*to, "--samples", 5).code == 0
    assert server.ledger.requests == 3_500
    assert len({row["response"] for row in read()}) == 3_500


def test_a_column_of_that_name_gives_way_and_bad_rows_are_repeated(submit: Submit) -> None:
    lines = ['{"prompt": "One?", "sample": "mine", "custom_id": "a"}', "{broken"]
    Path("in.jsonl").write_text("\n".join(lines))
    ended = submit("in.jsonl", "--mock", "-o", "out.parquet", "--samples", 2)
    assert ended.code == 3
    assert "custom_id of an earlier row" not in ended.err
    rows = read()
    assert [(row["input_sample"], row["sample"], row["custom_id"]) for row in rows] == [
        ("mine", 0, "a"),
        ("mine", 1, "a"),
        (None, 0, "2"),
        (None, 1, "2"),
    ]


def test_samples_and_a_sample_of_the_rows_go_together(submit: Submit) -> None:
    Path("in.jsonl").write_text("".join(f'{{"prompt": "Q{n}", "n": {n}}}\n' for n in range(100)))
    options = ("--samples", 2, "--sample", 3)
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", *options).code == 0
    rows = read()
    assert [row["sample"] for row in rows] == [0, 1] * 3
    assert len({row["n"] for row in rows}) == 3
    assert submit("in.jsonl", "--mock", "--samples", 0).code == 2
