"""What the run's process and those that send for it say to each other, over a socket pair.

Down go the ``Terms``, pickled, and then ``Orders``; up come ``Reports``, the first of them as soon
as the endpoint is open, and one a second at least. Frames are a length of four bytes and that much
msgpack. Instants are on the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from batchrun.endpoint import ChatEndpoint
from batchrun.providers import Endpoint
from batchrun.secret import Secret
from batchrun.types import Attempt

HEARTBEAT_S = 1.0
_LENGTH_BYTES = 4


class Terms(NamedTuple):
    """All that a process has to know to send: the arguments of ``ChatEndpoint``."""

    endpoint: Endpoint
    headers: Sequence[tuple[str, Secret]]
    timeout_s: float
    connect_timeout_s: float
    proxied: bool
    room: int  # requests in flight in one process, at the very most

    def endpoint_here(self) -> ChatEndpoint:
        """The endpoint as this process opens it."""
        return ChatEndpoint(
            self.endpoint,
            self.headers,
            timeout_s=self.timeout_s,
            connect_timeout_s=self.connect_timeout_s,
            proxied=self.proxied,
            room=self.room,
        )


class Orders(msgspec.Struct, array_like=True, gc=False):
    """Requests that were let go, numbered on from ``first``, and numbers nobody waits for."""

    at_s: float
    first: int
    bodies: list[bytes]
    given_up: list[int]


Reports: TypeAlias = list[tuple[int, Attempt]]

# Where one socket is for several processes, each frame names the process and what it is about.
NO_PLACE, START, ORDERS, KILL, CONNECTED, REPORTS, GONE = 0, 1, 2, 3, 4, 5, 6


def marked(place: int, kind: int, content: bytes) -> bytes:
    """A frame about the process at ``place``, of which there may be 2**32."""
    return place.to_bytes(4, "big") + bytes((kind,)) + content


def unmarked(frame: memoryview) -> tuple[int, int, memoryview]:
    """The place, the kind and the content of such a frame."""
    return int.from_bytes(frame[:4], "big"), frame[4], frame[5:]


def _plain(value: object) -> object:
    """Headers as a dict with lower-case names; of one that is there twice, the first counts."""
    if not isinstance(value, Mapping):
        raise NotImplementedError(type(value).__name__)
    headers: dict[str, str] = {}
    for name, text in value.items():
        headers.setdefault(name.lower(), text)
    return headers


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)


def encode(message: Orders | Reports) -> bytes:
    return _encoder.encode(message)


orders_decoder = msgspec.msgpack.Decoder(Orders)
reports_decoder = msgspec.msgpack.Decoder(Reports)


class Frames(ABC, asyncio.Protocol):
    """One end of the socket: ``heard`` for every frame that came, ``lost`` once at the end."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._transport: asyncio.Transport | None = None

    @abstractmethod
    def heard(self, frame: memoryview) -> None:
        """Told of a frame's content, which is gone when this returns."""

    @abstractmethod
    def lost(self) -> None:
        """Told once that the other end is gone."""

    def say(self, content: bytes) -> None:
        """Send a frame; nothing happens when the other end is gone."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.writelines((len(content).to_bytes(_LENGTH_BYTES, "big"), content))

    def close_line(self) -> None:
        """Send what was said, and end."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        at, end = 0, len(self._unread)
        with memoryview(self._unread) as view:
            while end - at >= _LENGTH_BYTES:
                start = at + _LENGTH_BYTES
                stop = start + int.from_bytes(view[at:start], "big")
                if stop > end:
                    break
                with view[start:stop] as frame:
                    self.heard(frame)
                at = stop
        del self._unread[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost()
