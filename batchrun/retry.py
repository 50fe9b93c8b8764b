"""What an attempt means, and whether and when its row is tried again.

``classify`` turns an Attempt into a Decision: a pure function, written as the list of rules that
the providers' behaviour came to, first match wins. Three ideas carry it:

* **The body outranks the status.** One provider says 400 for an unknown model, another 404, a
  third 422; a 429 may be a pause or an empty account. Codes and known wordings are read first.
* **A failure belongs to a row, to a model or to the run.** What no row can be blamed for (key,
  credit, URL, TLS) is fatal and settles nothing. What waiting can cure is tried again.
* **In doubt is whatever was sent and brought no usable answer**, unless the endpoint said that it
  refused: such an attempt may have been billed, so it has a budget of its own.

``Policy`` turns Decisions into waits with tenacity's stop and wait objects, ``Persistence``
remembers what it needs for that of each unsettled row. Both are asked only after a failure: a row
that succeeds at once never meets tenacity.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final

from msgspec import Struct
from tenacity import RetryCallState, Retrying
from tenacity.stop import stop_after_attempt, stop_base
from tenacity.wait import wait_base, wait_exponential

from batchrun.types import (
    Attempt,
    Decision,
    DecisionKind,
    ErrorBody,
    Failure,
    Pushback,
    Reply,
    Request,
    Scope,
    Tries,
    Verdict,
)

OK: Final = Decision(kind="ok")

# A fatal decision belongs to no row, so its code is ours, one of these, and tells the run what to
# advise; its reason reads on after the host's name: 'api.mistral.ai refused the key: 401 ...'.
NEXT_STEPS: Final[Mapping[str, str]] = {
    "unauthorized": "correct the key, then run the same command",
    "no_access": "get access for this key, or use another, then run the same command",
    "no_credit": "add credit or raise the limit there, then run the same command",
    "no_allowance": "add --model NAME, or get a plan that includes this model",
    "model_not_found": "add --model NAME",
    "wrong_url": "correct --base-url (it may need a path such as /v1)",
    "redirect": "give the address it points to as --base-url",
    "no_host": "correct the host name in --base-url",
    "tls": "check the host and its certificate; SSL_CERT_FILE names a CA file",
    "proxy": "check HTTPS_PROXY and NO_PROXY",
}


def classify(attempt: Attempt, request: Request) -> Decision:
    """Say what ``attempt`` means for its row and for the run. Pure; never raises.

    The Reply must be parsed already; ``None`` stands for an empty body. A named wait comes back
    as it was named, however long: what is too long is not decided here.
    """
    reply = attempt.reply
    if (
        reply is not None
        and reply.finish_reason in _FINISHED
        and reply.choices
        and reply.has_message
        and attempt.status == 200
        and reply.error is None
        and attempt.failure is None
    ):
        return OK
    status = attempt.status
    if status is None or (attempt.failure is not None and status < 300):
        return _FAILED[attempt.failure or "disconnected"](attempt)
    if status >= 300:
        return _first_match(_Said.of(status, attempt, request))
    if reply is None or not reply.is_json:
        return _unreadable(attempt, status)
    if reply.error is not None:
        # The 200 had gone out before the error was known; its code stands in for the status.
        return _first_match(_Said.of(_status_of(reply.error), attempt, request))
    return _judge_completion(reply)


# --- replies with status 200 ----------------------------------------------------------------

_FINISHED: Final = frozenset(
    ("stop", "length", "tool_calls", "content_filter", "function_call", "model_length")
)
_INTERRUPTED: Final = frozenset(("error", "abort", "aborted", "insufficient_system_resource"))


def _judge_completion(reply: Reply) -> Decision:
    if not reply.choices:
        return _unusable("no_choices", "answered 200 without any choices")
    if not reply.has_message:
        return _unusable("no_message", "answered 200 with a choice that has no message")
    finish = reply.finish_reason
    if finish is None:
        # Ollama and imitations leave it null on whole answers; without content it is a torn one.
        return OK if reply.has_content else _unusable("no_finish", "the answer has no finish")
    if finish.lower() in _INTERRUPTED:
        reason = f'the endpoint gave up on the answer: finish_reason "{finish}"'
        return Decision(kind="transient", code=finish.lower(), reason=reason, in_doubt=True)
    # An open enum: a reason nobody has heard of is still the endpoint saying that it finished.
    return OK


def _unreadable(attempt: Attempt, status: int) -> Decision:
    if attempt.reply is None:
        return _unusable("empty_body", f"answered {status} with an empty body")
    if _is_html(attempt):
        page = f"answered {status} with an HTML page, not a completion; is the base URL right?"
        return _unusable("bad_json", page)
    error = attempt.reply.error
    words = f": {_one_line(error.message, 80)}" if error is not None and error.message else ""
    return _unusable("bad_json", f"answered {status} with something that is not whole JSON{words}")


def _unusable(code: str, reason: str) -> Decision:
    return Decision(
        kind="invalid_response", code=code, reason=reason, in_doubt=True, alike=f"200|{code}|"
    )


_ERROR_STATUS: Final = re.compile(r"[45][0-9][0-9]")


def _status_of(error: ErrorBody) -> int:
    """The HTTP status an error inside a 200 names; 0 when it names none."""
    return int(error.code) if _ERROR_STATUS.fullmatch(error.code) else 0


# --- failures without a whole reply ---------------------------------------------------------


def _passing(
    code: Failure, words: str, *, kind: DecisionKind = "transient"
) -> Callable[[Attempt], Decision]:
    def decide(attempt: Attempt) -> Decision:
        reason = _one_line(attempt.detail) or words
        return Decision(kind=kind, code=code, reason=reason, in_doubt=attempt.sent)

    return decide


def _unreachable(code: Failure, words: str) -> Callable[[Attempt], Decision]:
    def decide(attempt: Attempt) -> Decision:
        reason = _one_line(attempt.detail) or words
        return Decision(kind="transient", code=code, reason=reason, unreachable=True)

    return decide


def _configuration(code: Failure, words: str) -> Callable[[Attempt], Decision]:
    def decide(attempt: Attempt) -> Decision:
        detail = _one_line(attempt.detail)
        return _fatal(code, f"{words}: {detail}" if detail else words)

    return decide


def _timed_out(attempt: Attempt) -> Decision:
    reason = _one_line(attempt.detail) or _no_answer_within(attempt.ended_s - attempt.started_s)
    return Decision(kind="timeout", code="timeout", reason=reason, in_doubt=attempt.sent)


def _no_answer_within(seconds: float) -> str:
    return f"no answer within {seconds:.0f} s" if math.isfinite(seconds) else "no answer in time"


_FAILED: Final[Mapping[Failure, Callable[[Attempt], Decision]]] = {
    "connect": _unreachable("connect", "could not connect"),
    "dns": _unreachable("dns", "the host name could not be looked up just now"),
    "no_host": _configuration("no_host", "cannot be found"),
    "tls": _configuration("tls", "failed the TLS check"),
    "proxy": _configuration("proxy", "cannot be reached through the proxy"),
    "disconnected": _passing("disconnected", "the connection ended before an answer"),
    "cut": _passing("cut", "the answer was cut short"),
    "timeout": _timed_out,
    "too_large": _passing("too_large", "the answer is too large", kind="invalid_response"),
    "bad_header": _passing(
        "bad_header", "the head of the answer cannot be read", kind="invalid_response"
    ),
    "bad_encoding": _passing(
        "bad_encoding", "the body of the answer cannot be decompressed", kind="invalid_response"
    ),
    "not_utf8": lambda attempt: _unusable(
        "not_utf8", f"answered {attempt.status} with text that is not UTF-8"
    ),
}


# --- what an endpoint says instead of an answer ---------------------------------------------

_NO_ERROR: Final = ErrorBody()
_MODEL_LOCS: Final = frozenset(("model", "body.model"))

_QUOTA_CODE: Final = re.compile(
    r"insufficient_(?:quota|balance|credits?|funds)|credit_balance|billing|payment_required"
    r"|spend(?:ing)?_(?:limit|cap)|usage_limit|account_(?:deactivated|suspended|disabled)"
)
# Not "exceeded your current quota": Gemini says so of a limit that passes within the minute.
_QUOTA_WORDS: Final = re.compile(
    r"credit balance is too low|insufficient (?:balance|credits?|funds)|out of credits"
    r"|spend(?:ing)? (?:limit|cap)|specified api usage limits"
)
_KEY_CODES: Final = frozenset(("invalid_api_key", "api_key_invalid", "authentication_error"))
_KEY_WORDS: Final = re.compile(r"(?:incorrect|invalid) api key|api key not valid")

_RATE_CODES: Final = frozenset(
    ("1300", "rate_limited", "rate_limit_exceeded", "rate_limit_error", "resource_exhausted")
)
# The backend is full: not this account's limit, so pacing alone does not help.
_CAPACITY_CODES: Final = frozenset(
    ("3505", "service_tier_capacity_exceeded", "slow_down", "capacity_exceeded")
)
_OVERLOADED: Final = frozenset((498, 503, 529))

_MODEL_CODES: Final = frozenset(
    (
        "1500",
        "deploymentnotfound",
        "invalid_model",
        "model_decommissioned",
        "model_not_available",
        "model_not_found",
    )
)
_IS_GONE: Final = (
    r"(?:does not exist|doesn't exist|not exist|not found|not available|not deployed"
    r"|decommissioned|no longer available)"
)
_MODEL_WORDS: Final = re.compile(
    r"\b(?:invalid|unknown|unsupported|no such) model\b|\bnot a valid model\b|\bnot a chat model\b"
    rf"|\bmodel(?: is| was| has been)? {_IS_GONE}"
    rf"|\bmodels?[ :/=]+\S{{1,200}}(?: is| was| has been)? {_IS_GONE}"
    r"|\bno (?:endpoints found|allowed providers)\b|\bunable to access model\b|^model:"
)

_CONTEXT_WORDS: Final = re.compile(
    r"context_length_exceeded|maximum context length|context length is only"
    r"|(?:longer than|exceeds?|less than|greater than|within) the (?:model's )?(?:maximum )?context"
    r"|available context size|prompt is too long|reduce the length of the (?:messages|prompt)"
    r"|exceeded model token limit|input token count .{0,80}exceeds"
    r"|max_(?:new_)?tokens .{0,80}context"
)
_FILTER_WORDS: Final = re.compile(
    r"content[ _-]?(?:filter|policy|management policy)|responsible ?ai ?policy|moderation|guardrail"
    r"|response was filtered"
    r"|\b(?:inputs?|prompts?|content|messages?|text|request)"
    r" (?:was|were|is|has been|have been) flagged"
)
_TOO_LARGE_WORDS: Final = re.compile(
    r"request (?:is )?too large|request_too_large|payload too large"
)
# Classes of errors, not causes: beside one of these the status says more.
_CLASSES: Final = frozenset(
    ("api_error", "error", "internal_server_error", "invalid_request_error", "server_error")
)
_OUGHT_TO_PASS: Final = frozenset((408, 409, 425, 498, 499))
# A gateway or the client's side gave up while the model may have been at work.
_IN_DOUBT: Final = frozenset((408, 499, 504, 520, 524))


class _Said(Struct, frozen=True, gc=False):
    """An error as the endpoint reported it, prepared for the rules below."""

    status: int  # of the head, or named by an error inside a 200; 0 when that names none
    attempt: Attempt
    request: Request
    error: ErrorBody
    codes: tuple[str, str]  # the error's code and type, lower case
    text: str  # the beginning of its message, lower case

    @classmethod
    def of(cls, status: int, attempt: Attempt, request: Request) -> _Said:
        reply = attempt.reply
        error = (reply.error if reply is not None else None) or _NO_ERROR
        codes = (error.code.lower(), error.type.lower())
        return cls(status, attempt, request, error, codes, error.message[:_LOOK_AT].lower())

    def has_code(self, known: frozenset[str]) -> bool:
        return self.codes[0] in known or self.codes[1] in known

    def speaks_of(self, words: re.Pattern[str]) -> bool:
        return any(words.search(text) for text in (*self.codes, self.text))

    def speaks_first_of(self, words: re.Pattern[str]) -> bool:
        """Whether a 4xx begins with ``words``; further on it may be quoting the row's own text."""
        return 400 <= self.status < 500 and words.search(self.text, 0, _OPENING) is not None

    @property
    def code(self) -> str:
        """The endpoint's code, else its type, else the status."""
        return _one_line(self.error.code or self.error.type, 80) or self.number

    @property
    def number(self) -> str:
        return str(self.status) if self.status else "error"

    @property
    def message(self) -> str:
        return _one_line(self.error.message)

    @property
    def came_late(self) -> bool:
        return self.attempt.status != self.status

    def header(self, name: str) -> str:
        return self.attempt.headers.get(name, "").strip().lower()

    def status_line(self) -> str:
        """``503 Service Unavailable: what the endpoint adds to it``."""
        phrase = _phrase(self.status)
        line = f"{self.number} {phrase}".rstrip()
        message = self.message
        if message.lower().startswith(line.lower()):
            return message
        if message and message.lower() != phrase.lower():
            return f"{line}: {message}"
        return f"{line} (an HTML page)" if _is_html(self.attempt) else line


