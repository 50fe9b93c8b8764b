"""One reply's JSON, read twice: ``parse`` to decide on it, ``answer`` to publish it. No I/O.

Both first try one typed decode, which is what nearly every reply passes. Whatever surprises it
(content as a list of parts, tool arguments as an object, an error, a lone surrogate, a number
beyond all types) is read again by the standard library and coerced into the same shape, so there
is one reading of a completion and not two. Nothing here raises, whatever the bytes are.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from batchrun.types import NO_USAGE, Answer, Answers, ErrorBody, Reply, Usage

# The names of the output's columns, in order (contract §4). An input column of one of these names
# has to give way, so those who read inputs need them too.
ANSWER_COLUMNS = (
    "custom_id",
    "status",
    "response",
    "finish_reason",
    "request_model",
    "response_model",
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "reasoning",
    "tool_calls",
    "error_kind",
    "error_code",
    "error_message",
    "http_status",
    "attempts",
    "in_doubt_attempts",
    "latency_s",
    "ttft_s",
    "request_id",
    "finished_at",
    "request_hash",
    "response_body",
)

MAX_TOKENS = 2**63 - 1  # what an int64 column holds
MAX_FLOAT = sys.float_info.max
MAX_MESSAGE_CHARS = 2_000
MAX_PAGE_CHARS = 300
MAX_ID_CHARS = 200

_Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None


class _Details(Struct, gc=False):
    cached_tokens: _Count = None
    reasoning_tokens: _Count = None


class _Usage(Struct, gc=False):
    """The spellings of endpoints.md §1.4."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    total_tokens: _Count = None
    prompt_tokens_details: _Details | None = None
    prompt_token_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    num_cached_tokens: _Count = None
    prompt_cache_hit_tokens: _Count = None


class _Message(Struct, gc=False):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Raw] | None = None
    function_call: None = None  # anything but null is a surprise: the legacy form of a tool call


class _Choice(Struct, gc=False):
    index: int | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    error: None = None  # anything but null is a surprise: OpenRouter's failed generation


class _Columns(Struct, gc=False):
    """A completion, as far as it fills columns; the decoder skips over the rest."""

    choices: Annotated[list[_Choice], Meta(min_length=1)]
    model: str | None = None
    error: None = None  # anything but null is a surprise


class _Completion(_Columns, gc=False):
    usage: _Usage | None = None


class _Named(Struct, gc=False):
    id: str | None = None
    request_id: str | None = None


