"""Whole runs through an outage, and against a server with fewer places than connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mock_faults import fault_reply

from batchrun.mock.replies import MockReply, MockRequest, completion

if TYPE_CHECKING:
    from conftest import StartMock, Submit

ROWS = 60


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = (json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(ROWS))
    Path("in.jsonl").write_text("".join(rows))


def statuses() -> list[str]:
    return [
        json.loads(line)["batchrun"]["status"]
        for line in Path("out.jsonl").read_text().splitlines()
    ]


class Full:
    """Accepts every connection and resets those beyond its ``places`` at once."""

    def __init__(self, places: int, latency_s: float = 0.02) -> None:
        self.resets = 0
        self._places, self._latency_s = places, latency_s
        self._at_work = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._at_work >= self._places:
            self.resets += 1
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return
        self._at_work += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                (length,) = (
                    int(line.partition(b":")[2])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length:")
                )
                await reader.readexactly(length)
                await asyncio.sleep(self._latency_s)
                writer.write(_answer())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
        finally:
            self._at_work -= 1

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Its base URL, while it runs in a thread of its own."""
        ready, over = threading.Event(), asyncio.Event()
        urls: list[str] = []
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            async with await asyncio.start_server(self.handle, "127.0.0.1") as server:
                port = server.sockets[0].getsockname()[1]
                urls.append(f"http://127.0.0.1:{port}/v1")
                ready.set()
                await over.wait()

        def run() -> None:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(serve())

        thread = threading.Thread(target=run)
        thread.start()
        ready.wait(30)
        try:
            yield urls[0]
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join()


def _answer() -> bytes:
    message = {"role": "assistant", "content": "Hello"}
    told = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    body = json.dumps(told).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("concurrency", ["auto", 16])
def test_a_server_that_resets_connections_beyond_its_places_fails_no_row(
    concurrency: int | str, submit: Submit
) -> None:
    full = Full(places=4)
    with full.serving() as url:
        command = ("in.jsonl", "-o", "out.jsonl", "--base-url", url, "-m", "m", "-c", concurrency)
        ended = submit(*command)
    assert ended.code == 0, ended.err
    assert statuses() == ["ok"] * ROWS
    assert full.resets > 0
    assert "does not answer" not in ended.err


@pytest.mark.parametrize("kind", ["502", "503", "504"])
def test_a_gateway_without_its_endpoint_for_a_while_costs_no_row_its_retries(
    kind: str, mock: StartMock, submit: Submit
) -> None:
    """The last four rows are told so four times each; what was on its way may be charged for."""

    def respond(request: MockRequest) -> MockReply | None:
        return fault_reply(kind, request) if ROWS - 4 < request.n <= ROWS + 12 else None

    server = mock(respond=respond)
    command = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.url, "-m", "m", "-c", 4)
    ended = submit(*command, "--max-retries", 2, "--max-in-doubt-retries", 9)
    assert ended.code == 0, ended.err
    assert statuses() == ["ok"] * ROWS


def test_a_row_cut_off_for_ever_lets_the_others_be_published(
    mock: StartMock, submit: Submit
) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        number = int(request.prompt.split()[1][:-1])
        return fault_reply("stream-cut", request) if number % 5 == 0 else completion(request)

    server = mock(respond=respond)
    command = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.url, "-m", "m", "--stream")
    ended = submit(*command, "--max-in-doubt-retries", 1)
    assert ended.code == 3, ended.err
    assert statuses() == ["error" if n % 5 == 0 else "ok" for n in range(ROWS)]