_Rule = Callable[[_Said], Decision | None]


def _first_match(said: _Said) -> Decision:
    for rule in _RULES:
        decision = rule(said)
        if decision is not None:
            return decision
    return _ought_to_pass(said)


def _redirected(said: _Said) -> Decision | None:
    if not 300 <= said.status < 400:
        return None
    target = _one_line(said.attempt.headers.get("location", ""))
    where = f"redirects to {target}" if target else "redirects without saying where"
    return _fatal("redirect", f"{where} ({said.status}); redirects are never followed")


def _payment_required(said: _Said) -> Decision | None:
    if said.status != 402:
        return None
    # OpenRouter's budget for requests in flight: the one 402 that passes, and it names a wait.
    if (wait_s := _named_wait(said.attempt)) is not None:
        return _rate_limit(said, wait_s, "rate")
    return _fatal("no_credit", f"wants payment first: {said.status_line()}")


def _out_of_quota(said: _Said) -> Decision | None:
    if said.speaks_first_of(_QUOTA_WORDS) or any(map(_QUOTA_CODE.search, said.codes)):
        return _fatal("no_credit", f"says the account's quota is used up: {said.status_line()}")
    if said.status != 429:
        return None
    if said.header("x-ratelimit-remaining-tokens-month") == "0":
        return _fatal("no_credit", "says this month's tokens are used up (429)")
    if said.header("x-ratelimit-limit-req-minute") == "0":
        return _no_allowance(said)
    return None


