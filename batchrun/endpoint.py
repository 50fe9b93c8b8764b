"""One Request in, one Attempt out, over aiohttp. The only room that knows aiohttp's exceptions.

Nothing here judges: whatever the network does becomes an Attempt, and ``retry`` says what it means.
The traps of the library are designed out once, in ``_session``: no redirects, no cookies, no netrc,
no connection limit that would count as time, explicit timeouts, our own bounded decompression.
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
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]  # not in its stubs

import aiohttp
import msgspec
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

from batchrun import answers
from batchrun.config import VERSION
from batchrun.errors import EndpointRefused, StoppedEarly
from batchrun.providers import Endpoint, Secret
from batchrun.sse import Assembler
from batchrun.types import Attempt, Failure, Reply, Request

# Larger than any completion with its log probabilities; a gzip bomb of 300 MB stops here.
MAX_BODY_BYTES = 24 * 2**20
# vLLM and uvicorn close idle connections after 5 s; reusing one they just closed loses the request.
KEEPALIVE_S = 4.0
# A stream that is silent this long is dead, whatever the attempt's own time.
STREAM_SILENCE_S = 120.0
# What may still follow once every choice has its finish: usage, [DONE], the last chunk.
STREAM_TAIL_S = 5.0
# aiohttp warns when larger bodies are given as bytes: it would copy them in one go.
LARGE_BODY_BYTES = 2**20
MAX_HEADER_BYTES = 64 * 2**10
# Shorter header values ("1", "true") are no secrets, and occur in every JSON.
MIN_SECRET_BYTES = 8
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
        self._timeout_s = timeout_s
        self._timeout = aiohttp.ClientTimeout(
            total=connect_timeout_s + timeout_s,
            connect=connect_timeout_s,
            sock_connect=connect_timeout_s,
            sock_read=None,
        )
        self._proxy = proxy_for(endpoint.url) if proxied else None
        # A proxy wants heads of its own.
        self._is_lean = self._proxy is None and aiohttp.__version__.startswith(LEAN_VERSIONS)
        self._secrets = [endpoint.key] if endpoint.key else []
        self._secrets += [value for _, value in headers]
        values = [secret.reveal().encode() for secret in self._secrets]
        self._secret_bytes = [value for value in values if len(value) >= MIN_SECRET_BYTES]

    async def __aenter__(self) -> Self:
        self._session = self._new_session(lean=self._is_lean)
        return self

    def _new_session(self, *, lean: bool) -> aiohttp.ClientSession:
        """``lean`` sends chat completions and nothing else, for a fifth less CPU."""
        more: dict[str, Any] = {}
        if lean:
            head = _head(self._url, self._headers)
            more = {"request_class": type("_Request", (_ChatRequest,), {"head": head})}
        # No default headers: aiohttp would send those to the proxy too, the key among them.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # waiting for a pool place would count as the attempt's time
                keepalive_timeout=KEEPALIVE_S,
                ttl_dns_cache=60,
                socket_factory=_keepalive_socket,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            auto_decompress=False,
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
        try:
            response = await self._session.post(
                self._url,
                data=self._content(request.body),
                headers=None if self._is_lean else self._headers,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return self._failed(exc, started_s)
        try:
            return await self._read(response, started_s)
        except (aiohttp.ClientError, OSError) as exc:
            return self._failed(exc, started_s, response)
        finally:
            # A connection whose reply was not read to its end must not be used again.
            if not response.content.at_eof():
                response.close()

    def _content(self, body: bytes) -> bytes | io.BytesIO:
        return body if self._is_lean or len(body) <= LARGE_BODY_BYTES else io.BytesIO(body)

    async def models(self) -> list[str]:
        """The model names the endpoint offers to this key, in its order."""
        host = self._endpoint.host
        url = URL(self._endpoint.models_url, encoded=True)
        try:
            async with (
                self._new_session(lean=False) as session,
                session.get(url, headers=self._headers, allow_redirects=False) as response,
            ):
                body = await _whole(response)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            failure, detail, _ = _explain(exc)
            stopped = EndpointRefused if failure in ("tls", "no_host") else StoppedEarly
            raise stopped(f"cannot ask {host} for its models: {self.scrub(detail)}") from exc
        if response.status != 200:
            error = answers.parse(body).error
            said = f": {self.scrub(error.message)}" if error and error.message else ""
            raise EndpointRefused(f"{host} does not list its models (HTTP {response.status}){said}")
        try:
            listing = msgspec.json.decode(body, type=_ModelList)
        except msgspec.DecodeError as exc:
            raise EndpointRefused(f"{host} did not answer with a list of models") from exc
        return [model.id for model in listing.data]

    def scrub(self, text: str) -> str:
        """``text`` without any secret this endpoint was given."""
        for secret in self._secrets:
            text = secret.scrub(text)
        return text

    def _scrubbed(self, response: aiohttp.ClientResponse) -> Mapping[str, str]:
        """The reply's headers, which become request ids and reasons, without any secret."""
        if not self._secret_bytes:
            return response.headers
        for _, value in response.raw_headers:
            for secret in self._secret_bytes:
                if secret in value:
                    shown = ((name, self.scrub(value)) for name, value in response.headers.items())
                    return CIMultiDict(shown)
        return response.headers

    async def _read(self, response: aiohttp.ClientResponse, started_s: float) -> Attempt:
        ttft_s: float | None = None
        failure: Failure | None = None
        if response.content_type == "text/event-stream":
            stream = Assembler(limit_bytes=MAX_BODY_BYTES)
            ttft_s = await _follow(response, stream, started_s)
            body, failure = stream.body(), stream.problem
        else:
            body = await _whole(response)
        reply = _parsed(body)
        if response.status != 200 or failure or reply is None or reply.error or not reply.choices:
            # Some endpoints quote the key they refuse; it must not reach journal or report. An
            # answer stays as it came.
            scrubbed = body
            for secret in self._secret_bytes:
                scrubbed = scrubbed.replace(secret, b"[key]")
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
        response: aiohttp.ClientResponse | None = None,
    ) -> Attempt:
        failure, detail, sent = _explain(exc)
        if failure == "timeout":
            detail = f"no answer within {self._timeout_s:g} s"
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
        transport.write(b"%b%d\r\n\r\n%b" % (self.head, len(content), content))
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


