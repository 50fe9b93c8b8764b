"""What the stand-in says: completions, streams and error bodies.

Answers are a pure function of the request and plainly marked ``[synthetic]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from batchrun.config import JSONValue
from batchrun.mock.instances import Instances
from batchrun.mock.knobs import Knobs
from batchrun.types import Usage

Framing = Literal["length", "chunked", "until_close"]
Ending = Literal["keep", "close", "reset", "hang"]
MARK = "[synthetic]"
DEFAULT_MODELS = ("mock-small", "mock-large")
# Fixed, so that equal requests get equal bytes in every run.
CREATED = 1_700_000_000
_ECHO_CHARS = 160


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


class _Form(Struct):
    schema: dict[str, Any] | None = None


class _Format(Struct):
    type: str = ""
    json_schema: _Form | None = None


class _Structured(Struct):
    json: dict[str, Any] | None = None


class Chat(Struct):
    """What the server needs of a request; other members are accepted and ignored."""

    messages: list[_Message]
    model: str = ""
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    response_format: _Format | None = None
    guided_json: dict[str, Any] | None = None
    structured_outputs: _Structured | None = None

    @property
    def schema(self) -> dict[str, Any] | None:
        """What the answer has to fit, in whatever form it is asked for."""
        form = self.response_format
        if form is not None and form.json_schema is not None:
            return form.json_schema.schema
        if form is not None and form.type == "json_object":
            return {"type": "object", "properties": {"answer": {"type": "string"}}}
        structured = self.structured_outputs
        return self.guided_json or (structured.json if structured is not None else None)


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
        schema = chat.schema
        if schema is not None:
            instance = Instances(schema, request.digest + bytes((index % 256,)), text).make()
            text = msgspec.json.encode(instance).decode()
        elif knobs.completion_tokens is not None:
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
        yield event(chunk(choice(index, {"role": "assistant", "content": ""}), running))
        if knobs.stream_comments:
            yield b": keep-alive\n\n"
        for piece in _pieces(text):
            yield event(chunk(choice(index, {"content": piece}), running))
        on_choice = place in ("final_choice", "every_chunk") and index == last
        final = chunk(
            choice(index, {"content": ""}, answer.finish_reason), usage if on_choice else None
        )
        if place == "x_groq" and index == last:
            final["x_groq"] = {"id": answer.id, "usage": usage}
        yield event(final)
    if place == "extra_chunk":
        yield event(chunk([], usage))
    yield b"data: [DONE]\n\n"


def _pieces(content: JSONValue) -> Iterator[JSONValue]:
    if not isinstance(content, str):
        yield content
        return
    size = max(8, len(content) // 16)
    for at in range(0, len(content), size):
        yield content[at : at + size]


def event(value: JSONValue) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


JSON_HEADERS = {"Content-Type": "application/json"}
HTML_HEADERS = {"Content-Type": "text/html; charset=utf-8"}
_SSE = {"Content-Type": "text/event-stream"}


def error_reply(
    status: int,
    message: str,
    *,
    type: str = "invalid_request_error",
    code: str | int | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> MockReply:
    """An endpoint's refusal in OpenAI's words; nothing is billed for it."""
    told: dict[str, JSONValue] = {"message": message, "type": type, "param": param, "code": code}
    body = msgspec.json.encode({"error": told})
    return MockReply(status=status, body=body, headers={**JSON_HEADERS, **(headers or {})})


def rate_limited(headers: Mapping[str, str], hint: str = "") -> MockReply:
    """A 429 for requests that come too fast."""
    told = "Rate limit reached for requests" + hint
    return error_reply(429, told, type="requests", code="rate_limit_exceeded", headers=headers)


def in_seconds(wait_s: float) -> dict[str, str]:
    """A wait as Retry-After, rounded up: sooner would be refused again."""
    return {"Retry-After": str(math.ceil(wait_s))}


def wrong_key(request: MockRequest) -> MockReply:
    """A 401 that quotes the key, as OpenAI's does."""
    given = request.headers.get("Authorization", "none").removeprefix("Bearer ")
    return error_reply(401, f"Incorrect API key provided: {given}.", code="invalid_api_key")