def _no_allowance(said: _Said) -> Decision:
    name = _one_line(said.request.model, 120)
    reason = f'allows no requests to model "{name}" (429, limit 0 a minute)'
    if said.request.model_from_row:
        return _rejected(said, code="no_allowance", reason=reason)
    return _fatal("no_allowance", reason, scope="model")


def _larger_than_the_limit(said: _Said) -> Decision | None:
    """One request above the whole per-minute allowance never fits, whatever its code says."""
    limited = said.status in (413, 429) or said.has_code(_RATE_CODES)
    if limited and _TOO_LARGE_WORDS.search(said.text):
        return _rejected(said)
    return None


def _rate_limited(said: _Said) -> Decision | None:
    capacity = said.has_code(_CAPACITY_CODES) and said.status != 498
    if said.status != 429 and not capacity and not said.has_code(_RATE_CODES):
        return None
    attempt = said.attempt
    wait_s = retry_after(attempt.headers, attempt.reply, attempt.finished_at_ms)
    if wait_s is None and said.header("x-should-retry") == "false":
        return _rejected(said)
    return _rate_limit(said, wait_s, "capacity" if capacity else "rate")


def _bad_key(said: _Said) -> Decision | None:
    by_word = said.status in (400, 403) and said.speaks_first_of(_KEY_WORDS)
    if said.status == 401 or said.has_code(_KEY_CODES) or by_word:
        return _fatal("unauthorized", f"refused the key: {said.status_line()}")
    return None


