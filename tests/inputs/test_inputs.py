"""Which files are read, one verdict for every row, and what of a row is carried."""

from __future__ import annotations

import gzip
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from batchrun.cli.main import run_command
from batchrun.errors import BatchrunError, LocalIOError, StoppedEarly, UsageError
from batchrun.inputs import jsonl as jsonl_room
from batchrun.inputs import lines as lines_room
from batchrun.inputs.carried import Carried
from batchrun.inputs.column_types import ColumnTypes
from batchrun.inputs.files import content_digest, resolve, unchanged
from batchrun.inputs.foreign import is_no_text
from batchrun.inputs.formats import head, read
from batchrun.inputs.lines import _split
from batchrun.inputs.repeated_ids import RepeatedIds
from batchrun.inputs.rows import BadRow, InputFile, Rows
from batchrun.inputs.spool import spool
from batchrun.journal.state import StateDir
from batchrun.outputs import NAMES

SAMPLES = Path(__file__).parents[2] / "sample_inputs"


def jsonl(path: Path, content: bytes | Iterable[Any]) -> Path:
    if not isinstance(content, bytes):
        content = b"".join(json.dumps(row).encode() + b"\n" for row in content)
    path.write_bytes(content)
    return path


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return packed


def opened(path: Path) -> InputFile:
    [file] = resolve([str(path)]).files
    return file


def verdicts(path: Path) -> list[tuple[int, Any]]:
    """(line, row) or (line, reason) of every row."""
    return [
        (line, row.reason if isinstance(row, BadRow) else row)
        for batch in read(opened(path))
        for line, row in zip(batch.lines, batch.rows, strict=True)
    ]


def carried(*paths: Path, carry: tuple[str, ...] | None = None) -> tuple[Carried, pa.Table]:
    """Both passes over several files."""
    files = resolve([str(path) for path in paths]).files
    types = ColumnTypes(carry, NAMES)
    for file in files:
        for batch in read(file):
            types.observe(file, batch)
    found = types.carried()
    batches = [batch.carried for file in files for batch in read(file, columns=(), carry=found)]
    assert all(batch is not None for batch in batches)
    return found, pa.Table.from_batches(batches, schema=found.schema)


