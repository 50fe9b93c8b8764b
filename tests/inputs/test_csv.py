"""Tables of text from other makers: every cell arrives as it was written, with its line."""

from __future__ import annotations

import csv
import gzip
import io
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.cli.main import run_command
from batchrun.errors import UsageError
from batchrun.inputs import BadRow, Batch, ColumnTypes, InputFile, head, read, resolve, spool
from batchrun.inputs import csv as csv_room
from batchrun.inputs import lines as lines_room
from batchrun.journal.state import StateDir
from batchrun.outputs import NAMES

if TYPE_CHECKING:
    from conftest import StartMock, Submit

# What other makers of tables get wrong, and people write.
CELLS = {
    "custom_id": ["007", "1e3", "", "-0", "NA"],
    "prompt": ['a "q", b', "two\nlines\n\nand more", "back\\slash", " spaces ", "nul, None; ü €"],
    "note": ["", "x", "\r\n", "null", "1.10"],
}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def opened(content: str | bytes, name: str = "a.csv") -> InputFile:
    path = Path(name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    [file] = resolve([name]).files
    return file


def batches(file: InputFile) -> list[Batch]:
    return list(read(file))


def rows(file: InputFile) -> list[tuple[int, Any]]:
    return [pair for batch in read(file) for pair in zip(batch.lines, batch.rows, strict=True)]


def cells(name: str) -> dict[str, list[Any]]:
    """The columns of a file, read whole."""
    [file] = resolve([name]).files
    found = [row for _, row in rows(file)]
    assert not [row for row in found if isinstance(row, BadRow)]
    return {column: [row[column] for row in found] for column in head(file).columns}


def refused(content: str | bytes, name: str = "a.csv") -> UsageError:
    file = opened(content, name)

    def read_twice() -> None:
        head(file)
        rows(file)

    with pytest.raises(UsageError) as error:
        read_twice()
    assert name.partition(".")[0] in error.value.message
    return error.value


# --- other makers ------------------------------------------------------------------------------


def test_what_pandas_writes_is_read_as_it_was() -> None:
    pd: Any = pytest.importorskip("pandas")
    pd.DataFrame(CELLS).to_csv("a.csv", index=False)
    pd.DataFrame(CELLS).to_csv("b.tsv.gz", index=False, sep="\t")
    assert cells("a.csv") == cells("b.tsv.gz") == CELLS


def test_the_index_that_pandas_writes_has_no_name_and_is_refused() -> None:
    pd: Any = pytest.importorskip("pandas")
    error = refused(pd.DataFrame(CELLS).to_csv())
    assert "column 1 has no name" in error.message
    assert "index=False" in error.message


def test_what_polars_writes_is_read_as_it_was() -> None:
    pl: Any = pytest.importorskip("polars")
    pl.DataFrame(CELLS).write_csv("a.csv", include_bom=True)
    pl.DataFrame(CELLS).write_csv("b.tsv", separator="\t", quote_style="always")
    assert cells("a.csv") == cells("b.tsv") == CELLS


def test_what_duckdb_writes_is_read_as_it_was() -> None:
    duckdb: Any = pytest.importorskip("duckdb")
    pq.write_table(pa.table(CELLS), "a.parquet")
    for name, options in (("a.csv", ""), ("b.csv.gz", ", COMPRESSION gzip"), ("c.tsv", "")):
        delimiter = "\t" if name == "c.tsv" else ","
        duckdb.sql(
            f"COPY (FROM 'a.parquet') TO '{name}' (FORMAT csv, HEADER, DELIMITER '{delimiter}'"
            f"{options})"
        )
    assert cells("a.csv") == cells("b.csv.gz") == cells("c.tsv") == CELLS


@pytest.mark.parametrize("mark", ["", "sep=;\r\n"], ids=["plain", "sep"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_excel_writes_is_read_as_it_was(encoding: str, mark: str) -> None:
    text = io.StringIO(newline="")
    text.write(mark)
    writer = csv.writer(text, delimiter=";", lineterminator="\r\n")
    writer.writerows([list(CELLS), *zip(*CELLS.values(), strict=True)])
    file = opened(text.getvalue().encode(encoding))
    assert cells(file.name) == CELLS
    assert rows(file)[0][0] == (3 if mark else 2)


def test_zstandard_is_unpacked() -> None:
    Path("a.tsv.zst").write_bytes(pa.compress(b"prompt\tb\nx\ty\n", codec="zstd", asbytes=True))
    assert cells("a.tsv.zst") == {"prompt": ["x"], "b": ["y"]}


# --- one verdict a record ----------------------------------------------------------------------


def test_a_record_is_numbered_by_the_line_it_begins_on() -> None:
    file = opened('prompt,n\n"a\nb\n",1\n\nragged\n"c",2,3\r\n"d"x,4\ne\rf,5\n"g\r\n",6')
    assert [line for line, _ in rows(file)] == [2, 6, 7, 8, 9, 10]
    verdicts = [row if isinstance(row, dict) else (row.code, row.reason) for _, row in rows(file)]
    assert verdicts == [
        {"prompt": "a\nb\n", "n": "1"},
        ("ragged_row", "1 cell, and the header names 2"),
        ("ragged_row", "3 cells, and the header names 2"),
        ("broken_csv", "broken: text behind a closing quote"),
        ("broken_csv", "broken: a carriage return outside of quotes"),
        {"prompt": "g\r\n", "n": "6"},
    ]


def test_a_comma_in_a_tsv_and_a_tab_in_a_csv_are_text() -> None:
    assert rows(opened("prompt\tb\nx,y\tz\n", "a.tsv")) == [(2, {"prompt": "x,y", "b": "z"})]
    assert rows(opened("prompt,b\nx\ty,z\n")) == [(2, {"prompt": "x\ty", "b": "z"})]


@pytest.mark.parametrize("content", ["prompt,b\n", "prompt,b", '\ufeff"prompt",b\r\n\r\n'])
def test_a_table_without_rows_has_its_columns(content: str) -> None:
    file = opened(content)
    assert head(file) == (["prompt", "b"], [])
    [batch] = batches(file)
    assert len(batch) == 0


texts = st.text(st.sampled_from('",;\n\r\t aé€😀'), max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=20))
def test_whatever_is_written_by_the_rules_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.csv"
    with path.open("w", newline="") as out:
        csv.writer(out, quoting=csv.QUOTE_ALL).writerows([("prompt", "b"), *table])
    [file] = resolve([str(path)]).files
    assert [tuple(row.values()) for _, row in rows(file)] == table


def test_batches_are_bounded_in_rows_and_bytes() -> None:
    many = batches(opened("prompt\n" + "x\n" * 3000))
    assert [len(batch) for batch in many] == [1023, 1024, 953]
    large = batches(opened("prompt\n" + (("y" * (1 << 20)) + "\n") * 12))
    assert max(len(batch) for batch in large) <= 4


# --- what is no table --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b,a\n", 'two columns are named "a"'),
        ("a,,b\n", "column 2 has no name"),
        ("a, ,b\n", "column 2 has no name"),
        ("a,b,\n", "column 3 has no name"),
        ('a,"b\n', "the header is broken"),
        ("a\rb\rc", "a carriage return"),
        ('prompt,b\nx,"y\nz\n', "line 2: a quote is opened here that nothing closes"),
        ('{"prompt":"x"}\n', "looks like JSON lines"),
        ("[\n1,\n2]", "looks like one JSON array"),
        ("<html>\n", "looks like XML or HTML"),
        (b"PK\x03\x04\x14\0rest", "Excel file"),
    ],
)
def test_what_is_no_table_is_refused(content: str | bytes, words: str) -> None:
    assert words in refused(content).message


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("cp1252", "x,Où?\n"), ("utf-16", "x,Où?\n"), ("utf-16-le", "x,y\n"), ("utf-16-be", "x,y\n")],
)
def test_other_encodings_are_refused_with_a_conversion_that_works(encoding: str, text: str) -> None:
    error = refused(("prompt,b\n" + "good,row\n" * 5000 + text).encode(encoding))
    assert "not UTF-8" in error.message or "UTF-16" in error.message
    if encoding == "cp1252":
        assert "line 5002" in error.message
    [command] = error.next_steps
    subprocess.run(["sh", "-c", command], check=True)
    assert cells("a.converted.csv")["b"][-1] == text[2:-1]


