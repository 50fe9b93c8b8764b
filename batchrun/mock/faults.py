"""Every fault of the stand-in by its name: what real endpoints, gateways and networks do.

A fault is a function from the request and its proper answer to the reply that is sent instead, down
to the bytes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate

import msgspec
from msgspec.structs import replace

from batchrun.errors import UsageError
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import (
    HTML_HEADERS,
    JSON_HEADERS,
    Ending,
    MockReply,
    MockRequest,
    error_reply,
    event,
    in_seconds,
    rate_limited,
    reason_phrase,
    wrong_key,
)

Fault = Callable[[MockRequest, MockReply, Knobs], MockReply]


def check_kinds(knobs: Knobs, faults: Mapping[str, Fault]) -> None:
    """UsageError for a fault that does not exist."""
    named = {*knobs.faults, *knobs.script} - {"ok"}
    if unknown := sorted(named - faults.keys()):
        raise UsageError(f"no fault {unknown[0]!r}; there are: {', '.join(faults)}")


def fault_of(asked: MockRequest, knobs: Knobs) -> str:
    """The kind of fault this sending meets; "" for none. The same in every run with these knobs."""
    if asked.seen <= len(knobs.script):
        kind = knobs.script[asked.seen - 1]
        return "" if kind == "ok" else kind
    if not knobs.faults:
        return ""
    draw = chance(asked, knobs, b"fault")
    for kind, rate in knobs.faults.items():
        draw -= rate
        if draw < 0:
            return kind
    return ""


def chance(asked: MockRequest, knobs: Knobs, what: bytes) -> float:
    """A number in [0, 1) that depends on the seed, the body and its how-manieth sending."""
    told = b"%d %d %b %b" % (knobs.seed, asked.seen, what, asked.digest)
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest()) / 2**64


def _refused(_r: MockRequest, _a: MockReply, _k: Knobs) -> MockReply:
    return rate_limited({})


def _refused_for_seconds(_r: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
    return rate_limited(in_seconds(knobs.retry_after_s))


def _refused_for_ms(_r: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
    return rate_limited({"retry-after-ms": str(math.ceil(knobs.retry_after_s * 1000))})


def _refused_until(_r: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
    now_s = time.time()
    then = formatdate(math.ceil(now_s + knobs.retry_after_s), usegmt=True)
    return rate_limited({"Date": formatdate(now_s, usegmt=True), "Retry-After": then})


def _refused_in_words(_r: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
    return rate_limited({}, f". Please try again in {knobs.retry_after_s:g}s.")


def _error(
    status: int, message: str, type: str, code: str | None = None, param: str | None = None
) -> Fault:
    reply = error_reply(status, message, type=type, code=code, param=param)
    return lambda _r, _a, _k: reply


# A gateway that gave up waiting says nothing about the generation behind it: it is billed.
_BILLED_STATUSES = frozenset({408, 499, 504, 524})


def _server_error(status: int, *, html: bool = False, named_wait: bool = False) -> Fault:
    def fail(_r: MockRequest, answer: MockReply, knobs: Knobs) -> MockReply:
        headers = in_seconds(knobs.retry_after_s) if named_wait else {}
        reply = error_reply(
            status,
            reason_phrase(status),
            type="server_error",
            headers=headers,
        )
        if html:
            reply = replace(reply, body=_html_page(status), headers={**HTML_HEADERS, **headers})
        return replace(reply, billed=answer.billed if status in _BILLED_STATUSES else None)

    return fail


def _html_page(status: int) -> bytes:
    title = f"{status}: {reason_phrase(status)}"
    return (
        f"<!DOCTYPE html>\n<html><head><title>mock.invalid | {title}</title></head>\n"
        f"<body><h1>{title}</h1><p>cloudflare</p></body></html>\n"
    ).encode()


def _wrong_key(request: MockRequest, _a: MockReply, _k: Knobs) -> MockReply:
    return wrong_key(request)


def _extra_forbidden(_r: MockRequest, _a: MockReply, _k: Knobs) -> MockReply:
    problem = {"type": "extra_forbidden", "loc": ["body", "store"], "msg": "Extra inputs ..."}
    return MockReply(
        status=422, headers=JSON_HEADERS, body=msgspec.json.encode({"detail": [problem]})
    )


def content_of(answer: MockReply) -> bytes:
    """The body of a reply, of its parts as well."""
    return answer.body if answer.parts is None else b"".join(answer.parts)


def dropped(ending: Ending) -> Fault:
    """The connection ends without a byte of an answer that was made and billed."""
    return lambda _r, answer, _k: MockReply(raw=b"", ending=ending, billed=answer.billed)


def _cut_length(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    content = content_of(answer)
    return replace(
        answer,
        parts=None,
        body=content[: len(content) // 2],
        framing="length",
        claims_bytes=len(content),
        ending="close",
        whole=False,
    )


def instead(body: bytes, headers: Mapping[str, str] = JSON_HEADERS) -> Fault:
    """Something else at 200, of an answer that was made and billed."""
    return lambda _r, answer, _k: MockReply(body=body, headers=headers, billed=answer.billed)


def _error_at_200(_r: MockRequest, _a: MockReply, _k: Knobs) -> MockReply:
    told = {"error": {"code": 502, "message": "Provider returned error", "metadata": {}}}
    return MockReply(headers=JSON_HEADERS, body=msgspec.json.encode(told))


def stream_fault(change: Callable[[list[bytes]], list[bytes]], *, billed: bool = True) -> Fault:
    """A fault of the events themselves; a request that does not stream gets its answer."""

    def spoil(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
        if answer.parts is None:
            return answer
        events = [e + b"\n\n" for e in content_of(answer).split(b"\n\n") if e]
        spent = answer.billed if billed else None
        return replace(answer, parts=change(events), billed=spent, whole=False)

    return spoil


_MID_STREAM_ERROR = event(
    {"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": 500}}
)


FAULTS: Mapping[str, Fault] = {
    "400": _error(400, "Invalid value for 'temperature'", "invalid_request_error", "invalid_value"),
    "401": _wrong_key,
    "402": _error(402, "Insufficient Balance", "unknown_error", "invalid_request_error"),
    "403": _error(403, "You are not allowed to use this model", "permission_error"),
    "404": _error(404, "The model does not exist", "invalid_request_error", "model_not_found"),
    "408": _server_error(408),
    "409": _error(409, "Conflict", "conflict"),
    "413": _error(413, "Request too large", "request_too_large"),
    "422": _extra_forbidden,
    "context_length": _error(
        400,
        "This model's maximum context length is 8192 tokens, your messages have 9000.",
        "invalid_request_error",
        "context_length_exceeded",
        "messages",
    ),
    "content_filter": _error(
        400, "The response was filtered", "invalid_request_error", "content_filter", "prompt"
    ),
    "429": _refused,
    "429-retry-after": _refused_for_seconds,
    "429-date": _refused_until,
    "429-ms": _refused_for_ms,
    "429-hint": _refused_in_words,
    "429-quota": _error(
        429, "You exceeded your current quota", "insufficient_quota", "insufficient_quota"
    ),
    "429-capacity": _error(
        429, "Service tier capacity exceeded", "service_tier_capacity_exceeded", "3505"
    ),
    **{str(s): _server_error(s) for s in (500, 502, 503, 504, 520, 524, 529)},
    **{f"{s}-html": _server_error(s, html=True) for s in (500, 502, 503, 504, 520, 524, 529)},
    "503-retry-after": _server_error(503, named_wait=True),
    "disconnect": dropped("close"),
    "reset": dropped("reset"),
    "cut": _cut_length,
    "garbage": instead(b"upstream said: ok", {"Content-Type": "text/plain"}),
    "html": instead(b"<html><body>Sign in to the network</body></html>", HTML_HEADERS),
    "empty": instead(b""),
    "error-200": _error_at_200,
    "hang": dropped("hang"),
    "stream-error": stream_fault(lambda e: [*e[:2], _MID_STREAM_ERROR, e[-1]]),
    "stream-cut": stream_fault(lambda e: [b"".join(e)[: len(b"".join(e)) // 2]]),
}
