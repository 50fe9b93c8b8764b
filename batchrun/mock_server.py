"""The stand-in endpoint: an OpenAI-compatible server for dry runs, users' CI and our own tests.

Answers are a pure function of the request and plainly marked ``[synthetic]``. ``Knobs`` makes the
server slow, limited or hostile; which request meets which fault depends on nothing but the seed,
the body and how often that body came before, so a run can be repeated. ``respond`` lets a test
script any single reply, down to its bytes.

The **ledger** is the other side's word on what a client claims. For every request it says what was
billed and whether the whole answer was *delivered*: every byte written, and read by the client. A
write that succeeded does not prove it, so a delivery stays open to doubt until the same connection
carries another request or ends: a reset means that something was left unread and takes it back.
(Only where the server closes first, by a fault or because it was asked to, is writing all there is
to go by.) Therefore, once client and server are quiet, the usage a client recorded must equal
``ledger.delivered``, and each further answer in ``ledger.billed`` must be an attempt the client
counts as in doubt.

Replies are written to the transport as bytes made here, not as ``web.Response``: a hostile reply
(a wrong Content-Length, a cut chunk, a reset) cannot be said in aiohttp's terms, one path for all
replies is simpler than two, and it is the cheapest one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import signal
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from msgspec import Struct
from msgspec.structs import replace

from batchrun.errors import LocalIOError
from batchrun.mock_replies import (
    CREATED,
    DEFAULT_MODELS,
    FAULTS,
    JSON_HEADERS,
    Chat,
    Ending,
    Knobs,
    MockReply,
    MockRequest,
    Respond,
    completion,
    echoed_key,
    error_reply,
    fault_reply,
    rate_limited,
    reason_phrase,
    retry_after,
)
from batchrun.types import Usage

# The stand-in is one thing to those who use it, though its words have a room of their own.
__all__ = [
    "Entry",
    "Knobs",
    "Ledger",
    "MockReply",
    "MockRequest",
    "MockServer",
    "MockServerThread",
    "Respond",
    "completion",
    "error_reply",
    "fault_reply",
    "serve",
]

_CHAT_PATHS = frozenset({"/v1/chat/completions", "/chat/completions"})
_MODELS_PATHS = frozenset({"/v1/models", "/models"})


class Entry(Struct):
    """One request in the ledger. ``delivered`` may still be taken back while the connection lives.

    Instants are monotonic seconds. ``headers`` and ``body`` hold secrets and prompts: they stay in
    memory and never reach the ledger file.
    """

    n: int
    seen: int
    path: str
    model: str
    digest: str
    streamed: bool
    started_s: float
    prompt: str = ""
    headers: Mapping[str, str] = {}
    body: bytes = b""
    status: int | None = None  # None: no status line was sent
    fault: str = ""
    billed: Usage | None = None
    delivered: bool = False
    ended_s: float | None = None


class Ledger:
    """What the server received, billed and delivered.

    Only the server's thread writes. Another thread may read any number at any time; for a
    consistent whole it asks ``MockServerThread.ledger``, which lets pending events settle first.
    """

    def __init__(self, *, keep: bool = False, file: BinaryIO | None = None) -> None:
        self.requests = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.statuses: Counter[int | None] = Counter()
        self.faults: Counter[str] = Counter()
        self.billed = Usage()
        self.billed_answers = 0
        self.delivered = Usage()
        self.delivered_answers = 0
        self._keep = keep
        self._entries: list[Entry] = []
        self._file = file

    @property
    def entries(self) -> list[Entry]:
        """A copy, in order of arrival; empty unless the server was told to keep them."""
        return list(self._entries)

    def begin(self, entry: Entry) -> None:
        self.requests += 1
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        if self._keep:
            self._entries.append(entry)

    def bill(self, entry: Entry, usage: Usage) -> None:
        entry.billed = usage
        self.billed += usage
        self.billed_answers += 1

    def end(self, entry: Entry, *, delivered: bool) -> None:
        entry.ended_s = time.monotonic()
        self.in_flight -= 1
        self.statuses[entry.status] += 1
        if entry.fault:
            self.faults[entry.fault] += 1
        if delivered:
            entry.delivered = True
            self._recount(entry, +1)

    def take_back(self, entry: Entry) -> None:
        """The client was gone before it read the answer."""
        if entry.delivered:
            entry.delivered = False
            self._recount(entry, -1)

    def settle(self, entry: Entry) -> None:
        """Nothing about this request can change any more."""
        if self._file is not None:
            self._file.write(_ledger_line(entry))

    def _recount(self, entry: Entry, sign: int) -> None:
        self.delivered_answers += sign
        if entry.billed is not None:
            self.delivered += entry.billed if sign > 0 else _negative(entry.billed)


def _negative(usage: Usage) -> Usage:
    counts = msgspec.structs.asdict(usage)
    return Usage(**{name: None if n is None else -n for name, n in counts.items()})


def _ledger_line(entry: Entry) -> bytes:
    record = msgspec.structs.asdict(entry)
    for private in ("prompt", "headers", "body"):
        del record[private]
    return msgspec.json.encode(record) + b"\n"


# --- quota -----------------------------------------------------------------------------------


class _Bucket:
    """A token bucket: ``per_minute`` refilled evenly, at most ``burst_s`` seconds of it held."""

    def __init__(self, per_minute: float, burst_s: float, now: float) -> None:
        self.per_minute = per_minute
        self._per_second = per_minute / 60
        self.capacity = max(1.0, self._per_second * burst_s)
        self._level = self.capacity
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self.capacity, self._level + (now - self._at) * self._per_second)
        self._at = now
        return self._level

    def wait_s(self, cost: float, now: float) -> float:
        return max(0.0, (cost - self.level(now)) / self._per_second)

    def take(self, cost: float, now: float) -> None:
        self._level = self.level(now) - cost

    def reset_s(self, now: float) -> float:
        return (self.capacity - self.level(now)) / self._per_second


class _Quota:
    """Requests and tokens of one model; a refused request takes neither."""

    def __init__(self, knobs: Knobs, now: float) -> None:
        self._knobs = knobs
        self._requests = _Bucket(knobs.rpm, knobs.burst_s, now) if knobs.rpm else None
        self._tokens = _Bucket(knobs.tpm, knobs.burst_s, now) if knobs.tpm else None

    def fits(self, tokens: int) -> bool:
        return self._tokens is None or tokens <= self._tokens.capacity

    def take(self, tokens: int, now: float) -> float:
        """0.0 when taken, else the seconds until it could be."""
        wait_s = max(
            self._requests.wait_s(1, now) if self._requests else 0.0,
            self._tokens.wait_s(tokens, now) if self._tokens else 0.0,
        )
        # A rounding error in the refill is not a reason to refuse.
        if wait_s > 1e-9:
            return wait_s
        if self._requests:
            self._requests.take(1, now)
        if self._tokens:
            self._tokens.take(tokens, now)
        return 0.0

    def headers(self, tokens: int, now: float) -> dict[str, str]:
        if self._knobs.limit_headers == "openai":
            return self._openai_headers(now)
        if self._knobs.limit_headers == "mistral":
            return self._mistral_headers(tokens, now)
        return {}

    def _openai_headers(self, now: float) -> dict[str, str]:
        told = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{name}"] = f"{bucket.per_minute:.0f}"
                told[f"x-ratelimit-remaining-{name}"] = _whole(bucket.level(now))
                told[f"x-ratelimit-reset-{name}"] = go_duration(bucket.reset_s(now))
        return told

    def _mistral_headers(self, tokens: int, now: float) -> dict[str, str]:
        told = {}
        for name, bucket in (("req", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{name}-minute"] = f"{bucket.per_minute:.0f}"
                told[f"x-ratelimit-remaining-{name}-minute"] = _whole(bucket.level(now))
        if self._tokens is not None:
            told["x-ratelimit-tokens-query-cost"] = str(tokens)
        return told


def _whole(level: float) -> str:
    return str(max(0, math.floor(level + 1e-9)))


def go_duration(seconds: float) -> str:
    """``seconds`` as OpenAI's reset headers write it: ``20ms``, ``1.5s``, ``6m0s``, ``1h2m3s``."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if ms < 1000:
        return f"{ms}ms"
    whole_minutes, rest_ms = divmod(ms, 60_000)
    hours, minutes = divmod(whole_minutes, 60)
    text = f"{rest_ms / 1000:g}s"
    if whole_minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


