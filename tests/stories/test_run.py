"""Whole runs against a real server: what is sent, what is kept, what comes out, which code ends it.

Every test is a story of what users are promised, told with the command line and read back from the
file, the journal and the server's ledger. Where a signal or a death is the point, the run is a
process of its own; everywhere else the command runs in this one.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mock_faults import fault_reply, faulty, redirected
from mock_servers import MockServerThread

from batchrun.cli.main import run_command
from batchrun.journal.journal import Journal
from batchrun.journal.state import StateDir
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest, Respond, error_reply

if TYPE_CHECKING:
    from conftest import StartMock, StartRun, Submit

WAIT_S = 30.0  # for events of another process; reached only when something is broken


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory, and no key, option or proxy of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def question(number: int) -> str:
    return f"Question {number}?"


def write_rows(numbers: Sequence[int], path: str = "in.jsonl", **more: object) -> Path:
    """A file with one row a number: ``n``, its prompt, and ``more`` in every row."""
    file = Path(path)
    rows = [{"n": n, "prompt": question(n), **more} for n in numbers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table(path: str | Path = "in.results.parquet") -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return columns


def identity(path: str | Path = "in.results.parquet") -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def to(server: MockServerThread) -> tuple[str, ...]:
    return "--base-url", server.url, "-m", "m", "-c", "16"


def asked(server: MockServerThread) -> list[int]:
    """The numbers of the questions the server has received, in order."""
    return [int(entry.prompt.split()[1][:-1]) for entry in server.ledger.entries if entry.prompt]


class Holding:
    """A server that answers ``count`` requests and lets the test know when more have come."""

    def __init__(self, mock: StartMock, count: int, more: int = 1) -> None:
        self.reached = threading.Event()
        self._count, self._at = count, count + more
        self.server = mock(respond=self._respond)

    def _respond(self, request: MockRequest) -> MockReply | None:
        if request.n >= self._at:
            self.reached.set()
        if request.n <= self._count:
            return None
        return MockReply(raw=b"", ending="hang")

    def wait(self) -> None:
        assert self.reached.wait(WAIT_S)


# Every row ends once


FAULTS = {
    "429": 0.025,
    "429-ms": 0.025,
    "500": 0.0125,
    "502": 0.0125,
    "503": 0.0125,
    "disconnect": 0.0125,
    "truncated_json": 0.01,
    "cut": 0.01,
}


@pytest.mark.parametrize(("rows", "seed"), [(10_000, 0), (300, 1), (300, 2)])
@pytest.mark.slow
def test_every_row_ends_once_in_input_order_and_the_tokens_add_up(
    rows: int, seed: int, mock: StartMock, submit: Submit
) -> None:
    server = mock(Knobs(faults=FAULTS, retry_after_s=0.01, seed=seed))
    write_rows(range(rows))
    ended = submit("in.jsonl", "--base-url", server.url, "-m", "m", "-c", 64, "--json")
    answers = table()
    ledger = server.ledger
    assert answers["n"] == list(range(rows))
    assert all(ledger.faults[kind] for kind in FAULTS) or rows < 1000
    failed = [n for n, status in enumerate(answers["status"]) if status != "ok"]
    assert len(failed) <= rows // 1000
    assert ended.code == (3 if failed else 0)
    assert {answers["error_code"][n] for n in failed} <= {"disconnected", "bad_json", "cut"}
    assert all(answers["in_doubt_attempts"][n] == 3 for n in failed)
    for n, (status, response) in enumerate(
        zip(answers["status"], answers["response"], strict=True)
    ):
        assert status == "error" or response == f"[synthetic] {question(n)}"
    assert ledger.delivered_answers == rows - len(failed)
    for column, told in (
        ("prompt_tokens", ledger.delivered.prompt_tokens),
        ("completion_tokens", ledger.delivered.completion_tokens),
        ("total_tokens", ledger.delivered.total_tokens),
    ):
        assert sum(tokens or 0 for tokens in answers[column]) == told
    this_run = ended.summary["this_run"]
    assert this_run["attempts"] == ledger.requests == sum(answers["attempts"])
    in_doubt = ledger.billed_answers - ledger.delivered_answers
    assert this_run["in_doubt"] == in_doubt == sum(answers["in_doubt_attempts"])
    assert this_run["rate_limited"] == ledger.statuses[429]


def test_the_request_of_mistrals_introduction_goes_over_the_wire(
    mock: StartMock, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mock(Knobs(key="the-key"))
    monkeypatch.setenv("BATCHRUN_API_KEY", "the-key")
    row = {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello!"},
        ],
        "stream": False,
    }
    Path("in.jsonl").write_text(json.dumps(row) + "\n")
    assert submit("in.jsonl", "--base-url", server.url, "-m", "Mistral-chat").code == 0
    (entry,) = server.ledger.entries
    assert entry.path == "/v1/chat/completions"
    assert json.loads(entry.body) == {"model": "Mistral-chat", **row}
    assert entry.body == json.dumps(json.loads(entry.body), separators=(",", ":")).encode()
    assert entry.headers["Authorization"] == "Bearer the-key"
    assert entry.headers["Content-Type"] == "application/json"


def test_an_input_without_rows_becomes_an_empty_table_with_the_full_schema(submit: Submit) -> None:
    Path("in.jsonl").write_text("")
    assert submit("in.jsonl", "--mock").code == 0
    published = pq.read_table("in.mock.parquet")
    assert published.num_rows == 0
    assert {"custom_id", "response", "response_body"} <= set(published.schema.names)


def test_a_row_that_cannot_become_a_request_is_an_error_row_and_stops_nothing(
    mock: StartMock, submit: Submit
) -> None:
    server = mock()
    bad = '{"prompt": \n{"prompt": null}\n{"prompt": " "}\n'
    Path("in.jsonl").write_text('{"prompt": "Question 0?"}\n' + bad)
    ended = submit("in.jsonl", *to(server), "--json")
    assert ended.code == 3
    answers = table()
    assert answers["status"] == ["ok", "error", "error", "error"]
    assert answers["error_kind"] == [None, *["invalid_input"] * 3]
    assert answers["error_code"] == [None, "broken_json", "null_prompt", "blank_prompt"]
    assert answers["custom_id"] == ["1", "2", "3", "4"]
    assert [each["code"] for each in ended.summary["errors"]] == [*answers["error_code"][1:]]
    assert asked(server) == [0]
    # Recomputed, not remembered: the corrected row is sent, the others are not.
    Path("in.jsonl").write_text('{"prompt": "Question 0?"}\n{"prompt": "Question 1?"}\n')
    assert submit("in.jsonl", *to(server)).code == 0
    assert asked(server) == [0, 1]


# Killed and run again


@pytest.mark.slow
def test_no_journaled_answer_is_asked_again_after_kill_9(
    mock: StartMock, submit: Submit, tmp_path: Path, running: StartRun
) -> None:
    rows, killed_after = 400, 150
    holding = Holding(mock, killed_after, more=8)
    write_rows(range(rows))
    with running("in.jsonl", "--base-url", holding.server.url, "-m", "m", "-c", 8) as process:
        holding.wait()
        process.send_signal(signal.SIGKILL)
        process.wait()
    journaled = held_answers(tmp_path / "in.results.parquet.batchrun")
    assert journaled == killed_after
    assert not Path("in.results.parquet").exists()
    first = {entry.digest for entry in holding.server.ledger.entries if entry.delivered}

    again = mock()
    ended = submit("in.jsonl", *to(again), "--json")
    assert ended.code == 0
    second = {entry.digest for entry in again.ledger.entries}
    assert not first & second
    assert again.ledger.requests == rows - journaled
    assert ended.summary["rows"]["reused"] == journaled
    # Whether the eight in flight were billed nobody knows.
    assert sum(table()["in_doubt_attempts"]) == 8

    shutil.copy("in.jsonl", "undisturbed.jsonl")
    assert submit("undisturbed.jsonl", *to(again)).code == 0
    assert told_by(table()) == told_by(table("undisturbed.results.parquet"))
    assert not Path("in.results.parquet.batchrun").exists()


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_completes(
    mock: StartMock, submit: Submit, running: StartRun
) -> None:
    server = mock(Knobs(latency_s=0.002))
    write_rows(range(600))
    chance = random.Random(7)
    for _ in range(2):
        wanted = server.ledger.requests + chance.randrange(20, 120)
        with running("in.jsonl", *to(server)) as process:
            while server.ledger.requests < wanted and process.poll() is None:
                pass
            process.kill()
            process.wait()
    assert submit("in.jsonl", *to(server)).code == 0
    answers = table()
    assert answers["n"] == list(range(600))
    assert set(answers["status"]) == {"ok"}
    # 16 in flight may be asked again after each death, and nothing else.
    assert server.ledger.requests <= 600 + 2 * 16


def held_answers(state: Path) -> int:
    book = Journal.peek(StateDir(state))
    assert book is not None
    with contextlib.closing(book):
        return book.answers


def told_by(answers: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that depend on the endpoint's answers alone, not on when and how they came."""
    own = {"latency_s", "finished_at", "request_id", "in_doubt_attempts", "attempts"}
    return {name: values for name, values in answers.items() if name not in own}