def test_the_conversion_of_a_packed_file_unpacks_it() -> None:
    error = refused(gzip.compress("prompt\nOù\n".encode("cp1252")), "a.csv.gz")
    [command] = error.next_steps
    subprocess.run(["sh", "-c", command], check=True)
    assert cells("a.csv") == {"prompt": ["Où"]}


def test_a_quote_that_nothing_closes_is_not_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = csv.field_size_limit(1000)
    try:
        for room in (csv_room, lines_room):
            monkeypatch.setattr(room, "LINE_LIMIT_BYTES", 1000)
        error = refused('prompt\nx\n"open\n' + "line\n" * 5000)
    finally:
        csv.field_size_limit(limit)
    assert "line 3: a quote is opened here" in error.message


# --- with the rest -----------------------------------------------------------------------------


def test_columns_are_text_over_all_files() -> None:
    files = [opened("prompt,n\na,007\n"), opened('{"prompt":"b","n":7}\n', "b.jsonl")]
    types = ColumnTypes(None, NAMES)
    for file in files:
        for batch in read(file):
            types.observe(file, batch)
    carried = types.carried()
    tables = [batch.carried for file in files for batch in read(file, carry=carried)]
    whole = pa.Table.from_batches([table for table in tables if table is not None])
    assert whole.to_pydict() == {"prompt": ["a", "b"], "n": ["007", "7"]}