def _unknown_model(said: _Said) -> Decision | None:
    if not _names_the_model(said):
        return None
    if said.request.model_from_row:
        return _rejected(said)
    name = _one_line(said.request.model, 120)
    reason = f'has no model "{name}" ({said.number})' if name else f"wants a model ({said.number})"
    return _fatal("model_not_found", reason, scope="model")


def _names_the_model(said: _Said) -> bool:
    if said.has_code(_MODEL_CODES):
        return True
    if said.status not in (400, 404, 410, 422):
        return False
    if said.error.loc.lower() in _MODEL_LOCS or said.speaks_first_of(_MODEL_WORDS):
        return True
    # A 404 that repeats the model's name is about the model, in whatever language.
    name = re.escape(said.request.model.lower())
    return said.status == 404 and name != "" and bool(re.search(rf"(?<!\w){name}(?!\w)", said.text))


def _forbidden(said: _Said) -> Decision | None:
    if said.status != 403:
        return None
    # Together says 403 of a prompt too long, OpenRouter and Mistral's guardrails of its content.
    if said.speaks_of(_CONTEXT_WORDS) or said.speaks_of(_FILTER_WORDS):
        return _rejected(said)
    return _fatal("no_access", f"refuses access: {said.status_line()}")


def _wrong_url(said: _Said) -> Decision | None:
    if said.status == 407:
        return _fatal("proxy", f"cannot be reached through the proxy: {said.status_line()}")
    if said.status in (404, 405, 501):
        return _fatal("wrong_url", f"has no chat completions at this URL: {said.status_line()}")
    return None