def one_line(error: pytest.ExceptionInfo[BatchrunError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


# --- which files -------------------------------------------------------------------------------


def test_formats_follow_the_suffix(tmp_path: Path) -> None:
    expected = {
        "a.jsonl": ("jsonl", ""),
        "b.ndjson": ("jsonl", ""),
        "c.jsonl.gz": ("jsonl", "gz"),
        "d.ndjson.zst": ("jsonl", "zst"),
        "e.parquet": ("parquet", ""),
        "F.JSONL": ("jsonl", ""),
    }
    for name in expected:
        (tmp_path / name).write_bytes(b"{}\n")
    found = resolve([str(tmp_path / name) for name in expected]).files
    assert {f.path.name: (f.format, f.compression) for f in found} == expected


def test_an_unknown_suffix_needs_the_format(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.txt", [{"prompt": "x"}])
    with pytest.raises(UsageError) as error:
        resolve([str(path)])
    one_line(error, "rows.txt", "--input-format")
    assert resolve([str(path)], "jsonl").files[0].format == "jsonl"


@pytest.mark.parametrize(
    ("name", "words"),
    [("gone.jsonl", "no such file"), ("gone-*.jsonl", "no file matches"), ("", "nothing")],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words if name else "no .jsonl"):
        resolve([str(tmp_path / name)])


def test_a_pipe_cannot_be_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(UsageError, match="not a regular file"):
        resolve([str(tmp_path / "p.jsonl")])


def test_directories_are_read_sorted_and_say_what_they_skip(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", [{"prompt": "x"}])
    (tmp_path / "a").mkdir()
    parquet(tmp_path / "a" / "z.parquet", {"prompt": ["x"]})
    jsonl(tmp_path / ".hidden.jsonl", [{}])
    jsonl(tmp_path / "notes.txt", b"no rows")
    (tmp_path / "b.results.parquet.batchrun").mkdir()
    jsonl(tmp_path / "b.results.parquet.batchrun" / "stdin.jsonl", [{}])
    marked = pa.table({"prompt": ["x"]}).replace_schema_metadata({"batchrun": "{}"})
    pq.write_table(marked, tmp_path / "b.results.parquet")
    jsonl(tmp_path / "c.jsonl", [{"id": "1", "batchrun": {"request_hash": "1:0"}}])
    jsonl(tmp_path / "out.jsonl", [{"prompt": "x"}])

    found = resolve([str(tmp_path)], output=tmp_path / "out.jsonl")
    assert [f.path.name for f in found.files] == ["z.parquet", "b.jsonl"]
    skipped = "\n".join(found.skipped)
    for name, why in {
        ".hidden.jsonl": "hidden",
        "notes.txt": "not JSONL, CSV, TSV or Parquet",
        "b.results.parquet.batchrun": "the state of a run",
        "b.results.parquet": "made by batchrun",
        "c.jsonl": "made by batchrun",
        "out.jsonl": "the output of this run",
    }.items():
        assert f"{name} ({why})" in skipped

    globbed = resolve([str(tmp_path / "**")], output=tmp_path / "out.jsonl")
    assert [f.path.name for f in globbed.files] == ["z.parquet", "b.jsonl"]


def test_a_linked_directory_is_not_followed(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{}])
    (tmp_path / "loop").symlink_to(tmp_path)
    found = resolve([str(tmp_path)])
    assert len(found.files) == 1
    assert found.skipped == [f"{tmp_path / 'loop'} (a linked directory)"]


@pytest.mark.skipif(sys.platform == "darwin", reason="there, file names are UTF-8")
def test_a_file_name_that_utf8_cannot_hold_can_still_be_shown(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    file = opened(jsonl(path, [{"prompt": "x"}]))
    assert file.name.encode().endswith("/\ufffd.jsonl".encode())
    assert [batch.rows for batch in read(file)] == [[{"prompt": "x"}]]


def test_an_output_given_by_name_is_read(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", [{"batchrun": {"request_hash": "1:0"}}])
    assert resolve([str(path)]).files


def test_a_name_with_glob_characters_is_a_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "part[1].jsonl", [{}])
    assert [f.path for f in resolve([str(path)]).files] == [path]


def test_the_output_of_this_run_is_no_input(tmp_path: Path) -> None:
    out = jsonl(tmp_path / "out.jsonl", [{}])
    other = jsonl(tmp_path / "in.jsonl", [{}])
    with pytest.raises(UsageError, match="output of this run"):
        resolve([str(out)], output=out)
    # A shell expands *.jsonl before us: the second run of a command must not fail for it.
    assert [f.path for f in resolve([str(out), str(other)], output=out).files] == [other]


def test_standard_input_is_read_from_its_spool(tmp_path: Path) -> None:
    for content in (b'{"prompt":"x"}\n', gzip.compress(b'{"prompt":"x"}\n')):
        kept = spool(io.BytesIO(content), StateDir(tmp_path / "state"))
        [file] = resolve(["-"], spool=kept).files
        assert file.name == "stdin"
        assert [batch.rows for batch in read(file)] == [[{"prompt": "x"}]]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["stdin.jsonl"]


def test_rows_and_tables_in_memory_are_spooled(tmp_path: Path) -> None:
    rows = [{"prompt": "\ud800", "when": datetime(2026, 11, 1), "n": 2**80, "x": float("nan")}]
    [file] = resolve(["-"], spool=spool(rows, StateDir(tmp_path))).files
    [row] = next(read(file)).rows
    assert isinstance(row, dict)
    assert row["prompt"] == "\ud800"
    assert row["when"] == "2026-11-01T00:00:00"
    assert row["n"] == 2**80
    table = pa.table({"prompt": ["x"]})
    [file] = resolve(["-"], spool=spool(table, StateDir(tmp_path))).files
    assert (file.format, next(read(file)).rows) == ("parquet", [{"prompt": "x"}])


@pytest.mark.parametrize("rows", [["text"], [{"x": object()}]])
def test_what_is_no_row_is_refused_and_nothing_is_left(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(UsageError, match="row 1"):
        spool(rows, StateDir(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_spool_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    jsonl(tmp_path / "file", b"")
    with pytest.raises(LocalIOError) as error:
        spool(io.BytesIO(b""), StateDir(tmp_path / "file"))
    one_line(error, "stdin.jsonl")


def test_a_change_of_the_file_is_seen(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}])
    file = opened(path)
    digest = content_digest([file])
    assert unchanged(file)
    jsonl(path, [{"prompt": "longer"}])
    assert not unchanged(file)
    assert content_digest([opened(path)]) != digest
    path.unlink()
    assert not unchanged(file)


# --- JSON lines --------------------------------------------------------------------------------


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    text = '\ufeff{"a":"\u2028\u0085"}\r\n\r\n  \n{"a":"\\r"}\n{"a":2,"a":3}'
    path = jsonl(tmp_path / "a.jsonl", text.encode())
    assert verdicts(path) == [(1, {"a": "\u2028\u0085"}), (4, {"a": "\r"}), (5, {"a": 3})]


def test_a_lone_carriage_return_ends_no_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", b'{"a":1,\r"b":"x"}\r\r\n{"a":2}\r{"a":3}\n\r\n{"a":4}\r')
    assert verdicts(path) == [
        (1, {"a": 1, "b": "x"}),
        (2, "broken JSON at column 9"),
        (4, {"a": 4}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "x', "broken JSON at column 12"),
        (b'{"prompt"', "broken JSON at column 10"),
        (b"{'a':1}", "broken JSON at column 2"),
        (b"plain text", "broken JSON at column 1"),
        (b'{"a":1}{"a":2}', "broken JSON at column 8"),
        (b"[1]", "a list, not an object"),
        (b"null", "null, not an object"),
        (b'"x"', "text, not an object"),
        (b"17", "a number, not an object"),
        (b"true", "true or false, not an object"),
        (b'{"a":"\xff"}', "not UTF-8 at byte 7"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8 at byte 7"),
        (b"\0\0\0\0", "a NUL byte at column 1"),
        (b'{"a":"x\0y"}', "a NUL byte at column 8"),
        (b"[" * 100_000, "nested more than 400 levels deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested more than 400 levels deep"),
        (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "nested more than 400 levels deep"),
        (b'{"a":' + b"9" * 5_000 + b"}", "a number of too many digits"),
        (b'{"a":1e99999999999999999999}', "a number of too many digits"),
    ],
)
def test_a_bad_line_has_its_reason_and_stops_nothing(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", b'{"a":0}\n' + line + b'\n{"a":9}\n')
    assert verdicts(path) == [(1, {"a": 0}), (2, reason), (3, {"a": 9})]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b'{"a":1e400}', Decimal("1e400")),
        (b'{"a":"\\ud800"}', "\ud800"),
        (b'{"a":123456789012345678901234567890}', 123456789012345678901234567890),
        (b'{"a":"\\u0000"}', "\0"),
        (b'{"a":-Infinity}', float("-inf")),
        (b'{"a":"' + b"[" * 1000 + b'"}', "[" * 1000),
        (b'{"a":[' + b"[]," * 1000 + b"[]]}", [[]] * 1001),
    ],
)
def test_odd_lines_that_can_be_read_are_read(tmp_path: Path, line: bytes, value: Any) -> None:
    assert verdicts(jsonl(tmp_path / "a.jsonl", line)) == [(1, {"a": value})]


def test_a_line_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    text = "é" * 5_000_000
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": text}, {"prompt": "y"}])
    assert [row["prompt"] for _, row in verdicts(path)] == ["x", text, "y"]


def test_of_an_over_long_line_no_more_is_kept_than_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines_room, "LINE_LIMIT_BYTES", 20)
    pieces = [b"short\n", *[b"a" * 10] * 5, b"aaa\nb", b"c"]
    assert list(_split(pieces)) == [[b"short"], [b"a" * 20 + b"aaa"], [b"bc"]]


def test_a_line_without_end_is_skipped_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (lines_room, jsonl_room):
        monkeypatch.setattr(room, "LINE_LIMIT_BYTES", 1 << 20)
    long = b'{"a":"' + b"x" * (3 << 20) + b'"}'
    path = jsonl(tmp_path / "a.jsonl", b'{"a":1}\n' + long + b'\n{"a":2}\n' + long)
    assert verdicts(path) == [
        (1, {"a": 1}),
        (2, "longer than 1 MB"),
        (3, {"a": 2}),
        (4, "longer than 1 MB"),
    ]


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    many = jsonl(tmp_path / "many.jsonl", [{"i": i} for i in range(2500)])
    batches = list(read(opened(many)))
    assert [len(batch) for batch in batches] == [1024, 1024, 452]
    assert [line for batch in batches for line in batch.lines] == list(range(1, 2501))
    big = jsonl(tmp_path / "big.jsonl", [{"i": "x" * 3_000_000} for _ in range(4)])
    assert [len(batch) for batch in read(opened(big))] == [2, 2]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_one_empty_batch(tmp_path: Path, content: bytes) -> None:
    path = jsonl(tmp_path / "a.jsonl", content)
    assert [len(batch) for batch in read(opened(path))] == [0]
    assert head(opened(path)) == ([], [])
    found, table = carried(path)
    assert (found.schema.names, table.num_rows) == ([], 0)


def test_the_head_is_the_first_good_rows(tmp_path: Path) -> None:
    rows = [b"broken", b'{"a":1}', b"[]", b'{"b":1,"a":2}', b'{"c":1}']
    path = jsonl(tmp_path / "a.jsonl", b"\n".join(rows))
    assert head(opened(path), 2) == (["a", "b"], [{"a": 1}, {"b": 1, "a": 2}])


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
def test_compressed_lines_are_read_over_several_members(tmp_path: Path, pack: Any) -> None:
    rows = [{"i": i, "text": "abc" * i} for i in range(3000)]
    half = [b"".join(json.dumps(r).encode() + b"\n" for r in part) for part in (rows[:9], rows[9:])]
    suffix = "gz" if pack is gzip.compress else "zst"
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(pack(half[0]) + pack(half[1]))
    assert [row for _, row in verdicts(path)] == rows


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "one byte short", "empty", "flipped"])
def test_damaged_compressed_files_are_one_line(tmp_path: Path, pack: Any, damage: str) -> None:
    content = b"".join(b'{"i":"%x"}\n' % (i * i * 7919) for i in range(5000))
    packed = bytearray(pack(content))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "one byte short":
        packed = packed[:-1]
    elif damage == "empty":
        packed = bytearray()
    else:
        packed[20:60] = b"\xff" * 40
    path = tmp_path / f"a.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(packed)
    with pytest.raises(LocalIOError) as error:
        verdicts(path)
    one_line(error, path.name, "copy or write it again")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (gzip.compress(b"{}"), "gzip"),
        (zstd(b"{}"), "zstd"),
        (b"PAR1....", "Parquet"),
        ('{"prompt":"x"}\n'.encode("utf-16"), "UTF-16"),
        ('{"prompt":"x"}\n'.encode("utf-16-le"), "UTF-16"),
        (b"PK\x03\x04....", "Excel"),
        (b"BZh9....", "bzip2"),
    ],
    ids=["gzip", "zstd", "parquet", "utf-16", "utf-16-le", "zip", "bzip2"],
)
def test_another_format_under_the_name_of_jsonl_is_one_line(
    tmp_path: Path, content: bytes, word: str
) -> None:
    with pytest.raises(UsageError) as error:
        head(opened(jsonl(tmp_path / "a.jsonl", content)))
    one_line(error, "a.jsonl", "not JSON lines", word)


