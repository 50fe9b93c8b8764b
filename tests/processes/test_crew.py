"""Processes that send: whatever becomes of them, every request has its Attempt, once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mock_servers import MockServerThread

from batchrun.errors import BatchrunError, StoppedEarly
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest
from batchrun.processes import crew, desk
from batchrun.processes.crew import Crew
from batchrun.processes.here import Here
from batchrun.processes.wire import Terms
from batchrun.providers import MOCK, full_url
from batchrun.secret import Secret
from batchrun.types import Attempt, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import StartMock

WAIT_S = 30.0  # for events of other processes; reached only when something is broken

pytestmark = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="/proc tells the children"
)


def terms(server: MockServerThread, *, timeout_s: float = 30.0, key: str | None = None) -> Terms:
    secret = None if key is None else Secret(key)
    url = full_url(server.url, MOCK.path)
    endpoint = replace(MOCK, url=url, key=secret)
    return Terms(endpoint, (), timeout_s, 10.0, proxied=False, room=64)


def _unexpected(cause: BatchrunError) -> None:
    raise cause


def crew_of(how: Terms, processes: int) -> Crew:
    return Crew(how, processes, Here(how), lambda: None, _unexpected)


def in_flight(place: crew._Place) -> int:
    assert place._member is not None
    return place._member.in_flight


def request(number: int) -> Request:
    body = b'{"model":"m","messages":[{"role":"user","content":"%d"}]}' % number
    return Request(number, body, b"", 0, 0, "m")


def children() -> list[int]:
    """The processes of this one, the dead that nobody asked about among them."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.005)


def never(_: MockRequest) -> MockReply:
    return MockReply(raw=b"", ending="hang")


@pytest.mark.asyncio
async def test_an_attempt_comes_back_as_the_endpoint_gave_it(mock: StartMock) -> None:
    server = mock(Knobs(limit_headers="openai", rpm=1e6))
    how = terms(server)
    async with crew_of(how, 2) as two, how.endpoint_here() as here:
        from_there, from_here = await two.send(request(1)), await here.send(request(1))
    lower = {name.lower(): value for name, value in from_here.headers.items()}
    assert from_there.headers["x-ratelimit-limit-requests"] == "1000000"
    assert from_there.headers.keys() == lower.keys()
    for name in ("status", "body", "reply", "failure", "detail", "sent", "ttft_s", "resent"):
        assert getattr(from_there, name) == getattr(from_here, name)
    assert abs(from_there.started_s - from_here.started_s) < WAIT_S


@pytest.mark.asyncio
async def test_the_processes_share_what_there_is_to_do(mock: StartMock) -> None:
    server = mock(respond=never)
    async with crew_of(terms(server), 3) as three:
        assert three.room == 3 * 64
        await until(lambda: all(place.is_ready for place in three._places))
        tasks = [asyncio.create_task(three.send(request(n))) for n in range(12)]
        await until(lambda: server.ledger.requests == 12)
        assert [in_flight(place) for place in three._places] == [4, 4, 4]
        # Nobody waits any more: the connections end, though no answer came.
        for task in tasks:
            task.cancel()
        await until(lambda: server.ledger.in_flight == 0)
        assert [in_flight(place) for place in three._places] == [0, 0, 0]
    assert three.notes == ()


@pytest.mark.asyncio
async def test_a_process_that_dies_leaves_its_requests_in_doubt_and_is_replaced(
    mock: StartMock,
) -> None:
    server = mock(respond=never)
    async with crew_of(terms(server), 1) as one:
        (victim,) = children()
        task = asyncio.create_task(one.send(request(1)))
        await until(lambda: server.ledger.requests == 1)
        os.kill(victim, signal.SIGKILL)
        attempt = await task
        assert (attempt.failure, attempt.sent) == ("disconnected", True)
        # Until there is another one, nothing leaves.
        meanwhile = await one.send(request(2))
        assert (meanwhile.failure, meanwhile.sent) == ("connect", False)
        await until(lambda: one._places[0].is_ready)
        assert children() not in ([], [victim])
    assert one.notes == ("a sending process died and was replaced, 1 time (last: signal 9)",)
    assert children() == []


@pytest.mark.asyncio
async def test_what_lay_before_a_stopped_process_goes_back_unsent(mock: StartMock) -> None:
    server = mock()
    async with crew_of(terms(server), 1) as one:
        (stopped,) = children()
        os.kill(stopped, signal.SIGSTOP)
        task = asyncio.create_task(one.send(request(1)))
        await asyncio.sleep(desk.LATE_S + 0.2)
        assert not task.done()
        os.kill(stopped, signal.SIGCONT)
        attempt = await task
        assert (attempt.failure, attempt.sent) == ("connect", False)
        assert server.ledger.requests == 0
        assert (await one.send(request(2))).status == 200


@pytest.mark.asyncio
async def test_a_process_that_hangs_gets_nothing_new_and_is_killed_in_the_end(
    mock: StartMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(crew, "PATIENCE_S", 1.0)
    monkeypatch.setattr(crew, "SILENT_BEATS", 10)
    server = mock(respond=never)
    async with crew_of(terms(server, timeout_s=0.5), 2) as two:
        await until(lambda: all(place.is_ready for place in two._places))
        tasks = [asyncio.create_task(two.send(request(n))) for n in range(2)]
        await until(lambda: in_flight(two._places[0]) == 1)
        hung = children()[0]
        os.kill(hung, signal.SIGSTOP)
        await until(lambda: not all(place.takes_more is not None for place in two._places))
        ended = [await task for task in tasks]
        assert {attempt.failure for attempt in ended} == {"timeout", "disconnected"}
        assert hung not in children()


@pytest.mark.asyncio
async def test_where_no_process_comes_up_the_run_ends(
    mock: StartMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mock()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StoppedEarly, match="exit code 1"):
        async with crew_of(terms(server), 2):
            raise AssertionError
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StoppedEarly, match="No such file or directory"):
        async with crew_of(terms(server), 2):
            raise AssertionError
    assert children() == []


@pytest.mark.asyncio
async def test_the_key_is_in_no_command_line(mock: StartMock) -> None:
    key = "canary-3f0c9a"
    server = mock(Knobs(key=key))
    async with crew_of(terms(server, key=key), 2) as two:
        assert (await two.send(request(1))).status == 200
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children()]
        assert len(lines) == 2
        assert not any(key.encode() in line for line in lines)


@pytest.mark.asyncio
async def test_large_bodies_and_answers_pass_whole(mock: StartMock) -> None:
    server = mock(Knobs(completion_tokens=200_000))
    long = b'{"model":"m","messages":[{"role":"user","content":"%s"}]}' % (b"x" * 3_000_000)
    large = Request(0, long, b"", 0, 0, "m")
    how = terms(server)
    async with crew_of(how, 1) as one, how.endpoint_here() as here:
        attempts: list[Attempt] = await asyncio.gather(*(one.send(large) for _ in range(4)))
        expected = await here.send(large)
    assert expected.status == 200
    assert {attempt.body for attempt in attempts} == {expected.body}
    assert time.monotonic() > attempts[0].ended_s