def _bad_request(said: _Said) -> Decision | None:
    if not 400 <= said.status < 500 or said.status in _OUGHT_TO_PASS:
        return None
    if said.header("x-should-retry") == "true":
        return _transient(said)
    return _rejected(said)


def _ought_to_pass(said: _Said) -> Decision:
    """Timeouts and conflicts of 4xx, every 5xx, and errors inside a 200 that name no status."""
    if said.header("x-should-retry") == "false":
        return _rejected(said)
    return _transient(said)


# The order is the meaning: a body's code before the status, what cannot pass before what can.
_RULES: Final[tuple[_Rule, ...]] = (
    _redirected,
    _payment_required,
    _out_of_quota,
    _larger_than_the_limit,
    _rate_limited,
    _bad_key,
    _unknown_model,
    _forbidden,
    _wrong_url,
    _bad_request,
)


def _fatal(code: str, reason: str, *, scope: Scope = "run") -> Decision:
    return Decision(kind="fatal", code=code, reason=reason, scope=scope)


def _rate_limit(said: _Said, wait_s: float | None, pushback: Pushback) -> Decision:
    return Decision(
        kind="rate_limit",
        code=said.code,
        reason=said.status_line(),
        wait_s=wait_s,
        scope="model",
        pushback=pushback,
    )


def _transient(said: _Said) -> Decision:
    reason = said.status_line()
    if said.status in (504, 524):
        reason += " (a gateway stopped waiting; --stream keeps long answers alive)"
    return Decision(
        kind="transient",
        code=said.number if said.codes[0] in _CLASSES else said.code,
        reason=reason,
        wait_s=_named_wait(said.attempt),
        in_doubt=_may_be_billed(said),
        pushback="capacity" if said.status in _OVERLOADED else "none",
    )


def _rejected(said: _Said, *, code: str = "", reason: str = "") -> Decision:
    code = code or said.code
    return Decision(
        kind="rejected",
        code=code,
        reason=reason or _what_is_wrong(said, code),
        in_doubt=_may_be_billed(said),
        alike="" if _is_the_rows_own(said) else f"{said.number}|{code}|{said.error.loc}",
    )


def _may_be_billed(said: _Said) -> bool:
    if not said.attempt.sent:
        return False
    if said.status in _IN_DOUBT:
        return True
    # A 5xx is a refusal only when it was said whole, and before any answer had begun.
    was_refused = 400 <= said.status < 500
    return not was_refused and (said.came_late or said.attempt.failure is not None)


def _is_the_rows_own(said: _Said) -> bool:
    """Too long, filtered or too large: such rows may stand first by chance and prove nothing."""
    return said.status == 413 or any(
        said.speaks_of(words) for words in (_CONTEXT_WORDS, _FILTER_WORDS, _TOO_LARGE_WORDS)
    )


def _what_is_wrong(said: _Said, code: str) -> str:
    if not said.message:
        return said.status_line()
    loc = _one_line(said.error.loc, 120)
    # Validators say "Extra inputs are not permitted" and leave the place to another member.
    return said.message if loc in said.message else f"{code}: {loc}: {said.message}"


# --- waits that an endpoint names -----------------------------------------------------------

_NUMBER: Final = re.compile(r"\d{1,15}(?:\.\d{1,15})?")
_UNITS: Final[Mapping[str, float]] = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_UNIT: Final = (
    r"(?:milliseconds?|msecs?|seconds?|secs?|minutes?|mins?|hours?|hrs?|days?"
    r"|ns|us|µs|ms|s|m|h|d)(?![a-zµ])"
)
_STEP: Final = re.compile(rf"(\d{{1,15}}(?:\.\d{{1,15}})?) ?({_UNIT})")
_DURATION: Final = rf"(?:\d{{1,15}}(?:\.\d{{1,15}})? ?{_UNIT}(?:,? (?=\d))?)+"
_GO_DURATION: Final = re.compile(_DURATION)
_HINT: Final = re.compile(
    rf"\b(?:try again|retry|wait) (?:again )?(?:in|after|for) (?:about )?({_DURATION})"
)
_EPOCH_S: Final = 1e9
_EPOCH_MS: Final = 1e12