# --- the wire --------------------------------------------------------------------------------


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


class _Wire:
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


_KEEP = _AlreadyWritten(keep_alive=True)
_CLOSE = _AlreadyWritten(keep_alive=False)
_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _Connections(web.Server):
    """aiohttp's low-level server, which also sees when a connection has proved its last answer."""

    def __init__(self, handler: _Handler, ledger: Ledger, keep_alive_s: float) -> None:
        super().__init__(
            handler,
            request_factory=self._request,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=keep_alive_s,
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


# --- the server ------------------------------------------------------------------------------


class MockServer:
    """The server, inside the running loop: ``async with MockServer(knobs) as server``.

    ``url`` is the bare ``http://127.0.0.1:PORT``; the API is there with and without ``/v1``.
    ``respond`` sees every request first and may return any reply; None leaves it to the knobs.
    """

    def __init__(
        self,
        knobs: Knobs | None = None,
        *,
        respond: Respond | None = None,
        keep_entries: bool = False,
        ledger_file: BinaryIO | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.knobs = knobs or Knobs()
        self.ledger = Ledger(keep=keep_entries, file=ledger_file)
        self.url = ""
        self._respond = respond
        self._host, self._port, self._tls = host, port, tls
        self._clock = clock
        # Counting costs memory per body, so only where something depends on it.
        self._counts_sendings = bool(
            respond or keep_entries or ledger_file or self.knobs.faults or self.knobs.script
        )
        self._keeps_entries = keep_entries
        self._sendings: Counter[bytes] = Counter()
        self._quotas: dict[str, _Quota] = {}
        self._slots = asyncio.Semaphore(self.knobs.slots) if self.knobs.slots else None
        self._queued = 0

    async def __aenter__(self) -> Self:
        self._connections = _Connections(self._handle, self.ledger, self.knobs.keep_alive_s)
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(
                self._connections, self._host, self._port, ssl=self._tls, backlog=4096
            )
        except OSError as exc:
            where = f"{self._host}:{self._port}"
            raise LocalIOError(f"cannot listen on {where}: {exc.strerror or exc}") from exc
        port = self._listener.sockets[0].getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{'https' if self._tls else 'http'}://{host}:{port}"
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.close()
        await self._connections.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        self._connections.request_read(connection)
        wire = _Wire(request)
        if "Expect" in request.headers:
            await wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        asked = self._asked(request, await request.read())
        entry = self._enter(asked)
        delivered = goes_on = has_slot = False
        try:
            has_slot = await self._slot()
            reply = self._reply(asked) if has_slot else self._overloaded()
            delivered = await self._answer(wire, asked, entry, reply)
            goes_on = request.keep_alive and _goes_on(reply)
        finally:
            if has_slot and self._slots is not None:
                self._slots.release()
            self.ledger.end(entry, delivered=delivered)
            self._connections.answered(connection, entry)
        return _KEEP if goes_on else _CLOSE

    async def _slot(self) -> bool:
        """Wait for a slot in the queue; False when that is full."""
        if self._slots is None:
            return True
        queue = self.knobs.queue
        if queue is not None and self._queued >= queue and self._slots.locked():
            return False
        self._queued += 1
        try:
            return await self._slots.acquire()
        finally:
            self._queued -= 1

    def _asked(self, request: web.BaseRequest, body: bytes) -> MockRequest:
        digest = hashlib.blake2b(body, digest_size=8).digest()
        seen = 1
        if self._counts_sendings:
            seen = self._sendings[digest] = self._sendings[digest] + 1
        chat, problem = None, ""
        if request.method == "POST":
            chat, problem = _parse(body)
        return MockRequest(
            n=self.ledger.requests + 1,
            seen=seen,
            method=request.method,
            path=request.path_qs,
            headers=request.headers,
            body=body,
            digest=digest,
            chat=chat,
            problem=problem,
        )

    def _enter(self, asked: MockRequest) -> Entry:
        chat = asked.chat
        entry = Entry(
            n=asked.n,
            seen=asked.seen,
            path=asked.path,
            model=chat.model if chat else "",
            digest=asked.digest.hex(),
            streamed=bool(chat and chat.stream),
            started_s=time.monotonic(),
        )
        if self._keeps_entries:
            entry.prompt, entry.headers, entry.body = asked.prompt, asked.headers, asked.body
        self.ledger.begin(entry)
        return entry

    async def _answer(
        self, wire: _Wire, asked: MockRequest, entry: Entry, reply: MockReply
    ) -> bool:
        """Bill, wait and write; True when a whole answer was written."""
        entry.fault = reply.fault
        # Billed before it is sent, like the real thing: a client that leaves pays all the same.
        if reply.billed is not None:
            self.ledger.bill(entry, reply.billed)
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
        entry.status = None if reply.raw is not None else reply.status
        try:
            await wire.send(reply, f"mock-{asked.n}")
        except ConnectionError:
            return False
        if reply.ending == "hang":
            await asyncio.Event().wait()
        wire.end(reply.ending)
        return reply.whole

    def _reply(self, asked: MockRequest) -> MockReply:
        if self._respond is not None and (scripted := self._respond(asked)) is not None:
            return scripted
        path = asked.path.partition("?")[0]
        dialect = self.knobs.dialect
        if self.knobs.key is not None and not self._has_key(asked):
            return echoed_key(asked, MockReply(), self.knobs)
        if path in _MODELS_PATHS and asked.method == "GET":
            return MockReply(body=self._model_list(), headers=JSON_HEADERS)
        if path not in _CHAT_PATHS | _MODELS_PATHS:
            return error_reply(404, f"no such path: {path}", code="not_found", dialect=dialect)
        if path in _MODELS_PATHS or asked.method != "POST":
            return error_reply(405, f"{asked.method} is not allowed here", dialect=dialect)
        if asked.chat is None:
            return error_reply(400, asked.problem, code="invalid_request", dialect=dialect)
        if self.knobs.models and asked.chat.model not in self.knobs.models:
            return self._no_such_model(asked.chat.model)
        return self._metered(asked, asked.chat)

    def _has_key(self, asked: MockRequest) -> bool:
        return asked.headers.get("Authorization") == f"Bearer {self.knobs.key}"

    def _model_list(self) -> bytes:
        names = self.knobs.models or DEFAULT_MODELS
        data = [
            {"id": n, "object": "model", "created": CREATED, "owned_by": "batchrun"} for n in names
        ]
        return msgspec.json.encode({"object": "list", "data": data})

    def _no_such_model(self, model: str) -> MockReply:
        if self.knobs.dialect == "mistral":
            return error_reply(
                400, f"Invalid model: {model}", type="invalid_model", code="1500", dialect="mistral"
            )
        return error_reply(
            404, f"The model {model!r} does not exist", code="model_not_found", param="model"
        )

    def _overloaded(self) -> MockReply:
        if self.knobs.dialect == "mistral":
            return fault_reply("429-capacity", _NOTHING_ASKED, self.knobs)
        return error_reply(
            503,
            "The server is overloaded",
            type="service_unavailable_error",
            code="server_is_overloaded",
        )

    def _metered(self, asked: MockRequest, chat: Chat) -> MockReply:
        answer = completion(asked, knobs=self.knobs)
        knobs = self.knobs
        if not (knobs.rpm or knobs.tpm):
            return self._faulty(asked, answer)
        now = self._clock()
        quota = self._quotas.get(chat.model)
        if quota is None:
            quota = self._quotas[chat.model] = _Quota(knobs, now)
        tokens = (answer.billed.total_tokens or 0) if answer.billed else 0
        wait_s = quota.take(tokens, now) if quota.fits(tokens) else None
        if wait_s == 0.0:
            reply = self._faulty(asked, answer)
        elif wait_s is None:
            reply = _too_large_for_quota(knobs, tokens)
        else:
            reply = rate_limited(retry_after(knobs.retry_after, wait_s), knobs.dialect)
        told = quota.headers(tokens, now)
        return replace(reply, headers={**reply.headers, **told}) if told else reply

    def _faulty(self, asked: MockRequest, answer: MockReply) -> MockReply:
        knobs = self.knobs
        kind = _fault_of(asked, knobs)
        reply = replace(FAULTS[kind](asked, answer, knobs), fault=kind) if kind else answer
        if knobs.latency_s or knobs.latency_jitter_s:
            more_s = knobs.latency_jitter_s * _chance(asked, knobs, b"latency")
            reply = replace(reply, delay_s=knobs.latency_s + more_s)
        return reply


_NOTHING_ASKED = MockRequest(0, 1, "POST", "", {}, b"", b"", None)


def _goes_on(reply: MockReply) -> bool:
    return reply.ending == "keep" and reply.framing != "until_close" and reply.raw is None


def _parse(body: bytes) -> tuple[Chat | None, str]:
    try:
        chat = _decode_chat(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        return None, f"not a chat completion request: {exc}"
    return (chat, "") if chat.messages else (None, "messages: at least one is needed")


_decode_chat = msgspec.json.Decoder(Chat).decode


def _fault_of(asked: MockRequest, knobs: Knobs) -> str:
    if asked.seen <= len(knobs.script):
        kind = knobs.script[asked.seen - 1]
        return "" if kind == "ok" else kind
    if not knobs.faults:
        return ""
    chance = _chance(asked, knobs, b"fault")
    for kind, rate in knobs.faults.items():
        chance -= rate
        if chance < 0:
            return kind
    return ""


def _chance(asked: MockRequest, knobs: Knobs, what: bytes) -> float:
    """A number in [0, 1) that depends on the seed, the body and its how-manieth sending."""
    told = b"%d %d %b %b" % (knobs.seed, asked.seen, what, asked.digest)
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest()) / 2**64


def _too_large_for_quota(knobs: Knobs, tokens: int) -> MockReply:
    return error_reply(
        429,
        f"Request too large on tokens per min (TPM): Limit {knobs.tpm:.0f}, Requested {tokens}.",
        type="tokens",
        code="rate_limit_exceeded",
        dialect=knobs.dialect,
    )


async def serve(
    host: str,
    port: int,
    knobs: Knobs,
    ledger_file: Path | None = None,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Run until cancelled or terminated.

    The ledger file gets one JSON line per request once nothing about it can change any more,
    without prompts and headers.
    """
    stop = asyncio.Event()
    # Whoever ends a server in a script sends SIGTERM, and wants the ledger whole.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        if ledger_file is not None:
            try:
                file = stack.enter_context(ledger_file.open("ab"))
            except OSError as exc:
                raise LocalIOError(f"{ledger_file}: {exc.strerror or exc}") from exc
        async with MockServer(knobs, ledger_file=file, host=host, port=port) as server:
            on_ready(server.url)
            await stop.wait()


class MockServerThread:
    """A MockServer with an event loop and a thread of its own, for tests and synchronous code.

    with MockServerThread(Knobs(faults={"429": 0.05})) as server:
        subprocess.run(["batchrun", "submit", ..., "--base-url", server.url])
    assert server.ledger.delivered_answers == 100
    """

    def __init__(
        self,
        knobs: Knobs | None = None,
        *,
        respond: Respond | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._server = MockServer(knobs, respond=respond, keep_entries=True, tls=tls)
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, name="mock-server", daemon=True)
        self._thread.start()
        self._loop, self._stop = self._started.result()

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def knobs(self) -> Knobs:
        return self._server.knobs

    @property
    def ledger(self) -> Ledger:
        """The ledger, after the server has seen every event that reached this machine before."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(_let_events_pass(), self._loop).result()
        return self._server.ledger

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:
            if self._started.done():
                raise
            self._started.set_exception(exc)

    async def _serve(self) -> None:
        stop = asyncio.Event()
        async with self._server:
            self._started.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()


async def _let_events_pass() -> None:
    # A closed socket is seen in one turn of the loop, its connection_lost comes in the next and the
    # handler it cancels in the one after.
    for _ in range(8):
        await asyncio.sleep(0)
