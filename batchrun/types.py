"""The vocabulary: rows become Requests, Requests Attempts, Attempts Decisions, Decisions Outcomes.

Durations are seconds as float, on the monotonic clock where they are instants; ``*_ms`` are Unix
milliseconds. Everything is a ``msgspec.Struct`` (0.4 µs to make, against 5 for a frozen
dataclass); those of the hot path hold no reference cycles, so the collector need not track them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from msgspec import Struct

OutcomeKind = Literal[
    "ok", "rejected", "rate_limit", "transient", "timeout", "invalid_response", "invalid_answer"
]


DecisionKind = Literal[
    "ok",
    "rejected",
    "rate_limit",
    "transient",
    "timeout",
    "invalid_response",
    "invalid_answer",  # whole, and not what was asked for
    "fatal",
]


Bound = Literal["endpoint", "quota", "input", "loop"]
Pushback = Literal["none", "rate", "capacity"]


Failure = Literal[
    "connect",  # refused, unreachable, or not connected within the connect timeout
    "dns",  # the resolver failed for now
    "no_host",  # the resolver says the name does not exist
    "tls",  # certificate or handshake
    "proxy",  # the proxy refused or cannot be reached
    "disconnected",  # the connection ended before a whole response head
    "cut",  # the body ended early, or a stream ended without finish
    "timeout",  # no whole answer within the attempt's time
    "too_large",  # more bytes than a completion can sensibly have
    "bad_header",  # a response head that cannot be parsed
    "bad_encoding",  # a body whose content-encoding does not decode
    "not_utf8",  # a body that is no text as JSON has it
]


class ArrowStream(Protocol):
    """Any table that speaks Arrow: of pyarrow, pandas, Polars, DuckDB."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


class Usage(Struct, frozen=True, gc=False):
    """Tokens as the endpoint reported them; ``None`` is not reported, never 0. Adds with ``+``."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            _plus(self.prompt_tokens, other.prompt_tokens),
            _plus(self.completion_tokens, other.completion_tokens),
            _plus(self.total_tokens, other.total_tokens),
            _plus(self.cached_tokens, other.cached_tokens),
            _plus(self.reasoning_tokens, other.reasoning_tokens),
        )


def _plus(a: int | None, b: int | None) -> int | None:
    if a is None:
        return b
    return a if b is None else a + b


NO_USAGE = Usage()


class Request(Struct, frozen=True, gc=False):
    """One chat completion to make. ``body`` is the JSON sent, compact UTF-8, never modelled."""

    row: int  # 0-based position over all inputs
    body: bytes
    hash: bytes  # 16 bytes, see chat.identity.request_hash
    occurrence: int  # which of the equal requests, from 0
    slot: int  # where the journal keeps this answer
    model: str  # the body's model; "" when it names none
    model_from_row: bool = False  # the row named the model itself, so a bad one is the row's fault
    in_doubt: int = 0  # attempts of earlier runs that may have been billed
    used: Usage = NO_USAGE  # by attempts of earlier runs


class ErrorBody(Struct, frozen=True, gc=False):
    """An endpoint's error, whatever its dialect; ``chat.error_body`` reads them."""

    code: str = ""
    type: str = ""
    message: str = ""
    loc: str = ""  # the offending parameter or location, e.g. "body.store"


class Reply(Struct, frozen=True, gc=False):
    """What a response body says, parsed once; enough to decide on, not to publish from."""

    is_json: bool
    choices: int = 0
    finish_reason: str | None = None
    has_content: bool = False  # text, refusal, reasoning or tool calls in choice 0
    refusal: bool = False
    model: str | None = None
    usage: Usage = NO_USAGE
    error: ErrorBody | None = None
    has_message: bool = True  # choice 0 has one


class Attempt(Struct, frozen=True, gc=False):
    """What one sending brought. ``headers`` are case-insensitive or have lower-case names."""

    status: int | None  # None when no response head arrived
    headers: Mapping[str, str]
    body: bytes  # whole and decompressed; of a stream, the completion put together from it
    started_s: float
    ended_s: float
    finished_at_ms: int
    reply: Reply | None = None  # None when there is no body to read
    failure: Failure | None = None
    detail: str = ""  # the failure in words, without secrets
    sent: bool = True  # a first byte of the request may have left this machine
    ttft_s: float | None = None
    resent: int = 0  # times it had gone out before, on a connection that was dead already