def retry_after(
    headers: Mapping[str, str], reply: Reply | None, finished_at_ms: int
) -> float | None:
    """Seconds the endpoint asks to wait, more than 0; ``None`` when it names no such time.

    ``retry-after-ms``, then ``Retry-After`` (RFC 9110: seconds or a date; fractions happen), then
    the message ("Please try again in 5.289s"), then the reset header of a used-up limit. The
    message comes before the resets because those tell when a bucket is full again, not when this
    request fits.
    """
    wait_s = _header_wait(headers, finished_at_ms)
    if wait_s is None and reply is not None and reply.error is not None:
        wait_s = _hinted_wait(reply.error.message)
    return _reset_wait(headers, finished_at_ms) if wait_s is None else wait_s


def _named_wait(attempt: Attempt) -> float | None:
    return _header_wait(attempt.headers, attempt.finished_at_ms)


def _header_wait(headers: Mapping[str, str], now_ms: int) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None and milliseconds > 0:
        return milliseconds / 1000
    return _wait_until(headers.get("retry-after", ""), headers, now_ms)


def _hinted_wait(message: str) -> float | None:
    hint = _HINT.search(message[:_LOOK_AT].lower())
    return _positive(_seconds(hint[1])) if hint else None


def _reset_wait(headers: Mapping[str, str], now_ms: int) -> float | None:
    """The longest reset among the limits that are used up; one that does not say counts too."""
    waits = [
        wait_s
        for name in headers
        if _is_reset(name.lower())
        and _is_used_up(headers.get(name.lower().replace("reset", "remaining"), ""))
        and (wait_s := _wait_until(headers[name], headers, now_ms)) is not None
    ]
    return max(waits, default=None)


def _is_reset(name: str) -> bool:
    return "reset" in name and ("ratelimit" in name or "rate-limit" in name)


def _is_used_up(remaining: str) -> bool:
    return not remaining.strip() or _number(remaining) == 0


def _wait_until(text: str, headers: Mapping[str, str], now_ms: int) -> float | None:
    """Seconds until what ``text`` says: seconds, an epoch, a duration or a date.

    Instants are the endpoint's, so they are measured by its ``Date`` where it sends one: our own
    clock (``now_ms``) may be wrong, and may jump.
    """
    text = text.strip()
    number = _number(text)
    if number is not None and number <= _EPOCH_S:
        return _positive(number)
    if number is None and (duration_s := _duration(text)):
        return _positive(duration_s)
    # A bare number this large is an instant (OpenRouter: in milliseconds), not a duration.
    then_s = _date(text) if number is None else number / 1000 if number > _EPOCH_MS else number
    if then_s is None:
        return None
    now_s = _date(headers.get("date", ""))
    return _positive(then_s - (now_ms / 1000 if now_s is None else now_s))


def _number(text: str) -> float | None:
    text = text.strip()
    return float(text) if text.isascii() and _NUMBER.fullmatch(text) else None


def _duration(text: str) -> float | None:
    text = text[:_LOOK_AT].lower()
    return _seconds(text) if _GO_DURATION.fullmatch(text) else None


def _seconds(duration: str) -> float:
    return sum(float(step[1]) * _unit(step[2]) for step in _STEP.finditer(duration))


def _unit(name: str) -> float:
    if name in _UNITS:
        return _UNITS[name]
    return _UNITS["ms"] if name.startswith(("mil", "mse")) else _UNITS[name[0]]


