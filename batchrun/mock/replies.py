"""What the stand-in says: completions, streams, error bodies, and every fault by its name.

Answers are a pure function of the request and plainly marked ``[synthetic]``. A fault is a function
from the request and its proper answer to the reply that is sent instead, down to the bytes.
"""

from __future__ import annotations

import itertools
import math
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.utils import formatdate
from functools import cache
from http import HTTPStatus
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from batchrun.config import JSONValue
from batchrun.errors import UsageError
from batchrun.types import Usage

Dialect = Literal["openai", "mistral"]


LimitHeaders = Literal["none", "mistral", "openai"]


RetryAfterForm = Literal["none", "seconds", "date", "ms"]


StreamUsage = Literal["auto", "final_choice", "extra_chunk", "every_chunk", "x_groq", "none"]


Framing = Literal["length", "chunked", "until_close"]


Ending = Literal["keep", "close", "reset", "hang"]


MARK = "[synthetic]"


DEFAULT_MODELS = ("mock-small", "mock-large")


# Fixed, so that equal requests get equal bytes in every run.
CREATED = 1_700_000_000


_ECHO_CHARS = 160


class Knobs(Struct, frozen=True, kw_only=True):
    """How the server behaves; the defaults answer at once, always and without limits.

    ``faults`` maps a kind of ``FAULTS`` to its share of requests (together at most 1). ``script``
    names what the 1st, 2nd … sending of every body meets ("ok" for an answer), before ``faults``.
    """

    latency_s: float = 0.0
    latency_jitter_s: float = 0.0  # up to this much more, fixed per body
    seed: int = 0
    faults: Mapping[str, float] = {}
    script: tuple[str, ...] = ()
    retry_after_s: float = 1.0  # what injected faults with a Retry-After name
    drip_s: float = 10.0  # between the bytes of the fault "drip"
    redirect_to: str = "http://127.0.0.1:9/v1/chat/completions"

    rpm: float | None = None  # per model, as are tokens
    tpm: float | None = None
    burst_s: float = 60.0  # seconds of quota the bucket holds
    limit_headers: LimitHeaders = "none"
    retry_after: RetryAfterForm = "seconds"  # how a refusal by the quota names its wait
    slots: int | None = None  # requests worked on at a time
    queue: int | None = None  # requests waiting for a slot; more are refused. None: any number

    dialect: Dialect = "openai"  # of error bodies
    models: tuple[str, ...] = ()  # those there are; () accepts any name
    key: str | None = None  # the Bearer token demanded
    completion_tokens: int | None = None  # length of every answer; None: a short one

    stream_usage: StreamUsage = "auto"  # include_usage: an extra chunk, else on the last choice
    stream_comments: bool = False
    stream_split_bytes: int | None = None  # cut the stream anywhere, also inside a character
    stream_pause_s: float = 0.0  # between the writes of a stream
    keep_alive_s: float = 75.0

    def __post_init__(self) -> None:
        named = {*self.faults, *self.script} - {"ok"}
        if unknown := sorted(named - FAULTS.keys()):
            raise UsageError(
                f"no fault {unknown[0]!r}; there are: {', '.join(FAULTS)}",
            )
        if any(not 0 <= rate <= 1 for rate in self.faults.values()) or (
            sum(self.faults.values()) > 1 + 1e-9
        ):
            raise UsageError("fault rates are shares between 0 and 1, together at most 1")


class MockRequest(Struct, frozen=True):
    """One request as the server read it."""

    n: int  # 1 for the first request of this server
    seen: int  # which sending of this body, from 1
    method: str
    path: str  # with the query
    headers: Mapping[str, str]  # case-insensitive
    body: bytes
    digest: bytes  # 8 bytes of BLAKE2b over the body
    chat: Chat | None  # None when the body is not a chat-completion request
    problem: str = ""  # why not

    @property
    def prompt(self) -> str:
        """The last message's text."""
        return _text(self.chat.messages[-1]) if self.chat and self.chat.messages else ""


