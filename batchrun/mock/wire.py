"""HTTP/1.1 as the stand-in speaks it, connection by connection."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from batchrun.mock.ledger import Entry, Ledger
from batchrun.mock.replies import Ending, MockReply, reason_phrase


def _head(reply: MockReply, request_id: str, keep_alive: bool) -> bytes:
    lines = [f"HTTP/1.1 {reply.status} {reason_phrase(reply.status)}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in reply.headers.items()]
    if reply.framing == "length":
        size = len(reply.body) if reply.claims_bytes is None else reply.claims_bytes
        lines.append(f"Content-Length: {size}\r\n")
    elif reply.framing == "chunked":
        lines.append("Transfer-Encoding: chunked\r\n")
    if not keep_alive or reply.framing == "until_close":
        lines.append("Connection: close\r\n")
    lines.append(f"x-request-id: {request_id}\r\n\r\n")
    return "".join(lines).encode("latin-1")


def _body_writes(reply: MockReply) -> Iterator[bytes]:
    """The body as it goes out, a write at a time; framing that ends it rides on the last one."""
    if reply.parts is None:
        parts: Iterable[bytes] = (reply.body,)
    else:
        parts = (part for part in reply.parts if part)
    if reply.framing != "chunked":
        yield from parts
        return
    held = b""
    for part in parts:
        if held:
            yield held
        held = b"%x\r\n%b\r\n" % (len(part), part)
    yield held + (b"0\r\n\r\n" if reply.ends_chunked else b"")


class Wire:
    """The client's connection during one exchange."""

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request

    async def write(self, data: bytes) -> None:
        """``ConnectionError`` when the client is known to be gone."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client vanished")
        transport.write(data)
        if transport.get_write_buffer_size():
            await self._request.writer.drain()

    async def send(self, reply: MockReply, request_id: str) -> None:
        """Write a reply as it says, pauses and wrong lengths included."""
        if reply.raw is not None:
            if reply.raw:
                await self.write(reply.raw)
            return
        pending = _head(reply, request_id, self._request.keep_alive)
        for data in _body_writes(reply):
            await self.write(pending + data)
            pending = b""
            if reply.pause_s:
                await asyncio.sleep(reply.pause_s)

    def end(self, ending: Ending) -> None:
        transport = self._request.transport
        if transport is None:
            return
        if ending == "reset":
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        elif ending == "close":
            transport.close()


def _has_error(transport: asyncio.Transport) -> bool:
    # A client that closed before our bytes came answers them with a reset, but the event loop sees
    # the close first and reports a clean end: only the socket knows.
    sock = transport.get_extra_info("socket")
    return bool(sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


class _AlreadyWritten(web.StreamResponse):
    """Tells aiohttp that the reply is on the wire, and whether the connection goes on."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._goes_on = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._goes_on

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes | bytearray | memoryview = b"") -> None:
        return None


KEEP = _AlreadyWritten(keep_alive=True)
CLOSE = _AlreadyWritten(keep_alive=False)
_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
KEEP_ALIVE_S = 75.0


class Connections(web.Server):
    """aiohttp's low-level server, which also sees when a connection has proved its last answer."""

    def __init__(self, handler: _Handler, ledger: Ledger) -> None:
        super().__init__(
            handler,
            request_factory=self._request,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEP_ALIVE_S,
            max_line_size=65_536,
            max_field_size=65_536,
        )
        self._ledger = ledger
        self._last: dict[web.RequestHandler, Entry] = {}

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        # 0: a prompt may be of any size.
        return web.BaseRequest(
            message, payload, protocol, writer, task, self._loop, client_max_size=0
        )

    def request_read(self, connection: web.RequestHandler) -> None:
        """A client asks again on a connection only after it has read the answer before."""
        if (entry := self._last.pop(connection, None)) is not None:
            self._ledger.settle(entry)

    def answered(self, connection: web.RequestHandler, entry: Entry) -> None:
        """A reply is written; whether it was read, the connection's next event tells."""
        if connection.transport is None:
            self._ledger.settle(entry)
        else:
            self._last[connection] = entry

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        if (entry := self._last.pop(handler, None)) is not None:
            if exc is not None or (handler.transport is not None and _has_error(handler.transport)):
                self._ledger.take_back(entry)
            self._ledger.settle(entry)
        super().connection_lost(handler, exc)

    async def abort(self) -> None:
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self.shutdown(1.0)
