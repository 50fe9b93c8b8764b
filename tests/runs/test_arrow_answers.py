"""Arrow in, Arrow out: every row once, in order, whatever the pace, the end or the caller does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.api import Options
from batchrun.config import JSONValue
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest, error_reply
from batchrun.money import Price
from batchrun.runs.answers import PIECE_ROWS

if TYPE_CHECKING:
    from conftest import StartMock

WAIT_S = 30.0
OF_THE_RUN = ["latency_s", "ttft_s", "finished_at", "request_id", "response_body"]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def table(rows: int, first: int = 0) -> pa.Table:
    numbers = range(first, first + rows)
    return pa.table({"n": numbers, "prompt": [f"Question {n}?" for n in numbers]})


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def no_threads_left() -> bool:
    return not any(
        t.name.startswith(("batchrun-answers", "batchrun-read")) for t in threading.enumerate()
    )


@pytest.mark.parametrize("dedupe", [False, True])
def test_the_rows_are_those_of_submit(mock: StartMock, *, dedupe: bool) -> None:
    """Invalid rows, failures, typed columns, prices, repeated rows: as a run of files has them."""
    schema: dict[str, JSONValue] = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
    }
    asked = [f"Question {n % 900}?" if n % 50 else None for n in range(1_000)]
    source = pa.table({"n": range(1_000), "prompt": asked, "custom_id": map(str, range(1_000))})
    pq.write_table(source, "in.parquet")
    options: Options = {"model": "m", "schema": schema, "price": Price.parse("1,2")}
    options["dedupe"] = dedupe
    knobs = Knobs(faults={"400": 0.1}, seed=5)
    options["base_url"] = mock(knobs).url
    assert batchrun.submit("in.parquet", "out.parquet", **options).published
    from_files = batchrun.read("out.parquet")
    options["base_url"] = mock(knobs).url
    with batchrun.answers(source, **options) as answers:
        streamed = pa.Table.from_batches(answers, answers.schema)
    assert streamed.schema.names == from_files.schema.names
    assert streamed.schema.types == from_files.schema.types
    assert streamed["status"].to_pylist().count("error") >= 20
    differing = [
        name
        for name in streamed.column_names
        if name not in [*OF_THE_RUN, "error_message"] and streamed[name] != from_files[name]
    ]
    assert differing == []


def test_every_shape_of_source_gives_the_same(mock: StartMock) -> None:
    source = table(1_300)
    chunks = source.to_batches(max_chunksize=300)
    many = [source, source.to_reader(), iter(chunks), [source.slice(0, 1_000), source.slice(1_000)]]
    url = mock().url
    for each in many:
        answers = batchrun.answers(each, base_url=url, model="m")
        batches = list(answers)
        assert all(batch.schema == answers.schema for batch in batches)
        made = pa.Table.from_batches(batches)
        assert made["n"].to_pylist() == list(range(1_300))
        assert made["response"].to_pylist() == [f"[synthetic] Question {n}?" for n in range(1_300)]
    until(no_threads_left)


def test_frames_of_pandas_and_polars_are_sources_too(mock: StartMock) -> None:
    url = mock().url
    for library in ("pandas", "polars"):
        frames = pytest.importorskip(library)
        frame = frames.DataFrame({"prompt": ["a", "b"]})
        made = pa.Table.from_batches(batchrun.answers(frame, base_url=url, model="m"))
        assert made["response"].to_pylist() == ["[synthetic] a", "[synthetic] b"]


def test_the_schema_is_known_before_a_row_is() -> None:
    source = table(10)
    told = batchrun.answers_schema(source.schema, mock=True)
    answers = batchrun.answers(iter(source.to_batches()), mock=True)
    assert answers.schema == told
    assert next(answers).schema == told
    answers.close()
    assert list(batchrun.answers([], mock=True)) == []
    with pytest.raises(batchrun.UsageError, match="no batch came"):
        _ = batchrun.answers([], mock=True).schema
    empty = batchrun.answers(source.slice(0, 0), mock=True)
    assert list(empty) == []


def test_no_batch_waits_for_the_slowest_row_of_another(mock: StartMock) -> None:
    go_on = threading.Event()

    def respond(request: MockRequest) -> MockReply | None:
        slow = request.prompt == "Question 0?" and not go_on.is_set()
        return MockReply(raw=b"", ending="hang") if slow else None

    server = mock(respond=respond)
    source = (batch for n in range(4) for batch in table(100, 100 * n).to_batches())
    answers = batchrun.answers(source, base_url=server.url, model="m", concurrency=4, timeout_s=1.0)
    taking = threading.Thread(target=lambda: made.extend(answers))
    made: list[pa.RecordBatch] = []
    taking.start()
    # The whole of the others is sent while the first row of the first batch is awaited.
    until(lambda: server.ledger.requests >= 400)
    assert made == []
    go_on.set()
    taking.join(WAIT_S)
    assert pa.Table.from_batches(made)["n"].to_pylist() == list(range(400))


def test_who_stops_pulling_stops_the_sending_and_the_reading(mock: StartMock) -> None:
    read = 0

    def source() -> Iterator[pa.RecordBatch]:
        nonlocal read
        for n in range(1_000):
            read += 1
            yield from table(PIECE_ROWS, n * PIECE_ROWS).to_batches()

    server = mock()
    answers = batchrun.answers(source(), base_url=server.url, model="m", concurrency=8)
    next(answers)
    before = -1
    while server.ledger.requests != before:
        before = server.ledger.requests
        time.sleep(0.3)
    assert read <= 6
    assert server.ledger.requests <= 6 * PIECE_ROWS
    answers.close()
    until(no_threads_left)
    assert list(answers) == []


def test_leaving_gives_up_what_is_in_flight(mock: StartMock) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        number = int(request.prompt.split()[1].rstrip("?"))
        return MockReply(raw=b"", ending="hang") if number >= PIECE_ROWS else None

    server = mock(respond=respond)
    source = table(2 * PIECE_ROWS)
    with batchrun.answers(source, base_url=server.url, model="m", concurrency=5) as answers:
        assert next(answers).num_rows == PIECE_ROWS
        until(lambda: server.ledger.in_flight == 5)
    until(lambda: server.ledger.in_flight == 0)
    assert server.ledger.requests == PIECE_ROWS + 5


def test_what_the_source_raises_comes_after_what_was_settled(mock: StartMock) -> None:
    class OddError(Exception):
        pass

    server = mock(Knobs(latency_s=0.01))

    def source() -> Iterator[pa.RecordBatch]:
        yield from table(700).to_batches()
        until(lambda: server.ledger.requests >= 600)
        raise OddError

    made: list[pa.RecordBatch] = []
    answers = batchrun.answers(source(), base_url=server.url, model="m")
    with pytest.raises(OddError):
        made.extend(answers)
    numbers = pa.Table.from_batches(made)["n"].to_pylist()
    assert numbers == sorted(set(numbers))
    # What was billed is what came.
    assert len(numbers) == server.ledger.billed_answers >= 600


def test_a_refused_key_is_raised_and_what_was_paid_comes_first(mock: StartMock) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        number = int(request.prompt.split()[1].rstrip("?"))
        return error_reply(401, "no more", code="invalid_api_key") if number >= 800 else None

    server = mock(respond=respond)
    made: list[pa.RecordBatch] = []
    answers = batchrun.answers(table(2_000), base_url=server.url, model="m", concurrency=4)
    with pytest.raises(batchrun.EndpointRefused):
        made.extend(answers)
    numbers = pa.Table.from_batches(made)["n"].to_pylist()
    assert len(numbers) == server.ledger.delivered_answers
    assert set(range(780)) <= set(numbers)


def test_it_works_under_a_running_loop(mock: StartMock) -> None:
    url = mock().url

    async def story() -> int:
        return sum(batch.num_rows for batch in batchrun.answers(table(5), base_url=url, model="m"))

    assert asyncio.run(story()) == 5


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (table(2), {"samples": 2}, "samples= is for runs with files"),
        (table(2), {"limit": 1}, "limit= is for runs with files"),
        ([{"prompt": "a"}], {}, "no Arrow data"),
        ([table(2), pa.table({"x": [1]})], {}, "column 'n' is in one and not in the other"),
        ([table(2), table(2).select(["prompt", "n"])], {}, "their order differs"),
        (
            [table(2), table(2).set_column(0, "n", [["x", "y"]])],
            {},
            "'n' is string in a batch and int64 in the first",
        ),
        ([pa.table({"x": [1]})], {}, 'the batches: no "prompt"'),
        ([table(1)], {"prompt": "{{ m }}"}, 'no column "m", which the template asks for'),
        ([table(1)], {"output": "out.parquet"}, "output=: no such option"),
        (pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), {}, 'named "a"'),
    ],
)
def test_what_cannot_be_answered_is_said(
    source: object, options: dict[str, int], said: str
) -> None:
    with pytest.raises(batchrun.UsageError, match=said):
        list(batchrun.answers(source, mock=True, **options))  # type: ignore[arg-type]


def test_a_batch_without_a_value_in_a_column_need_not_know_its_type() -> None:
    without = table(2).set_column(0, "n", [pa.nulls(2)])
    batches = list(batchrun.answers([table(2), without], mock=True))
    assert pa.Table.from_batches(batches)["n"].to_pylist() == [0, 1, None, None]


def test_ctrl_c_ends_a_program_that_waits(mock: StartMock) -> None:
    server = mock(respond=lambda _: MockReply(raw=b"", ending="hang"))
    program = """
import sys, pyarrow as pa, batchrun
try:
    list(batchrun.answers(pa.table({"prompt": ["a"]}), base_url=sys.argv[1], model="m"))
except KeyboardInterrupt:
    print("interrupted")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, server.url],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        # In the background of a shell it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            until(lambda: server.ledger.in_flight == 1)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert out == "interrupted\n"
    assert process.returncode == 0