class MockReply(Struct, frozen=True, kw_only=True):
    """One reply, honest or not. ``parts`` are written one by one instead of ``body``.

    ``billed`` is what the endpoint would charge; ``whole`` says that the reply carries a whole
    answer, so that delivering it entirely is a delivery in the ledger's sense.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}
    parts: Iterable[bytes] | None = None
    pause_s: float = 0.0
    framing: Framing = "length"  # parts of unknown size: "chunked"
    claims_bytes: int | None = None  # what Content-Length says, if not the truth
    ends_chunked: bool = True  # write the last, empty chunk
    raw: bytes | None = None  # everything, status line included
    delay_s: float = 0.0
    ending: Ending = "keep"
    billed: Usage | None = None
    whole: bool = False
    fault: str = ""


Respond = Callable[[MockRequest], MockReply | None]


class _Part(Struct):
    type: str = ""
    text: str = ""


class _Message(Struct):
    role: str = "user"
    content: str | list[_Part] | None = None


class _StreamOptions(Struct):
    include_usage: bool | None = None


class Chat(Struct):
    """What the server needs of a request; other members are accepted and ignored."""

    messages: list[_Message]
    model: str = ""
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


@cache
def reason_phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def token_count(text: str) -> int:
    """What this server bills for ``text``: a token for every four characters begun."""
    return (len(text) + 3) // 4


def completion(
    request: MockRequest,
    *,
    content: JSONValue = None,
    finish_reason: str | None = None,
    usage: Usage | None = None,
    knobs: Knobs | None = None,
) -> MockReply:
    """The whole, honest answer to ``request``, streamed when it asks for that.

    For ``respond`` hooks: with ``content``, ``finish_reason`` or ``usage`` in place of our own.
    """
    knobs = knobs or Knobs()
    chat = request.chat or Chat(messages=[])
    answer = _answer(request, chat, knobs)
    if content is not None:
        answer.texts = [content] * len(answer.texts)
    if finish_reason is not None:
        answer.finish_reason = finish_reason
    if usage is not None:
        answer.usage = usage
    if not chat.stream:
        body = msgspec.json.encode(_completion_json(answer))
        return MockReply(body=body, headers=JSON_HEADERS, billed=answer.usage, whole=True)
    return _streamed(answer, chat, knobs)


class _Answer(Struct):
    id: str
    model: str
    texts: list[JSONValue]
    finish_reason: str
    usage: Usage


def _answer(request: MockRequest, chat: Chat, knobs: Knobs) -> _Answer:
    limit = chat.max_completion_tokens or chat.max_tokens
    echo = request.prompt[:_ECHO_CHARS]
    texts, cut = [], False
    for index in range(max(1, chat.n or 1)):
        text = f"{MARK} {echo}" if index == 0 else f"{MARK} ({index + 1}) {echo}"
        if knobs.completion_tokens is not None:
            text = _of_length(text, knobs.completion_tokens)
        # Never cut into the mark: an answer of ours must show what it is.
        if limit is not None and token_count(text) > limit:
            text, cut = text[: max(4 * limit, len(MARK))], True
        texts.append(text)
    prompt_tokens = sum(3 + token_count(_text(m)) for m in chat.messages)
    completion_tokens = sum(map(token_count, texts))
    return _Answer(
        id=f"chatcmpl-mock-{request.digest.hex()}",
        model=chat.model,
        texts=list(texts),
        finish_reason="length" if cut else "stop",
        usage=Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens),
    )


def _text(message: _Message) -> str:
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _of_length(text: str, tokens: int) -> str:
    size = max(4 * tokens, len(MARK))
    filler = " and so on" * ((size - len(text)) // 10 + 1) if size > len(text) else ""
    return (text + filler)[:size]


def _usage_json(usage: Usage) -> dict[str, JSONValue]:
    shown: dict[str, JSONValue] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
    if usage.cached_tokens is not None:
        shown["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        shown["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return shown


def _completion_json(answer: _Answer) -> dict[str, JSONValue]:
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": CREATED,
        "model": answer.model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text},
                "finish_reason": answer.finish_reason,
            }
            for index, text in enumerate(answer.texts)
        ],
        "usage": _usage_json(answer.usage),
    }


def _streamed(answer: _Answer, chat: Chat, knobs: Knobs) -> MockReply:
    events = list(_events(answer, chat, knobs))
    reply = MockReply(headers=_SSE, framing="chunked", billed=answer.usage, whole=True)
    if knobs.stream_split_bytes:
        text, step = b"".join(events), knobs.stream_split_bytes
        events = [text[at : at + step] for at in range(0, len(text), step)]
    elif not knobs.stream_pause_s:
        events = [b"".join(events)]
    return replace(reply, parts=events, pause_s=knobs.stream_pause_s)


def _events(answer: _Answer, chat: Chat, knobs: Knobs) -> Iterator[bytes]:
    usage = _usage_json(answer.usage)
    place = knobs.stream_usage
    if place == "auto":
        wanted = chat.stream_options is not None and chat.stream_options.include_usage
        place = "extra_chunk" if wanted else "final_choice"
    running = usage if place == "every_chunk" else None

    def chunk(choices: list[JSONValue], spent: JSONValue) -> dict[str, JSONValue]:
        return {
            "id": answer.id,
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": answer.model,
            "choices": choices,
            "usage": spent,
        }

    def choice(index: int, delta: JSONValue, finish: str | None = None) -> list[JSONValue]:
        return [{"index": index, "delta": delta, "finish_reason": finish}]

    last = len(answer.texts) - 1
    for index, text in enumerate(answer.texts):
        yield _event(chunk(choice(index, {"role": "assistant", "content": ""}), running))
        if knobs.stream_comments:
            yield b": keep-alive\n\n"
        for piece in _pieces(text):
            yield _event(chunk(choice(index, {"content": piece}), running))
        on_choice = place in ("final_choice", "every_chunk") and index == last
        final = chunk(
            choice(index, {"content": ""}, answer.finish_reason), usage if on_choice else None
        )
        if place == "x_groq" and index == last:
            final["x_groq"] = {"id": answer.id, "usage": usage}
        yield _event(final)
    if place == "extra_chunk":
        yield _event(chunk([], usage))
    yield b"data: [DONE]\n\n"


def _pieces(content: JSONValue) -> Iterator[JSONValue]:
    if not isinstance(content, str):
        yield content
        return
    size = max(8, len(content) // 16)
    for at in range(0, len(content), size):
        yield content[at : at + size]


def _event(value: JSONValue) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


JSON_HEADERS = {"Content-Type": "application/json"}


_HTML = {"Content-Type": "text/html; charset=utf-8"}


_SSE = {"Content-Type": "text/event-stream"}


def error_reply(
    status: int,
    message: str,
    *,
    type: str = "invalid_request_error",
    code: str | int | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    dialect: Dialect = "openai",
) -> MockReply:
    """An endpoint's refusal, in the shape of the dialect; nothing is billed for it."""
    told: dict[str, JSONValue] = {"message": message, "type": type, "param": param, "code": code}
    body = {"object": "error", **told} if dialect == "mistral" else {"error": told}
    return MockReply(
        status=status, body=msgspec.json.encode(body), headers={**JSON_HEADERS, **(headers or {})}
    )


