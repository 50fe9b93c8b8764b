"""Which connection a request goes on: one that is free and clean, else a new one.

A reused connection is not a promise. Servers close them at any moment, also right after a reply
that promised to keep it, and some send what nobody asked for: a late reply, a second one, a 408.

* Whatever waits on an idle connection belongs to nobody: the connection is closed, never used.
* One that dies before a byte of the reply, soon after a request went out on it, had been given up
  by the other side before: the request goes again, at once, on a new one (RFC 9112 section 9.3.1).
* Where that keeps happening, no connection is used twice for a while.
* Where new connections are reset, the next ones must live for a moment before a request goes out:
  what never left cannot have been billed.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import select
import socket
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from batchrun.endpoint.deadlines import Deadlines

if TYPE_CHECKING:
    from aiohttp.tracing import Trace


# vLLM and uvicorn close idle connections after 5 s; reusing one they just closed loses the request.
KEEPALIVE_S = 4.0
# A connection that was dead already says so within a round trip; later the request was at work.
STALE_S = 1.0
# So many deaths, less a tenth for every reuse that went well, and connections are not trusted.
MANY_DEATHS = 3.0
REUSE_IS_WORTH = 0.1
# A server that restarts takes all its connections along once: no reason to do without for ever.
DISTRUST_S = 60.0
# What a server takes to close a connection that it accepted and does not want.
AT_ONCE_S = 0.02
# What a new connection has to live where others were reset, and how many have to do so.
PROOF_S = 0.05
PROOFS = 50


class Line(ResponseHandler):
    """A connection that knows whether anything came on it, and when."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.uses = 0
        self._arrivals = 0
        self._arrivals_before = 0
        self._poll = select.poll()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            self._poll.register(sock.fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        # aiohttp also calls this without any, to go on with what it has.
        if data:
            self._arrivals += 1
        super().data_received(data)

    def begin(self) -> None:
        """A request goes out on it."""
        self.uses += 1
        self._arrivals_before = self._arrivals

    def rest(self) -> bool:
        """Whether something came since it began. What arrives from now on was not asked for."""
        has_heard = self._arrivals != self._arrivals_before
        self._arrivals_before = self._arrivals
        return has_heard

    def is_clean(self) -> bool:
        """Whether a request may go out on it: nothing came, and nothing waits in the socket."""
        if self._arrivals != self._arrivals_before or self.should_close:
            return False
        return self.is_connected() and not self._poll.poll(0)


class Trip:
    """One way to the endpoint and back, as far as its connection is concerned."""

    __slots__ = (
        *("_began_s", "_deadlines", "_limit", "_line"),
        *("connecting_s", "left", "wants_new", "was_proven", "was_reused", "was_silent"),
    )

    def __init__(
        self,
        limit: asyncio.Timeout | None = None,
        deadlines: Deadlines | None = None,
        *,
        wants_new: bool = False,
    ) -> None:
        self.wants_new = wants_new
        self.was_reused = False
        self.was_proven = False
        self.was_silent = True  # not a byte of a reply has come
        self.left = True  # a byte of the request may have left; only the fast path knows better
        self.connecting_s = 0.0
        self._began_s = 0.0
        self._limit = limit
        self._deadlines = deadlines
        self._line: Line | None = None

    def begin(self, line: Line, now: float) -> None:
        self.was_reused = line.uses > 0
        self._line = line
        self._began_s = now
        line.begin()
        if self._deadlines is not None and self._limit is not None:
            self._deadlines.start(self._limit, now)

    def end(self) -> None:
        """Its connection is free again, or closed."""
        if self._line is not None:
            self.was_silent = not self._line.rest()

    @property
    def is_early(self) -> bool:
        """Soon enough for the connection to have been dead before."""
        return self._took_s() <= STALE_S

    @property
    def is_immediate(self) -> bool:
        """As soon as the news of a new connection's end takes to come back."""
        return self._took_s() <= 2 * self.connecting_s + AT_ONCE_S

    def _took_s(self) -> float:
        return asyncio.get_running_loop().time() - self._began_s


# The trip of this task: aiohttp asks for connections without saying for whom.
TRIP: ContextVar[Trip] = ContextVar("TRIP")


class Connector(aiohttp.TCPConnector):
    """Hands out clean connections, and learns from those that die."""

    def __init__(self) -> None:
        super().__init__(
            limit=0,  # waiting for a pool place would count as the attempt's time
            keepalive_timeout=KEEPALIVE_S,
            ttl_dns_cache=60,
            socket_factory=_keepalive_socket,
        )
        # Its own type is that of one class; there is no other way to say which protocol to use.
        self._factory = functools.partial(Line, loop=self._loop)  # type: ignore[assignment]
        self._deaths = 0.0
        self._distrusts_until_s = 0.0
        self._proofs_wanted = 0

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  # aiohttp's signature
    ) -> Connection:
        trip = TRIP.get()
        asked_s = self._loop.time()
        trusts = asked_s >= self._distrusts_until_s
        while True:
            connection = await super().connect(req, traces, timeout)
            line: Any = connection.protocol
            if line.uses == 0:
                trip.connecting_s = self._loop.time() - asked_s
                trip.was_proven = self._proofs_wanted > 0
                if trip.was_proven:
                    await self._prove(connection, line, req, trip.connecting_s)
                break
            if trusts and not trip.wants_new and line.is_clean():
                self._deaths = max(0.0, self._deaths - REUSE_IS_WORTH)
                break
            connection.close()
        if not trusts:
            line.force_close()
        trip.begin(line, self._loop.time())
        connection.add_callback(trip.end)
        return connection

    def lost(self, trip: Trip, exc: Exception) -> bool:
        """Note a connection that ended under a request; True when it had been given up before.

        Of a new one that is so when it is reset at once: servers that are full accept, then reset.
        One that had to prove itself was not.
        """
        if not trip.was_silent or not _is_loss(exc):
            return False
        if trip.was_reused and trip.is_early:
            self._died_idle()
            return True
        if trip.was_reused or trip.was_proven or not trip.is_immediate or not _is_reset(exc):
            return False
        self._proofs_wanted = PROOFS
        return True

    def _died_idle(self) -> None:
        # The reuse was counted as one that went well.
        self._deaths += 1.0 + REUSE_IS_WORTH
        if self._deaths >= MANY_DEATHS:
            self._deaths = 0.0
            self._distrusts_until_s = self._loop.time() + DISTRUST_S

    async def _prove(
        self, connection: Connection, line: Line, req: aiohttp.ClientRequest, connecting_s: float
    ) -> None:
        """Where connections are reset as soon as they are made, wait for that to happen."""
        try:
            await asyncio.sleep(max(PROOF_S, 2 * connecting_s))
        except BaseException:
            connection.close()
            raise
        if line.is_clean():
            self._proofs_wanted = max(0, self._proofs_wanted - 1)
            return
        connection.close()
        self._proofs_wanted = PROOFS
        reason = ConnectionResetError(errno.ECONNRESET, "closed as soon as it was made")
        raise aiohttp.ClientConnectorError(req.connection_key, reason)


def _is_loss(exc: Exception) -> bool:
    """The connection ended under the request, and nothing else went wrong."""
    if isinstance(exc, aiohttp.ClientConnectorError | TimeoutError):
        return False
    return isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)


def _is_reset(exc: Exception) -> bool:
    return isinstance(exc, OSError) and exc.errno in (errno.ECONNRESET, errno.EPIPE)


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