@pytest.mark.parametrize("line", [b"ORCA", b"BZh", b"{\0", b"PK\x03\x04"])
def test_a_first_line_that_begins_like_another_format_is_a_bad_line(
    tmp_path: Path, line: bytes
) -> None:
    path = jsonl(tmp_path / "a.jsonl", line + b'\n{"prompt":"x"}\n')
    assert head(opened(path)) == (["prompt"], [{"prompt": "x"}])
    assert verdicts(path)[1] == (2, {"prompt": "x"})


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_lines_that_are_not_packed_as_their_name_says_are_renamed(
    tmp_path: Path, suffix: str
) -> None:
    path = jsonl(tmp_path / f"a.jsonl.{suffix}", [{"prompt": "x"}])
    with pytest.raises(UsageError) as error:
        verdicts(path)
    one_line(error, path.name, "looks like JSON lines")
    assert error.value.next_steps == (f"mv {path} {tmp_path / 'a.jsonl'}",)


CONVERTED: dict[str, tuple[str | bytes, str, list[Any]]] = {
    "csv": ('id,prompt\n1,Why?\n2,"a, b\nc"\n', 'CSV (2 columns, "id" first)', []),
    "excel": ("\ufeffid;prompt\r\n1;Warum?\r\n2;Wie, so?\r\n", "CSV (2 columns", []),
    "latin": ("id,prompt\n1,Où?\n".encode("cp1252"), "CSV (2 columns", []),
    "tsv": ("id\tprompt\n1\ta,b\n", "tab-separated text (2 columns", []),
    "one-column": ("prompt\nWhy?\nHow, then?\n", 'CSV (1 column, "prompt" first)', []),
    "array": ('[{"prompt": "x"}, {"prompt": "y"}]', "one JSON array", ["x", "y"]),
    "array-of-lines": ('[\n{"prompt": "x"},\n{"prompt": "y"}\n]\n', "one JSON array", ["x", "y"]),
    "array-inside": ('[{"prompt": "x"},\n{"prompt": "y"}]', "one JSON array", ["x", "y"]),
    "pretty": (
        json.dumps({"prompt": "x }\n{", "a": {"b": {}}}, indent=2)
        + "\n"
        + json.dumps({"prompt": "y"}, indent=2),
        "JSON spread over several lines",
        ["x }\n{", "y"],
    ),
    "repr": ("{'prompt': \"it's\"}\n{'prompt': None}\n", "Python's own notation", ["it's", None]),
    "text": ("Why is the sky blue?\nHow so?\n", "plain text", ["Why is the sky blue?", "How so?"]),
    "utf-16": ('{"prompt":"x"}\n'.encode("utf-16"), "UTF-16 text", ["x"]),
}