def _date(text: str) -> float | None:
    """The Unix seconds of a date; None for what is none."""
    try:
        date = datetime.fromisoformat(text) if text[:4].isdigit() else parsedate_to_datetime(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        return date.timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _positive(seconds: float | None) -> float | None:
    # "Retry-After: 0" and dates gone by name no wait; our own backoff is kinder than a tight loop.
    return seconds if seconds is not None and 0 < seconds < math.inf else None


# --- texts ----------------------------------------------------------------------------------

_LOOK_AT: Final = 2000
_OPENING: Final = 300
_SHOWN: Final = 300
_MARKUP: Final = re.compile(
    r"<(script|style)\b.*?(?:</\1>|\Z)|<!--.*?(?:-->|\Z)|<[^>]*(?:>|\Z)", re.DOTALL | re.IGNORECASE
)
_LAST_WORD: Final = re.compile(r"[!-~]+\Z")
_PHRASES: Final[Mapping[int, str]] = {
    **{status.value: status.phrase for status in HTTPStatus},
    498: "Capacity Exceeded",
    499: "Client Closed Request",
    520: "Unknown Error",
    521: "Web Server Is Down",
    522: "Connection Timed Out",
    523: "Origin Is Unreachable",
    524: "A Timeout Occurred",
    529: "Overloaded",
}


def _phrase(status: int) -> str:
    return _PHRASES.get(status, "")


def _one_line(text: str, width: int = _SHOWN) -> str:
    """``text`` fit for one line of a terminal: no markup, no control characters, not too long.

    It is cut between words: half of a key that the endpoint echoes could not be recognised and
    removed later.
    """
    text = text[:_LOOK_AT]
    if text.lstrip().startswith("<"):
        text = _MARKUP.sub(" ", text)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) < width and len(text) < _LOOK_AT:
        return line
    return f"{_LAST_WORD.sub('', line[:width]).rstrip()} ...".lstrip()


def _is_html(attempt: Attempt) -> bool:
    return "html" in attempt.headers.get("content-type", "").lower()


# --- whether and when to try again ----------------------------------------------------------

FIRST_BACKOFF_S: Final = 0.5
LONGEST_BACKOFF_S: Final = 30.0
# A row that is refused this often while its neighbours get through has something of its own.
MAX_REFUSALS: Final = 20

_PASSING_KINDS: Final = frozenset(("rate_limit", "transient", "timeout", "invalid_response"))


class Tally(Struct):
    """The failures of one unsettled row."""

    attempts: int = 0  # of this run
    in_doubt: int = 0  # of them, perhaps billed; with those of earlier runs
    retries: int = 0  # used up of --max-retries
    refusals: int = 0  # rate limits
    passed_over: int = 0  # of them, while others of its model got through
    answered: int = 0  # of its model, when it was last refused
    resent: int = 0  # of the attempts, those that went again at once


class Wait(Struct, frozen=True):
    """Try again after ``seconds``, never more than ``max_wait_s``."""

    seconds: float


class GiveUp(Struct, frozen=True):
    """Settle the row with the decision's kind and code.

    ``doubt_spent``: it may have been billed as often as is allowed, so only --retry-failed sends it
    again.
    """

    doubt_spent: bool = False


class Policy:
    """How often and how soon a failed row is tried again.

    A rate limit costs no retry: waiting it out is the endpoint's wish. After an attempt that may
    have been billed there are ``max_in_doubt_retries`` over all runs, and those are part of the
    ``max_retries``. A wait that the endpoint named is kept exactly; otherwise it is full jitter
    over a window that doubles from 0.5 to 30 s, so that rows which failed together do not return
    together.
    """

    def __init__(
        self,
        max_retries: int,
        max_in_doubt_retries: int,
        max_wait_s: float,
        rng: random.Random | None = None,
    ) -> None:
        wait = _NamedOrJitter(max_wait_s, rng or random.Random())
        self._retries = _budget(stop_after_attempt(max_retries + 1), wait)
        self._in_doubt = _budget(stop_after_attempt(max_in_doubt_retries + 1), wait)
        self._refusals = _budget(stop_after_attempt(MAX_REFUSALS), wait)

    def next(
        self, tally: Tally, decision: Decision, *, others_succeed: bool = True
    ) -> Wait | GiveUp:
        """Count one failed attempt in ``tally`` and say what becomes of its row.

        ``others_succeed``: rows of the same model have been answered since this one was last
        refused. Without that, refusals never end a row; an outage is for the limits to judge.
        """
        tally.attempts += 1
        tally.in_doubt += decision.in_doubt
        if decision.kind not in _PASSING_KINDS:
            return GiveUp()
        if decision.kind == "rate_limit":
            return self._after_refusal(tally, decision, others_succeed)
        if decision.unreachable:
            # No row's fault, so it ends none: an outage is for the limits to judge.
            return _pause(self._retries, tally.attempts, decision)
        if decision.in_doubt and _is_spent(self._in_doubt, tally.in_doubt, decision):
            return GiveUp(doubt_spent=True)
        if _is_spent(self._retries, tally.retries + 1, decision):
            return GiveUp()
        tally.retries += 1
        return _pause(self._retries, tally.retries, decision)

    def _after_refusal(self, tally: Tally, decision: Decision, others: bool) -> Wait | GiveUp:
        tally.refusals += 1
        tally.passed_over += others
        if _is_spent(self._refusals, tally.passed_over, decision):
            return GiveUp()
        return _pause(self._refusals, tally.refusals, decision)


