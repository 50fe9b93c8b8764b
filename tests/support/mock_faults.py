"""Faults of servers that are broken or mean: the kinds beyond those that users may ask for."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache

from msgspec.structs import replace

from batchrun.mock import faults
from batchrun.mock.faults import Fault, content_of, instead, stream_fault
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import (
    HTML_HEADERS,
    JSON_HEADERS,
    Ending,
    MockReply,
    MockRequest,
    completion,
)


def fault_reply(kind: str, request: MockRequest, knobs: Knobs | None = None) -> MockReply:
    """What the fault ``kind`` makes of the answer to ``request``; for ``respond`` hooks."""
    return replace(faulty(FAULTS[kind], knobs)(request), fault=kind)


def faulty(fault: Fault, knobs: Knobs | None = None) -> Callable[[MockRequest], MockReply]:
    """A ``respond`` hook: every request meets the fault."""
    how = knobs or Knobs()
    return lambda request: fault(request, completion(request, knobs=how), how)


def redirected(to: str) -> Fault:
    return lambda _r, _a, _k: MockReply(status=307, headers={**HTML_HEADERS, "Location": to})


def _delivered_then(ending: Ending) -> Fault:
    """A whole answer on a connection that ends unannounced: its next request finds it stale.

    For answers the socket's buffers hold; a reset discards what the kernel has not sent yet.
    """
    return lambda _r, answer, _k: replace(answer, ending=ending)


def _cut_chunk(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    content = content_of(answer)
    return replace(
        answer,
        parts=[content[: len(content) // 2]],
        framing="chunked",
        ends_chunked=False,
        ending="close",
        whole=False,
    )


def _cut_silently(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    content = content_of(answer)
    return replace(
        answer, parts=None, body=content[: len(content) // 2], framing="until_close", whole=False
    )


def _truncated(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    content = content_of(answer)
    return replace(
        answer, parts=None, body=content[: len(content) // 2], framing="length", whole=False
    )


def _blank_lines_first(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    if answer.parts is not None:
        return answer
    return replace(answer, parts=[b"\n"] * 8 + [answer.body], framing="chunked")


def dripped(pause_s: float) -> Fault:
    """The answer byte by byte, with so much time between them."""

    def drip(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
        content = content_of(answer)
        parts = [content[at : at + 1] for at in range(len(content))]
        return replace(answer, parts=parts, framing="chunked", pause_s=pause_s)

    return drip


def _endless(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    parts = itertools.chain([b'{"id":"'], itertools.repeat(b" " * 65_536))
    return replace(answer, parts=parts, framing="chunked", whole=False)


@cache
def _bomb() -> bytes:
    """300 MB of JSON that never closes, in 306 KB of valid gzip."""
    opening, block, blocks = b'{"id":"', b" " * 2**20, 300
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    # After a full flush equal blocks pack to equal bytes: one is enough.
    packed_opening = packer.compress(opening) + packer.flush(zlib.Z_FULL_FLUSH)
    packed_block = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = zlib.crc32(opening)
    for _ in range(blocks):
        checksum = zlib.crc32(block, checksum)
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    tail = struct.pack("<II", checksum, len(opening) + blocks * len(block))
    return head + packed_opening + packed_block * blocks + packer.flush() + tail


def _gzip_bomb(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    headers = {**JSON_HEADERS, "Content-Encoding": "gzip"}
    return MockReply(body=_bomb(), headers=headers, billed=answer.billed)


def _huge_header(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    return replace(answer, headers={**answer.headers, "X-Padding": "a" * 1_000_000}, whole=False)


def _invalid_utf8(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    # A stream cuts the mark into pieces; its beginning is in the first.
    broken = content_of(answer).replace(b"[synth", b"\xff\xfe\x80", 1)
    return replace(answer, parts=None, framing="length", body=broken, whole=False)


def _raw(head: bytes) -> Fault:
    return lambda _r, answer, _k: MockReply(raw=head, ending="close", billed=answer.billed)


def _without_finish(events: list[bytes]) -> list[bytes]:
    return [e for e in events if b'"finish_reason":"' not in e]


FAULTS: Mapping[str, Fault] = {
    **faults.FAULTS,
    "redirect": redirected("http://127.0.0.1:9/v1/chat/completions"),
    "close-after": _delivered_then("close"),
    "reset-after": _delivered_then("reset"),
    "cut-chunk": _cut_chunk,
    "cut-silent": _cut_silently,
    "truncated_json": _truncated,
    "no_choices": instead(b'{"id":"x","object":"chat.completion","choices":[]}'),
    "blank_lines": _blank_lines_first,
    "drip": dripped(10.0),
    "endless": _endless,
    "gzip_bomb": _gzip_bomb,
    "huge_header": _huge_header,
    "bad_head": _raw(b"HTP/9 what\r\n\r\n"),
    "invalid_utf8": _invalid_utf8,
    "deep_json": instead(b"[" * 100_000),
    "stream-no-finish": stream_fault(_without_finish),
    "stream-eof": stream_fault(lambda e: _without_finish(e)[:-1]),
}