_decode_name = msgspec.json.Decoder(_Named).decode
_decode = msgspec.json.Decoder(_Completion).decode
_decode_columns = msgspec.json.Decoder(_Columns).decode
_decode_raw = msgspec.json.Decoder(Raw).decode
_BEGINS_LATE = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*[{\[]")
# UnicodeDecodeError is a ValueError; RecursionError is what JSON nested without end brings.
_SURPRISES = (msgspec.MsgspecError, ValueError, RecursionError)
_NO_MESSAGE = _Message()


def parse(body: bytes) -> Reply:
    """Say what a reply holds, enough to decide on it; ``error`` as in endpoints.md §4.2.

    Of a body that is no JSON, ``error`` carries the first words, without markup.
    """
    try:
        completion = _decode(body)
    except _SURPRISES:
        return _parse_surprise(body)
    return _reply(completion, None)


def answer(body: bytes) -> Answer:
    """Fill the answer columns from one completion, from choice 0 of several.

    The text of a refusal is the response where there is no other. A body that is no completion
    gives an empty Answer.
    """
    try:
        completion = _decode(body)
        return _answer(completion, _usage_in(completion))
    except _SURPRISES:
        return _answer_surprise(body)


def request_id(body: bytes) -> str:
    """What a completion or an error calls itself; "" where it has no name.

    llama.cpp and others tell it nowhere else.
    """
    try:
        named = _decode_name(body)
    except _SURPRISES:
        return ""
    return (named.request_id or named.id or "")[:MAX_ID_CHARS]


# A completion that fills no column: stands for what is no answer among those that are.
NOTHING = b'{"choices":[{}]}'


def columns(bodies: Sequence[bytes]) -> Answers:
    """``answer`` of several bodies, by column; the usage is left to the outcomes, which have it."""
    try:
        # One call for all: what surprises is rare.
        completions = list(map(_decode_columns, bodies))
        choices = [each.choices[0] for each in completions]
        messages = [choice.message or _NO_MESSAGE for choice in choices]
        several = sum([len(each.choices) for each in completions]) > len(completions)
        if several or any(message.refusal for message in messages):
            return _one_by_one(bodies)
        return Answers(
            [message.content for message in messages],
            [choice.finish_reason for choice in choices],
            [each.model for each in completions],
            [message.reasoning_content or message.reasoning or None for message in messages],
            [_joined(m.tool_calls) if m.tool_calls else None for m in messages],
            [False] * len(messages),
        )
    except _SURPRISES:
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
        return _answer(_decode_columns(body), NO_USAGE)
    except _SURPRISES:
        return _answer_surprise(body)


def body_text(body: bytes) -> str:
    """The endpoint's bytes as text any UTF-8 column can hold; what cannot be held is U+FFFD."""
    return _text(body)[0]


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
        _decode_raw(one_line)
        if not one_line.isascii():
            one_line.decode()
        return one_line
    except _SURPRISES:
        return _mended(body)


def rebuild(
    response: str | None,
    finish_reason: str | None,
    response_model: str | None,
    usage: Usage,
    reasoning: str | None,
    tool_calls: str | None,
) -> bytes:
    """Put a completion together from answer columns, so that ``answer`` gives them back."""
    message: dict[str, object] = {"role": "assistant", "content": response}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if tool_calls is not None and _is_json(tool_calls):
        message["tool_calls"] = Raw(tool_calls.encode())
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return msgspec.json.encode(
        {
            "object": "chat.completion",
            "model": response_model,
            "choices": [choice],
            "usage": _usage_json(usage),
        }
    )


# --- the usual reply -----------------------------------------------------------------------------


def _reply(completion: _Completion, error: ErrorBody | None) -> Reply:
    choices = completion.choices
    choice = choices[0] if len(choices) == 1 else _choice_0(choices)
    message = choice.message or _NO_MESSAGE
    refused = bool(message.refusal)
    return Reply(
        True,
        len(choices),
        choice.finish_reason,
        bool(message.content)
        or refused
        or bool(message.tool_calls or message.reasoning_content or message.reasoning),
        refused,
        completion.model,
        _usage_in(completion),
        error,
        choice.message is not None,
    )


def _answer(completion: _Columns, usage: Usage) -> Answer:
    choices = completion.choices
    choice = choices[0] if len(choices) == 1 else _choice_0(choices)
    message = choice.message or _NO_MESSAGE
    refused = bool(message.refusal)
    return Answer(
        message.refusal if refused and not message.content else message.content,
        choice.finish_reason,
        completion.model,
        usage,
        message.reasoning_content or message.reasoning or None,
        _joined(message.tool_calls) if message.tool_calls else None,
        refused,
    )


def _usage_in(completion: _Completion) -> Usage:
    return NO_USAGE if completion.usage is None else _normalised(completion.usage)


def _choice_0(choices: list[_Choice]) -> _Choice:
    """Choices may come in any order; one without an index counts by its place."""
    return next((choice for choice in choices if choice.index == 0), choices[0])


def _normalised(usage: _Usage) -> Usage:
    details = usage.prompt_tokens_details
    cached = None if details is None else details.cached_tokens
    if cached is None:
        cached = _cached_elsewhere(usage)
    details = usage.completion_tokens_details
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        cached,
        None if details is None else details.reasoning_tokens,
    )


def _cached_elsewhere(usage: _Usage) -> int | None:
    details = usage.prompt_token_details
    if details is not None and details.cached_tokens is not None:
        return details.cached_tokens
    if usage.num_cached_tokens is not None:
        return usage.num_cached_tokens
    return usage.prompt_cache_hit_tokens


def _joined(tool_calls: list[Raw]) -> str:
    # The decoder skips over raw parts without looking at their UTF-8: ``decode`` does.
    parts = [msgspec.json.format(bytes(call), indent=-1) for call in tool_calls]
    return (b"[" + b",".join(parts) + b"]").decode()


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


# --- the surprising one --------------------------------------------------------------------------

_RAW_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MARKUP = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)|<[^<>]*>", re.IGNORECASE | re.DOTALL)


def _parse_surprise(body: bytes) -> Reply:
    text, _ = _text(body)
    try:
        value, _ = _loads(text)
        completion = _coerced(value)
        error = _error(value, has_choices=completion is not None)
    except (ValueError, RecursionError):
        return Reply(False, error=_page(text))
    if completion is not None:
        return _reply(completion, error)
    return Reply(True, model=_model(value), usage=_usage_of(value), error=error)


