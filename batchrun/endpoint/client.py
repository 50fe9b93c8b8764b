"""One Request in, one Attempt out, over aiohttp. No exception of aiohttp's gets out.

Nothing here judges: whatever the network does becomes an Attempt, and ``sending`` says what it
means. The traps of the library are designed out once, in ``_new_session``: no redirects, no
cookies, no netrc, explicit timeouts, our own bounded decompression; ``connections`` and
``deadlines`` do the rest.
"""

from __future__ import annotations

import asyncio
import io
import platform
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from batchrun import secret
from batchrun.chat import CHAT, Api, is_utf8
from batchrun.config import MAX_CONCURRENCY, VERSION
from batchrun.endpoint.body import follow, whole
from batchrun.endpoint.connections import TRIP, Connector, Trip
from batchrun.endpoint.deadlines import Deadlines
from batchrun.endpoint.failures import MAX_HEADER_BYTES, Explained, Unsendable, explain
from batchrun.endpoint.lean import Departures, LeanRequest, request_head
from batchrun.endpoint.memory import MAX_BODY_BYTES, Space
from batchrun.endpoint.proxies import proxy_for
from batchrun.errors import EndpointRefused, StoppedEarly
from batchrun.providers import Endpoint
from batchrun.secret import Scrubber, Secret
from batchrun.types import Attempt, Failure, Reply, Request

# What aiohttp reads ahead of a reply that waits; one read of the socket may add 256 KB.
READ_AHEAD_BYTES = 16 * 2**10
# aiohttp warns when larger bodies are given as bytes: it would copy them in one go.
LARGE_BODY_BYTES = 2**20
LEAN_VERSIONS = ("3.14.",)


class ChatEndpoint:
    """One endpoint of one API. Use as an async context manager; ``send`` never raises.

    ``proxied`` False ignores HTTP(S)_PROXY: the embedded stand-in is inside this process.
    ``room`` is how many requests may be in flight at once, as far as open files go.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        headers: Sequence[tuple[str, Secret]] = (),
        *,
        timeout_s: float,
        connect_timeout_s: float,
        proxied: bool = True,
        room: int = MAX_CONCURRENCY,
        api: Api = CHAT,
    ) -> None:
        self.host = endpoint.host
        self.room = room
        self.notes = ()
        self._endpoint = endpoint
        self._api = api
        self._url = URL(endpoint.url, encoded=True)
        self._headers = _headers(endpoint.key, headers)
        self._space = Space()
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
        """``lean`` posts bodies to this endpoint and does nothing else, for a fifth less CPU."""
        more: dict[str, Any] = {}
        if lean:
            head = request_head(self._url, self._headers)
            own = {"head": head, "departures": Departures()}
            more = {"request_class": type("_Request", (LeanRequest,), own)}
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
            is_lost = response is None and self._connector.lost(trip, exc)
            return _Tried(attempt, is_lost and not wants_new)
        except ValueError as exc:
            if response is not None:
                raise
            unsendable = Unsendable(type(exc).__name__)
            return _Tried(self._failed(unsendable, started_s, None, left=False), goes_again=False)
        return _Tried(attempt, _was_for_nobody(attempt, trip) and not wants_new)

    def _content(self, body: bytes) -> bytes | io.BytesIO:
        return body if self._is_lean or len(body) <= LARGE_BODY_BYTES else io.BytesIO(body)

    async def models(self) -> list[str]:
        """The model names the endpoint offers to this key, in its order."""
        host = self.host
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
                        body = await whole(response, self._space)
                finally:
                    self._deadlines.end(limit)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            failure, detail, _ = self._explained(exc)
            stopped = EndpointRefused if failure in ("tls", "no_host") else StoppedEarly
            raise stopped(f"cannot ask {host} for its models: {self.scrub(detail)}") from exc
        if response.status != 200:
            error = self._api.parse(self._scrubber.scrub_bytes(body)).error
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
            stream = self._api.assembler(limit_bytes=MAX_BODY_BYTES)
            ttft_s = await follow(response, stream, self._space, self._deadlines, started_s)
            body, failure = stream.body(), stream.problem
        else:
            body = await whole(response, self._space)
        if failure is None and not body.isascii() and not is_utf8(body):
            failure = "not_utf8"
        reply = self._parsed(body)
        if response.status != 200 or failure or reply is None or reply.error or not reply.choices:
            # Some endpoints quote the key they refuse; it must not reach journal or report. An
            # answer stays as it came.
            scrubbed = self._scrubber.scrub_bytes(body)
            if scrubbed != body:
                body, reply = scrubbed, self._parsed(scrubbed)
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

    def _parsed(self, body: bytes) -> Reply | None:
        """What a body says; None when there is nothing to read."""
        return self._api.parse(body) if body and not body.isspace() else None

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

    def _explained(self, exc: Exception) -> Explained:
        is_proxied = self._proxy is not None
        return explain(exc, timeout_s=self._deadlines.allowed_s, is_proxied=is_proxied)


class _Tried(NamedTuple):
    attempt: Attempt
    goes_again: bool  # on a new connection: this one had been given up before the request came


def _was_for_nobody(attempt: Attempt, trip: Trip) -> bool:
    """A server that closes an idle connection may say so, just when a request is on its way."""
    if attempt.status != 408 or not (trip.was_reused and trip.is_early):
        return False
    return "close" in attempt.headers.get("Connection", "").lower()


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


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
