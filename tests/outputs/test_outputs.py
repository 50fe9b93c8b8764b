"""Publishing: the promised columns to the letter, whole or not at all, and read back as it was."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from batchrun.chat.identity import format_hash
from batchrun.chat.reply import answer, parse
from batchrun.config import OutputFormat
from batchrun.errors import LocalIOError
from batchrun.outputs.columns import NAMES
from batchrun.outputs.footer import Footer
from batchrun.outputs.publish import publish as outputs_publish
from batchrun.outputs.read_back import read_back, recognise
from batchrun.outputs.rows import InvalidRow, Slice
from batchrun.outputs.tally import OutputTally
from batchrun.outputs.target import backup, clean_leftovers
from batchrun.types import Outcome, OutcomeKind, Usage

FORMATS: list[OutputFormat] = ["parquet", "jsonl"]
NOTHING = pa.schema([])
WHEN_MS = 1_763_733_663_123


def completion(content: Any = "Hello", **message: Any) -> bytes:
    choice = {"index": 0, "message": {"content": content, **message}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return json.dumps({"model": "m-2603", "choices": [choice], "usage": usage}).encode()


def outcome(body: bytes, name: str = "a", kind: OutcomeKind = "ok", **fields: Any) -> Outcome:
    made = Outcome(
        hash=hashlib.blake2b(name.encode(), digest_size=16).digest(),
        occurrence=0,
        kind=kind,
        final=kind in ("ok", "rejected"),
        attempts=2,
        in_doubt=1,
        http_status=200,
        code="",
        message="",
        request_id="req-1",
        model="m",
        latency_s=1.5,
        ttft_s=None,
        finished_at_ms=WHEN_MS,
        usage=parse(body).usage,
        body=body,
    )
    return replace(made, **fields)


NO_PROMPT = InvalidRow("no_prompt", "no prompt")
REJECTED = outcome(
    b'{"message":"too long","code":"3051"}',
    "r",
    "rejected",
    code="3051",
    message="too long",
    http_status=400,
)
UNREACHED = outcome(
    b"", "t", "timeout", code="timeout", message="no answer", http_status=None, request_id=""
)


def slice_of(*rows: Outcome | InvalidRow | None, carried: pa.RecordBatch | None = None) -> Slice:
    numbers = range(1, len(rows) + 1)
    return Slice(carried, [f"id-{n}" for n in numbers], [f"p.jsonl:{n}" for n in numbers], rows)


def publish(
    target: Path | io.BytesIO,
    *slices: Slice,
    fmt: OutputFormat = "parquet",
    schema: pa.Schema = NOTHING,
    footer: Footer | None = None,
    response_body: bool = True,
) -> Footer:
    return outputs_publish(
        target,
        fmt,
        schema,
        slices,
        footer or Footer(),
        OutputTally(),
        response_body=response_body,
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


# --- Parquet -------------------------------------------------------------------------------------


def test_the_columns_are_those_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    carried = pa.schema([("a.b", pa.int8()), ("l", pa.list_(pa.string()))])
    publish(path, schema=carried)
    schema = pq.read_schema(path)
    text, count, small, real = pa.string(), pa.int64(), pa.int32(), pa.float64()
    tokens = ["prompt", "completion", "total", "cached", "reasoning"]
    assert list(zip(schema.names, schema.types, strict=True)) == [
        ("a.b", pa.int8()),
        ("l", pa.list_(pa.field("element", pa.string()))),
        *((name, text) for name in ("custom_id", "status", "response", "finish_reason")),
        *((name, text) for name in ("request_model", "response_model")),
        *((f"{name}_tokens", count) for name in tokens),
        ("cost_usd", real),
        *((name, text) for name in ("reasoning", "tool_calls")),
        *((f"error_{name}", text) for name in ("kind", "code", "message")),
        *((name, small) for name in ("http_status", "attempts", "in_doubt_attempts")),
        *((name, real) for name in ("latency_s", "ttft_s")),
        ("request_id", text),
        ("finished_at", pa.timestamp("ms", tz="UTC")),
        ("request_hash", text),
        ("response_body", text),
    ]
    assert tuple(schema.names[2:]) == NAMES
    publish(path, schema=carried, response_body=False)
    assert pq.read_schema(path).names == schema.names[:-1]


def test_an_answered_row_fills_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    body = completion(reasoning="hm", tool_calls=[{"id": "1"}])
    publish(path, slice_of(outcome(body)))
    assert rows_of(path) == [
        {
            "custom_id": "id-1",
            "status": "ok",
            "response": "Hello",
            "finish_reason": "stop",
            "request_model": "m",
            "response_model": "m-2603",
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "cached_tokens": None,
            "reasoning_tokens": None,
            "cost_usd": None,
            "reasoning": "hm",
            "tool_calls": '[{"id":"1"}]',
            "error_kind": None,
            "error_code": None,
            "error_message": None,
            "http_status": 200,
            "attempts": 2,
            "in_doubt_attempts": 1,
            "latency_s": 1.5,
            "ttft_s": None,
            "request_id": "req-1",
            "finished_at": datetime(2025, 11, 21, 14, 1, 3, 123_000, UTC),
            "request_hash": format_hash(outcome(b"").hash),
            "response_body": body.decode(),
        }
    ]


def test_failed_rows_say_why_and_keep_what_the_endpoint_said(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    publish(path, slice_of(REJECTED, UNREACHED, InvalidRow("null_prompt", '"prompt" is null')))
    rejected, unreached, invalid = rows_of(path)
    assert {row["status"] for row in (rejected, unreached, invalid)} == {"error"}
    assert (rejected["error_kind"], rejected["error_code"]) == ("rejected", "3051")
    assert (rejected["error_message"], rejected["http_status"]) == ("too long", 400)
    assert rejected["response_body"] == REJECTED.body.decode()
    assert rejected["response"] is None
    assert (unreached["error_kind"], unreached["http_status"]) == ("timeout", None)
    assert (unreached["response_body"], unreached["request_id"]) == (None, None)
    assert invalid["error_kind"] == "invalid_input"
    assert invalid["error_message"] == 'p.jsonl:3: "prompt" is null'
    assert (invalid["custom_id"], invalid["attempts"]) == ("id-3", 0)
    assert invalid["request_hash"] is None


CARRIED = pa.table(
    {
        "at": pa.array([1, None], pa.timestamp("ns")),
        "local": pa.array([1, 2], pa.timestamp("us", tz="Europe/Paris")),
        "money": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
        "list": pa.array([["a"], []], pa.list_(pa.string())),
        "struct": pa.array([{"x": 1}, None], pa.struct([("x", pa.int16())])),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "large": pa.array(["a", None], pa.large_string()),
        "bytes": pa.array([b"\xff", b""], pa.binary()),
        "nothing": pa.array([None, None], pa.string()),
        "real": pa.array([float("nan"), 1e300]),
        "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
    }
).combine_chunks()


def test_carried_columns_keep_values_and_types(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    (carried,) = CARRIED.to_batches()
    slices = [slice_of(outcome(completion()), REJECTED, carried=carried)] * 3
    publish(path, *slices, schema=CARRIED.schema)
    table = pq.read_table(path)
    assert table.schema.names[:11] == CARRIED.schema.names
    expected = pa.concat_tables([CARRIED] * 3).drop_columns("real")
    assert table.select(expected.schema.names).cast(expected.schema).equals(expected)
    for name in ("at", "local", "money", "kind", "large", "bytes"):
        assert table.schema.field(name).type == CARRIED.schema.field(name).type


def test_carried_columns_reach_jsonl_as_json(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    (carried,) = CARRIED.to_batches()
    rows = slice_of(outcome(completion()), REJECTED, carried=carried)
    publish(path, rows, schema=CARRIED.schema, fmt="jsonl")
    first, second = (line["batchrun"]["input"] for line in lines_of(path))
    assert first["at"] == "1970-01-01 00:00:00.000000001"
    assert first["money"] == "1.50"
    assert (first["list"], first["struct"], first["kind"]) == (["a"], {"x": 1}, "a")
    assert (first["real"], first["bytes"]) == (None, "/w==")
    assert (second["at"], second["struct"]) == (None, None)


def test_a_carried_column_with_whatever_name_does_not_disturb(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    carried = pa.record_batch({"input_status": ["x"], "batchrun": [1], "": [2], "é\n": [3]})
    publish(path, slice_of(REJECTED, carried=carried), schema=carried.schema)
    (row,) = rows_of(path)
    assert (row["input_status"], row["batchrun"], row[""], row["é\n"]) == ("x", 1, 2, 3)


def test_row_groups_hold_at_most_20000_rows(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    publish(path, *[slice_of(*[REJECTED] * 1000)] * 45)
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert groups == [20_000, 20_000, 5_000]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_row_groups_hold_at_most_32_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    large = outcome(completion("x" * 3_000_000))
    publish(path, *[slice_of(*[large] * 3)] * 6)
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert sum(groups) == 18
    assert max(groups) <= 5  # response and response_body: 6 MB a row
    assert {row["response"] for row in rows_of(path)} == {"x" * 3_000_000}


def test_a_slice_larger_than_a_piece_is_cut_without_losing_a_row(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    rows = [outcome(completion("x" * 1_500_000 + str(n))) for n in range(8)]
    carried = pa.record_batch({"n": list(range(8))})
    publish(path, slice_of(*rows, carried=carried), schema=carried.schema)
    read = rows_of(path)
    assert [row["response"][1_500_000:] for row in read] == [str(n) for n in range(8)]
    assert [(row["n"], row["custom_id"]) for row in read] == [(n, f"id-{n + 1}") for n in range(8)]
    many = tmp_path / "many.parquet"
    publish(many, slice_of(*[REJECTED] * 5000))
    assert [row["custom_id"] for row in rows_of(many)] == [f"id-{n}" for n in range(1, 5001)]


@pytest.mark.parametrize("fmt", FORMATS)
def test_pending_rows_are_counted_and_left_out(tmp_path: Path, fmt: OutputFormat) -> None:
    path = tmp_path / "out"
    carried = pa.record_batch({"n": [1, 2, 3]})
    rows = slice_of(None, outcome(completion()), None, carried=carried)
    tally = OutputTally()
    outputs_publish(
        path, fmt, carried.schema, [rows, slice_of(None)], Footer(), tally, response_body=True
    )
    assert (tally.rows.pending, tally.rows.ok) == (3, 1)
    if fmt == "parquet":
        assert [(row["n"], row["custom_id"]) for row in rows_of(path)] == [(2, "id-2")]
    else:
        assert [line["batchrun"]["input"] for line in lines_of(path)] == [{"n": 2}]


def test_answered_failed_invalid_and_pending_rows_may_alternate(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    answered = outcome(completion("yes"), model="b")
    rows = (
        answered,
        REJECTED,
        None,
        NO_PROMPT,
        replace(answered, model="a"),
    )
    footer = publish(path, slice_of(*rows))
    assert [(r["custom_id"], r["response"], r["error_kind"]) for r in rows_of(path)] == [
        ("id-1", "yes", None),
        ("id-2", None, "rejected"),
        ("id-4", None, "invalid_input"),
        ("id-5", "yes", None),
    ]
    assert (footer.rows.ok, footer.rows.error) == (2, 2)
    assert footer.request_models == ["b", "m", "a"]


# --- JSONL ---------------------------------------------------------------------------------------


def test_jsonl_lines_are_openai_batch_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    body = completion()
    publish(
        path,
        slice_of(outcome(body), REJECTED, UNREACHED, NO_PROMPT),
        fmt="jsonl",
    )
    ok, rejected, unreached, invalid = lines_of(path)
    assert list(ok) == ["id", "custom_id", "response", "error", "batchrun"]
    assert (ok["id"], ok["custom_id"], ok["error"]) == ("batch_req_1", "id-1", None)
    assert ok["response"] == {
        "status_code": 200,
        "request_id": "req-1",
        "body": json.loads(body),
    }
    assert ok["batchrun"] == {
        "status": "ok",
        "request_hash": format_hash(outcome(b"").hash),
        "request_model": "m",
        "attempts": 2,
        "in_doubt_attempts": 1,
        "latency_s": 1.5,
        "finished_at": "2025-11-21T14:01:03.123000Z",
    }
    assert rejected["error"] == {"code": "3051", "message": "too long"}
    assert rejected["response"]["status_code"] == 400
    assert rejected["batchrun"]["error_kind"] == "rejected"
    assert unreached["response"] is None
    assert invalid["error"] == {"code": "no_prompt", "message": "p.jsonl:4: no prompt"}
    assert (invalid["response"], invalid["batchrun"]["error_kind"]) == (None, "invalid_input")
    assert invalid["batchrun"]["run"]["rows"]["ok"] == 1
    assert "run" not in unreached["batchrun"]


def test_a_body_is_spliced_as_it_came(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    body = b'{"choices": [], "n": 1.50, "big": 123456789012345678901234567890}'
    publish(path, slice_of(outcome(body)), fmt="jsonl")
    assert b'"body":' + body + b"}" in path.read_bytes()


def test_without_response_body_a_line_still_holds_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    publish(path, slice_of(outcome(completion()), REJECTED), fmt="jsonl", response_body=False)
    ok, rejected = lines_of(path)
    assert ok["response"]["body"]["choices"][0]["message"]["content"] == "Hello"
    assert ok["batchrun"]["rebuilt"] is True
    assert rejected["response"]["body"] is None


def test_a_stream_gets_the_lines(tmp_path: Path) -> None:
    stream, path = io.BytesIO(), tmp_path / "out.jsonl"
    rows = [slice_of(outcome(completion()), REJECTED), slice_of(UNREACHED)]
    publish(stream, *rows, fmt="jsonl")
    publish(path, *rows, fmt="jsonl")
    assert stream.getvalue() == path.read_bytes()
    assert stream.getvalue().count(b"\n") == 3


# --- hostile answers -----------------------------------------------------------------------------

HOSTILE = {
    "lone surrogate, escaped": completion("ABC").replace(b"ABC", b"a\\ud800"),
    "lone surrogate, raw": completion("ABC").replace(b"ABC", b"a\xed\xa0\x80"),
    "not UTF-8": completion("ABC").replace(b"ABC", b"a\xff"),
    "not UTF-8 beside the text": completion("a\ufffd", x="ABC").replace(b"ABC", b"\xff"),
    "null": completion(None),
    "list": completion([{"type": "text", "text": "a\ufffd"}]),
    "tool call": completion(None, tool_calls=[{"function": {"arguments": {"a": 1}}}]),
    "NaN": completion("a\ufffd", logprob=float("nan")),
    "1e400": completion("a\ufffd", logprob="ABC").replace(b'"ABC"', b"1e400"),
    "huge usage": completion("a\ufffd").replace(b": 3,", b": 3" + b"0" * 30 + b","),
    "several lines": json.dumps(json.loads(completion("a\ufffd")), indent=2).encode(),
    "duplicate keys": b'{"choices":0,' + completion("a\ufffd")[1:],
    "NUL": completion("\x00\ufffd"),
    "empty": completion(""),
    "5 MB": completion("x" * 5_000_000),
    "too deep": b"[" * 100_000,
    "not JSON": b"<html>\n</html>",
    "a JSON string": b'"text"',
    "nothing": b"",
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("response_body", [True, False])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_answer_arrives_and_stays_the_same(
    tmp_path: Path, body: bytes, fmt: OutputFormat, response_body: bool
) -> None:
    path = tmp_path / "out"
    rows = slice_of(outcome(body), outcome(body, "e", "invalid_response", code="x"))
    publish(path, rows, fmt=fmt, response_body=response_body)
    back = list(read_back(path))
    expected = answer(body)
    assert [o.kind for o in back] == ["ok", "invalid_response"]
    read = answer(back[0].body)
    assert read == expected
    if fmt == "parquet":
        assert rows_of(path)[0]["response"] == expected.response
    again = tmp_path / "again"
    publish(again, slice_of(*back), fmt=fmt, response_body=response_body)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("fmt", FORMATS)
def test_texts_around_the_answer_may_hold_lone_surrogates(
    tmp_path: Path, fmt: OutputFormat
) -> None:
    path = tmp_path / "out"
    texts = dict.fromkeys(("code", "message", "request_id", "model"), "a\udc80")
    rows = slice_of(replace(REJECTED, **texts), InvalidRow("broken_json", "\udc80"))
    publish(path, rows._replace(custom_ids=["i\udc80", "j"]), fmt=fmt)
    (back,) = read_back(path)
    assert {getattr(back, name) for name in texts} == {"a\ufffd"}
    text = path.read_bytes() if fmt == "jsonl" else str(rows_of(path)).encode()
    assert "i\ufffd".encode() in text


# --- the footer ----------------------------------------------------------------------------------

FOOTER = Footer(
    batchrun_version="0.1.0",
    run_id="r1",
    synthetic=True,
    inputs=["prompts.jsonl"],
    inputs_digest="d",
    settings={"model": "m", "params": {"temperature": 0.5, "stop": ["a", None]}},
    publishing={"carry": None},
    hosts=["api.mistral.ai"],
    finished_at="2026-11-21T14:02:12Z",
)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_footer_says_what_the_file_holds(tmp_path: Path, fmt: OutputFormat) -> None:
    path = tmp_path / "out"
    rows = slice_of(outcome(completion()), REJECTED, UNREACHED, NO_PROMPT)
    footer = publish(path, rows, fmt=fmt, footer=FOOTER)
    assert recognise(path) == footer
    assert replace(
        footer, rows=FOOTER.rows, tokens=FOOTER.tokens, errors=[], request_models=[]
    ) == (FOOTER)
    assert (footer.rows.ok, footer.rows.error, footer.rows.passing) == (1, 3, 1)
    assert (footer.tokens.prompt, footer.tokens.rows_without_usage) == (3, 3)
    assert footer.request_models == ["m"]
    assert {(e.kind, e.code, e.retried_on_rerun) for e in footer.errors} == {
        ("rejected", "3051", False),
        ("timeout", "timeout", True),
        ("invalid_input", "no_prompt", False),
    }
    example = next(e.example for e in footer.errors if e.kind == "timeout")
    assert example is not None
    assert (example.custom_id, example.source) == ("id-3", "p.jsonl:3")


def test_the_footer_of_a_parquet_file_is_not_copied_with_its_table(tmp_path: Path) -> None:
    path, derived = tmp_path / "out.parquet", tmp_path / "mine.parquet"
    publish(path, slice_of(REJECTED))
    assert b"batchrun" in pq.read_metadata(path).metadata
    pq.write_table(pq.read_table(path), derived)
    assert recognise(derived) is None


def test_the_footer_is_found_after_a_very_long_last_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    large = outcome(completion("x" * 700_000))
    publish(path, slice_of(large, large), fmt="jsonl", footer=FOOTER)
    footer = recognise(path)
    assert footer is not None
    assert footer.run_id == "r1"


@pytest.mark.parametrize("fmt", FORMATS)
def test_an_output_without_rows_is_published_and_recognised(
    tmp_path: Path, fmt: OutputFormat
) -> None:
    path = tmp_path / "out"
    publish(path, fmt=fmt)
    footer = recognise(path)
    assert footer is not None
    assert footer.rows.ok == 0
    assert list(read_back(path)) == []


@pytest.mark.parametrize(
    "content",
    [
        b'{"custom_id":"a","response":{}}\n',
        b'{"batchrun":{"run":7}}\n',
        b'{"batchrun":7}\n',
        b"not JSON at all",
        b"\xff\xfe\n\n",
        b"\n\n",
        b"PAR1 but not really PAR1",
        b"PAR1",
        b"[" * 100_000,
    ],
)
def test_another_file_is_not_recognised(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    assert recognise(path) is None


def test_a_parquet_file_of_others_is_not_recognised(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    assert recognise(path) is None


def test_what_cannot_be_read_is_an_io_error(tmp_path: Path) -> None:
    with pytest.raises(LocalIOError, match="missing"):
        recognise(tmp_path / "missing")
    with pytest.raises(LocalIOError, match="cannot be read"):
        list(read_back(tmp_path))


# --- reading back --------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_published_row_comes_back_as_its_outcome(tmp_path: Path, fmt: OutputFormat) -> None:
    path = tmp_path / "out"
    page = outcome(b"<html>\n", "p", "transient", code="502", http_status=502, ttft_s=0.25)
    rows = [outcome(completion()), REJECTED, UNREACHED, page]
    publish(path, slice_of(*rows, InvalidRow("no_prompt", "left out")), fmt=fmt)
    assert list(read_back(path)) == rows


@pytest.mark.parametrize("fmt", FORMATS)
def test_without_response_body_the_body_is_rebuilt(tmp_path: Path, fmt: OutputFormat) -> None:
    path = tmp_path / "out"
    body = completion("é", reasoning="hm", tool_calls=[{"id": "1"}])
    publish(path, slice_of(outcome(body), REJECTED), fmt=fmt, response_body=False)
    ok, rejected = read_back(path)
    assert ok.rebuilt
    assert answer(ok.body) == answer(body)
    assert replace(ok, body=body, rebuilt=False) == outcome(body)
    assert rejected == replace(REJECTED, body=b"")


def test_a_rebuilt_body_is_never_published_as_the_endpoints(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    publish(path, slice_of(outcome(completion(), rebuilt=True)))
    (row,) = rows_of(path)
    assert (row["response"], row["response_body"]) == ("Hello", None)


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("then", FORMATS)
def test_answers_pass_from_format_to_format(
    tmp_path: Path, first: OutputFormat, then: OutputFormat
) -> None:
    direct, one, two = tmp_path / "direct", tmp_path / "one", tmp_path / "two"
    rows = [outcome(completion()), REJECTED, UNREACHED, outcome(b'"text"', "x", "transient")]
    publish(direct, slice_of(*rows), fmt=then)
    publish(one, slice_of(*rows), fmt=first)
    publish(two, slice_of(*read_back(one)), fmt=then)
    assert two.read_bytes() == direct.read_bytes()


def test_a_hash_of_another_version_is_not_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    publish(path, slice_of(outcome(completion())), fmt="jsonl")
    path.write_bytes(path.read_bytes().replace(b'"request_hash":"1:', b'"request_hash":"9:'))
    assert list(read_back(path)) == []


def test_a_line_that_is_not_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    publish(path, slice_of(outcome(completion()), REJECTED), fmt="jsonl")
    path.write_bytes(b"edited\n" + path.read_bytes())
    with pytest.raises(LocalIOError, match="line 1"):
        list(read_back(path))


# --- whole or not at all -------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "out.parquet"
    publish(path, slice_of(outcome(completion("old"))))
    return path


def assert_untouched(path: Path) -> None:
    assert [row["response"] for row in rows_of(path)] == ["old"]
    assert os.listdir(path.parent) == [path.name]


class OutOfRowsError(Exception):
    pass


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("error", [OutOfRowsError, KeyboardInterrupt, OSError])
def test_an_error_while_rows_are_made_passes_as_it_is(
    old: Path, fmt: OutputFormat, error: type[BaseException]
) -> None:
    def rows() -> Iterator[Slice]:
        yield slice_of(*[outcome(completion("new"))] * 2000)
        raise error

    with pytest.raises(error) as caught:
        outputs_publish(old, fmt, NOTHING, rows(), Footer(), OutputTally(), response_body=True)
    assert caught.type is error
    assert_untouched(old)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from tests.outputs.test_outputs import LocalIOError, completion, outcome, publish, slice_of
import random
words = random.Random(1).randbytes
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    rows = [outcome(completion(words(3000).hex())) for _ in range(1000)]
    publish(Path(sys.argv[1]), *[slice_of(*rows)] * 9, fmt=sys.argv[2])
except LocalIOError as error:
    print(error)
"""


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("limit", [1, 100, 3_000_000, 9_000_000])
@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(old: Path, fmt: OutputFormat, limit: int) -> None:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-W", "error", "-c", FULL_DISK, str(old), fmt, str(limit), root]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{old}: cannot be written: File too large\n"
    assert done.stderr == ""
    assert_untouched(old)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the platform has no /dev/full")
