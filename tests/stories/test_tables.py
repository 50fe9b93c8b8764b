"""Tables of other libraries in, and a table back."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.errors import UsageError

DAY = datetime.date(2026, 1, 31)
COLUMNS: dict[str, list[Any]] = {
    "prompt": ["One?", "Two? ü", "Three?"],
    "n": [1, None, 3],
    "day": [DAY, DAY, None],
    "tags": [["a"], [], None],
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def by_pandas() -> Any:
    return pytest.importorskip("pandas").DataFrame({**COLUMNS, "n": [1.0, None, 3.0]})


def by_polars() -> Any:
    return pytest.importorskip("polars").DataFrame(COLUMNS)


def by_duckdb() -> Any:
    table = pa.table(COLUMNS)
    return pytest.importorskip("duckdb").from_arrow(table)


def by_views() -> Any:
    return pa.table({"prompt": pa.array(COLUMNS["prompt"], pa.string_view())})


def by_stream() -> Any:
    table = pa.table(COLUMNS)
    batches: Iterator[pa.RecordBatch] = iter(table.to_batches(max_chunksize=1))
    return pa.RecordBatchReader.from_batches(table.schema, batches)


@pytest.mark.parametrize("make", [by_pandas, by_polars, by_duckdb, by_views, by_stream])
def test_a_table_of_another_library_is_asked(make: Callable[[], Any]) -> None:
    summary = batchrun.submit(make(), "out.parquet", mock=True)
    assert summary.exit_code == 0
    table = summary.table()
    assert table["prompt"].to_pylist() == COLUMNS["prompt"]
    assert table["response"].to_pylist() == [f"[synthetic] {p}" for p in COLUMNS["prompt"]]
    if "n" in table.column_names:
        assert table["n"].to_pylist() == COLUMNS["n"]
        assert table.schema.field("day").type == pa.date32() or make is by_pandas
        assert table["day"].to_pylist() == COLUMNS["day"]
    # Nothing is asked again for the same rows.
    again = batchrun.submit(make(), "out.parquet", mock=True)
    assert again.this_run is None


def test_what_parquet_cannot_hold_is_said() -> None:
    table = pa.table({"prompt": ["x"], "odd": pa.array([b"abc"], pa.binary(3)).cast(pa.binary())})
    assert batchrun.submit(table, "out.parquet", mock=True).exit_code == 0
    union = pa.UnionArray.from_dense(
        pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]
    )
    with pytest.raises(UsageError, match="cannot be kept as Parquet"):
        batchrun.submit(pa.table({"prompt": ["x"], "odd": union}), "two.parquet", mock=True)
    assert not Path("two.parquet.batchrun").exists()


def test_an_output_is_read_as_a_table_whatever_its_format() -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "One?", "n": 1},
        {"prompt": "Two?", "n": None},
        {"prompt": ""},
    ]
    batchrun.submit(rows, "out.parquet", mock=True)
    batchrun.submit(rows, "out.jsonl", mock=True)
    parquet, jsonl = batchrun.read("out.parquet"), batchrun.read(Path("out.jsonl"))
    assert parquet.equals(pq.read_table("out.parquet"))
    same = ["n", "prompt", "response", "status", "request_hash", "total_tokens", "error_code"]
    assert jsonl.select(same).to_pylist() == parquet.select(same).to_pylist()
    assert batchrun.read("out.jsonl", columns=["response"]).column_names == ["response"]
    assert batchrun.read("out.parquet", columns=["response"]).num_rows == 3


def test_what_is_no_output_is_no_table() -> None:
    Path("other.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"a": [1]}), "foreign.parquet")
    for name in ("gone.parquet", "foreign.parquet"):
        with pytest.raises(UsageError, match="no output of batchrun"):
            batchrun.read(name)
