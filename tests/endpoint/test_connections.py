"""What becomes of a connection after its reply: used again, closed, or made anew for the request.

Each holds for the fast path and for aiohttp's own.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from test_endpoint import ANSWER, KEY, REPLY, client, raw_server, read_request, request

from batchrun.endpoint import client as client_room
from batchrun.endpoint import connections as connections_room
from batchrun.endpoint.client import ChatEndpoint
from batchrun.endpoint.connections import MANY_DEATHS, Trip
from batchrun.endpoint.lean import Departures
from batchrun.sending.classify import classify
from batchrun.types import Attempt, Decision

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OTHERS = REPLY.replace(b"hi", b"no")
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)
STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: keep-alive\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(EVENTS), EVENTS)
)


@pytest.fixture(params=["fast path", "aiohttp's own path"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name != "fast path":
        monkeypatch.setattr(client_room, "LEAN_VERSIONS", ())
    return name


def decided(attempt: Attempt) -> Decision:
    return classify(attempt, request())


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a reset instead of an orderly end."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def run(handle: Handle, story: Callable[[ChatEndpoint], Awaitable[None]]) -> None:
    async def told() -> None:
        async with raw_server(handle) as url, client(url) as endpoint:
            await story(endpoint)

    asyncio.run(told())


@pytest.fixture
def departures(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What left by the fast path."""
    left: list[bytes] = []
    add = Departures.add

    def noting(self: Any, transport: asyncio.Transport, request: bytes, trip: Trip) -> None:
        left.append(request)
        add(self, transport, request, trip)

    monkeypatch.setattr(Departures, "add", noting)
    return left


def test_both_paths_send_the_same(path: str, departures: list[bytes]) -> None:
    asked: list[tuple[bytes, bytes]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await read_request(reader))
        writer.write(REPLY)

    async def story() -> None:
        async with raw_server(handle) as url, client(url, key=KEY) as endpoint:
            assert (await endpoint.send(request("Größe"))).body == ANSWER

    asyncio.run(story())
    ((head, body),) = asked
    assert body == request("Größe").body
    names = [line.split(b":")[0].lower() for line in head.splitlines()[1:-1]]
    assert names == [
        *(b"host", b"accept", b"accept-encoding", b"content-type"),
        *(b"user-agent", b"authorization", b"content-length"),
    ]
    assert departures == ([head + body] if path == "fast path" else [])


def test_through_a_proxy_nothing_takes_the_fast_path(
    monkeypatch: pytest.MonkeyPatch, departures: list[bytes]
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(REPLY)

    async def story() -> None:
        async with raw_server(handle) as url:
            monkeypatch.setenv("http_proxy", url)
            async with client("http://upstream.invalid") as endpoint:
                assert (await endpoint.send(request())).body == ANSWER

    asyncio.run(story())
    assert departures == []


@pytest.mark.parametrize("unasked", [OTHERS, OTHERS[:9], OTHERS + OTHERS, TIMED_OUT, b"\r\n", b"?"])
def test_what_comes_on_an_idle_connection_belongs_to_nobody(unasked: bytes) -> None:
    connected: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)
        while True:
            await read_request(reader)
            writer.write(REPLY)

    async def story(endpoint: ChatEndpoint) -> None:
        for number in range(1, 4):
            attempt = await endpoint.send(request())
            assert (attempt.body, attempt.resent) == (ANSWER, 0)
            assert len(connected) == number
            connected[-1].write(unasked)
            # The loop has read it, or it lies in the socket: neither may matter.
            for _ in range(number % 2 * 20):
                await asyncio.sleep(0.001)

    run(handle, story)


def test_a_second_reply_in_the_same_packet_belongs_to_nobody() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(REPLY + OTHERS)

    async def story(endpoint: ChatEndpoint) -> None:
        for _ in range(3):
            assert (await endpoint.send(request())).body == ANSWER

    run(handle, story)


def test_a_408_of_a_server_that_was_tired_of_waiting_is_nobodys() -> None:
    asked = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        for reply in (REPLY, TIMED_OUT):
            await read_request(reader)
            asked += 1
            writer.write(reply)

    async def story(endpoint: ChatEndpoint) -> None:
        for _ in range(3):
            attempt = await endpoint.send(request())
            assert (attempt.body, attempt.resent) == (ANSWER, 0)
        assert asked == 5

    run(handle, story)


def test_a_408_to_the_first_request_of_a_connection_is_a_reply() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(TIMED_OUT)

    async def story(endpoint: ChatEndpoint) -> None:
        attempt = await endpoint.send(request())
        assert attempt.status == 408
        assert decided(attempt).in_doubt

    run(handle, story)


