"""One Request in, one Attempt out, over aiohttp. The only room that knows aiohttp's exceptions.

Nothing here judges: whatever the network does becomes an Attempt, and ``retry`` says what it means.
The traps of the library are designed out once, in ``_session``: no redirects, no cookies, no netrc,
explicit timeouts, our own bounded decompression; ``connections`` and ``deadlines`` do the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import platform
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import aiohttp
import msgspec
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

from batchrun import answers, secret
from batchrun.config import VERSION
from batchrun.connections import TRIP, Connector, Trip
from batchrun.deadlines import Deadlines
from batchrun.errors import EndpointRefused, StoppedEarly
from batchrun.providers import Endpoint
from batchrun.proxies import proxy_for
from batchrun.secret import Scrubber, Secret
from batchrun.sse import Assembler
from batchrun.types import Attempt, Failure, Reply, Request

# Larger than any completion with its log probabilities; a gzip bomb of 300 MB stops here.
MAX_BODY_BYTES = 24 * 2**20
# What a reply may hold without asking anybody; all of a usual one.
OWN_BYTES = 64 * 2**10
# What all larger ones share: 64 streams of 50,000 tokens each fit in.
SHARED_BYTES = 12 * 2**20
# What Python needs for a piece, however small: single bytes must not pass for a small body.
PIECE_COST_BYTES = 64
# What aiohttp reads ahead of a reply that waits; one read of the socket may add 256 KB.
READ_AHEAD_BYTES = 16 * 2**10
# Read, unpacked and asked for at a time, once a reply is no usual one.
STEP_BYTES = 64 * 2**10
# A stream that is silent this long is dead, whatever the attempt's own time.
STREAM_SILENCE_S = 120.0
# What may still follow once every choice has its finish: usage, [DONE], the last chunk.
STREAM_TAIL_S = 5.0
# aiohttp warns when larger bodies are given as bytes: it would copy them in one go.
LARGE_BODY_BYTES = 2**20
MAX_HEADER_BYTES = 64 * 2**10
# More would keep the first of them waiting for milliseconds.
MOST_TOGETHER = 16
LEAN_VERSIONS = ("3.14.",)


class ChatEndpoint:
    """A chat-completions endpoint. Use as an async context manager; ``send`` never raises.

    ``proxied`` False ignores HTTP(S)_PROXY: the embedded stand-in is inside this process.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        headers: Sequence[tuple[str, Secret]] = (),
        *,
        timeout_s: float,
        connect_timeout_s: float,
        proxied: bool = True,
    ) -> None:
        self._endpoint = endpoint
        self._url = URL(endpoint.url, encoded=True)
        self._headers = _headers(endpoint.key, headers)
        self._space = _Space()
        self._deadlines = Deadlines(timeout_s)
        self._timeout = aiohttp.ClientTimeout(
            total=None,  # its clock goes on while this process is stopped
            connect=connect_timeout_s,
            sock_connect=connect_timeout_s,
            sock_read=None,
        )
        self._proxy = proxy_for(endpoint.url) if proxied else None
        # A proxy wants heads of its own.
        self._is_lean = self._proxy is None and aiohttp.__version__.startswith(LEAN_VERSIONS)
        keys = [*([endpoint.key] if endpoint.key else []), *secret.in_url(endpoint.url)]
        self._scrubber = Scrubber(keys, [value for _, value in headers])

    async def __aenter__(self) -> Self:
        self._connector = Connector()
        self._session = self._new_session(self._connector, lean=self._is_lean)
        return self

    def _new_session(self, connector: Connector, *, lean: bool) -> aiohttp.ClientSession:
        """``lean`` sends chat completions and nothing else, for a fifth less CPU."""
        more: dict[str, Any] = {}
        if lean:
            head = _head(self._url, self._headers)
            own = {"head": head, "departures": _Departures()}
            more = {"request_class": type("_Request", (_ChatRequest,), own)}
        # No default headers: aiohttp would send those to the proxy too, the key among them.
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            auto_decompress=False,
            read_bufsize=READ_AHEAD_BYTES,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            proxy=self._proxy,
            **more,
        )

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def send(self, request: Request) -> Attempt:
        """Make one request and read its whole answer, or say what went wrong.

        A reply is parsed by its Content-Type, whatever was asked for. Only cancellation raises.
        """
        started_s = time.monotonic()
        tried = await self._try(request, started_s, wants_new=False)
        if not tried.goes_again:
            return tried.attempt
        again = await self._try(request, started_s, wants_new=True)
        # What never left, or was not understood as a request, was no attempt.
        resent = int(tried.attempt.failure == "disconnected")
        return msgspec.structs.replace(again.attempt, resent=resent)

    async def _try(self, request: Request, started_s: float, *, wants_new: bool) -> _Tried:
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(None) as limit:
                trip = Trip(limit, self._deadlines, wants_new=wants_new)
                TRIP.set(trip)
                try:
                    response = await self._session.post(
                        self._url,
                        data=self._content(request.body),
                        headers=None if self._is_lean else self._headers,
                        allow_redirects=False,
                    )
                    attempt = await self._read(response, started_s)
                finally:
                    self._deadlines.end(limit)
                    # A connection whose reply was not read to its end must not be used again.
                    if response is not None and not response.content.at_eof():
                        response.close()
        except (aiohttp.ClientError, OSError) as exc:
            attempt = self._failed(exc, started_s, response, left=trip.left)
            is_lost = response is None and _is_loss(exc) and self._connector.lost(trip, exc)
            return _Tried(attempt, is_lost and not wants_new)
        except ValueError as exc:
            if response is not None:
                raise
            unsendable = _Unsendable(type(exc).__name__)
            return _Tried(self._failed(unsendable, started_s, None, left=False), goes_again=False)
        return _Tried(attempt, _was_for_nobody(attempt, trip) and not wants_new)

    def _content(self, body: bytes) -> bytes | io.BytesIO:
        return body if self._is_lean or len(body) <= LARGE_BODY_BYTES else io.BytesIO(body)

    async def models(self) -> list[str]:
        """The model names the endpoint offers to this key, in its order."""
        host = self._endpoint.host
        url = URL(self._endpoint.models_url, encoded=True)
        try:
            async with (
                asyncio.timeout(None) as limit,
                self._new_session(Connector(), lean=False) as session,
            ):
                TRIP.set(Trip(limit, self._deadlines))
                try:
                    async with session.get(
                        url, headers=self._headers, allow_redirects=False
                    ) as response:
                        body = await _whole(response, self._space)
                finally:
                    self._deadlines.end(limit)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            failure, detail, _ = self._explained(exc)
            stopped = EndpointRefused if failure in ("tls", "no_host") else StoppedEarly
            raise stopped(f"cannot ask {host} for its models: {self.scrub(detail)}") from exc
        if response.status != 200:
            error = answers.parse(self._scrubber.scrub_bytes(body)).error
            said = f": {error.message}" if error and error.message else ""
            raise EndpointRefused(f"{host} does not list its models (HTTP {response.status}){said}")
        try:
            listing = msgspec.json.decode(body, type=_ModelList)
        except msgspec.DecodeError as exc:
            raise EndpointRefused(f"{host} did not answer with a list of models") from exc
        return [self.scrub(model.id) for model in listing.data]

    def scrub(self, text: str) -> str:
        """``text`` without any secret this endpoint was given."""
        return self._scrubber.scrub(text)

    def _scrubbed(self, response: aiohttp.ClientResponse) -> Mapping[str, str]:
        """The reply's headers, which become request ids and reasons, without any secret."""
        together = b"\n".join([value for _, value in response.raw_headers])
        if self._scrubber.scrub_bytes(together) == together:
            return response.headers
        shown = ((name, self.scrub(value)) for name, value in response.headers.items())
        return CIMultiDict(shown)

    async def _read(self, response: aiohttp.ClientResponse, started_s: float) -> Attempt:
        ttft_s: float | None = None
        failure: Failure | None = None
        if response.content_type == "text/event-stream":
            stream = Assembler(limit_bytes=MAX_BODY_BYTES)
            ttft_s = await _follow(response, stream, self._space, self._deadlines, started_s)
            body, failure = stream.body(), stream.problem
        else:
            body = await _whole(response, self._space)
        if failure is None and not body.isascii() and not _is_utf8(body):
            failure = "not_utf8"
        reply = _parsed(body)
        if response.status != 200 or failure or reply is None or reply.error or not reply.choices:
            # Some endpoints quote the key they refuse; it must not reach journal or report. An
            # answer stays as it came.
            scrubbed = self._scrubber.scrub_bytes(body)
            if scrubbed != body:
                body, reply = scrubbed, _parsed(scrubbed)
        return Attempt(
            status=response.status,
            headers=self._scrubbed(response),
            body=body,
            started_s=started_s,
            ended_s=time.monotonic(),
            finished_at_ms=int(time.time() * 1000),
            reply=reply,
            failure=failure,
            detail="the stream ended without a finish_reason" if failure == "cut" else "",
            ttft_s=ttft_s,
        )

    def _failed(
        self,
        exc: Exception,
        started_s: float,
        response: aiohttp.ClientResponse | None,
        *,
        left: bool,
    ) -> Attempt:
        failure, detail, sent = self._explained(exc)
        if sent and not left:
            failure, detail, sent = "connect", "the connection ended as soon as it was made", False
        return Attempt(
            status=response.status if response is not None else None,
            headers=self._scrubbed(response) if response is not None else {},
            body=b"",
            started_s=started_s,
            ended_s=time.monotonic(),
            finished_at_ms=int(time.time() * 1000),
            failure=failure,
            detail=self.scrub(detail),
            sent=sent or response is not None,
        )

    def _explained(self, exc: Exception) -> tuple[Failure, str, bool]:
        """As ``_explain``; what is said of a name or a time is this endpoint's."""
        failure, detail, sent = _explain(exc)
        if failure == "timeout" and not isinstance(exc, _Silent):
            detail = f"no answer within {self._deadlines.allowed_s:g} s"
        if failure == "no_host" and self._proxy is not None:
            failure, detail = "proxy", f"the proxy's name is unknown ({detail})"
        return failure, detail, sent