class Persistence:
    """Remembers the failures of unsettled rows and applies the Policy to them.

    It holds as many tallies as rows have failed and are not settled yet, and none at the end.
    """

    def __init__(
        self,
        *,
        max_retries: int,
        max_in_doubt_retries: int,
        max_wait_s: float = 600.0,
        rng: random.Random | None = None,
    ) -> None:
        self._policy = Policy(max_retries, max_in_doubt_retries, max_wait_s, rng)
        self._tallies: dict[int, Tally] = {}
        self._answered: Counter[str] = Counter()

    def after(self, request: Request, decision: Decision) -> Verdict:
        """How a row goes on after a failed attempt; forgets it when it ends."""
        tally = self._tallies.pop(request.row, None) or Tally(in_doubt=request.in_doubt)
        others_succeed = decision.kind == "rate_limit" and self._others_succeed(request, tally)
        step = self._policy.next(tally, decision, others_succeed=others_succeed)
        tries = Tries(tally.attempts, tally.in_doubt - request.in_doubt + tally.resent)
        if isinstance(step, GiveUp):
            return Verdict(None, tries._replace(doubt_spent=step.doubt_spent))
        self._tallies[request.row] = tally
        return Verdict(step.seconds, tries)

    def settle(self, request: Request) -> Tries | None:
        """All attempts of a row that now has its answer; None when this was the first."""
        if not self._tallies:
            return None
        self._answered[request.model] += 1
        tally = self._tallies.pop(request.row, None)
        if tally is None:
            return None
        in_doubt = tally.in_doubt - request.in_doubt + tally.resent
        return Tries(tally.attempts + 1, in_doubt)

    def resent(self, request: Request, times: int) -> None:
        """Count attempts that went again at once: perhaps billed, and outside every budget."""
        tally = self._tallies.setdefault(request.row, Tally(in_doubt=request.in_doubt))
        tally.attempts += times
        tally.resent += times

    def _others_succeed(self, request: Request, tally: Tally) -> bool:
        before, tally.answered = tally.answered, self._answered[request.model]
        # The first refusal has nothing to compare with: what was answered before it proves nothing.
        return tally.refusals > 0 and tally.answered > before


class _NamedOrJitter(wait_base):
    def __init__(self, max_wait_s: float, rng: random.Random) -> None:
        self._max_wait_s = max_wait_s
        self._rng = rng
        self._window = wait_exponential(multiplier=FIRST_BACKOFF_S, max=LONGEST_BACKOFF_S)

    def __call__(self, retry_state: RetryCallState) -> float:
        named = _decision(retry_state).wait_s
        # tenacity's own full jitter draws from the global generator; ours can be seeded.
        wait_s = self._rng.uniform(0, self._window(retry_state)) if named is None else named
        return min(wait_s, self._max_wait_s)


def _budget(stop: stop_base, wait: wait_base) -> Retrying:
    return Retrying(stop=stop, wait=wait, reraise=True)


def _is_spent(budget: Retrying, attempts: int, decision: Decision) -> bool:
    return bool(budget.stop(_state(budget, attempts, decision)))


def _pause(budget: Retrying, attempts: int, decision: Decision) -> Wait:
    return Wait(float(budget.wait(_state(budget, attempts, decision))))


def _state(budget: Retrying, attempts: int, decision: Decision) -> RetryCallState:
    state = RetryCallState(budget, None, (), {})
    state.attempt_number = attempts
    state.set_result(decision)
    return state


def _decision(state: RetryCallState) -> Decision:
    result = state.outcome.result() if state.outcome is not None else None
    return result if isinstance(result, Decision) else OK