def _answer_surprise(body: bytes) -> Answer:
    text, replaced = _text(body)
    try:
        value, more = _loads(text)
        completion = _coerced(value)
    except (ValueError, RecursionError):
        return Answer()
    if completion is None:
        return Answer(response_model=_model(value), usage=_usage_of(value))
    return msgspec.structs.replace(
        _answer(completion, _usage_in(completion)), surrogates=replaced + more
    )


def _text(body: bytes) -> tuple[str, int]:
    """The text without a BOM, and how many lone surrogates became U+FFFD in it."""
    try:
        return body.decode("utf-8-sig"), 0
    except UnicodeDecodeError:
        mended, replaced = _RAW_SURROGATE.subn(b"\xef\xbf\xbd", body)
        return mended.decode("utf-8-sig", "replace"), replaced


def _loads(text: str) -> tuple[Any, int]:
    """Decode leniently: no number, constant or surrogate is left that JSON or UTF-8 cannot hold."""
    value = _loads_sloppily(text)
    if not _ESCAPED_SURROGATE.search(text):
        return value, 0
    text = json.dumps(value, ensure_ascii=False)
    mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _loads_sloppily(mended), mended.count("\ufffd") - text.count("\ufffd")


def _loads_sloppily(text: str) -> Any:
    return json.loads(
        text, strict=False, parse_int=_int, parse_float=_float, parse_constant=lambda _: None
    )


def _int(digits: str) -> int | None:
    try:
        return int(digits)
    except ValueError:  # more digits than the interpreter is willing to convert
        return None


def _float(digits: str) -> float | None:
    number = float(digits)
    return number if abs(number) <= MAX_FLOAT else None


def _mended(body: bytes) -> bytes | None:
    try:
        return _compact(_loads(_text(body)[0])[0]).encode()
    except (ValueError, RecursionError):
        return None


def _is_json(text: str) -> bool:
    try:
        _decode_raw(text)
        text.encode()
    except _SURPRISES:
        return False
    return True


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _coerced(value: Any) -> _Completion | None:
    """The completion in ``value``, its members turned into the types they should have had."""
    if not isinstance(value, dict):
        return None
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices:
        return None
    return _Completion(
        [_coerced_choice(choice) for choice in choices],
        _model(value),
        usage=_coerced_usage(value),
    )


def _coerced_choice(value: Any) -> _Choice:
    if not isinstance(value, dict):
        return _Choice()
    index = value.get("index")
    return _Choice(
        index if type(index) is int else None,
        _coerced_message(value.get("message")),
        _word(value.get("finish_reason")) or None,
    )


def _coerced_message(value: Any) -> _Message:
    if not isinstance(value, dict):
        return _Message()
    content = value.get("content")
    thinking = ""
    if isinstance(content, list):
        thinking = "".join(_thinking(content))
        content = "".join(_texts(content))
    return _Message(
        _as_text(content),
        _as_text(value.get("refusal")),
        thinking or _as_text(value.get("reasoning_content")),
        _as_text(value.get("reasoning")),
        _coerced_tool_calls(value),
    )


def _coerced_tool_calls(message: dict[str, Any]) -> list[Raw] | None:
    calls = message.get("tool_calls")
    if not calls and (legacy := message.get("function_call")):
        calls = [{"type": "function", "function": legacy}]
    if not calls:
        return None
    return [
        Raw(_compact(call).encode()) for call in (calls if isinstance(calls, list) else [calls])
    ]


def _texts(parts: list[Any]) -> Iterator[str]:
    """The text of a content list; parts of other kinds (references, images) hold none of it."""
    for part in parts:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and part.get("type", "text") == "text":
            yield _as_text(part.get("text")) or ""