def test_folders_and_directories_count() -> None:
    Path("data/lang=fr").mkdir(parents=True)
    Path("data/lang=fr/a.csv").write_text("prompt\nx\n")
    Path("data/b.tsv").write_text("prompt\ty\nz\t1\n")
    files = resolve(["data"]).files
    assert [file.name for file in files] == ["data/b.tsv", "data/lang=fr/a.csv"]
    assert rows(files[1]) == [(2, {"prompt": "x", "lang": "fr"})]
    assert head(files[1]) == (["prompt", "lang"], [{"prompt": "x", "lang": "fr"}])


def test_a_pipe_is_read_as_what_it_is_said_to_be() -> None:
    kept = spool(io.BytesIO(gzip.compress(b"prompt\tb\nx\ty\n")), StateDir(Path("state")))
    [file] = resolve(["-"], "tsv", spool=kept).files
    assert rows(file) == [(2, {"prompt": "x", "b": "y"})]


def test_a_run_of_a_table_is_continued_and_asks_only_for_what_is_new(
    submit: Submit, mock: StartMock
) -> None:
    server = mock()
    endpoint = ("--base-url", server.url, "-m", "m", "-o", "out.parquet")
    Path("a.csv").write_text('id,prompt\n01,"a, b"\n02,"c\nd"\n03\n04,e\n')
    assert submit("a.csv", *endpoint, "-n", "1").code in (0, 75)
    assert submit("a.csv", *endpoint).code == 3
    assert len(server.ledger.entries) == 3
    Path("a.csv").write_text('id,prompt\n01,"a, b"\n02,"c\nd"\n03,new\n04,e\n')
    assert submit("a.csv", *endpoint).code == 0
    assert len(server.ledger.entries) == 4
    table = pq.read_table("out.parquet")
    assert table["id"].to_pylist() == ["01", "02", "03", "04"]
    assert table["prompt"].to_pylist() == ["a, b", "c\nd", "new", "e"]
    # The same rows in another dress are the same requests.
    Path("a.tsv").write_text('id\tprompt\n01\t"a, b"\n02\t"c\nd"\n03\tnew\n04\te\n')
    assert submit("a.tsv", *endpoint).code == 0
    assert len(server.ledger.entries) == 4


def test_bad_rows_are_told_with_file_and_line(
    submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.csv").write_text('prompt,n\n"x\ny",1\nz\n')
    assert submit("a.csv", "--mock").code == 3
    table = pq.read_table("a.mock.parquet")
    assert table["error_code"].to_pylist() == [None, "ragged_row"]
    assert table["error_message"].to_pylist()[1].startswith("a.csv:4: 1 cell")
    assert run_command(["validate", "a.csv"]) == 3
    assert "CSV, 2 rows" in capsys.readouterr().err
