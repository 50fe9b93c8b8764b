"""Tables of other makers go in, and come out as they were, for the maker to read."""

from __future__ import annotations

import os
from datetime import datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.cli.main import run_command

if TYPE_CHECKING:
    from conftest import Submit

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about each other


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def pandas_frame(pd: Any) -> Any:
    return pd.DataFrame(
        {
            "prompt": ["a", "b", "c"],
            "i": pd.array([1, None, 3], dtype="Int64"),
            "b": pd.array([True, None, False], dtype="boolean"),
            "f": pd.array([1.5, None, 2], dtype="Float64"),
            "s": pd.array(["q", None, "r"], dtype="string"),
            "status": pd.array([1, None, 2], dtype="Int8"),
            "category": pd.Categorical(["x", "y", "x"], categories=["y", "x", "z"], ordered=True),
            "at": pd.date_range("2020-01-01", periods=3, tz="Europe/Zurich"),
            "month": pd.period_range("2020-01", periods=3, freq="M"),
        },
        index=pd.Index(["r1", "r2", "r3"], name="key"),
    )


def test_pandas_reads_its_own_types_and_index_back(submit: Submit) -> None:
    pd: Any = pytest.importorskip("pandas")
    frame = pandas_frame(pd)
    frame.to_parquet("in.parquet")
    assert submit("in.parquet", "--mock").code == 0
    expected = frame.rename(columns={"status": "input_status"})
    answers = pd.read_parquet("in.mock.parquet")
    pd.testing.assert_frame_equal(answers[list(expected.columns)], expected)
    assert list(answers["response"]) == [f"[synthetic] {text}" for text in "abc"]
    # Also as far as a run has come, and whatever is left out.
    assert run_command(["collect", "in.mock.parquet", "-o", "copy.parquet"]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet("copy.parquet"), answers)
    few = ("--carry", "status,i", "-o", "few.parquet")
    assert submit("in.parquet", "--mock", *few).code == 0
    few_read = pd.read_parquet("few.parquet")[["input_status", "i"]]
    pd.testing.assert_frame_equal(few_read, expected[["input_status", "i"]].reset_index(drop=True))


def test_pandas_reads_several_tables_as_far_as_they_agree(submit: Submit) -> None:
    pd: Any = pytest.importorskip("pandas")
    frame = pandas_frame(pd).reset_index(drop=True)
    frame.to_parquet("a.parquet")
    frame.assign(i=[1.5, 2.5, 3.5]).to_parquet("b.parquet")
    assert submit("a.parquet", "b.parquet", "--mock", "-o", "out.parquet").code == 0
    answers = pd.read_parquet("out.parquet")
    assert (str(answers["b"].dtype), str(answers["i"].dtype)) == ("boolean", "float64")
    assert list(answers.index) == list(range(6))


@pytest.mark.parametrize("labels", [[0, 1], [("a", "x"), ("a", "y")]])
def test_pandas_labels_that_are_no_texts_do_not_hinder_reading(
    labels: list[Any], submit: Submit
) -> None:
    pd: Any = pytest.importorskip("pandas")
    frame = pd.DataFrame([["p", 1]])
    frame.columns = labels
    frame.to_parquet("in.parquet")
    assert submit("in.parquet", "--mock", "--prompt-column", str(labels[0])).code == 0
    assert str(labels[0]) in pd.read_parquet("in.mock.parquet").columns


def test_polars_reads_its_own_types_back(submit: Submit) -> None:
    pl: Any = pytest.importorskip("polars")
    frame = pl.DataFrame(
        {
            "prompt": ["a", "b"],
            "enum": pl.Series(["x", "y"], dtype=pl.Enum(["y", "x"])),
            "category": pl.Series(["x", "y"], dtype=pl.Categorical),
            "decimal": [Decimal("1.10"), None],
            "list": [[1, 2], None],
            "struct": [{"a": 1, "b": None}, None],
            "at": [datetime(2020, 1, 1), None],
            "time": [time(1, 2), None],
            "bytes": [b"\xff", None],
            "took": [timedelta(seconds=1), None],
            "unsigned": pl.Series([1, 2], dtype=pl.UInt64),
            "nulls": [None, None],
            "array": pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int8, 2)),
        }
    )
    frame.write_parquet("in.parquet")
    assert submit("in.parquet", "--mock").code == 0
    answers = pl.read_parquet("in.mock.parquet").select(frame.columns)
    assert answers.schema == frame.schema
    assert answers.equals(frame)


def test_duckdb_reads_its_own_values_back(submit: Submit) -> None:
    duckdb: Any = pytest.importorskip("duckdb")
    duckdb.sql("""
        COPY (SELECT 'hi' AS prompt, MAP {'k': 1} AS m, {'a': [1, NULL]} AS s, uuid() AS u,
            TIMESTAMPTZ '2020-01-01' AS at, 1.1::DECIMAL(20,3) AS d, DATE '2020-01-01' AS day,
            '\\xFF'::BLOB AS bytes, 12::UTINYINT AS small, '{"a":1}'::JSON AS js)
        TO 'in.parquet'""")
    assert submit("in.parquet", "--mock").code == 0
    [before] = duckdb.sql("SELECT * FROM 'in.parquet'").fetchall()
    [after] = duckdb.sql("SELECT * FROM 'in.mock.parquet'").fetchall()
    assert after[: len(before)] == before


def test_arrow_types_fields_and_notes_come_out_as_they_went_in(submit: Submit) -> None:
    schema = pa.schema([pa.field("n", pa.int8(), metadata={"unit": "kg"})])
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"]).dictionary_encode(),
            "large": pa.array(["x", None], pa.large_string()),
            "view": pa.array(["x", None], pa.string_view()),
            "list": pa.array([[1], None], pa.large_list(pa.int8())),
            "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
            "nested": pa.array([{"a": [{"b": None}]}, None]),
            "fixed": pa.array([b"ab", None], pa.binary(2)),
            "half": pa.array([1.5, None], pa.float16()),
            "wide": pa.array([Decimal("1"), None], pa.decimal256(50, 2)),
            "nanos": pa.array([1, None], pa.timestamp("ns", "+02:00")),
        }
    )
    table = table.append_column(schema.field("n"), pa.array([1, 2], pa.int8()))
    pq.write_table(table.replace_schema_metadata({"mine": "kept"}), "in.parquet")
    before = pq.read_table("in.parquet")
    assert submit("in.parquet", "--mock").code == 0
    after = pq.read_table("in.mock.parquet").select(table.column_names)
    assert after.equals(before)
    assert after.schema.equals(before.schema, check_metadata=True)
    assert pq.read_schema("in.mock.parquet").metadata == {b"mine": b"kept"}