# A finished run


@pytest.fixture
def finished(mock: StartMock, submit: Submit) -> MockServerThread:
    """in.jsonl with rows 0 to 99, answered and published, by a server that is still there."""
    server = mock()
    write_rows(range(100))
    assert submit("in.jsonl", *to(server)).code == 0
    assert server.ledger.requests == 100
    return server


def new_questions(server: MockServerThread) -> list[int]:
    return sorted(asked(server)[100:])


def test_the_same_command_sends_nothing_and_leaves_the_file_untouched(
    finished: MockServerThread, submit: Submit
) -> None:
    before = identity()
    ended = submit("in.jsonl", *to(finished), "--json")
    assert ended.code == 0
    assert ended.summary["rows"] == {
        **dict.fromkeys(("error", "passing", "pending", "duplicate", "copied"), 0),
        **dict.fromkeys(("truncated", "filtered", "empty"), 0),
        **dict.fromkeys(("total", "ok", "reused"), 100),
    }
    assert finished.ledger.requests == 100
    assert identity() == before
    assert not Path("in.results.parquet.batchrun").exists()


def test_edited_appended_and_deleted_rows_cost_the_edited_and_appended_ones(
    finished: MockServerThread, submit: Submit
) -> None:
    numbers = [n + 1000 if n < 10 else n for n in range(100) if n not in (50, 60, 70)]
    numbers += range(200, 205)
    write_rows(numbers)
    ended = submit("in.jsonl", *to(finished), "--json")
    assert ended.code == 0
    assert new_questions(finished) == [*range(200, 205), *range(1000, 1010)]
    answers = table()
    assert answers["n"] == numbers
    assert answers["response"] == [f"[synthetic] {question(n)}" for n in numbers]
    assert ended.summary["backup"] is None
    assert ended.summary["unused"]["answers"] == 13
    before = identity()
    assert submit("in.jsonl", *to(finished)).code == 0
    assert identity() == before


