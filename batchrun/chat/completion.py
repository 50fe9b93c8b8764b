"""The usual chat completion, as one typed decode reads it, and what it says."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from batchrun.types import NO_USAGE, Answer, ErrorBody, Reply, Usage

MAX_TOKENS = 2**63 - 1  # what an int64 column holds
_Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None


class Details(Struct, gc=False):
    cached_tokens: _Count = None
    reasoning_tokens: _Count = None


class UsageFields(Struct, gc=False):
    """Every spelling there is: OpenAI's, and Mistral's and DeepSeek's of cached tokens."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    total_tokens: _Count = None
    prompt_tokens_details: Details | None = None
    prompt_token_details: Details | None = None
    completion_tokens_details: Details | None = None
    num_cached_tokens: _Count = None
    prompt_cache_hit_tokens: _Count = None


class Message(Struct, gc=False):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Raw] | None = None
    function_call: None = None  # anything but null is a surprise: the legacy form of a tool call


class Choice(Struct, gc=False):
    index: int | None = None
    message: Message | None = None
    finish_reason: str | None = None
    error: None = None  # anything but null is a surprise: OpenRouter's failed generation


class _Columns(Struct, gc=False):
    """A completion, as far as it fills columns; the decoder skips over the rest."""

    choices: Annotated[list[Choice], Meta(min_length=1)]
    model: str | None = None
    error: None = None  # anything but null is a surprise


class Completion(_Columns, gc=False):
    usage: UsageFields | None = None


decode = msgspec.json.Decoder(Completion).decode
decode_columns = msgspec.json.Decoder(_Columns).decode
decode_raw = msgspec.json.Decoder(Raw).decode
# UnicodeDecodeError is a ValueError; RecursionError is what JSON nested without end brings.
SURPRISES = (msgspec.MsgspecError, ValueError, RecursionError)
NO_MESSAGE = Message()


def reply_of(completion: Completion, error: ErrorBody | None) -> Reply:
    """What decides about a completion, of choice 0; ``error`` when it came with one."""
    choices = completion.choices
    choice = choices[0] if len(choices) == 1 else _choice_0(choices)
    message = choice.message or NO_MESSAGE
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
        usage_in(completion),
        error,
        choice.message is not None,
    )


def answer_of(completion: _Columns, usage: Usage) -> Answer:
    """The columns a completion fills, from choice 0; a refusal is the response where no text is."""
    choices = completion.choices
    choice = choices[0] if len(choices) == 1 else _choice_0(choices)
    message = choice.message or NO_MESSAGE
    refused = bool(message.refusal)
    return Answer(
        message.refusal if refused and not message.content else message.content,
        choice.finish_reason,
        completion.model,
        usage,
        message.reasoning_content or message.reasoning or None,
        joined(message.tool_calls) if message.tool_calls else None,
        refused,
    )


def usage_in(completion: Completion) -> Usage:
    return NO_USAGE if completion.usage is None else normalised(completion.usage)


def _choice_0(choices: list[Choice]) -> Choice:
    """Choices may come in any order; one without an index counts by its place."""
    return next((choice for choice in choices if choice.index == 0), choices[0])


def normalised(usage: UsageFields) -> Usage:
    """Tokens in our words; of cached ones the first spelling given wins, also with 0."""
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


def _cached_elsewhere(usage: UsageFields) -> int | None:
    details = usage.prompt_token_details
    if details is not None and details.cached_tokens is not None:
        return details.cached_tokens
    if usage.num_cached_tokens is not None:
        return usage.num_cached_tokens
    return usage.prompt_cache_hit_tokens


def joined(tool_calls: list[Raw]) -> str:
    """Tool calls as one JSON array, compact; ValueError for what is no UTF-8."""
    # The decoder skips over raw parts without looking at their UTF-8: ``decode`` does.
    parts = [msgspec.json.format(bytes(call), indent=-1) for call in tool_calls]
    return (b"[" + b",".join(parts) + b"]").decode()