def fault_reply(kind: str, request: MockRequest, knobs: Knobs | None = None) -> MockReply:
    """What the fault ``kind`` makes of the answer to ``request``; for ``respond`` hooks."""
    knobs = knobs or Knobs()
    return replace(FAULTS[kind](request, completion(request, knobs=knobs), knobs), fault=kind)


_Fault = Callable[[MockRequest, MockReply, Knobs], MockReply]


def rate_limited(headers: Mapping[str, str], dialect: Dialect, hint: str = "") -> MockReply:
    if dialect == "mistral":
        told = "Rate limit exceeded" + hint
        return error_reply(
            429, told, type="rate_limited", code="1300", headers=headers, dialect=dialect
        )
    told = "Rate limit reached for requests" + hint
    return error_reply(429, told, type="requests", code="rate_limit_exceeded", headers=headers)


def retry_after(form: RetryAfterForm, wait_s: float) -> dict[str, str]:
    """A wait in one of its written forms, rounded up: sooner would be refused again."""
    if form == "seconds":
        return {"Retry-After": str(math.ceil(wait_s))}
    if form == "date":
        now_s = time.time()
        then = formatdate(math.ceil(now_s + wait_s), usegmt=True)
        return {"Date": formatdate(now_s, usegmt=True), "Retry-After": then}
    if form == "ms":
        return {"retry-after-ms": str(math.ceil(wait_s * 1000))}
    return {}