def test_other_settings_are_refused_and_the_answers_at_stake_are_counted(
    finished: MockServerThread, submit: Submit
) -> None:
    before = identity()
    ended = submit("in.jsonl", *to(finished), "--system", "Answer in one word.")
    assert ended.code == 2
    assert "100 answers" in ended.err
    assert "Answer in one word." in ended.err
    assert finished.ledger.requests == 100
    assert identity() == before
    assert not Path("in.results.parquet.batchrun").exists()


def test_overwrite_keeps_the_answers_of_other_settings_as_bak(
    finished: MockServerThread, submit: Submit
) -> None:
    other = ("in.jsonl", *to(finished), "--system", "Briefly.", "--overwrite")
    assert submit(*other).code == 0
    assert finished.ledger.requests == 200
    assert table("in.results.parquet.bak")["n"] == list(range(100))
    # In a crontab: the same command again finds a run begun with these settings.
    before, backup = identity(), identity("in.results.parquet.bak")
    assert submit(*other).code == 0
    assert finished.ledger.requests == 200
    assert identity() == before
    assert identity("in.results.parquet.bak") == backup


def test_delivery_settings_change_freely(finished: MockServerThread, submit: Submit) -> None:
    before = identity()
    ended = submit("in.jsonl", "--base-url", finished.url, "-m", "m", "--stream", "--rpm", 5)
    assert ended.code == 0
    assert identity() == before


def test_reordered_and_duplicated_rows_find_their_answers(
    finished: MockServerThread, submit: Submit
) -> None:
    numbers = [*range(99, -1, -1), 7, 7]
    write_rows(numbers)
    assert submit("in.jsonl", *to(finished)).code == 0
    assert new_questions(finished) == [7, 7]
    assert table()["n"] == numbers


def test_changed_carried_columns_are_published_without_a_request(
    finished: MockServerThread, submit: Submit
) -> None:
    write_rows(range(100), topic="physics")
    before = table()
    assert submit("in.jsonl", *to(finished)).code == 0
    assert finished.ledger.requests == 100
    after = table()
    assert after["topic"] == ["physics"] * 100
    assert {name: after[name] for name in before} == before


def test_changed_publishing_settings_are_published_without_a_request(
    finished: MockServerThread, submit: Submit
) -> None:
    ended = submit("in.jsonl", *to(finished), "--no-response-body", "--carry", "none")
    assert ended.code == 0
    answers = table()
    assert "response_body" not in answers
    assert "n" not in answers
    assert answers["response"] == [f"[synthetic] {question(n)}" for n in range(100)]
    # And back again: the answers are rebuilt from their columns.
    assert submit("in.jsonl", *to(finished)).code == 0
    assert finished.ledger.requests == 100
    assert table()["response"] == answers["response"]


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("options", [(), ("--no-response-body",)], ids=["whole", "columns"])
def test_a_published_output_is_the_memory_of_the_next_run(
    output: str, options: tuple[str, ...], mock: StartMock, submit: Submit
) -> None:
    server = mock()
    command = ("in.jsonl", *to(server), "-o", output, *options)
    write_rows(range(20))
    assert submit(*command).code == 0
    before = identity(output)
    assert submit(*command).code == 0
    assert identity(output) == before
    write_rows([*range(5, 20), 100])
    ended = submit(*command, "--json")
    assert ended.code == 0
    assert asked(server)[20:] == [100]
    assert ended.summary["rows"]["reused"] == 15
    assert responses(output) == [f"[synthetic] {question(n)}" for n in [*range(5, 20), 100]]


def responses(output: str) -> list[str]:
    if output.endswith(".parquet"):
        texts: list[str] = table(output)["response"]
        return texts
    lines = [json.loads(line) for line in Path(output).read_text().splitlines()]
    return [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]


