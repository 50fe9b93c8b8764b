"""One reply's JSON, read twice: ``parse`` to decide on it, ``answer`` to publish it. No I/O.

Both first try one typed decode, which is what nearly every reply passes. Whatever surprises it
(content as a list of parts, tool arguments as an object, an error, a lone surrogate, a number
beyond all types) is read again by the standard library and coerced into the same shape, so there
is one reading of a completion and not two. Nothing here raises, whatever the bytes are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
from msgspec import Raw, Struct

from batchrun.chat.completion import (
    NO_MESSAGE,
    SURPRISES,
    answer_of,
    decode,
    decode_columns,
    decode_raw,
    joined,
    reply_of,
    usage_in,
)
from batchrun.chat.surprises import answer_surprise, parse_surprise
from batchrun.chat.text import is_json, mended, utf8_text
from batchrun.types import NO_USAGE, Answer, Answers, Reply, Usage

MAX_ID_CHARS = 200


class _Named(Struct, gc=False):
    id: str | None = None
    request_id: str | None = None


_decode_name = msgspec.json.Decoder(_Named).decode
_BEGINS_LATE = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*[{\[]")


def parse(body: bytes) -> Reply:
    """Say what a reply holds, enough to decide on it; ``error`` in every dialect.

    Of a body that is no JSON, ``error`` carries the first words, without markup.
    """
    try:
        completion = decode(body)
    except SURPRISES:
        return parse_surprise(body)
    return reply_of(completion, None)


def answer(body: bytes) -> Answer:
    """Fill the answer columns from one completion, from choice 0 of several.

    The text of a refusal is the response where there is no other. A body that is no completion
    gives an empty Answer.
    """
    try:
        completion = decode(body)
        return answer_of(completion, usage_in(completion))
    except SURPRISES:
        return answer_surprise(body)


def request_id(body: bytes) -> str:
    """What a completion or an error calls itself; "" where it has no name.

    llama.cpp and others tell it nowhere else.
    """
    try:
        named = _decode_name(body)
    except SURPRISES:
        return ""
    return (named.request_id or named.id or "")[:MAX_ID_CHARS]


# A completion that fills no column: stands for what is no answer among those that are.
NOTHING = b'{"choices":[{}]}'


def columns(bodies: Sequence[bytes]) -> Answers:
    """``answer`` of several bodies, by column; the usage is left to the outcomes, which have it."""
    try:
        # One call for all: what surprises is rare.
        completions = list(map(decode_columns, bodies))
        choices = [each.choices[0] for each in completions]
        messages = [choice.message or NO_MESSAGE for choice in choices]
        several = sum([len(each.choices) for each in completions]) > len(completions)
        if several or any(message.refusal for message in messages):
            return _one_by_one(bodies)
        return Answers(
            [message.content for message in messages],
            [choice.finish_reason for choice in choices],
            [each.model for each in completions],
            [message.reasoning_content or message.reasoning or None for message in messages],
            [joined(m.tool_calls) if m.tool_calls else None for m in messages],
            [False] * len(messages),
        )
    except SURPRISES:
        return _one_by_one(bodies)


def _one_by_one(bodies: Sequence[bytes]) -> Answers:
    read = [_without_usage(body) for body in bodies]
    return Answers(
        [each.response for each in read],
        [each.finish_reason for each in read],
        [each.response_model for each in read],
        [each.reasoning for each in read],
        [each.tool_calls for each in read],
        [each.refusal for each in read],
    )


def _without_usage(body: bytes) -> Answer:
    try:
        return answer_of(decode_columns(body), NO_USAGE)
    except SURPRISES:
        return answer_surprise(body)


def body_text(body: bytes) -> str:
    """The endpoint's bytes as text any UTF-8 column can hold; what cannot be held is U+FFFD."""
    return utf8_text(body)


def body_json(body: bytes) -> bytes | None:
    """The endpoint's JSON object or array, strictly valid and on one line; None when it is none.

    Valid JSON keeps its bytes, but on several lines it loses the space between them. What strict
    readers would refuse is mended: NaN and Infinity become null, lone surrogates U+FFFD.
    """
    if not body.startswith((b"{", b"[")) and not _BEGINS_LATE.match(body):
        return None
    try:
        one_line = msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body
        # Decoding to Raw checks the grammar and the escapes, but not the UTF-8 between the quotes.
        decode_raw(one_line)
        if not one_line.isascii():
            one_line.decode()
        return one_line
    except SURPRISES:
        return mended(body)


def rebuild(said: Answer) -> bytes:
    """Put a completion together from answer columns, so that ``answer`` gives them back."""
    message: dict[str, object] = {"role": "assistant", "content": said.response}
    if said.reasoning is not None:
        message["reasoning_content"] = said.reasoning
    if said.tool_calls is not None and is_json(said.tool_calls):
        message["tool_calls"] = Raw(said.tool_calls.encode())
    choice = {"index": 0, "message": message, "finish_reason": said.finish_reason}
    return msgspec.json.encode(
        {
            "object": "chat.completion",
            "model": said.response_model,
            "choices": [choice],
            "usage": _usage_json(said.usage),
        }
    )


def _usage_json(usage: Usage) -> dict[str, object] | None:
    if usage == NO_USAGE:
        return None
    given: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
    if usage.cached_tokens is not None:
        given["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        given["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return given