class Decision(Struct, frozen=True, gc=False):
    """What an attempt means for its row and for the run. Loops act on it and look no further."""

    kind: DecisionKind
    code: str = ""  # the endpoint's code, else ours, else the status
    reason: str = ""  # one line for a person
    wait_s: float | None = None  # what the endpoint named; None when it named nothing
    in_doubt: bool = False  # sent, no usable answer, perhaps billed
    pushback: Pushback = "none"
    unreachable: bool = False  # nothing reached the endpoint: no row's fault
    may_be_outage: bool = False  # a gateway's word for nobody behind it: seldom the row's fault
    again: bool = False  # goes again at once and as otherwise asked: outside every budget
    alike: str = ""  # equal for failures of one cause; "" never ends a run early


# When another row was answered last: while this attempt was on its way, earlier (also in an earlier
# run), or never.
Others = Literal["now", "before", "never"]


class Tries(NamedTuple):
    """The attempts of this run behind a settled row."""

    attempts: int
    in_doubt: int
    doubt_spent: bool = False  # it ended because it may have been billed as often as is allowed


class Verdict(NamedTuple):
    """What a failed attempt leads to: another one after ``wait_s``, or None and the row's end."""

    wait_s: float | None
    tries: Tries


class Outcome(Struct, frozen=True, gc=False):
    """One settled request as it is journaled."""

    hash: bytes
    occurrence: int
    kind: OutcomeKind
    final: bool  # only --retry-failed sends it again (ok, rejected, in doubt too often)
    attempts: int
    in_doubt: int
    http_status: int | None
    code: str
    message: str
    request_id: str
    model: str  # as requested
    latency_s: float | None  # of the last attempt
    ttft_s: float | None
    finished_at_ms: int
    usage: Usage
    body: bytes  # the endpoint's bytes, whole; b"" when there were none
    rebuilt: bool = False  # the body was put together from an output without response_body


class Answer(Struct, frozen=True, gc=False):
    """The answer columns that one completion's JSON fills: of choice 0, and of the usage."""

    response: str | None = None
    finish_reason: str | None = None
    response_model: str | None = None
    usage: Usage = NO_USAGE
    reasoning: str | None = None
    tool_calls: str | None = None
    refusal: bool = False


class Answers(NamedTuple):
    """The answers of several rows by column, without their usage; see ``Answer``."""

    responses: Sequence[str | None]
    finish_reasons: Sequence[str | None]
    response_models: Sequence[str | None]
    reasonings: Sequence[str | None]
    tool_calls: Sequence[str | None]
    refusals: Sequence[bool]


class Tokens(NamedTuple):
    """The usage of several rows by column."""

    prompt: Sequence[int | None]
    completion: Sequence[int | None]
    total: Sequence[int | None]
    cached: Sequence[int | None]
    reasoning: Sequence[int | None]


class Result(Struct, frozen=True):
    """One finished row for the Python API; the fields are the output's columns."""

    custom_id: str
    status: Literal["ok", "error"]
    response: str | None = None
    finish_reason: str | None = None
    request_model: str | None = None
    response_model: str | None = None
    usage: Usage = NO_USAGE
    reasoning: str | None = None
    tool_calls: str | None = None
    error_kind: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    http_status: int | None = None
    attempts: int = 0
    in_doubt_attempts: int = 0
    latency_s: float | None = None
    ttft_s: float | None = None
    request_id: str | None = None
    finished_at_ms: int | None = None
    request_hash: str | None = None
    response_body: str | None = None
    paid_by: str | None = None  # the custom_id of the row whose answer this one takes


class UnusedCounts(Struct):
    """Answers whose rows are gone from the input, and the file that keeps them."""

    answers: int = 0
    file: str | None = None
    moved: int = 0  # left the output in this run
    taken_back: int = 0  # their rows are in the input again
    dropped: int = 0  # kept for as long as was asked