# Of these the name is all that is wrong.
READ_AS_THEY_ARE = {"csv": ".csv", "excel": ".csv", "one-column": ".csv", "tsv": ".tsv"}


@pytest.mark.parametrize("case", CONVERTED)
def test_what_is_no_json_lines_is_refused_with_a_command_that_helps(
    tmp_path: Path, case: str
) -> None:
    content, seems, prompts = CONVERTED[case]
    path = tmp_path / "it's a file.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError) as error:
        head(opened(path))
    one_line(error, path.name, "is not JSON lines", seems)
    [command] = error.value.next_steps
    subprocess.run(["sh", "-c", command], check=True)
    target = Path(shlex.split(command)[-1])
    [row, *more] = [row for _, row in verdicts(target)]
    assert target.suffix == READ_AS_THEY_ARE.get(case, ".jsonl")
    if prompts:
        assert [each["prompt"] for each in (row, *more)] == prompts
    else:
        assert "prompt" in row


@pytest.mark.parametrize(
    "content", [b"[1]\n[2]\n", b'"x"\n', b"17\n18\n", b'{"prompt": "x', b"\0\0\0\0"]
)
def test_a_file_without_an_object_is_refused_by_its_first_line(
    tmp_path: Path, content: bytes
) -> None:
    with pytest.raises(UsageError) as error:
        head(opened(jsonl(tmp_path / "a.jsonl", content)))
    one_line(error, "a.jsonl is not JSON lines", "no line of it is a JSON object (line 1:")


def test_a_pipe_of_a_table_of_text_is_told_the_option(tmp_path: Path) -> None:
    kept = spool(io.BytesIO(b"id,prompt\n1,x\n"), StateDir(tmp_path))
    [file] = resolve(["-"], spool=kept).files
    with pytest.raises(UsageError, match=r"^stdin is not JSON lines: it looks like CSV") as error:
        head(file)
    assert error.value.next_steps == ("--input-format csv",)


def test_a_pipe_of_another_format_is_converted_on_its_way(tmp_path: Path) -> None:
    kept = spool(io.BytesIO(b'[{"prompt":"x"}]'), StateDir(tmp_path))
    [file] = resolve(["-"], spool=kept).files
    with pytest.raises(UsageError, match=r"^stdin is not JSON lines: it looks like one") as error:
        head(file)
    [step] = error.value.next_steps
    assert step.startswith("... | python3 -c")
    assert step.endswith("| batchrun submit - ...")


def test_one_good_line_far_behind_makes_a_file_of_error_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", b"broken\n" * 3000 + b'{"prompt":"x"}\n')
    assert head(opened(path)) == (["prompt"], [{"prompt": "x"}])


@pytest.mark.parametrize("name", ["a.dat", "a.json", "a.txt"])
def test_what_is_in_a_file_of_another_suffix_says_what_to_do(tmp_path: Path, name: str) -> None:
    path = jsonl(tmp_path / name, b'[{"prompt":"x"}]')
    with pytest.raises(UsageError) as error:
        resolve([str(path)])
    one_line(error, name, "one JSON array")
    assert error.value.next_steps[0].endswith(f"< {path} > {tmp_path / 'a.jsonl'}")


@pytest.mark.parametrize("name", ["a.dat", "a.json", "a.txt"])
def test_a_file_of_another_suffix_that_can_be_read_needs_its_format(
    tmp_path: Path, name: str
) -> None:
    path = jsonl(tmp_path / name, b"id,prompt\n1,x\n")
    with pytest.raises(UsageError) as error:
        resolve([str(path)])
    one_line(error, name, "--input-format")
    [file] = resolve([str(path)], "csv").files
    assert head(file).rows == [{"id": "1", "prompt": "x"}]