def _refusal(form: RetryAfterForm) -> _Fault:
    def refuse(_r: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
        return rate_limited(retry_after(form, knobs.retry_after_s), knobs.dialect)

    return refuse


def _hinted_refusal(_r: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
    hint = f". Please try again in {knobs.retry_after_s:g}s."
    return rate_limited({}, knobs.dialect, hint)


def _error(
    status: int, message: str, type: str, code: str | None = None, param: str | None = None
) -> _Fault:
    def refuse(_r: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
        return error_reply(
            status, message, type=type, code=code, param=param, dialect=knobs.dialect
        )

    return refuse


# A gateway that gave up waiting says nothing about the generation behind it: it is billed.
_BILLED_STATUSES = frozenset({408, 499, 504, 524})


def _server_error(status: int, *, html: bool = False, named_wait: bool = False) -> _Fault:
    def fail(_r: MockRequest, answer: MockReply, knobs: Knobs) -> MockReply:
        headers = retry_after("seconds", knobs.retry_after_s) if named_wait else {}
        reply = error_reply(
            status,
            reason_phrase(status),
            type="server_error",
            headers=headers,
            dialect=knobs.dialect,
        )
        if html:
            reply = replace(reply, body=_html_page(status), headers={**_HTML, **headers})
        return replace(reply, billed=answer.billed if status in _BILLED_STATUSES else None)

    return fail


def _html_page(status: int) -> bytes:
    title = f"{status}: {reason_phrase(status)}"
    return (
        f"<!DOCTYPE html>\n<html><head><title>mock.invalid | {title}</title></head>\n"
        f"<body><h1>{title}</h1><p>cloudflare</p></body></html>\n"
    ).encode()


def echoed_key(request: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
    given = request.headers.get("Authorization", "none").removeprefix("Bearer ")
    return error_reply(
        401,
        f"Incorrect API key provided: {given}.",
        code="invalid_api_key",
        dialect=knobs.dialect,
    )


def _extra_forbidden(_r: MockRequest, _a: MockReply, _k: Knobs) -> MockReply:
    problem = {"type": "extra_forbidden", "loc": ["body", "store"], "msg": "Extra inputs ..."}
    return MockReply(
        status=422, headers=JSON_HEADERS, body=msgspec.json.encode({"detail": [problem]})
    )


def _redirected(_r: MockRequest, _a: MockReply, knobs: Knobs) -> MockReply:
    return MockReply(status=307, headers={**_HTML, "Location": knobs.redirect_to})


def _content(answer: MockReply) -> bytes:
    return answer.body if answer.parts is None else b"".join(answer.parts)


def _dropped(ending: Ending) -> _Fault:
    """The connection ends without a byte of an answer that was made and billed."""
    return lambda _r, answer, _k: MockReply(raw=b"", ending=ending, billed=answer.billed)


def _delivered_then(ending: Ending) -> _Fault:
    """A whole answer on a connection that ends unannounced: its next request finds it stale.

    For answers the socket's buffers hold; a reset discards what the kernel has not sent yet.
    """
    return lambda _r, answer, _k: replace(answer, ending=ending)


def _cut_length(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    content = _content(answer)
    return replace(
        answer,
        parts=None,
        body=content[: len(content) // 2],
        framing="length",
        claims_bytes=len(content),
        ending="close",
        whole=False,
    )


def _cut_chunk(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    content = _content(answer)
    return replace(
        answer,
        parts=[content[: len(content) // 2]],
        framing="chunked",
        ends_chunked=False,
        ending="close",
        whole=False,
    )


def _cut_silently(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    content = _content(answer)
    return replace(
        answer, parts=None, body=content[: len(content) // 2], framing="until_close", whole=False
    )


def _truncated(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    content = _content(answer)
    return replace(
        answer, parts=None, body=content[: len(content) // 2], framing="length", whole=False
    )


def _instead(body: bytes, headers: Mapping[str, str] = JSON_HEADERS) -> _Fault:
    """Something else at 200, of an answer that was made and billed."""
    return lambda _r, answer, _k: MockReply(body=body, headers=headers, billed=answer.billed)


def _error_at_200(_r: MockRequest, _a: MockReply, _k: Knobs) -> MockReply:
    told = {"error": {"code": 502, "message": "Provider returned error", "metadata": {}}}
    return MockReply(headers=JSON_HEADERS, body=msgspec.json.encode(told))


def _blank_lines_first(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
    if answer.parts is not None:
        return answer
    return replace(answer, parts=[b"\n"] * 8 + [answer.body], framing="chunked")


def _dripped(_r: MockRequest, answer: MockReply, knobs: Knobs) -> MockReply:
    content = _content(answer)
    parts = [content[at : at + 1] for at in range(len(content))]
    return replace(answer, parts=parts, framing="chunked", pause_s=knobs.drip_s)


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
    broken = _content(answer).replace(b"[synth", b"\xff\xfe\x80", 1)
    return replace(answer, parts=None, framing="length", body=broken, whole=False)


def _raw(head: bytes) -> _Fault:
    return lambda _r, answer, _k: MockReply(raw=head, ending="close", billed=answer.billed)


def _stream_fault(change: Callable[[list[bytes]], list[bytes]], *, billed: bool = True) -> _Fault:
    """A fault of the events themselves; a request that does not stream gets its answer."""

    def spoil(_r: MockRequest, answer: MockReply, _k: Knobs) -> MockReply:
        if answer.parts is None:
            return answer
        events = [e + b"\n\n" for e in _content(answer).split(b"\n\n") if e]
        spent = answer.billed if billed else None
        return replace(answer, parts=change(events), billed=spent, whole=False)

    return spoil


def _without_finish(events: list[bytes]) -> list[bytes]:
    return [e for e in events if b'"finish_reason":"' not in e]


_MID_STREAM_ERROR = _event(
    {"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": 500}}
)


FAULTS: Mapping[str, _Fault] = {
    "400": _error(400, "Invalid value for 'temperature'", "invalid_request_error", "invalid_value"),
    "401": echoed_key,
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
    "429": _refusal("none"),
    "429-retry-after": _refusal("seconds"),
    "429-date": _refusal("date"),
    "429-ms": _refusal("ms"),
    "429-hint": _hinted_refusal,
    "429-quota": _error(
        429, "You exceeded your current quota", "insufficient_quota", "insufficient_quota"
    ),
    "429-capacity": _error(
        429, "Service tier capacity exceeded", "service_tier_capacity_exceeded", "3505"
    ),
    **{str(s): _server_error(s) for s in (500, 502, 503, 504, 520, 524, 529)},
    **{f"{s}-html": _server_error(s, html=True) for s in (500, 502, 503, 504, 520, 524, 529)},
    "503-retry-after": _server_error(503, named_wait=True),
    "redirect": _redirected,
    "disconnect": _dropped("close"),
    "reset": _dropped("reset"),
    "close-after": _delivered_then("close"),
    "reset-after": _delivered_then("reset"),
    "cut": _cut_length,
    "cut-chunk": _cut_chunk,
    "cut-silent": _cut_silently,
    "truncated_json": _truncated,
    "garbage": _instead(b"upstream said: ok", {"Content-Type": "text/plain"}),
    "html": _instead(b"<html><body>Sign in to the network</body></html>", _HTML),
    "empty": _instead(b""),
    "no_choices": _instead(b'{"id":"x","object":"chat.completion","choices":[]}'),
    "error-200": _error_at_200,
    "blank_lines": _blank_lines_first,
    "drip": _dripped,
    "endless": _endless,
    "gzip_bomb": _gzip_bomb,
    "huge_header": _huge_header,
    "bad_head": _raw(b"HTP/9 what\r\n\r\n"),
    "invalid_utf8": _invalid_utf8,
    "deep_json": _instead(b"[" * 100_000),
    "hang": _dropped("hang"),
    "stream-error": _stream_fault(lambda e: [*e[:2], _MID_STREAM_ERROR, e[-1]]),
    "stream-cut": _stream_fault(lambda e: [b"".join(e)[: len(b"".join(e)) // 2]]),
    "stream-no-finish": _stream_fault(_without_finish),
    "stream-eof": _stream_fault(lambda e: _without_finish(e)[:-1]),
}
