"""aiohttp's exceptions, mapped once: the failure, its words, and whether anything was sent."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

import aiohttp

from batchrun.endpoint.body import BadEncoding, Silent
from batchrun.endpoint.memory import MAX_BODY_BYTES, TooLarge
from batchrun.types import Failure

MAX_HEADER_BYTES = 64 * 2**10


class Unsendable(aiohttp.ClientError):
    """aiohttp would not make a request of it."""


class Explained(NamedTuple):
    failure: Failure
    detail: str  # for people; may still hold a secret that the endpoint quoted
    sent: bool  # a byte may have been sent


def explain(exc: Exception, *, timeout_s: float, is_proxied: bool) -> Explained:
    """What whatever aiohttp raised means; ``timeout_s`` is an attempt's whole time.

    Never uses ``repr``: aiohttp's shows request headers, the key among them.
    """
    failure, detail, sent = _explained(exc, timeout_s)
    if failure == "no_host" and is_proxied:
        return Explained("proxy", f"the proxy's name is unknown ({detail})", sent)
    return Explained(failure, detail, sent)


def _explained(exc: Exception, timeout_s: float) -> tuple[Failure, str, bool]:
    match exc:
        case TooLarge():
            return "too_large", f"the reply is larger than {MAX_BODY_BYTES >> 20} MB", True
        case Unsendable():
            return "bad_header", f"the request cannot be sent: {exc}", False
        case Silent():
            return "timeout", f"the stream said nothing for {exc.silence_s:g} s", True
        case BadEncoding():
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
            return "timeout", f"no answer within {timeout_s:g} s", True
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