def test_a_trial_with_limit_is_part_of_the_whole_run(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(range(30))
    command = ("in.jsonl", *to(server))
    assert submit(*command, "--limit", 10).code == 0
    assert table()["n"] == list(range(10))
    assert submit(*command, "-n", 20).code == 0
    assert submit(*command).code == 0
    assert sorted(asked(server)) == list(range(30))
    assert table()["n"] == list(range(30))


def test_a_limit_below_what_is_held_is_refused(finished: MockServerThread, submit: Submit) -> None:
    before = identity()
    ended = submit("in.jsonl", *to(finished), "--limit", 10)
    assert ended.code == 2
    assert "-o trial.parquet" in ended.err
    assert identity() == before
    assert not Path("in.results.parquet.batchrun").exists()


def test_rejected_rows_wait_for_retry_failed_and_passing_ones_do_not(
    mock: StartMock, submit: Submit
) -> None:
    failing = {1: "400", 2: "500"}

    def respond(request: MockRequest) -> MockReply | None:
        kind = failing.get(int(request.prompt.split()[1][:-1]))
        return fault_reply(kind, request) if kind else None

    server = mock(respond=respond)
    write_rows(range(4))
    command = ("in.jsonl", *to(server), "--max-retries", 0)
    assert submit(*command).code == 3
    assert table()["error_kind"] == [None, "rejected", "transient", None]
    failing.clear()
    ended = submit(*command, "--json")
    assert ended.code == 3
    assert ended.summary["rows"]["reused"] == 3
    assert asked(server)[4:] == [2]
    before = identity()
    assert submit(*command).code == 3
    assert identity() == before
    assert submit(*command, "--retry-failed").code == 0
    assert asked(server)[5:] == [1]
    assert set(table()["status"]) == {"ok"}
    assert submit(*command, "--retry-failed").code == 0
    assert server.ledger.requests == 6


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_code_names_the_cause_also_when_the_doubt_is_spent(
    suffix: str, mock: StartMock, submit: Submit
) -> None:
    kinds = {0: "504", 1: "disconnect", 2: "cut", 3: "truncated_json", 4: "408"}

    def respond(request: MockRequest) -> MockReply | None:
        kind = kinds.get(int(request.prompt.split()[1][:-1]))
        if kind == "408":
            return error_reply(408, "too slow")
        return fault_reply(kind, request) if kind else None

    server = mock(respond=respond)
    write_rows(range(6))
    output = f"out.{suffix}"
    command = ("in.jsonl", *to(server), "-o", output, "--max-in-doubt-retries", 0, "--json")
    codes = {"504", "disconnected", "cut", "bad_json", "408"}
    for asked_in_all in (6, 6):
        ended = submit(*command)
        assert ended.code == 3
        assert {cause["code"] for cause in ended.summary["errors"]} == codes
        assert not any(cause["retried_on_rerun"] for cause in ended.summary["errors"])
        assert server.ledger.requests == asked_in_all
    # An edited row makes the next run read the old output back: the doubt is still spent.
    write_rows(range(7))
    assert submit(*command).code == 3
    assert server.ledger.requests == 7
    kinds.clear()
    assert submit(*command, "--retry-failed").code == 0
    assert server.ledger.requests == 12


def test_retry_failed_takes_the_doubt_anew(mock: StartMock, submit: Submit) -> None:
    # Between two faults there is an answer only for who sends more than once.
    server = mock(respond=lambda r: fault_reply("cut", r) if r.n in (1, 2, 3, 4) else None)
    write_rows([0])
    command = ("in.jsonl", *to(server), "--max-in-doubt-retries", 2)
    assert submit(*command).code == 3
    assert table()["in_doubt_attempts"] == [3]
    assert submit(*command).code == 3
    assert server.ledger.requests == 3
    # The first of these is cut again; with the old doubts counted it would have been the last.
    assert submit(*command, "--retry-failed").code == 0
    assert server.ledger.requests == 5


@pytest.mark.parametrize(
    ("headers", "request_id"),
    [
        ({"x-litellm-call-id": "call-1", "cf-ray": "ray-1"}, "call-1"),
        ({"x-request-id": "req-1", "x-litellm-call-id": "call-1"}, "req-1"),
        ({}, "chatcmpl-9"),
    ],
    ids=["LiteLLM", "x-request-id first", "only in the body"],
)
def test_a_row_has_the_endpoints_name_for_it(
    headers: dict[str, str], request_id: str, mock: StartMock, submit: Submit
) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}}
    body = {"id": "chatcmpl-9", "choices": [{**choice, "finish_reason": "stop"}]}
    text = json.dumps(body)
    told = {"Content-Type": "application/json", "Content-Length": len(text), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    raw = f"HTTP/1.1 200 OK\r\n{head}\r\n{text}".encode()
    server = mock(respond=lambda request: MockReply(raw=raw))
    write_rows([0])
    assert submit("in.jsonl", *to(server)).code == 0
    assert table()["request_id"] == [request_id]


def test_allowed_failures_end_with_0(mock: StartMock, submit: Submit) -> None:
    server = mock(respond=lambda r: fault_reply("400", r) if question(3) in r.prompt else None)
    write_rows(range(10))
    assert submit("in.jsonl", *to(server), "--allow-failures", "5%").code == 3
    assert submit("in.jsonl", *to(server), "--allow-failures", "10%").code == 0
    assert submit("in.jsonl", *to(server), "--allow-failures", 1).code == 0


def test_mock_and_real_never_mix(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(range(3))
    assert submit("in.jsonl", "--mock", "-o", "out.parquet").code == 0
    ended = submit("in.jsonl", *to(server), "-o", "out.parquet")
    assert ended.code == 2
    assert "synthetic" in ended.err
    assert server.ledger.requests == 0
    assert submit("in.jsonl", *to(server), "-o", "real.parquet").code == 0
    assert submit("in.jsonl", "--mock", "-m", "m", "-o", "real.parquet").code == 2


def test_answers_of_rows_that_are_gone_before_anything_was_published_are_kept(
    mock: StartMock, submit: Submit, running: StartRun
) -> None:
    holding = Holding(mock, 10)
    write_rows(range(20))
    with running("in.jsonl", "--base-url", holding.server.url, "-m", "m", "-c", 1) as process:
        holding.wait()
        process.kill()
    # Three answered rows are deleted before the run ever published.
    write_rows(range(3, 20))
    server = mock()
    ended = submit("in.jsonl", *to(server), "--json")
    assert ended.code == 0
    assert server.ledger.requests == 10
    assert any("3 answers" in note for note in ended.summary["notes"])
    assert run_command(["status", "in.results.parquet"]) == 0
    before = identity()
    assert submit("in.jsonl", *to(server)).code == 0
    assert identity() == before
    assert not Path("in.results.parquet.bak").exists()
    # Whoever puts the rows back gets the answers back.
    write_rows(range(20))
    assert submit("in.jsonl", *to(server)).code == 0
    assert server.ledger.requests == 10
    assert table()["response"] == [f"[synthetic] {question(n)}" for n in range(20)]
    assert not Path("in.results.parquet.batchrun").exists()


# The input


def test_an_input_that_changes_while_it_is_read_is_not_published(
    mock: StartMock, submit: Submit
) -> None:
    path = write_rows(range(20))

    def respond(request: MockRequest) -> MockReply | None:
        if request.n == 10:
            with path.open("a") as file:
                file.write('{"n": 99, "prompt": "Question 99?"}\n')
        return None

    server = mock(respond=respond)
    ended = submit("in.jsonl", *to(server), "--json")
    assert ended.code == 75, ended.err
    assert "changed" in ended.summary["reason"]
    assert not Path("in.results.parquet").exists()
    assert submit("in.jsonl", *to(server)).code == 0
    assert sorted(asked(server)) == [*range(20), 99]


def test_stdin_is_remembered_by_its_rows(mock: StartMock, running: StartRun) -> None:
    server = mock()
    rows = "".join(json.dumps({"prompt": question(n)}) + "\n" for n in range(5))
    command = ("-", *to(server), "-o", "out.parquet")
    with running(*command, stdin=subprocess.PIPE) as process:
        assert process.end(rows).code == 0
    before = identity("out.parquet")
    with running(*command, stdin=subprocess.PIPE) as process:
        assert process.end(rows).code == 0
    assert identity("out.parquet") == before
    with running(*command, stdin=subprocess.PIPE) as process:
        assert process.end(rows + '{"prompt": "Question 5?"}\n').code == 0
    assert asked(server)[5:] == [5]


def rows_of(out: str) -> list[dict[str, Any]]:
    """Lines of an output, without what the last one says of the run."""
    lines = [json.loads(line) for line in out.splitlines()]
    del lines[-1]["batchrun"]["run"]
    return lines


def test_lines_on_stdout_can_be_resumed_with_a_state(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(range(5))
    ended = submit("in.jsonl", *to(server), "-o", "-", "--state", "state")
    assert ended.code == 0
    assert len(ended.out.splitlines()) == 5
    again = submit("in.jsonl", *to(server), "-o", "-", "--state", "state")
    assert again.code == 0
    assert rows_of(again.out) == rows_of(ended.out)
    assert server.ledger.requests == 5


def test_several_files_become_one_table_in_the_order_given(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(range(3), "b.jsonl")
    packed = write_rows(range(3, 5), "plain.jsonl").read_bytes()
    Path("a.jsonl.gz").write_bytes(gzip.compress(packed))
    pq.write_table(pa.table({"n": [5], "prompt": [question(5)]}), "c.parquet")
    ended = submit("b.jsonl", "a.jsonl.gz", "c.parquet", *to(server), "-o", "out.parquet")
    assert ended.code == 0
    assert table("out.parquet")["n"] == list(range(6))
    assert table("out.parquet")["custom_id"] == [str(n) for n in range(1, 7)]


# What is wrong before or while running


def broken_inputs() -> dict[str, tuple[Callable[[], object], int, str]]:
    def truncated() -> None:
        pq.write_table(pa.table({"prompt": [question(n) for n in range(1000)]}), "in.parquet")
        os.truncate("in.parquet", 600)

    def useless() -> None:
        pq.write_table(pa.table({"id": [1], "question": ["Why?"]}), "in.parquet")

    return {
        "missing": (lambda: None, 2, "in.parquet"),
        "truncated": (truncated, 74, "in.parquet"),
        "text": (lambda: Path("in.parquet").write_text("Why is the sky blue?\n"), 2, "plain text"),
        "no column": (useless, 2, "--prompt-column question"),
    }


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("id,prompt\n1,Why?\n", "mv in.jsonl in.csv"),
        ('[{"prompt": "Why?"}]', "> in.converted.jsonl"),
        ("{'prompt': 1}\n", "> in.converted.jsonl"),
    ],
)
def test_a_file_that_is_no_json_lines_is_refused_and_nothing_is_published(
    content: str, advice: str, mock: StartMock, submit: Submit
) -> None:
    Path("in.jsonl").write_text(content)
    server = mock()
    ended = submit("in.jsonl", *to(server))
    assert ended.code == 2
    assert "in.jsonl is not JSON lines: it looks like" in ended.err
    assert advice in ended.err
    assert "--allow-failures" not in ended.err
    assert server.ledger.requests == 0
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("case", broken_inputs())
def test_an_input_that_cannot_be_read_is_one_clear_line(
    case: str, mock: StartMock, submit: Submit
) -> None:
    make, code, said = broken_inputs()[case]
    make()
    server = mock()
    ended = submit("in.parquet", *to(server))
    assert ended.code == code
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert server.ledger.requests == 0
    assert {path.name for path in Path().iterdir()} <= {"in.parquet"}


def test_a_truncated_gzip_is_a_local_error(mock: StartMock, submit: Submit) -> None:
    packed = gzip.compress(write_rows(range(5000)).read_bytes())
    Path("in.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    ended = submit("in.jsonl.gz", *to(mock()))
    assert ended.code == 74
    assert "in.jsonl.gz" in ended.err


@pytest.mark.parametrize("output", ["/proc/out.parquet", "/proc/self/out.jsonl"])
def test_an_output_that_cannot_be_written_is_found_before_anything_is_sent(
    output: str, mock: StartMock, submit: Submit
) -> None:
    if not Path("/proc/self").is_dir():
        output = "/dev/fd/out.parquet"
    server = mock()
    write_rows(range(3))
    ended = submit("in.jsonl", *to(server), "-o", output)
    assert ended.code == 74
    assert output in ended.err
    assert server.ledger.requests == 0
    assert submit("in.jsonl", *to(server), "-o", output, "--state", "state").code == 74
    assert server.ledger.requests == 0


@pytest.mark.parametrize("output", ["in.jsonl/out.parquet", "nowhere/out.parquet"])
def test_an_output_without_a_directory_is_a_usage_error(
    output: str, mock: StartMock, submit: Submit
) -> None:
    server = mock()
    write_rows(range(3))
    assert submit("in.jsonl", *to(server), "-o", output).code == 2
    assert server.ledger.requests == 0


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_what_was_written_counts(
    mock: StartMock, submit: Submit, running: StartRun
) -> None:
    server = mock()
    write_rows(range(400))

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with running("in.jsonl", *to(server), "--json", preexec_fn=small_files_only) as process:
        ended = process.end()
    assert ended.code == 74, ended.err
    assert "journal" in ended.summary["reason"]
    assert "Traceback" not in ended.err
    held = held_answers(Path("in.results.parquet.batchrun"))
    assert 50 < held < 400
    before = server.ledger.requests
    assert submit("in.jsonl", *to(server)).code == 0
    assert server.ledger.requests - before == 400 - held
    assert set(table()["status"]) == {"ok"}


def test_a_file_of_somebody_else_is_never_replaced(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(range(3))
    pq.write_table(pa.table({"precious": [1]}), "out.parquet")
    before = identity("out.parquet")
    ended = submit("in.jsonl", *to(server), "-o", "out.parquet")
    assert ended.code == 2
    assert "--overwrite" in ended.err
    assert identity("out.parquet") == before
    assert server.ledger.requests == 0
    assert submit("in.jsonl", *to(server), "-o", "out.parquet", "--overwrite").code == 0
    assert table("out.parquet.bak") == {"precious": [1]}
    assert table("out.parquet")["n"] == [0, 1, 2]


def refused(kind: str) -> Respond:
    return lambda request: fault_reply(kind, request)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("401", "refused the key"),
        ("429-quota", "quota"),
        ("402", "payment"),
        ("403", "access"),
        ("redirect", "redirects to"),
    ],
)
@pytest.mark.slow
def test_an_endpoint_that_refuses_ends_the_run_and_blames_no_row(
    kind: str, said: str, mock: StartMock, submit: Submit
) -> None:
    server = mock(respond=refused(kind))
    write_rows(range(200))
    ended = submit("in.jsonl", *to(server), "--json")
    assert ended.code == 4
    summary = ended.summary
    assert said in summary["reason"]
    assert summary["state"] == "refused"
    assert summary["rows"]["pending"] == 200
    assert summary["rows"]["error"] == 0
    assert not Path("in.results.parquet").exists()
    # Nothing new was started after the first refusal was read.
    assert server.ledger.requests <= 2 * 16
    assert submit("in.jsonl", *to(mock())).code == 0


def test_a_wrong_key_is_never_shown(
    mock: StartMock, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mock(Knobs(key="right"))
    monkeypatch.setenv("WRONG", "wrong-key-0123456789")
    write_rows(range(3))
    ended = submit("in.jsonl", *to(server), "--api-key-env", "WRONG", "--log-file", "log.txt")
    assert ended.code == 4
    assert "$WRONG" in ended.err or "key" in ended.err
    everything = ended.err + ended.out + Path("log.txt").read_text()
    everything += "".join(p.read_bytes().decode("latin-1") for p in Path().glob("*.batchrun/*"))
    assert "wrong-key" not in everything


def test_a_wrong_url_ends_the_run(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(range(3))
    ended = submit("in.jsonl", "--base-url", f"{server.url}/api/v9", "-m", "m", "--json")
    assert ended.code == 4
    assert "404" in ended.summary["reason"]
    assert ended.summary["rows"]["pending"] == 3


def test_an_unknown_model_ends_the_run_and_the_offer_is_named(
    mock: StartMock, submit: Submit
) -> None:
    server = mock(Knobs(models=("Qwen3-32B", "tiny")))
    write_rows(range(3))
    ended = submit("in.jsonl", *to(server))
    assert ended.code == 4
    assert '"m"' in ended.err
    assert "Qwen3-32B" in ended.err
    assert submit("in.jsonl", "--base-url", server.url, "-m", "tiny").code == 0


def test_an_unknown_model_of_one_row_is_that_rows_error(mock: StartMock, submit: Submit) -> None:
    server = mock(Knobs(models=("m",)))
    Path("in.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}]}\n'
        '{"messages": [{"role": "user", "content": "b"}], "model": "nonsense"}\n'
    )
    pinned = ("in.jsonl", "--base-url", server.url)
    Path("config.toml").write_text('model = "m"\n')
    assert submit(*pinned, "--config", "config.toml").code == 3
    assert table()["error_kind"] == [None, "rejected"]


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_a_closed_port_is_worth_another_try_later(submit: Submit) -> None:
    write_rows(range(3))
    url = f"http://127.0.0.1:{closed_port()}"
    ended = submit("in.jsonl", "--base-url", url, "-m", "m", "--connect-timeout", 1, "--json")
    assert ended.code == 75
    assert "cannot reach" in ended.summary["reason"]
    assert ended.summary["rows"]["pending"] == 3
    assert not Path("in.results.parquet").exists()


def test_a_host_that_does_not_exist_needs_a_person(submit: Submit) -> None:
    try:
        socket.getaddrinfo("batchrun.invalid", 443)
    except socket.gaierror as exc:
        # Without a network the resolver only says "try later".
        code = 4 if exc.errno == socket.EAI_NONAME else 75
    write_rows(range(3))
    ended = submit("in.jsonl", "--base-url", "https://batchrun.invalid", "-m", "m", "--json")
    assert ended.code == code
    assert "batchrun.invalid" in ended.summary["reason"]
    assert ended.summary["rows"]["pending"] == 3


def test_a_redirect_is_not_followed_and_nothing_reaches_the_other_origin(
    mock: StartMock, submit: Submit
) -> None:
    other = mock()
    server = mock(respond=faulty(redirected(f"{other.url}/v1/chat/completions")))
    write_rows(range(3))
    ended = submit("in.jsonl", *to(server))
    assert ended.code == 4
    assert other.url in ended.err
    assert other.ledger.requests == 0


def test_first_rows_all_rejected_alike_end_the_run_and_stay_pending(
    mock: StartMock, submit: Submit
) -> None:
    server = mock(Knobs(faults={"422": 1.0}))
    write_rows(range(500))
    ended = submit("in.jsonl", "--base-url", server.url, "-m", "m", "-c", 4, "--json")
    assert ended.code == 4
    assert "store" in ended.summary["reason"]
    assert ended.summary["rows"]["pending"] == 500
    assert ended.summary["rows"]["error"] == 0
    assert server.ledger.requests <= 20 + 4
    # The counted rows are asked again once the cause is gone.
    assert submit("in.jsonl", *to(mock()), "--json").summary["rows"]["ok"] == 500


def test_rows_too_long_for_the_model_never_end_a_run_early(mock: StartMock, submit: Submit) -> None:
    server = mock(Knobs(faults={"context_length": 1.0}))
    write_rows(range(50))
    ended = submit("in.jsonl", *to(server), "--json")
    assert ended.code == 3
    assert ended.summary["rows"]["error"] == 50


def test_a_page_instead_of_every_answer_ends_the_run(mock: StartMock, submit: Submit) -> None:
    server = mock(Knobs(faults={"html": 1.0}))
    write_rows(range(100))
    ended = submit("in.jsonl", *to(server), "--max-retries", 0, "--json")
    assert ended.code == 4
    assert "HTML" in ended.summary["reason"]
    assert ended.summary["rows"]["pending"] == 100


def test_a_stream_brings_answers_usage_and_the_time_to_the_first_token(
    mock: StartMock, submit: Submit
) -> None:
    server = mock(Knobs(stream_split_bytes=11))
    write_rows(range(10))
    assert submit("in.jsonl", *to(server), "--stream").code == 0
    answers = table()
    assert answers["response"] == [f"[synthetic] {question(n)}" for n in range(10)]
    assert sum(answers["total_tokens"]) == server.ledger.delivered.total_tokens
    for first, whole in zip(answers["ttft_s"], answers["latency_s"], strict=True):
        assert 0 < first <= whole
    assert all(entry.streamed for entry in server.ledger.entries)


def test_abort_after_0_lets_every_row_fail(mock: StartMock, submit: Submit) -> None:
    server = mock(Knobs(faults={"422": 1.0}))
    write_rows(range(50))
    assert submit("in.jsonl", *to(server), "--abort-after", 0).code == 3
    assert server.ledger.requests == 50


def test_a_limit_that_resets_tomorrow_stops_the_run(mock: StartMock, submit: Submit) -> None:
    daily = {"Retry-After": "86400"}
    server = mock(
        respond=lambda r: error_reply(429, "daily limit", headers=daily) if r.n > 5 else None
    )
    write_rows(range(50))
    ended = submit("in.jsonl", "--base-url", server.url, "-m", "m", "-c", 1, "--json")
    assert ended.code == 75
    assert "resets at" in ended.summary["reason"]
    assert ended.summary["rows"]["ok"] == 5
    assert ended.summary["rows"]["pending"] == 45
    assert server.ledger.requests == 6


def test_without_a_model_anywhere_nothing_is_sent(mock: StartMock, submit: Submit) -> None:
    server = mock(Knobs())
    write_rows(range(3))
    ended = submit("in.jsonl", "--base-url", server.url)
    assert ended.code == 2
    assert "no model" in ended.err
    assert server.ledger.requests == 0
    write_rows(range(3), model="its own")
    assert submit("in.jsonl", "--base-url", server.url, "--body-columns", "model").code == 0
    assert not Path("in.results.parquet.batchrun").exists()


def test_a_disk_too_small_for_the_answers_is_said_at_the_start(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(".")._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    write_rows(range(10))
    ended = submit("in.jsonl", "--mock")
    assert "free; journal and output may need about" in " ".join(ended.err.split())
    assert ended.code == 0


# Tables and names as they are found


@pytest.mark.skipif(sys.platform == "darwin", reason="there, file names are UTF-8")
@pytest.mark.parametrize(
    "name", [b"\xff a.jsonl", b"a\nb'c.jsonl", b"-dash.jsonl", b"file:x.jsonl"]
)
def test_a_file_of_any_name_is_read_published_and_read_again(
    name: bytes, mock: StartMock, submit: Submit
) -> None:
    server = mock()
    source = Path(os.fsdecode(name))
    write_rows(range(3), str(source))
    output = Path(os.fsdecode(name.removesuffix(b".jsonl") + b".results.parquet"))
    named = () if name.isascii() else ("-o", "out.parquet")
    ended = submit(*to(server), *named, "--", source)
    assert ended.code == 0
    if named:  # only what others wrote has such a name
        shutil.copy("out.parquet", output)
        output = Path("out.parquet")
        again = pq.read_table("out.parquet")["response"].to_pylist()
        copy = Path(os.fsdecode(b"\xff a.results.parquet"))
        assert submit(*to(server), "-o", "b.parquet", "--", copy).code == 0
        assert table("b.parquet")["input_response"] == again
    [following] = [line for line in ended.err.splitlines() if line.startswith("next")] or [""]
    if following:
        command = following.removeprefix("next").strip().replace("batchrun", "echo", 1)
        subprocess.run(["bash", "-c", command], check=True)
    # The output is an input as well, and a converted one.
    assert submit("-o", "again.jsonl", *to(server), "--", output).code == 0
    with output.open("rb") as table_file:
        assert pq.read_table(table_file)["response"].to_pylist()[0]
    assert run_command(["collect", "-o", "copy.parquet", "--", str(output)]) == 0
    write_rows(range(4), str(source))
    assert submit(*to(server), *named, "--", source).code == 0
    assert asked(server)[-1] == 3
    assert run_command(["status", "--", str(output)]) == 0


def test_what_a_user_may_not_expect_of_a_table_is_said_at_the_start(
    mock: StartMock, submit: Submit
) -> None:
    Path("in.jsonl").write_text(
        '{"id": 1, "prompt": "Question 0?", "meta": {"a": 1}, "mixed": 1, "same": "x"}\n'
        '{"id": 2, "prompt": "Question 1?", "meta": null, "mixed": "x", "same": "y"}\n'
    )
    said = " ".join(submit("in.jsonl", *to(mock())).err.split())
    assert 'column "id" is only carried; name it custom_id' in said
    assert "carried as JSON text (nested, mixed or over-large values): meta, mixed" in said
    Path("b.jsonl").write_text('{"custom_id": 1, "id": 1, "prompt": "Question 0?"}\n' * 3)
    said = " ".join(submit("b.jsonl", *to(mock())).err.split())
    assert "2 rows have the custom_id of an earlier row, such as rows 1 and 2" in said
    assert '"id"' not in said


def test_folder_columns_are_published_also_by_collect_from_elsewhere(
    mock: StartMock, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace = Path("year=2026")
    for lang in ("de", "fr"):
        (workplace / f"data/lang={lang}").mkdir(parents=True)
    write_rows(range(2), str(workplace / "data/lang=de/a.jsonl"))
    write_rows(range(2, 4), str(workplace / "data/lang=fr/a.jsonl"))
    above = Path.cwd()
    monkeypatch.chdir(workplace)
    server = mock(Knobs(faults={"429": 1.0}))
    stopped = submit("data", "-o", "out.parquet", "--deadline", "1s", "--drain", "0", *to(server))
    assert stopped.code == 75
    monkeypatch.chdir(above)
    assert run_command(["collect", "year=2026/out.parquet", "-o", "c.parquet"]) == 0
    assert pq.read_schema("c.parquet").names[:3] == ["n", "prompt", "lang"]
    monkeypatch.chdir(workplace)
    assert submit("data", "-o", "out.parquet", *to(mock())).code == 0
    assert table("out.parquet")["lang"] == ["de", "de", "fr", "fr"]


def test_two_inputs_of_one_default_output_are_told_apart(mock: StartMock, submit: Submit) -> None:
    server = mock()
    write_rows(range(3))
    pq.write_table(pa.table({"prompt": [question(n) for n in range(2, 5)]}), "in.parquet")
    assert "was made from" not in submit("in.jsonl", *to(server)).err
    ended = submit("in.parquet", *to(server))
    said = " ".join(ended.err.split())
    assert "in.results.parquet was made from in.jsonl, and is now made from in.parquet" in said
    assert asked(server)[3:] == [3, 4]
    assert "was made from" not in submit("in.parquet", *to(server)).err
    # A name that was asked for may have any input.
    assert submit("in.jsonl", "-o", "x.parquet", *to(server)).code == 0
    assert "was made from" not in submit("in.parquet", "-o", "x.parquet", *to(server)).err