def _thinking(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "thinking":
            thought = part.get("thinking")
            yield from _texts(thought if isinstance(thought, list) else [thought])


def _as_text(value: Any) -> str | None:
    """Text as it is; any other value as compact JSON, so that it arrives at all."""
    return value if value is None or isinstance(value, str) else _compact(value)


def _model(value: Any) -> str | None:
    return _word(value.get("model")) or None if isinstance(value, dict) else None


def _usage_of(value: Any) -> Usage:
    usage = _coerced_usage(value) if isinstance(value, dict) else None
    return NO_USAGE if usage is None else _normalised(usage)


def _coerced_usage(body: dict[str, Any]) -> _Usage | None:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    return _Usage(
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _count(usage.get("total_tokens")),
        _coerced_details(usage.get("prompt_tokens_details")),
        _coerced_details(usage.get("prompt_token_details")),
        _coerced_details(usage.get("completion_tokens_details")),
        _count(usage.get("num_cached_tokens")),
        _count(usage.get("prompt_cache_hit_tokens")),
    )


def _coerced_details(value: Any) -> _Details | None:
    if not isinstance(value, dict):
        return None
    return _Details(_count(value.get("cached_tokens")), _count(value.get("reasoning_tokens")))


def _count(value: Any) -> int | None:
    """A number of tokens; what cannot be one counts as not reported."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None


# --- errors, in every dialect --------------------------------------------------------------------


def _error(value: Any, *, has_choices: bool) -> ErrorBody | None:
    if isinstance(value, list):  # Gemini
        value = value[0] if value else None
    if isinstance(value, str):
        return ErrorBody(message=_line(value)) if value.strip() else None
    if not isinstance(value, dict):
        return None
    inner = value.get("error") or _choice_error(value)
    if isinstance(inner, list):
        inner = inner[0]
    if isinstance(inner, dict):
        return _error_body(inner, value)
    if inner:
        return _error_body({"message": inner}, value)
    # A completion may have members of these names; only what is none is a flat error.
    if has_choices or not any(value.get(name) for name in ("message", "detail", "code")):
        return None
    return _error_body(value, {})


def _choice_error(body: dict[str, Any]) -> Any:
    choices = body.get("choices")
    if not isinstance(choices, list):
        return None
    errors = (choice.get("error") for choice in choices if isinstance(choice, dict))
    return next((error for error in errors if error), None)


def _error_body(error: dict[str, Any], around: dict[str, Any]) -> ErrorBody:
    """``error`` holds the members, ``around`` the object it came in, for what it leaves out."""
    detail = _first_detail(error) or _first_detail(around)
    metadata = error.get("metadata")
    limit_source = metadata.get("limit_source") if isinstance(metadata, dict) else None
    # {"type": "error", "error": {...}} is Anthropic's envelope and says nothing.
    kind = _word(error.get("type")) or _word(error.get("status")) or _word(limit_source)
    own_code = _word(error.get("code")) or _word(around.get("code"))
    return ErrorBody(
        code=own_code or _word(detail.get("type")) or _word(detail.get("code")) or kind,
        type=kind,
        message=_message(error, around, detail),
        loc=_loc(detail.get("loc") or detail.get("location")) or _word(error.get("param")),
    )


def _message(error: dict[str, Any], around: dict[str, Any], detail: dict[str, Any]) -> str:
    said: Any = _word(detail.get("msg")) or _word(detail.get("message"))
    said = said or error.get("message") or around.get("message")
    said = said or error.get("detail") or around.get("detail")
    if not said:
        # A bare code has nothing more to say; anything else is shown as it came.
        said = "" if set(error) <= {"code", "type", "param", "message", "object"} else error
    return _line(_as_text(said) or "")


def _first_detail(error: dict[str, Any]) -> dict[str, Any]:
    """The first {loc, msg, type} of a validation error, wherever Mistral has put the list.

    Prism has its own beside the message: {location, message, code} under ``validation``.
    """
    for held in (error.get("detail"), error.get("message"), error.get("validation")):
        if isinstance(held, str) and held.lstrip()[:1] in ("{", "["):
            held = _maybe_json(held)
        if isinstance(held, dict):
            held = held.get("detail")
        if isinstance(held, list) and held and isinstance(held[0], dict):
            return held[0]
    return {}


def _maybe_json(text: str) -> Any:
    try:
        return _loads(text)[0]
    except (ValueError, RecursionError):
        return None


def _loc(value: Any) -> str:
    if isinstance(value, list):
        return ".".join(filter(None, map(_word, value)))
    return _word(value)


def _word(value: Any) -> str:
    """A code, type or name as text: ``1500`` and ``"1500"`` are the same code."""
    if isinstance(value, str):
        return value
    return str(value) if type(value) is int else ""


def _line(text: str) -> str:
    return " ".join(text[: 2 * MAX_MESSAGE_CHARS].split())[:MAX_MESSAGE_CHARS]


def _page(text: str) -> ErrorBody | None:
    """The first words of a body that is no JSON, for instance of a proxy's HTML page."""
    if text.lstrip()[:1] in ("{", "["):  # JSON cut short says nothing to a person
        return None
    words = " ".join(_MARKUP.sub(" ", text[:20_000]).split())
    return ErrorBody(message=words[:MAX_PAGE_CHARS]) if words else None