class _Tried(NamedTuple):
    attempt: Attempt
    goes_again: bool  # on a new connection: this one had been given up before the request came


def _was_for_nobody(attempt: Attempt, trip: Trip) -> bool:
    """A server that closes an idle connection may say so, just when a request is on its way."""
    if attempt.status != 408 or not (trip.was_reused and trip.is_early):
        return False
    return "close" in attempt.headers.get("Connection", "").lower()


def _is_loss(exc: Exception) -> bool:
    """The connection ended under the request, and nothing else went wrong."""
    if isinstance(exc, aiohttp.ClientConnectorError | TimeoutError):
        return False
    return isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parsed(body: bytes) -> Reply | None:
    """What a body says; None when there is nothing to read."""
    return answers.parse(body) if body and not body.isspace() else None


def _head(url: URL, headers: Mapping[str, str]) -> bytes:
    """A request's head up to the number that its Content-Length is."""
    lines = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {url.host_port_subcomponent}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "Content-Length: "]).encode("ascii")


class _ChatRequest(aiohttp.ClientRequest):
    """A POST whose head was built once, sent with its body in one write.

    aiohttp builds every head anew, writes head and body through a StreamWriter, and on Python 3.11
    starts a task for it: together a fifth of a request's CPU. The session's ``request_class`` is
    the documented place to do otherwise; what this overrides is not, so other versions of aiohttp
    than those it was tried with get aiohttp's own class.
    """

    head: ClassVar[bytes] = b""
    departures: ClassVar[_Departures]
    _content: bytes = b""

    def update_headers(self, headers: object) -> None:
        self.headers = CIMultiDict()

    def update_auto_headers(self, skip_auto_headers: object) -> None:
        """They are in the head."""

    def update_body_from_data(self, body: bytes, _stacklevel: int = 3) -> None:
        self._content = body

    def update_transfer_encoding(self) -> None:
        """The head ends with the Content-Length."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        protocol = conn.protocol
        transport = protocol.transport if protocol is not None else None
        if protocol is None or transport is None or transport.is_closing():
            raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
        content = self._content
        request = b"%b%d\r\n\r\n%b" % (self.head, len(content), content)
        self.departures.add(transport, request, TRIP.get())
        protocol.start_timeout()
        return self.response_class(
            self.method,
            self.original_url,
            writer=None,
            continue100=None,
            timer=self._timer,
            request_info=self.request_info,
            traces=[],
            loop=self.loop,
            session=self._session,
            stream_writer=_WRITTEN,
        )


class _Departures:
    """Requests that leave together, at the end of a turn of the event loop.

    Each that is sent alone wakes the peer, which costs as much as the sending; those that follow at
    once find it awake. On loopback with 64 in flight this is a fifth of a request's CPU.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, bytes, Trip]] = []

    def add(self, transport: asyncio.Transport, request: bytes, trip: Trip) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._leave)
        trip.left = False
        self._waiting.append((transport, request, trip))
        if len(self._waiting) >= MOST_TOGETHER:
            self._leave()

    def _leave(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport, request, trip in waiting:
            # Closed meanwhile: cancelled, or by the peer. Whoever waits for the reply learns it.
            if not transport.is_closing():
                transport.write(request)
                # Where the first byte could not go, the transport closes at once.
                trip.left = not transport.is_closing()


class _Written:
    """What a response wants to know of the writer of its request."""

    output_size = 0


_WRITTEN: Any = _Written()


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


class _TooLarge(aiohttp.ClientError):
    """More bytes than MAX_BODY_BYTES, compressed or not."""


class _BadEncoding(aiohttp.ClientError):
    """The content-encoding does not decode."""


class _Unsendable(aiohttp.ClientError):
    """aiohttp would not make a request of it."""


class _Silent(aiohttp.ClientError, TimeoutError):
    """A stream said nothing for STREAM_SILENCE_S."""


def _explain(exc: Exception) -> tuple[Failure, str, bool]:
    """(failure, detail, may a byte have been sent) of whatever aiohttp raised.

    Never uses ``repr``: aiohttp's shows request headers, the key among them.
    """
    match exc:
        case _TooLarge():
            return "too_large", f"the reply is larger than {MAX_BODY_BYTES >> 20} MB", True
        case _Unsendable():
            return "bad_header", f"the request cannot be sent: {exc}", False
        case _Silent():
            return "timeout", f"the stream said nothing for {STREAM_SILENCE_S:g} s", True
        case _BadEncoding():
            return "bad_encoding", "the reply's compression does not decode", True
        case aiohttp.ClientConnectorCertificateError():
            return "tls", f"certificate not trusted: {_tls_reason(exc.certificate_error)}", False
        case aiohttp.ClientConnectorSSLError() | aiohttp.ClientSSLError():
            return "tls", f"TLS handshake failed: {_tls_reason(exc)}", False
        case aiohttp.ClientConnectorDNSError():
            name = exc.host
            if exc.os_error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", -5)):
                return "no_host", f"no such host: {name}", False
            return "dns", f"cannot look up {name}: {exc.os_error.strerror}", False
        case aiohttp.ClientProxyConnectionError():
            return "connect", f"cannot reach the proxy: {_os_reason(exc.os_error)}", False
        case aiohttp.ClientHttpProxyError():
            # Only a proxy that wants to know who asks will say the same tomorrow.
            failure: Failure = "proxy" if exc.status == 407 else "connect"
            return failure, f"the proxy answered {exc.status} {exc.message}".rstrip(), False
        case aiohttp.ClientConnectorError():
            return "connect", f"cannot connect: {_os_reason(exc.os_error)}", False
        case aiohttp.ConnectionTimeoutError():
            return "connect", "no connection within the connect timeout", False
        case TimeoutError():
            return "timeout", "no answer in time", True
        case aiohttp.ClientPayloadError():
            return "cut", "the reply was cut short", True
        case aiohttp.ClientResponseError():
            return "bad_header", _unreadable(exc), True
    return "disconnected", "the connection was closed before the reply was whole", True


def _unreadable(exc: aiohttp.ClientResponseError) -> str:
    """What is wrong with a reply, without the piece of it that the parser quotes."""
    what = " ".join(exc.message.partition(":")[0].split())
    if what.startswith("Got more than"):
        return f"the reply has a line in its head of more than {MAX_HEADER_BYTES:,} bytes"
    return "the reply cannot be read as HTTP" + (f": {what[0].lower()}{what[1:]}" if what else "")


def _os_reason(error: OSError) -> str:
    # asyncio puts the address into strerror; the errno has the plain words.
    return os.strerror(error.errno) if error.errno else error.strerror or "no reason given"


def _tls_reason(exc: Exception) -> str:
    reason = getattr(exc, "verify_message", "") or getattr(exc, "reason", "")
    return str(reason).replace("_", " ").lower() or "unknown reason"


class _Space:
    """Memory for the replies in flight: what keeps a run small when every one of them is huge.

    The law. Each reply holds up to OWN_BYTES that nobody counts. Beyond, it takes from SHARED_BYTES
    while they last; when they do not, one reply at a time may hold up to MAX_BODY_BYTES all the
    same, and the others wait, with their reading paused, until a reply ends or their attempt's own
    time does. So all of them hold at most SHARED_BYTES + MAX_BODY_BYTES + OWN_BYTES each, beside
    what aiohttp has read ahead of us. None fails for the company it is in: whoever may hold
    everything waits for nobody, so the line always moves.
    """

    def __init__(self) -> None:
        self.free_bytes = SHARED_BYTES
        self.largest: _Share | None = None  # the one that need not wait
        self.freed = asyncio.Event()


class _Share:
    """What one reply holds of a space; use with ``with``."""

    def __init__(self, space: _Space) -> None:
        self.bytes = OWN_BYTES
        self._space = space
        self._taken_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        space = self._space
        space.free_bytes += self._taken_bytes
        if space.largest is self:
            space.largest = None
        if self.bytes > OWN_BYTES:
            space.freed.set()

    async def grow(self, size_bytes: int) -> None:
        """Wait until the reply may hold so much, or until its attempt's time is over."""
        if size_bytes > MAX_BODY_BYTES:
            raise _TooLarge
        wanted_bytes = min(size_bytes + STEP_BYTES, MAX_BODY_BYTES)
        while not self._take(wanted_bytes - self.bytes):
            self._space.freed.clear()
            await self._space.freed.wait()
        self.bytes = wanted_bytes

    def _take(self, more_bytes: int) -> bool:
        space = self._space
        if space.largest is self:
            return True
        if more_bytes <= space.free_bytes:
            space.free_bytes -= more_bytes
            self._taken_bytes += more_bytes
            return True
        if space.largest is None:
            space.largest = self
            return True
        return False


async def _whole(response: aiohttp.ClientResponse, space: _Space) -> bytes:
    """The decompressed body, or _TooLarge as soon as it is too large."""
    content = response.content
    body = await content.readany()
    encoding = response.headers.get("Content-Encoding")
    # One read is the usual case: the whole reply was there, no copy is needed.
    if encoding is None and content.at_eof():
        return body
    with _Share(space) as share:
        if not content.at_eof():
            body = await _read_on(content, body, share)
        return body if encoding is None else await _decompressed(body, encoding, share)


async def _read_on(content: aiohttp.StreamReader, first: bytes, share: _Share) -> bytes:
    # Not one buffer that grows: each time it moves, it would be there twice.
    parts, size = [first], len(first)
    while True:
        if size + STEP_BYTES > share.bytes:
            await share.grow(size)
        part = await content.read(STEP_BYTES)
        if not part:
            return b"".join(parts)
        size += len(part) + PIECE_COST_BYTES
        parts.append(part)


async def _decompressed(packed: bytes, encoding: str, share: _Share) -> bytes:
    inflate = _inflater(encoding, packed)
    if inflate is None or not packed:
        return packed
    pieces = _pieces(inflate, packed)
    plain = next(pieces, b"")
    if not inflate.eof:
        # What is packed is held as well, but it is the smaller part of anything dangerous.
        parts, size = [plain], len(plain)
        for piece in pieces:
            size += len(piece)
            if size > share.bytes:
                await share.grow(size)
            parts.append(piece)
        plain = b"".join(parts)
    if not inflate.eof:
        raise aiohttp.ClientPayloadError
    return plain


async def _follow(
    response: aiohttp.ClientResponse,
    stream: Assembler,
    space: _Space,
    deadlines: Deadlines,
    started_s: float,
) -> float | None:
    """Feed the stream to its end; seconds from the request to its first token."""
    ttft_s: float | None = None
    content = response.content
    inflate: zlib._Decompress | None = None
    encoding = response.headers.get("Content-Encoding")
    with _Share(space) as share:
        while not stream.done:
            chunk = await _next_piece(content, STREAM_SILENCE_S, deadlines)
            if not chunk:
                break
            if encoding is not None:
                inflate, encoding = _inflater(encoding, chunk), None
            await _feed(stream, inflate, chunk, share)
            if ttft_s is None and stream.first_token:
                ttft_s = time.monotonic() - started_s
        # The usage often comes after the finish, and with the last chunk read the connection lives
        # on; an answer that has its finish does not depend on either.
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with asyncio.timeout(STREAM_TAIL_S):
                while chunk := await content.read(STEP_BYTES):
                    await _feed(stream, inflate, chunk, share)
        stream.close()
    return ttft_s


async def _next_piece(
    content: aiohttp.StreamReader, silence_s: float, deadlines: Deadlines
) -> bytes:
    """What comes next of a stream; _Silent when nothing does while this process runs."""
    while True:
        lost_s = deadlines.lost_s
        try:
            async with asyncio.timeout(silence_s):
                return await content.read(STEP_BYTES)
        except TimeoutError:
            if deadlines.lost_s == lost_s:
                raise _Silent from None


async def _feed(
    stream: Assembler, inflate: zlib._Decompress | None, chunk: bytes, share: _Share
) -> None:
    for piece in (chunk,) if inflate is None else _pieces(inflate, chunk):
        stream.feed(piece)
        if stream.held_bytes > share.bytes:
            await share.grow(stream.held_bytes)


def _inflater(encoding: str, packed: bytes) -> zlib._Decompress | None:
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "deflate" if packed[:1] and packed[0] & 0x0F != zlib.DEFLATED:
            # Some servers say deflate and send it without zlib's header.
            return zlib.decompressobj(wbits=-15)
        case "gzip" | "x-gzip" | "deflate":
            # 32 + 15: zlib finds out whether the header is gzip's or its own.
            return zlib.decompressobj(wbits=47)
    raise _BadEncoding


def _pieces(inflate: zlib._Decompress, packed: bytes) -> Iterator[bytes]:
    """What ``packed`` unpacks to, step by step: a few bytes may stand for a thousand times more."""
    unpacked_bytes = 0
    for at in range(0, len(packed), STEP_BYTES):
        tail, is_more = packed[at : at + STEP_BYTES], True
        while is_more and not inflate.eof:
            try:
                plain = inflate.decompress(tail, STEP_BYTES)
            except zlib.error as exc:
                raise _BadEncoding from exc
            tail = inflate.unconsumed_tail
            # A full step may leave something to unpack behind, also when all input is taken.
            is_more = bool(tail) or len(plain) == STEP_BYTES
            unpacked_bytes += len(plain)
            if unpacked_bytes > MAX_BODY_BYTES:
                raise _TooLarge
            yield plain


def _headers(key: Secret | None, extra: Sequence[tuple[str, Secret]]) -> Mapping[str, str]:
    headers = {
        "Accept": "application/json, text/event-stream",
        "Accept-Encoding": "gzip, deflate",
        "Content-Type": "application/json",
        "User-Agent": f"batchrun/{VERSION} Python/{platform.python_version()}",
    }
    if key is not None:
        headers["Authorization"] = f"Bearer {key.reveal()}"
    given = {name.lower() for name, _ in extra}
    headers = {name: value for name, value in headers.items() if name.lower() not in given}
    return headers | {name: value.reveal() for name, value in extra}