# --- tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda whole: b"", "empty"),
        (lambda whole: b"PAR1", "Parquet"),
        (lambda whole: whole[:-1], "cut short"),
        (lambda whole: whole[: len(whole) // 2], "cut short"),
        (lambda whole: whole[:-12] + b"\xff" * 4 + whole[-8:], "damaged"),
        (lambda whole: whole[:8] + b"\xff" * 60 + whole[68:], "damaged"),
    ],
    ids=["empty", "magic-only", "one-short", "half", "footer", "pages"],
)
def test_a_broken_parquet_file_is_one_line(tmp_path: Path, make: Any, word: str) -> None:
    whole = parquet(tmp_path / "whole.parquet", {"prompt": [f"p{i}" for i in range(500)]})
    path = tmp_path / "a.parquet"
    path.write_bytes(make(whole.read_bytes()))
    with pytest.raises(LocalIOError) as error:
        verdicts(path)
    one_line(error, "a.parquet", word)


def test_lines_under_the_name_of_parquet_are_renamed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.parquet", [{"prompt": "x"}])
    with pytest.raises(UsageError) as error:
        verdicts(path)
    one_line(error, "a.parquet is not Parquet", "JSON lines")
    assert error.value.next_steps == (f"mv {path} {tmp_path / 'a.jsonl'}",)


def test_every_cut_of_a_parquet_file_is_one_line(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "w.parquet", {"prompt": ["x", "y"], "n": [1, 2]}).read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "a.parquet").write_bytes(whole[:size])
        with pytest.raises(LocalIOError) as error:
            verdicts(tmp_path / "a.parquet")
        one_line(error, "a.parquet")


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        path = jsonl(tmp_path / name, [{}])
        file = opened(path)
        path.unlink()
        with pytest.raises(LocalIOError) as error:
            list(read(file))
        one_line(error, name, "No such file")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["id", "id"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match='two columns are named "id"'):
        head(opened(tmp_path / "a.parquet"))


def test_tables_without_rows_or_columns(tmp_path: Path) -> None:
    no_rows = parquet(tmp_path / "r.parquet", {"prompt": pa.array([], pa.string())})
    assert head(opened(no_rows)) == (["prompt"], [])
    assert [len(batch) for batch in read(opened(no_rows))] == [0]
    assert carried(no_rows)[1].schema == pa.schema({"prompt": pa.string()})
    no_columns = parquet(tmp_path / "c.parquet", {})
    assert head(opened(no_columns)) == ([], [])
    assert verdicts(no_columns) == []


def test_a_null_in_a_table_is_an_absent_member_at_every_depth(tmp_path: Path) -> None:
    kind = pa.list_(
        pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    )
    messages = [{"role": "user", "content": "x", "name": None}]
    path = parquet(
        tmp_path / "a.parquet",
        {
            "messages": pa.array([messages, None], kind),
            "stop": pa.array([["a", None], None], pa.list_(pa.string())),
            "body": [{"a": {"b": None, "c": 1}}, {"a": None}],
            "seed": [1, None],
        },
    )
    assert [row for _, row in verdicts(path)] == [
        {
            "messages": [{"role": "user", "content": "x"}],
            "stop": ["a", None],
            "body": {"a": {"c": 1}},
            "seed": 1,
        },
        {"body": {}},
    ]


def test_table_values_are_those_of_json(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        {
            "text": pa.array(["é"]).dictionary_encode(),
            "large": pa.array(["x"], pa.large_string()),
            "bytes": pa.array([b"abc"]),
            "not_text": pa.array([b"\xff"]),
            "price": pa.array([Decimal("0.70")]),
            "when_ns": pa.array([1], pa.timestamp("ns", "UTC")),
            "nested_ns": pa.array([[{"t": 1}]], pa.list_(pa.struct([("t", pa.timestamp("ns"))]))),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "half": pa.array([1.5], pa.float32()),
            "wide": pa.array([2**64 - 1], pa.uint64()),
        },
    )
    [(_, row)] = verdicts(path)
    assert row == {
        "text": "é",
        "large": "x",
        "bytes": "abc",
        "not_text": b"\xff",
        "price": Decimal("0.70"),
        "when_ns": "1970-01-01 00:00:00.000000001Z",
        "nested_ns": [{"t": "1970-01-01 00:00:00.000000001"}],
        "map": {"k": 1},
        "half": 1.5,
        "wide": 2**64 - 1,
    }


def test_a_table_reads_the_columns_asked_for_and_numbers_its_rows(tmp_path: Path) -> None:
    columns = {"id": range(3000), "prompt": [f"p{i}" for i in range(3000)]}
    path = parquet(tmp_path / "a.parquet", columns, row_group_size=700)
    batches = list(read(opened(path), columns=("prompt", "elsewhere")))
    rows = [row for batch in batches for row in batch.rows]
    assert rows == [{"prompt": f"p{i}"} for i in range(3000)]
    assert [line for batch in batches for line in batch.lines] == list(range(1, 3001))
    assert max(len(batch) for batch in batches) <= 1024
    assert sum(len(batch.rows) for batch in read(opened(path), columns=())) == 3000


def test_batches_of_wide_rows_are_small(tmp_path: Path) -> None:
    texts = [os.urandom(150_000).hex() for _ in range(40)]
    path = parquet(tmp_path / "a.parquet", {"prompt": texts}, use_dictionary=False)
    sizes = [len(batch) for batch in read(opened(path))]
    assert sum(sizes) == 40
    assert max(sizes) <= 14


