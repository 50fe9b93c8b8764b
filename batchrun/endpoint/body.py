"""A reply's body, read and decompressed within its bounds, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections.abc import Iterator

import aiohttp

from batchrun.chat import Assembler
from batchrun.endpoint.deadlines import Deadlines
from batchrun.endpoint.memory import MAX_BODY_BYTES, STEP_BYTES, Share, Space, TooLarge

# What Python needs for a piece, however small: single bytes must not pass for a small body.
PIECE_COST_BYTES = 64
# A stream that is silent this long is dead, whatever the attempt's own time.
STREAM_SILENCE_S = 120.0
# What may still follow once every choice has its finish: usage, [DONE], the last chunk.
STREAM_TAIL_S = 5.0


class BadEncoding(aiohttp.ClientError):
    """The content-encoding does not decode."""


class Silent(aiohttp.ClientError, TimeoutError):
    """A stream said nothing for ``silence_s``."""

    def __init__(self, silence_s: float) -> None:
        super().__init__()
        self.silence_s = silence_s


async def whole(response: aiohttp.ClientResponse, space: Space) -> bytes:
    """The decompressed body, or TooLarge as soon as it is too large."""
    content = response.content
    body = await content.readany()
    encoding = response.headers.get("Content-Encoding")
    # One read is the usual case: the whole reply was there, no copy is needed.
    if encoding is None and content.at_eof():
        return body
    with Share(space) as share:
        if not content.at_eof():
            body = await _read_on(content, body, share)
        return body if encoding is None else await _decompressed(body, encoding, share)


async def _read_on(content: aiohttp.StreamReader, first: bytes, share: Share) -> bytes:
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


async def _decompressed(packed: bytes, encoding: str, share: Share) -> bytes:
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


async def follow(
    response: aiohttp.ClientResponse,
    stream: Assembler,
    space: Space,
    deadlines: Deadlines,
    started_s: float,
) -> float | None:
    """Feed the stream to its end; seconds from the request to its first token."""
    ttft_s: float | None = None
    content = response.content
    inflate: zlib._Decompress | None = None
    encoding = response.headers.get("Content-Encoding")
    with Share(space) as share:
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
    """What comes next of a stream; Silent when nothing does while this process runs."""
    while True:
        lost_s = deadlines.lost_s
        try:
            async with asyncio.timeout(silence_s):
                return await content.read(STEP_BYTES)
        except TimeoutError:
            if deadlines.lost_s == lost_s:
                raise Silent(silence_s) from None


async def _feed(
    stream: Assembler, inflate: zlib._Decompress | None, chunk: bytes, share: Share
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
    raise BadEncoding


def _pieces(inflate: zlib._Decompress, packed: bytes) -> Iterator[bytes]:
    """What ``packed`` unpacks to, step by step: a few bytes may stand for a thousand times more."""
    unpacked_bytes = 0
    for at in range(0, len(packed), STEP_BYTES):
        tail, is_more = packed[at : at + STEP_BYTES], True
        while is_more and not inflate.eof:
            try:
                plain = inflate.decompress(tail, STEP_BYTES)
            except zlib.error as exc:
                raise BadEncoding from exc
            tail = inflate.unconsumed_tail
            # A full step may leave something to unpack behind, also when all input is taken.
            is_more = bool(tail) or len(plain) == STEP_BYTES
            unpacked_bytes += len(plain)
            if unpacked_bytes > MAX_BODY_BYTES:
                raise TooLarge
            yield plain