def _explain(exc: Exception) -> tuple[Failure, str, bool]:
    """(failure, detail, may a byte have been sent) of whatever aiohttp raised.

    Never uses ``repr``: aiohttp's shows request headers, the key among them.
    """
    match exc:
        case _TooLarge():
            return "too_large", f"the reply is larger than {MAX_BODY_BYTES >> 20} MB", True
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
            return "proxy", f"cannot reach the proxy: {exc.os_error.strerror}", False
        case aiohttp.ClientHttpProxyError():
            return "proxy", f"the proxy answered {exc.status} {exc.message}", False
        case aiohttp.ClientConnectorError():
            return "connect", f"cannot connect: {_os_reason(exc.os_error)}", False
        case aiohttp.ConnectionTimeoutError():
            return "connect", "no connection within the connect timeout", False
        case TimeoutError():
            return "timeout", "no answer in time", True
        case aiohttp.ClientPayloadError():
            return "cut", "the reply was cut short", True
        case aiohttp.ClientResponseError():
            return "bad_header", "the reply's head cannot be read (a header too long?)", True
        case ValueError():
            return "bad_header", f"the request cannot be sent: {type(exc).__name__}", False
    return "disconnected", "the connection was closed before the reply was whole", True


def _os_reason(error: OSError) -> str:
    # asyncio puts the address into strerror; the errno has the plain words.
    return os.strerror(error.errno) if error.errno else error.strerror or "no reason given"


def _tls_reason(exc: Exception) -> str:
    reason = getattr(exc, "verify_message", "") or getattr(exc, "reason", "")
    return str(reason).replace("_", " ").lower() or "unknown reason"


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """The decompressed body, or _TooLarge as soon as it is too large."""
    content = response.content
    body = await content.readany()
    # One read is the usual case: the whole reply was there, no copy is needed.
    if not content.at_eof():
        parts, size = [body], len(body)
        while part := await content.readany():
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise _TooLarge
            parts.append(part)
        body = b"".join(parts)
    if "Content-Encoding" in response.headers:
        return _decompressed(body, response.headers["Content-Encoding"])
    return body


async def _follow(
    response: aiohttp.ClientResponse, stream: Assembler, started_s: float
) -> float | None:
    """Feed the stream to its end; seconds from the request to its first token."""
    ttft_s: float | None = None
    inflate = _inflater(response.headers.get("Content-Encoding", ""))
    while not stream.done:
        async with asyncio.timeout(STREAM_SILENCE_S):
            chunk = await response.content.readany()
        if not chunk:
            break
        _feed(stream, inflate, chunk)
        if ttft_s is None and stream.first_token:
            ttft_s = time.monotonic() - started_s
    # The usage often comes after the finish, and with the last chunk read the connection lives on;
    # an answer that has its finish does not depend on either.
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(STREAM_TAIL_S):
            while chunk := await response.content.readany():
                _feed(stream, inflate, chunk)
    stream.close()
    return ttft_s


def _feed(stream: Assembler, inflate: zlib._Decompress | None, chunk: bytes) -> None:
    stream.feed(_inflated(inflate, chunk) if inflate is not None else chunk)
    if stream.problem == "too_large":
        raise _TooLarge


def _inflater(encoding: str) -> zlib._Decompress | None:
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip" | "deflate":
            # 32 + 15: zlib finds out whether the header is gzip's or its own.
            return zlib.decompressobj(wbits=47)
    raise _BadEncoding


def _inflated(inflate: zlib._Decompress, chunk: bytes) -> bytes:
    try:
        plain = inflate.decompress(chunk, MAX_BODY_BYTES)
    except zlib.error as exc:
        raise _BadEncoding from exc
    if inflate.unconsumed_tail:
        raise _TooLarge
    return plain


def _decompressed(body: bytes, encoding: str) -> bytes:
    inflate = _inflater(encoding)
    if inflate is None or not body:
        return body
    try:
        plain = inflate.decompress(body, MAX_BODY_BYTES)
    except zlib.error:
        try:
            # Some servers say deflate and send it without zlib's header.
            inflate = zlib.decompressobj(wbits=-15)
            plain = inflate.decompress(body, MAX_BODY_BYTES)
        except zlib.error as exc:
            raise _BadEncoding from exc
    if inflate.unconsumed_tail:
        raise _TooLarge
    if not inflate.eof:
        raise aiohttp.ClientPayloadError
    return plain


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


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for ``url``, by curl's variables."""
    parts = urlsplit(url)
    proxies = getproxies_environment()
    if proxy_bypass_environment(parts.netloc, proxies):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    return proxy


def _keepalive_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    # Middleboxes forget silent connections after 60-350 s; without probes we would wait for ever.
    family, kind, proto, _, _ = address
    sock = socket.socket(family=family, type=kind, proto=proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    for option, value in (
        (idle, 60),
        (getattr(socket, "TCP_KEEPINTVL", None), 60),
        (getattr(socket, "TCP_KEEPCNT", None), 5),
    ):
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock
