"""An attempt's time: the whole of it after connecting, and only while this process runs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import WAIT_S, StartMock, StartRun
from test_endpoint import ask, client, fault, request

from batchrun.endpoint import body as body_room
from batchrun.endpoint.deadlines import HEARTBEAT_S, LATE_S, Deadlines
from batchrun.mock.replies import MockReply, MockRequest, completion

ROWS = 8


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is told to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now


def ends(steps: list[float], allowed_s: float) -> list[bool]:
    """Whether an attempt's time is over, after each of these steps of time."""
    clock = Clock()

    async def attempt(deadlines: Deadlines) -> None:
        async with asyncio.timeout(None) as limit:
            deadlines.start(limit, clock.now)
            await asyncio.Event().wait()

    async def turns() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def story() -> list[bool]:
        task = asyncio.ensure_future(attempt(Deadlines(allowed_s)))
        seen = []
        for step in steps:
            await turns()
            clock.now += step
            await turns()
            seen.append(task.done())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return seen

    try:
        return clock.run_until_complete(story())
    finally:
        clock.close()


def test_an_attempt_ends_when_its_time_is_over() -> None:
    assert ends([HEARTBEAT_S] * 5, 4 * HEARTBEAT_S) == [False, False, False, True, True]


def test_time_in_which_the_process_stood_still_is_nobodys() -> None:
    # Of the pause, no more than a heartbeat counts.
    seen = ends([HEARTBEAT_S, 1_000.0, HEARTBEAT_S, HEARTBEAT_S], 4 * HEARTBEAT_S)
    assert seen == [False, False, False, True]


def test_after_a_pause_the_sockets_are_read_before_anything_ends() -> None:
    # The attempt's last moment lies within the pause.
    assert ends([1_000.0, 0.001, LATE_S], HEARTBEAT_S / 2) == [False, False, True]


def test_the_reason_names_the_time_that_was_asked_for() -> None:
    attempt = fault("hang", timeout_s=0.1, connect_timeout_s=30.0)
    assert (attempt.failure, attempt.detail) == ("timeout", "no answer within 0.1 s")


def test_connecting_has_a_time_of_its_own() -> None:
    async def story() -> str:
        with socket.socket() as server, socket.socket() as first, socket.socket() as second:
            server.bind(("127.0.0.1", 0))
            # Nobody accepts and the queue is full: connecting takes for ever.
            server.listen(0)
            for taken in (first, second):
                taken.setblocking(False)
                taken.connect_ex(server.getsockname())
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            async with client(url, timeout_s=0.01, connect_timeout_s=0.3) as endpoint:
                return (await endpoint.send(request())).detail

    assert asyncio.run(story()) == "no connection within the connect timeout"


def test_a_silent_stream_says_how_long_it_was_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_room, "STREAM_SILENCE_S", 0.1)
    reply = MockReply(
        parts=[b": hello\n\n", b": hello again\n\n"],
        pause_s=5.0,
        framing="chunked",
        headers={"Content-Type": "text/event-stream"},
    )
    attempt, _ = ask(respond=lambda _: reply)
    assert (attempt.failure, attempt.detail) == ("timeout", "the stream said nothing for 0.1 s")


def test_a_run_that_was_stopped_takes_the_replies_that_came_meanwhile(
    mock: StartMock, running: StartRun, tmp_path: Path
) -> None:
    asked = threading.Semaphore(0)

    def respond(question: MockRequest) -> MockReply:
        asked.release()
        whole = completion(question)
        parts = [whole.body[:40], whole.body[40:]]
        return MockReply(parts=parts, pause_s=0.5, framing="chunked", headers=whole.headers)

    server = mock(respond=respond)
    rows = "".join(f'{{"prompt": "{n}"}}\n' for n in range(ROWS))
    (tmp_path / "in.jsonl").write_text(rows)
    output = tmp_path / "out.parquet"
    arguments = (
        *(tmp_path / "in.jsonl", "-o", output, "--base-url", server.url, "-m", "m"),
        *("-c", ROWS, "--timeout", 2, "--json"),
    )
    with running(*arguments) as run:
        for _ in range(ROWS):
            assert asked.acquire(timeout=WAIT_S)
        os.kill(run.pid, signal.SIGSTOP)
        # Longer than an attempt may take.
        threading.Event().wait(3.0)
        os.kill(run.pid, signal.SIGCONT)
        ended = run.end()
    assert ended.code == 0
    assert ended.summary["this_run"]["attempts"] == ROWS
    assert len(server.ledger.entries) == ROWS
    assert set(pq.read_table(output)["attempts"].to_pylist()) == {1}