# --- carried columns ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        pytest.param([None, None], "string", [None, None], id="all-null"),
        pytest.param([True, None], "bool", [True, None], id="bool"),
        pytest.param([1, -(2**63), 2**63 - 1], "int64", [1, -(2**63), 2**63 - 1], id="int64"),
        pytest.param([1, 2.5], "double", [1.0, 2.5], id="int-and-float"),
        pytest.param([2**53, 2.5], "double", [2.0**53, 2.5], id="exact"),
        pytest.param([2**53 + 1, 2.5], "string", ["9007199254740993", "2.5"], id="loses-digits"),
        pytest.param([2**63], "string", ["9223372036854775808"], id="over-large"),
        pytest.param(["x", None], "string", ["x", None], id="string"),
        pytest.param(["x", 1, None], "string", ["x", "1", None], id="mixed"),
        pytest.param([True, 1], "string", ["true", "1"], id="bool-and-int"),
        pytest.param([[1, "é"], {"a": None}], "string", ['[1,"é"]', '{"a":null}'], id="nested"),
        pytest.param(["a\ud800b", "\U0001f600"], "string", ["a\ufffdb", "\U0001f600"], id="lone"),
        pytest.param([["\ud800"]], "string", ['["\ufffd"]'], id="lone-nested"),
        pytest.param(["\0"], "string", ["\0"], id="nul"),
    ],
)
def test_a_jsonl_column_has_one_type(
    tmp_path: Path, values: list[Any], kind: str, expected: list[Any]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"v": value} for value in values])
    for carry in (None, ("v",)):
        found, table = carried(path, carry=carry)
        assert str(found.schema.field("v").type) == kind
        assert table["v"].to_pylist() == expected
        assert found.surrogates == str(expected).count("\ufffd")