def test_a_full_disk_is_said_in_words() -> None:
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(LocalIOError, match="disk full"),
    ):
        outputs_publish(
            full,
            "jsonl",
            NOTHING,
            [slice_of(*[REJECTED] * 3)],
            Footer(),
            OutputTally(),
            response_body=True,
        )


def test_a_directory_is_no_target(tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    (target / "kept").mkdir(parents=True)
    with pytest.raises(LocalIOError, match=r"out\.parquet: cannot be written: Is a directory"):
        publish(target, slice_of(REJECTED))
    assert os.listdir(tmp_path) == ["out.parquet"]
    assert (target / "kept").exists()


def test_a_device_is_no_target() -> None:
    with pytest.raises(LocalIOError, match="not a regular file"):
        publish(Path("/dev/null"), slice_of(REJECTED))


def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(LocalIOError, match="No such file or directory"):
        publish(tmp_path / "missing" / "out.parquet", slice_of(REJECTED))


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may write everywhere: become somebody who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_an_unwritable_directory_leaves_the_old_file(as_nobody: None) -> None:
    with tempfile.TemporaryDirectory() as name:
        old = Path(name) / "out.parquet"
        publish(old, slice_of(outcome(completion("old"))))
        old.parent.chmod(0o500)
        with pytest.raises(
            LocalIOError, match=r"out\.parquet: cannot be written: Permission denied"
        ):
            publish(old, slice_of(REJECTED))
        assert_untouched(old)
        old.parent.chmod(0o700)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_reader_never_sees_half_a_file(tmp_path: Path, fmt: OutputFormat) -> None:
    path = tmp_path / "out"
    publish(path, slice_of(*[REJECTED] * 100), fmt=fmt)
    finished = threading.Event()
    counts: set[int] = set()
    problems: list[Exception] = []

    def read() -> None:
        while not finished.is_set():
            try:
                footer = recognise(path)
                assert footer is not None
                rows = sum(1 for _ in read_back(path))
                assert rows in (100, 200)
                counts.add(footer.rows.error)
            except Exception as exc:
                problems.append(exc)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(60):
        publish(path, slice_of(*[REJECTED] * (200 if n % 2 else 100)), fmt=fmt)
    finished.set()
    reader.join()
    assert problems == []
    assert counts <= {100, 200}


# --- modes, links, leftovers ---------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_the_mode_open_would_give(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "out.parquet"
    before = os.umask(umask)
    try:
        publish(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_replaced_file_keeps_its_mode(old: Path) -> None:
    old.chmod(0o664)
    publish(old)
    assert stat.S_IMODE(old.stat().st_mode) == 0o664


def test_a_link_stays_a_link(old: Path) -> None:
    link = old.with_name("latest.parquet")
    link.symlink_to(old.name)
    publish(link, slice_of(REJECTED))
    assert link.is_symlink()
    assert rows_of(old)[0]["error_code"] == "3051"


def test_a_long_name_still_has_room_for_a_temporary(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 123 + ".parquet")
    publish(path)
    assert os.listdir(tmp_path) == [path.name]


def test_a_leftover_of_our_own_number_does_not_stop_us(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    (tmp_path / f".out.parquet.{os.getpid()}.batchrun-tmp").write_bytes(b"killed")
    publish(path)
    assert os.listdir(tmp_path) == [path.name]


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = os.getppid()
    for name in ("out", "other"):
        for pid in (dead.pid, os.getpid(), alive):
            (tmp_path / f".{name}.{pid}.batchrun-tmp").touch()
    (tmp_path / ".out.x.batchrun-tmp").touch()
    clean_leftovers(tmp_path / "out")
    assert sorted(n for n in os.listdir(tmp_path) if n.startswith(".out")) == sorted(
        [f".out.{alive}.batchrun-tmp", ".out.x.batchrun-tmp"]
    )
    assert len(list(tmp_path.glob(".other.*"))) == 3
    clean_leftovers(tmp_path / "missing" / "out")


def test_a_backup_takes_the_place_of_no_other_file(old: Path) -> None:
    kept = backup(old)
    assert kept == old.with_name("out.parquet.bak")
    publish(old, slice_of(outcome(completion("new"))))
    second = backup(old)
    assert second == old.with_name("out.parquet.bak.2")
    assert [row["response"] for row in rows_of(kept)] == ["old"]
    assert [row["response"] for row in rows_of(second)] == ["new"]
    assert [row["response"] for row in rows_of(old)] == ["new"]
    assert sorted(os.listdir(old.parent)) == [
        *("out.parquet", "out.parquet.bak", "out.parquet.bak.2"),
    ]


def test_a_file_that_is_kept_already_is_not_kept_twice(old: Path) -> None:
    assert backup(old) == backup(old)
    assert sorted(os.listdir(old.parent)) == ["out.parquet", "out.parquet.bak"]


@pytest.mark.parametrize("kind", ["directory", "link", "pipe", "file"])
def test_what_has_the_name_of_a_backup_stays(kind: str, old: Path) -> None:
    taken = old.with_name("out.parquet.bak")
    if kind == "directory":
        taken.mkdir()
    elif kind == "link":
        taken.symlink_to(old)
    elif kind == "pipe":
        os.mkfifo(taken)
    else:
        taken.write_text("mine")
    assert backup(old) == old.with_name("out.parquet.bak.2")
    assert [row["response"] for row in rows_of(old.with_name("out.parquet.bak.2"))] == ["old"]
    assert kind != "file" or taken.read_text() == "mine"


def test_a_backup_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(LocalIOError, match=r"out\.parquet\.bak"):
        backup(tmp_path / "missing" / "out.parquet")


# --- the tally -----------------------------------------------------------------------------------


class LazySources(Iterable[str]):
    """Knows what row 3 is called and nothing else."""

    def __getitem__(self, at: Any) -> Any:
        assert at == 2
        return "p.parquet:3"

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("asked for every source")

    def __len__(self) -> int:
        return 3


def test_sources_are_asked_for_failed_rows_only(tmp_path: Path) -> None:
    ok = outcome(completion())
    sources: Any = LazySources()
    rows = Slice(None, ["a", "b", "c"], sources, [ok, ok, REJECTED])
    tally = OutputTally()
    outputs_publish(tmp_path / "o", "parquet", NOTHING, [rows], Footer(), tally, response_body=True)
    (error,) = tally.errors
    assert error.example is not None
    assert error.example.source == "p.parquet:3"
    assert tally.tokens.total == Usage(total_tokens=14).total_tokens
