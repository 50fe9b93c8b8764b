"""Typed answers, through the command line, against endpoints that do and do not play along."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import StartMock, StartRun, Submit
from msgspec.structs import replace

import batchrun
from batchrun.mock.replies import MockReply, MockRequest, completion, error_reply
from batchrun.types import Usage

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": ["integer", "null"]}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
GOOD = '{"kind": "a", "n": 3}'


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text(json.dumps(SCHEMA))


def write_rows(number: int) -> None:
    rows = [{"prompt": f"Question {n}?", "n": n} for n in range(number)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


Say = Callable[[dict[str, Any], int], MockReply | str | None]


class Endpoint:
    """Answers what ``say`` makes of a body and of how often its first question was asked."""

    def __init__(self, mock: StartMock, say: Say) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._seen: Counter[str] = Counter()
        self._say = say
        self.server = mock(respond=self._respond)

    def _respond(self, request: MockRequest) -> MockReply | None:
        body = json.loads(request.body)
        self.bodies.append(body)
        asked = next(m["content"] for m in body["messages"] if m["role"] == "user")
        self._seen[asked] += 1
        said = self._say(body, self._seen[asked])
        if isinstance(said, str):
            return completion(request, content=said, usage=Usage(10, 5, 15))
        return said

    @property
    def command(self) -> tuple[object, ...]:
        to = ("--base-url", self.server.url, "-m", "m", "-o", "out.parquet")
        return ("in.jsonl", *to, "--schema", "schema.json")


def form_of(body: dict[str, Any]) -> str:
    form = body.get("response_format", {})
    if form.get("type") == "json_schema":
        return "json-schema" if form["json_schema"].get("strict") else "json-schema-loose"
    if "guided_json" in body:
        return "guided"
    return "json-object" if form else "prompt"


def refusing(forms: set[str]) -> Say:
    def say(body: dict[str, Any], _: int) -> MockReply | str:
        if form_of(body) in forms:
            return error_reply(400, "response_format is not supported by this model")
        return GOOD

    return say


FORMS = ["json-schema", "json-schema-loose", "json-object", "prompt"]


@pytest.mark.parametrize("refused", range(len(FORMS)))
def test_a_form_that_is_refused_costs_no_row(mock: StartMock, submit: Submit, refused: int) -> None:
    endpoint = Endpoint(mock, refusing(set(FORMS[:refused])))
    write_rows(100)
    ended = submit(*endpoint.command, "-c", 32)
    assert ended.code == 0, ended.err
    table = pq.read_table("out.parquet")
    assert table["parsed_kind"].to_pylist() == ["a"] * 100
    assert table["parsed_n"].to_pylist() == [3] * 100
    used = Counter(map(form_of, endpoint.bodies))
    assert used == {**dict.fromkeys(FORMS[:refused], 1), FORMS[refused]: 100}
    assert f"schema asked for as {FORMS[refused]}" in ended.err


def test_answers_are_found_again_whatever_form_they_were_asked_in(
    mock: StartMock, submit: Submit
) -> None:
    endpoint = Endpoint(mock, refusing({"json-schema"}))
    write_rows(5)
    assert submit(*endpoint.command).code == 0
    sent = len(endpoint.bodies)
    write_rows(6)
    assert submit(*endpoint.command, "--schema-dialect", "guided").code == 0
    assert [form_of(body) for body in endpoint.bodies[sent:]] == ["guided"]
    Path("schema.json").write_text(json.dumps({**SCHEMA, "title": "another"}))
    ended = submit(*endpoint.command)
    assert ended.code == 2
    assert "schema" in ended.err


def test_a_wrong_answer_is_asked_again_with_what_is_wrong(mock: StartMock, submit: Submit) -> None:
    wrong = ['{"kind": "z", "n": 1}', "```json\n" + GOOD + "\n```"]
    endpoint = Endpoint(mock, lambda _, seen: wrong[seen - 1])
    write_rows(1)
    ended = submit(*endpoint.command, "--json")
    assert ended.code == 0
    first, second = endpoint.bodies
    assert second["messages"][: len(first["messages"])] == first["messages"]
    said, told = second["messages"][-2:]
    assert said == {"role": "assistant", "content": wrong[0]}
    assert told["role"] == "user"
    assert '"z" is not one of' in told["content"]
    row = pq.read_table("out.parquet").to_pylist()[0]
    assert (row["status"], row["parsed_kind"], row["attempts"]) == ("ok", "a", 2)
    assert (row["prompt_tokens"], row["completion_tokens"], row["total_tokens"]) == (20, 10, 30)
    assert ended.summary["this_run"]["tokens"]["prompt"] == 20


@pytest.mark.parametrize(
    ("reply", "code", "requests"),
    [
        ('{"kind": "z", "n": 1}', "schema", 3),
        ("[1, 2]", "schema", 3),
        ("I think it is a.", "not_json", 3),
        ("[" * 5_000, "not_json", 3),
        (" ", "empty", 3),
    ],
)
def test_an_answer_that_never_fits_is_an_error_row_with_its_text(
    mock: StartMock, submit: Submit, reply: str, code: str, requests: int
) -> None:
    endpoint = Endpoint(mock, lambda _body, _seen: reply)
    write_rows(1)
    assert submit(*endpoint.command).code == 3
    row = pq.read_table("out.parquet").to_pylist()[0]
    assert (row["status"], row["error_kind"], row["error_code"]) == (
        "error",
        "invalid_answer",
        code,
    )
    assert row["response"] == reply
    assert row["parsed_kind"] is None
    assert row["attempts"] == len(endpoint.bodies) == requests
    assert row["total_tokens"] == 15 * requests
    assert submit(*endpoint.command).code == 3
    assert len(endpoint.bodies) == requests
    assert submit(*endpoint.command, "--retry-failed", "--max-schema-retries", 0).code == 3
    assert len(endpoint.bodies) == requests + 1


def test_cut_and_refused_answers_are_not_paid_twice(mock: StartMock, submit: Submit) -> None:
    def respond(request: MockRequest) -> MockReply:
        if b"Question 0" in request.body:
            return completion(request, content='{"kind": "a', finish_reason="length")
        return completion(request, content="no", finish_reason="content_filter")

    server = mock(respond=respond)
    write_rows(2)
    to = ("--base-url", server.url, "-m", "m", "-o", "out.parquet", "--schema", "schema.json")
    assert submit("in.jsonl", *to, "--schema-dialect", "prompt").code == 3
    assert pq.read_table("out.parquet")["error_code"].to_pylist() == ["truncated", "refused"]
    assert server.ledger.requests == 2


def test_a_stronger_model_has_the_last_word(mock: StartMock, submit: Submit) -> None:
    endpoint = Endpoint(mock, lambda body, _: GOOD if body["model"] == "strong" else "no idea")
    write_rows(3)
    ended = submit(*endpoint.command, "--escalate", "strong", "--max-schema-retries", 1)
    assert ended.code == 0, ended.err
    table = pq.read_table("out.parquet")
    assert table["request_model"].to_pylist() == ["strong"] * 3
    assert table["attempts"].to_pylist() == [3] * 3
    assert table["total_tokens"].to_pylist() == [45] * 3
    strong = [body for body in endpoint.bodies if body["model"] == "strong"]
    assert [len(body["messages"]) for body in strong] == [1] * 3


def test_the_form_of_the_stronger_model_is_its_own(mock: StartMock, submit: Submit) -> None:
    def say(body: dict[str, Any], _: int) -> MockReply | str:
        if body["model"] != "strong":
            return GOOD if "Question 1" in str(body) else "no idea"
        if form_of(body) != "prompt":
            return error_reply(400, "response_format is not supported by this model")
        return GOOD

    endpoint = Endpoint(mock, say)
    write_rows(2)
    options = ("--escalate", "strong", "--max-schema-retries", 0, "-c", 1)
    assert submit(*endpoint.command, *options).code == 0
    forms = [(body["model"], form_of(body)) for body in endpoint.bodies]
    assert ("strong", "prompt") in forms
    assert {form for model, form in forms if model == "m"} == {"json-schema"}


def test_only_what_was_named_is_escalated(mock: StartMock, submit: Submit) -> None:
    endpoint = Endpoint(mock, lambda _body, _seen: "no idea")
    write_rows(1)
    assert submit(*endpoint.command, "--escalate", "strong", "--on", "refusal,empty").code == 3
    assert {body["model"] for body in endpoint.bodies} == {"m"}


def test_an_empty_answer_is_escalated_without_a_schema(mock: StartMock, submit: Submit) -> None:
    endpoint = Endpoint(mock, lambda body, _: "yes" if body["model"] == "strong" else "")
    write_rows(2)
    to = ("--base-url", endpoint.server.url, "-m", "m", "-o", "out.parquet")
    assert submit("in.jsonl", *to, "--escalate", "strong").code == 0
    assert pq.read_table("out.parquet")["response"].to_pylist() == ["yes", "yes"]


def test_a_stream_is_checked_too(mock: StartMock, submit: Submit) -> None:
    endpoint = Endpoint(mock, lambda _, seen: GOOD if seen > 1 else "{}")
    write_rows(2)
    assert submit(*endpoint.command, "--stream").code == 0
    assert pq.read_table("out.parquet")["attempts"].to_pylist() == [2, 2]


def test_a_signal_while_the_form_is_tried_sends_no_more(
    mock: StartMock, running: StartRun, submit: Submit
) -> None:
    def respond(request: MockRequest) -> MockReply:
        reply = completion(request, content=GOOD)
        return reply if go_on else replace(reply, delay_s=1.0)

    go_on = False
    server = mock(respond=respond)
    write_rows(20)
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "-c", 20)
    with running(*to, "--schema", "schema.json") as run:
        while not server.ledger.requests:
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert run.end().code == 130
    assert server.ledger.requests == 1
    go_on = True
    assert submit(*to, "--schema", "schema.json").code == 0
    assert server.ledger.requests == 20


WIDE: dict[str, Any] = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "whole": {"type": "integer"},
        "half": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "yes": {"type": "boolean"},
        "level": {"enum": [1, 2, None]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "who": {"type": "object", "properties": {"name": {"type": "string"}}},
        "any": {},
        "either": {"type": ["string", "integer"]},
        "chain": {"$ref": "#/$defs/node"},
        "a.b é": {"const": "x"},
    },
}
ANSWERS = [
    {
        "text": "ü",
        "whole": 1.0,
        "half": None,
        "yes": True,
        "level": 2,
        "tags": ["a", "b"],
        "who": {"name": "Bo", "more": 1},
        "any": {"k": [1]},
        "either": 7,
        "chain": {"next": {"next": {}}},
        "a.b é": "x",
    },
    {"whole": 1e30, "half": 1, "tags": [], "who": {}, "any": None, "either": "x"},
    {"whole": 123456789012345678901, "level": None},
]


def test_types_are_those_of_the_schema_in_every_reader(mock: StartMock, submit: Submit) -> None:
    duckdb, pandas, polars = map(pytest.importorskip, ("duckdb", "pandas", "polars"))
    Path("schema.json").write_text(json.dumps(WIDE))
    texts = {f"Question {n}?": json.dumps(answer) for n, answer in enumerate(ANSWERS)}
    endpoint = Endpoint(mock, lambda body, _: texts[body["messages"][-1]["content"]])
    write_rows(3)
    assert submit(*endpoint.command, "-c", 1).code == 0
    table = pq.read_table("out.parquet")
    names = [name for name in table.column_names if name.startswith("parsed_")]
    assert names == [f"parsed_{name}" for name in WIDE["properties"]]
    assert [str(table.schema.field(name).type) for name in names] == [
        *("string", "int64", "double", "bool", "int64", "list<element: string>"),
        *("struct<name: string>", "string", "string", "struct<next: string>", "string"),
    ]
    rows = table.select(names).to_pylist()
    assert list(rows[0].values()) == [
        *("ü", 1, None, True, 2, ["a", "b"], {"name": "Bo"}, '{"k":[1]}', "7"),
        *({"next": '{"next":{}}'}, "x"),
    ]
    assert rows[1]["parsed_whole"] is None
    assert (rows[1]["parsed_half"], rows[1]["parsed_tags"]) == (1.0, [])
    assert (rows[1]["parsed_who"], rows[1]["parsed_either"]) == ({"name": None}, '"x"')
    assert rows[2]["parsed_whole"] is None
    by_duckdb = duckdb.sql("SELECT * FROM 'out.parquet'").to_arrow_table().select(names)
    assert by_duckdb.to_pylist() == rows
    assert polars.read_parquet("out.parquet").select(names).to_dicts() == rows
    frame = pandas.read_parquet("out.parquet", columns=names)
    assert frame["parsed_whole"].dtype == "float64"  # pandas has no integer null of its own
    assert frame["parsed_text"].iloc[0] == "ü"
    assert list(frame["parsed_tags"].iloc[0]) == ["a", "b"]


def test_a_clash_of_names_renames_the_input_s_column(mock: StartMock, submit: Submit) -> None:
    endpoint = Endpoint(mock, lambda _body, _seen: GOOD)
    Path("in.jsonl").write_text('{"prompt": "Question 0?", "parsed_kind": "mine"}\n')
    assert submit(*endpoint.command).code == 0
    table = pq.read_table("out.parquet")
    assert table["input_parsed_kind"].to_pylist() == ["mine"]
    assert table["parsed_kind"].to_pylist() == ["a"]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"type": "objekt"}', "not a schema"),
        ('{"type": "array", "items": {}}', "must be an object"),
        ('{"type": "object", "properties": {"a": {"$ref": "http://x.org/y"}}}', "x.org"),
        ('{"type": "object", "properties": {"a": {"$ref": "file:///etc/passwd"}}}', "passwd"),
        ("[1]", "is an object"),
        ("{", "not JSON"),
        ("true", "is an object"),
    ],
)
def test_what_is_no_schema_is_said_before_anything_is_sent(
    submit: Submit, schema: str, words: str
) -> None:
    write_rows(1)
    Path("schema.json").write_text(schema)
    ended = submit("in.jsonl", "--mock", "--schema", "schema.json")
    assert ended.code == 2
    assert words in " ".join(ended.err.split())
    assert not Path("in.mock.parquet").exists()


def test_a_model_of_python_is_a_schema(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("shapes.py").write_text(
        "class Ticket:\n"
        "    @staticmethod\n"
        "    def model_json_schema():\n"
        "        return {'type': 'object', 'properties': {'a': {'type': 'string'}}}\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_rows(1)
    assert submit("in.jsonl", "--mock", "--schema", "shapes:Ticket").code == 0
    assert "parsed_a" in pq.read_schema("in.mock.parquet").names
    for wrong in ("shapes:Gone", "gone_module:Ticket", "shapes:sys"):
        ended = submit("in.jsonl", "--mock", "-o", "x.parquet", "--schema", wrong)
        assert ended.code == 2
        assert wrong in ended.err


def test_python_programs_give_the_schema_itself(mock: StartMock) -> None:
    endpoint = Endpoint(mock, lambda _body, _seen: GOOD)
    summary = batchrun.submit(
        [{"prompt": "Question 0?"}],
        "out.parquet",
        schema=SCHEMA,
        base_url=endpoint.server.url,
        model="m",
    )
    assert summary.exit_code == 0
    assert pq.read_table("out.parquet")["parsed_n"].to_pylist() == [3]