@pytest.mark.parametrize("end", [asyncio.StreamWriter.close, reset], ids=["closed", "reset"])
def test_a_connection_that_was_given_up_costs_the_row_nothing(
    end: Callable[[asyncio.StreamWriter], None],
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(REPLY)
        await read_request(reader)
        end(writer)

    async def story(endpoint: ChatEndpoint) -> None:
        resent = 0
        for _ in range(3):
            attempt = await endpoint.send(request())
            assert attempt.body == ANSWER
            resent += attempt.resent
        assert resent == 2, "each of them counts"

    run(handle, story)


def test_a_request_that_was_at_work_does_not_go_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_room, "STALE_S", 0.02)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(REPLY)
        await read_request(reader)
        await asyncio.sleep(0.1)

    async def story(endpoint: ChatEndpoint) -> None:
        await endpoint.send(request())
        attempt = await endpoint.send(request())
        assert (attempt.failure, attempt.resent) == ("disconnected", 0)
        assert decided(attempt).in_doubt

    run(handle, story)


def test_a_reply_that_had_begun_is_in_doubt() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(REPLY)
        await read_request(reader)
        writer.write(REPLY[:12])

    async def story(endpoint: ChatEndpoint) -> None:
        await endpoint.send(request())
        attempt = await endpoint.send(request())
        assert attempt.resent == 0
        assert decided(attempt).in_doubt

    run(handle, story)


def test_a_new_connection_that_ends_in_good_order_is_in_doubt() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async def story(endpoint: ChatEndpoint) -> None:
        attempt = await endpoint.send(request())
        assert (attempt.failure, attempt.resent) == ("disconnected", 0)
        assert decided(attempt).in_doubt

    run(handle, story)


def test_where_kept_connections_keep_dying_none_is_used_twice_for_a_while() -> None:
    connected = asked = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected, asked
        connected += 1
        await read_request(reader)
        asked += 1
        writer.write(STREAM)
        # Promised to be kept, and closed when the next request comes.
        await read_request(reader)
        asked += 1

    async def story(endpoint: ChatEndpoint) -> None:
        attempts = [await endpoint.send(request(stream=True)) for _ in range(20)]
        assert {decided(attempt).kind for attempt in attempts} == {"ok"}
        assert sum(attempt.resent for attempt in attempts) == MANY_DEATHS
        assert asked == 20 + MANY_DEATHS
        assert connected == 20

    run(handle, story)


def test_streams_on_connections_that_close_right_after_lose_no_row() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM)
        await asyncio.sleep(0.0005)

    async def story(endpoint: ChatEndpoint) -> None:
        async def worker() -> None:
            for _ in range(40):
                assert decided(await endpoint.send(request(stream=True))).kind == "ok"

        await asyncio.gather(*(worker() for _ in range(8)))

    run(handle, story)


def test_a_server_that_resets_what_it_has_no_place_for_puts_no_row_in_doubt() -> None:
    places = 4
    at_work = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal at_work
        if at_work >= places:
            reset(writer)
            return
        at_work += 1
        try:
            while True:
                await read_request(reader)
                await asyncio.sleep(0.005)
                writer.write(REPLY)
        finally:
            at_work -= 1

    async def story(endpoint: ChatEndpoint) -> None:
        async def worker() -> None:
            answered = 0
            while answered < 5:
                attempt = await endpoint.send(request())
                decision = decided(attempt)
                if decision.kind == "ok":
                    answered += 1
                    continue
                assert (decision.code, decision.in_doubt) == ("connect", False)
                assert decision.unreachable, "no row's fault"
                await asyncio.sleep(0.01)

        await asyncio.gather(*(worker() for _ in range(12)))

    run(handle, story)


def test_what_is_reset_as_soon_as_it_is_made_is_said_so() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reset(writer)

    async def story(endpoint: ChatEndpoint) -> None:
        decision = decided(await endpoint.send(request()))
        assert (decision.kind, decision.code) == ("transient", "connect")
        assert decision.reason == "cannot connect: Connection reset by peer"

    run(handle, story)


def test_a_key_over_plain_http_passes_no_proxy_on_its_way_to_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        assert KEY.encode() in head
        assert head.startswith(b"POST /v1/")
        writer.write(REPLY)

    async def story() -> None:
        async with raw_server(handle) as url:
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
            async with client(url, key=KEY) as endpoint:
                assert (await endpoint.send(request())).body == ANSWER

    asyncio.run(story())
