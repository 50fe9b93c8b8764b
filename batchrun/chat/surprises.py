"""A completion that no typed decode takes: read loosely, coerced into the usual shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Raw

from batchrun.chat.completion import (
    MAX_TOKENS,
    Choice,
    Completion,
    Details,
    Message,
    UsageFields,
    answer_of,
    normalised,
    reply_of,
    usage_in,
)
from batchrun.chat.error_body import error_body, page_text, word
from batchrun.chat.text import as_text, compact, loads, utf8_text
from batchrun.types import NO_USAGE, Answer, Reply, Usage


def parse_surprise(body: bytes) -> Reply:
    """As ``parse``, of a body that is no usual completion."""
    text = utf8_text(body)
    try:
        value = loads(text)
        completion = _coerced(value)
        error = error_body(value, has_choices=completion is not None)
    except (ValueError, RecursionError):
        return Reply(False, error=page_text(text))
    if completion is not None:
        return reply_of(completion, error)
    return Reply(True, model=_model(value), usage=_usage_of(value), error=error)


def answer_surprise(body: bytes) -> Answer:
    """As ``answer``, of a body that is no usual completion."""
    try:
        value = loads(utf8_text(body))
        completion = _coerced(value)
    except (ValueError, RecursionError):
        return Answer()
    if completion is None:
        return Answer(response_model=_model(value), usage=_usage_of(value))
    return answer_of(completion, usage_in(completion))


def _coerced(value: Any) -> Completion | None:
    """The completion in ``value``, its members turned into the types they should have had."""
    if not isinstance(value, dict):
        return None
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices:
        return None
    return Completion(
        [_coerced_choice(choice) for choice in choices],
        _model(value),
        usage=_coerced_usage(value),
    )


def _coerced_choice(value: Any) -> Choice:
    if not isinstance(value, dict):
        return Choice()
    index = value.get("index")
    return Choice(
        index if type(index) is int else None,
        _coerced_message(value.get("message")),
        word(value.get("finish_reason")) or None,
    )


def _coerced_message(value: Any) -> Message:
    if not isinstance(value, dict):
        return Message()
    content = value.get("content")
    thinking = ""
    if isinstance(content, list):
        thinking = "".join(_thinking(content))
        content = "".join(_texts(content))
    return Message(
        as_text(content),
        as_text(value.get("refusal")),
        thinking or as_text(value.get("reasoning_content")),
        as_text(value.get("reasoning")),
        _coerced_tool_calls(value),
    )


def _coerced_tool_calls(message: dict[str, Any]) -> list[Raw] | None:
    calls = message.get("tool_calls")
    if not calls and (legacy := message.get("function_call")):
        calls = [{"type": "function", "function": legacy}]
    if not calls:
        return None
    return [Raw(compact(call).encode()) for call in (calls if isinstance(calls, list) else [calls])]


def _texts(parts: list[Any]) -> Iterator[str]:
    """The text of a content list; parts of other kinds (references, images) hold none of it."""
    for part in parts:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and part.get("type", "text") == "text":
            yield as_text(part.get("text")) or ""


def _thinking(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "thinking":
            thought = part.get("thinking")
            yield from _texts(thought if isinstance(thought, list) else [thought])


def _model(value: Any) -> str | None:
    return word(value.get("model")) or None if isinstance(value, dict) else None


def _usage_of(value: Any) -> Usage:
    usage = _coerced_usage(value) if isinstance(value, dict) else None
    return NO_USAGE if usage is None else normalised(usage)


def _coerced_usage(body: dict[str, Any]) -> UsageFields | None:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    return UsageFields(
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _count(usage.get("total_tokens")),
        _coerced_details(usage.get("prompt_tokens_details")),
        _coerced_details(usage.get("prompt_token_details")),
        _coerced_details(usage.get("completion_tokens_details")),
        _count(usage.get("num_cached_tokens")),
        _count(usage.get("prompt_cache_hit_tokens")),
    )


def _coerced_details(value: Any) -> Details | None:
    if not isinstance(value, dict):
        return None
    return Details(_count(value.get("cached_tokens")), _count(value.get("reasoning_tokens")))


def _count(value: Any) -> int | None:
    """A number of tokens; what cannot be one counts as not reported."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None