def test_a_number_beyond_a_double_is_carried_as_written(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", b'{"v":1e400}\n{"v":[1E+400]}\n{"v":1}\n')
    assert carried(path)[1]["v"].to_pylist() == ["1E+400", "[1E+400]", "1"]


def test_bad_and_missing_values_are_null(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", b'{"a":1}\nbroken\n{"b":"x"}\n')
    _, table = carried(path)
    assert table.to_pylist() == [
        {"a": 1, "b": None},
        {"a": None, "b": None},
        {"a": None, "b": "x"},
    ]


def test_names_of_answer_columns_are_renamed_case_aside(tmp_path: Path) -> None:
    row = {"custom_id": "c", "Status": "new", "response": "r", "input_response": "i", "id": 1}
    found, table = carried(jsonl(tmp_path / "a.jsonl", [row]))
    assert found.renamed == [("Status", "input_Status"), ("response", "input_input_response")]
    assert table.to_pylist() == [
        {"input_Status": "new", "input_input_response": "r", "input_response": "i", "id": 1}
    ]


def test_column_names_that_utf8_cannot_hold_stay_apart(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", b'{"\\ud800": 1, "\\udfff": 2, "\\ufffd": 3, "": 4}')
    _, table = carried(path)
    assert len(set(table.column_names)) == 4
    assert sorted(table.to_pylist()[0].values()) == [1, 2, 3, 4]
    pq.write_table(table, tmp_path / "b.parquet")


def test_carry_chooses_columns_in_its_order(tmp_path: Path) -> None:
    for path in (
        jsonl(tmp_path / "a.jsonl", [{"a": 1, "b": 2, "c": 3}]),
        parquet(tmp_path / "a.parquet", {"a": [1], "b": [2], "c": [3]}),
    ):
        assert carried(path, carry=("c", "a"))[1].to_pylist() == [{"c": 3, "a": 1}]
        assert carried(path, carry=())[0].schema.names == []
        with pytest.raises(UsageError, match="--carry d"):
            carried(path, carry=("d",))


def test_a_column_that_appears_late_is_carried(tmp_path: Path) -> None:
    rows: list[Any] = [{"a": 1}] * 3000 + [{"a": 1, "late": "x"}]
    _, table = carried(jsonl(tmp_path / "a.jsonl", rows))
    assert table["late"].null_count == 3000
    assert table["late"][3000].as_py() == "x"


def test_keys_that_are_data_do_not_become_a_table(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{f"key{i}": i} for i in range(6000)])
    with pytest.raises(UsageError) as error:
        carried(path)
    one_line(error, "--carry")
    assert carried(path, carry=("key1",))[0].schema.names == ["key1"]


def test_a_value_that_does_not_fit_means_the_file_was_changed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    found, _ = carried(path)
    with pytest.raises(StoppedEarly, match='"a"'):
        found.from_rows([{"a": "text"}])


TABLE_TYPES = {
    "ts": pa.array([1, None], pa.timestamp("us", "Europe/Paris")),
    "date": pa.array([1, None], pa.date32()),
    "decimal": pa.array([Decimal("1.50"), None]),
    "list": pa.array([[1, None], None], pa.list_(pa.int16())),
    "struct": pa.array([{"a": 1, "b": None}, None]),
    "dict": pa.array(["x", None]).dictionary_encode(),
    "large": pa.array(["x", None], pa.large_string()),
    "binary": pa.array([b"\xff", None]),
    "null": pa.nulls(2),
    "uint64": pa.array([2**64 - 1, None], pa.uint64()),
    "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    "float16": pa.array([1.5, None], pa.float16()),
}


def test_table_columns_are_carried_unchanged(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", dict(TABLE_TYPES))
    original = pq.read_table(path)
    found, table = carried(path)
    assert found.schema.types == original.schema.types
    assert table.combine_chunks() == original.replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet").equals(original)


@pytest.mark.parametrize(
    ("first", "second", "kind", "expected"),
    [
        pytest.param(pa.array([1], pa.int8()), pa.array([2]), "int64", [1, 2], id="wider"),
        pytest.param(
            pa.array([1], pa.uint32()), pa.array([-2], pa.int32()), "int64", [1, -2], id="signs"
        ),
        pytest.param(
            pa.array([2**64 - 1], pa.uint64()),
            pa.array([-1]),
            "string",
            [str(2**64 - 1), "-1"],
            id="uint64",
        ),
        pytest.param(pa.array([1]), pa.array([2.5]), "double", [1.0, 2.5], id="int-double"),
        pytest.param(
            pa.array([2**60]), pa.array([2.5]), "string", [str(2**60), "2.5"], id="too-wide"
        ),
        pytest.param(
            pa.array(["x"]).dictionary_encode(), pa.array(["y"]), "string", ["x", "y"], id="dict"
        ),
        pytest.param(
            pa.array(["x"]), pa.array(["y"], pa.large_string()), "large_string", ["x", "y"], id="L"
        ),
        pytest.param(pa.nulls(1), pa.array([2]), "int64", [None, 2], id="null"),
        pytest.param(pa.array([[1]]), pa.array(["y"]), "string", ["[1]", "y"], id="nested"),
        pytest.param(
            pa.array([1], pa.date32()),
            pa.array([{"a": None, "b": 1}]),
            "string",
            ["1970-01-02", '{"b":1}'],
            id="unlike",
        ),
        pytest.param(None, pa.array([2]), "int64", [None, 2], id="missing"),
    ],
)
def test_columns_of_several_tables_become_one(
    tmp_path: Path, first: pa.Array | None, second: pa.Array, kind: str, expected: list[Any]
) -> None:
    a = parquet(tmp_path / "a.parquet", {"k": [0]} | ({} if first is None else {"v": first}))
    b = parquet(tmp_path / "b.parquet", {"v": second, "k": [1]})
    found, table = carried(a, b)
    assert found.schema.names[0] == "k"
    assert str(found.schema.field("v").type) == kind
    assert table["v"].to_pylist() == expected
    assert table["k"].to_pylist() == [0, 1]


def test_lines_and_tables_share_columns(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", [{"id": 1, "score": 2, "tag": None}])
    b = parquet(tmp_path / "b.parquet", {"id": pa.array([7], pa.int16()), "score": [0.5]})
    _, table = carried(a, b)
    assert table.to_pylist() == [
        {"id": 1, "score": 2.0, "tag": None},
        {"id": 7, "score": 0.5, "tag": None},
    ]
    assert [str(t) for t in table.schema.types] == ["int64", "double", "string"]


def test_a_number_that_a_double_would_round_is_text_over_all_files(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", [{"id": 2**60 + 1}])
    b = parquet(tmp_path / "b.parquet", {"id": [0.5]})
    assert carried(a, b)[1]["id"].to_pylist() == [str(2**60 + 1), "0.5"]


# --- the law -----------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
rows = st.dictionaries(st.sampled_from(["id", "prompt", "tag", "Status", "é"]), values)
good_lines = rows.map(lambda row: (json.dumps(row, ensure_ascii=False).encode(), row))
bad_lines = st.sampled_from(
    [b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"\0", b'{"a":01}', b"nul", b'{"a":1},']
).map(lambda line: (line, None))
blank_lines = st.sampled_from([b"", b"  ", b"\r", b"\t"]).map(lambda line: (line, "blank"))
noise = st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")).map(lambda b: (b, "any"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lines=st.lists(good_lines | bad_lines | blank_lines | noise, max_size=12),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
)
def test_every_line_gets_one_verdict_and_its_values_round_trip(
    tmp_path: Path, lines: list[tuple[bytes, Any]], end: bytes, last: bool
) -> None:
    content = end.join(line for line, _ in lines) + (end if last else b"")
    # What is plainly no text is refused as a file.
    assume(not is_no_text(content))
    path = jsonl(tmp_path / "a.jsonl", content)
    expected = [
        (number, row)
        for number, (line, row) in enumerate(lines, 1)
        if line.strip(b" \t\r\n\v\f") and row != "blank"
    ]
    found = verdicts(path)
    found_of = dict(found)
    assert len(found_of) == len(found)
    for number, row in expected:
        if row == "any":
            continue
        verdict = found_of.get(number)
        assert isinstance(verdict, str) if row is None else verdict == row

    _, table = carried(path)
    assert table.num_rows == len(found) or not table.column_names
    names = {"Status": "input_Status"}
    for at, (_, row) in enumerate(found):
        for column, value in row.items() if isinstance(row, dict) else ():
            out = table[names.get(column, column)][at].as_py() if column != "custom_id" else None
            assert same(value, out), (value, out)


def same(value: Any, out: Any) -> bool:
    """Whether a carried value is the row's, perhaps as a double or as JSON text."""
    if value is None or isinstance(value, str):
        return bool(out == value)
    if isinstance(out, str):
        return bool(json.loads(out) == value)
    return bool(out == value)


# --- the samples -------------------------------------------------------------------------------


def test_the_samples_are_what_they_say() -> None:
    for name in (
        "prompts.jsonl",
        "prompts.parquet",
        "messages.jsonl",
        "batch.jsonl",
        "tickets.csv",
    ):
        found = verdicts(SAMPLES / name)
        assert found
        assert all(isinstance(row, dict) for _, row in found)
    bad = [line for line, row in verdicts(SAMPLES / "mistakes.jsonl") if isinstance(row, str)]
    assert bad == [2, 8]


@settings(max_examples=50)
@given(st.lists(st.none() | st.sampled_from(["a", "b", 1, "1", "", "c", 1.5, [1]]), max_size=12))
def test_repeated_ids_are_counted_and_one_pair_is_named(names: list[Any]) -> None:
    ids = RepeatedIds()
    rows: Rows = [{} if name is None else {"custom_id": name} for name in names]
    ids.add(rows[:5])
    ids.add(rows[5:])
    texts = [name if isinstance(name, str) else json.dumps(name) for name in names if name]
    found = ids.found()
    if len(set(texts)) == len(texts):
        assert found is None
        return
    assert found is not None
    count, first, again = found
    assert count == len(texts) - len(set(texts))
    assert str(names[first - 1]) == str(names[again - 1])
    assert first < again


def test_files_that_batchrun_wrote_are_skipped_by_what_is_in_them(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", [{"prompt": "x"}])
    for name in ("in.parquet", "mine.jsonl"):
        output = tmp_path / name
        assert run_command(["submit", str(path), "--mock", "-q", "-o", str(output)]) == 0
    (tmp_path / "in.parquet").rename(tmp_path / "in.partial.parquet")
    (tmp_path / "mine.jsonl").rename(tmp_path / "mine.jsonl.bak")
    shutil.copy(tmp_path / "in.partial.parquet", tmp_path / "in.unused.PARQUET")
    found = resolve([str(tmp_path)])
    assert [file.path.name for file in found.files] == ["in.jsonl"]
    assert sorted(Path(each).name for each in found.skipped) == [
        f"{name} (made by batchrun)"
        for name in ("in.partial.parquet", "in.unused.PARQUET", "mine.jsonl.bak")
    ]


# --- key=value folders ---------------------------------------------------------------------------


def parts(root: Path) -> Path:
    """A table in parts, as Hive, Spark and DuckDB write one."""
    for folder in ("lang=fr/who=a%20%3D%C3%A9", "lang=de/who=__HIVE_DEFAULT_PARTITION__"):
        (root / folder).mkdir(parents=True)
    parquet(root / "lang=fr/who=a%20%3D%C3%A9/0.parquet", {"prompt": ["x", "y"], "n": [1, 2]})
    jsonl(
        root / "lang=de/who=__HIVE_DEFAULT_PARTITION__/0.jsonl",
        [{"prompt": "z", "n": 3}, {"prompt": "w", "lang": "its own"}],
    )
    return root


def test_folders_named_key_value_become_columns_of_text(tmp_path: Path) -> None:
    root = parts(tmp_path / "data")
    files = resolve([str(root)]).files
    for file in files:
        assert set(head(file)[0]) == {"prompt", "n", "lang", "who"}
    found, table = carried(root)
    assert found.schema.field("lang").type == pa.string()
    assert table.select(["prompt", "n", "lang", "who"]).to_pylist() == [
        {"prompt": "z", "n": 3, "lang": "de", "who": None},
        {"prompt": "w", "n": None, "lang": "its own", "who": None},
        {"prompt": "x", "n": 1, "lang": "fr", "who": "a =é"},
        {"prompt": "y", "n": 2, "lang": "fr", "who": "a =é"},
    ]
    rows = [row for file in files for batch in read(file) for row in batch.rows]
    assert [row["lang"] for row in rows if isinstance(row, dict)] == ["de", "its own", "fr", "fr"]
    _, one = carried(root, carry=("lang",))
    assert one.to_pydict() == {"lang": ["de", "its own", "fr", "fr"]}


@pytest.mark.parametrize(
    "typed",
    ["{root}/lang=fr", "{root}/lang=*/*/*.parquet", "{root}/**", "{root}/lang=fr/*/0.parquet"],
)
def test_folders_count_however_the_files_are_named(tmp_path: Path, typed: str) -> None:
    root = parts(tmp_path / "data")
    last = resolve([typed.format(root=root)]).files[-1]
    assert dict(last.folders) == {"lang": "fr", "who": "a =é"}


def test_folders_before_a_dot_are_only_where_the_files_lie(tmp_path: Path) -> None:
    root = parts(tmp_path / "year=2026" / "data")
    assert dict(resolve([str(root)]).files[0].folders) == {
        "year": "2026",
        "lang": "de",
        "who": None,
    }
    inside = resolve([f"{root.parent}/./data"]).files
    assert [dict(file.folders) for file in inside] == [
        {"lang": "de", "who": None},
        {"lang": "fr", "who": "a =é"},
    ]


def test_a_renamed_folder_is_another_input(tmp_path: Path) -> None:
    root = parts(tmp_path / "data")
    before = content_digest(resolve([str(root)]).files)
    (root / "lang=fr").rename(root / "lang=it")
    assert content_digest(resolve([str(root)]).files) != before


def test_tables_of_which_only_folder_columns_are_wanted(tmp_path: Path) -> None:
    root = parts(tmp_path / "data")
    for file in resolve([str(root)]).files:
        batches = list(read(file, columns=("lang",)))
        assert [len(batch.rows) for batch in batches] == [2]
    (tmp_path / "k=v").mkdir()
    empty = parquet(tmp_path / "k=v" / "a.parquet", {"prompt": pa.array([], pa.string())})
    _, table = carried(empty)
    assert (table.schema.names[:1], table.num_rows) == (["prompt"], 0)
    assert "k" in table.schema.names
