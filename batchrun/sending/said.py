"""What an endpoint said instead of an answer, prepared once, and the rules that read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

from msgspec import Struct

from batchrun.sending.waits import LOOK_AT, named_wait, retry_after
from batchrun.types import Attempt, Decision, ErrorBody, Pushback, Request

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
# What gateways, proxies and CDNs say while the endpoint behind them is away.
_NOBODY_BEHIND: Final = frozenset((502, 503, 504, 521, 522, 523))


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


class Said(Struct, frozen=True, gc=False):
    """An error as the endpoint reported it, prepared for the rules below."""

    status: int  # of the head, or named by an error inside a 200; 0 when that names none
    attempt: Attempt
    request: Request
    error: ErrorBody
    codes: tuple[str, str]  # the error's code and type, lower case
    text: str  # the beginning of its message, lower case

    @classmethod
    def of(cls, status: int, attempt: Attempt, request: Request) -> Said:
        reply = attempt.reply
        error = (reply.error if reply is not None else None) or _NO_ERROR
        codes = (error.code.lower(), error.type.lower())
        return cls(status, attempt, request, error, codes, error.message[:LOOK_AT].lower())

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
        return one_line(self.error.code or self.error.type, 80) or self.number

    @property
    def number(self) -> str:
        return str(self.status) if self.status else "error"

    @property
    def message(self) -> str:
        return one_line(self.error.message)

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
        return f"{line} (an HTML page)" if is_html(self.attempt) else line


_Rule = Callable[[Said], Decision | None]


def first_match(said: Said) -> Decision:
    for rule in _RULES:
        decision = rule(said)
        if decision is not None:
            return decision
    return _ought_to_pass(said)


def _redirected(said: Said) -> Decision | None:
    if not 300 <= said.status < 400:
        return None
    target = one_line(said.attempt.headers.get("location", ""))
    where = f"redirects to {target}" if target else "redirects without saying where"
    return fatal("redirect", f"{where} ({said.status}); redirects are never followed")


def _payment_required(said: Said) -> Decision | None:
    if said.status != 402:
        return None
    # OpenRouter's budget for requests in flight: the one 402 that passes, and it names a wait.
    if (wait_s := named_wait(said.attempt)) is not None:
        return _rate_limit(said, wait_s, "rate")
    return fatal("no_credit", f"wants payment first: {said.status_line()}")


def _out_of_quota(said: Said) -> Decision | None:
    if said.speaks_first_of(_QUOTA_WORDS) or any(map(_QUOTA_CODE.search, said.codes)):
        return fatal("no_credit", f"says the account's quota is used up: {said.status_line()}")
    if said.status != 429:
        return None
    if said.header("x-ratelimit-remaining-tokens-month") == "0":
        return fatal("no_credit", "says this month's tokens are used up (429)")
    if said.header("x-ratelimit-limit-req-minute") == "0":
        return _no_allowance(said)
    return None


def _no_allowance(said: Said) -> Decision:
    name = one_line(said.request.model, 120)
    reason = f'allows no requests to model "{name}" (429, limit 0 a minute)'
    if said.request.model_from_row:
        return _rejected(said, code="no_allowance", reason=reason)
    return fatal("no_allowance", reason)


def _larger_than_the_limit(said: Said) -> Decision | None:
    """One request above the whole per-minute allowance never fits, whatever its code says."""
    limited = said.status in (413, 429) or said.has_code(_RATE_CODES)
    if limited and _TOO_LARGE_WORDS.search(said.text):
        return _rejected(said)
    return None


def _rate_limited(said: Said) -> Decision | None:
    capacity = said.has_code(_CAPACITY_CODES) and said.status != 498
    if said.status != 429 and not capacity and not said.has_code(_RATE_CODES):
        return None
    attempt = said.attempt
    wait_s = retry_after(attempt.headers, attempt.reply, attempt.finished_at_ms)
    if wait_s is None and said.header("x-should-retry") == "false":
        return _rejected(said)
    return _rate_limit(said, wait_s, "capacity" if capacity else "rate")


def _bad_key(said: Said) -> Decision | None:
    by_word = said.status in (400, 403) and said.speaks_first_of(_KEY_WORDS)
    if said.status == 401 or said.has_code(_KEY_CODES) or by_word:
        return fatal("unauthorized", f"refused the key: {said.status_line()}")
    return None


def _unknown_model(said: Said) -> Decision | None:
    if not _names_the_model(said):
        return None
    if said.request.model_from_row:
        return _rejected(said)
    name = one_line(said.request.model, 120)
    reason = f'has no model "{name}" ({said.number})' if name else f"wants a model ({said.number})"
    return fatal("model_not_found", reason)


def _names_the_model(said: Said) -> bool:
    if said.has_code(_MODEL_CODES):
        return True
    if said.status not in (400, 404, 410, 422):
        return False
    if said.error.loc.lower() in _MODEL_LOCS or said.speaks_first_of(_MODEL_WORDS):
        return True
    # A 404 that repeats the model's name is about the model, in whatever language.
    name = re.escape(said.request.model.lower())
    return said.status == 404 and name != "" and bool(re.search(rf"(?<!\w){name}(?!\w)", said.text))


def _forbidden(said: Said) -> Decision | None:
    if said.status != 403:
        return None
    # Together says 403 of a prompt too long, OpenRouter and Mistral's guardrails of its content.
    if said.speaks_of(_CONTEXT_WORDS) or said.speaks_of(_FILTER_WORDS):
        return _rejected(said)
    return fatal("no_access", f"refuses access: {said.status_line()}")


def _wrong_url(said: Said) -> Decision | None:
    if said.status == 407:
        return fatal("proxy", f"cannot be reached through the proxy: {said.status_line()}")
    if said.status in (404, 405, 501):
        return fatal("wrong_url", f"has no chat completions at this URL: {said.status_line()}")
    return None


def _bad_request(said: Said) -> Decision | None:
    if not 400 <= said.status < 500 or said.status in _OUGHT_TO_PASS:
        return None
    if said.header("x-should-retry") == "true":
        return _transient(said)
    return _rejected(said)


def _ought_to_pass(said: Said) -> Decision:
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


def fatal(code: str, reason: str) -> Decision:
    return Decision(kind="fatal", code=code, reason=reason)


def _rate_limit(said: Said, wait_s: float | None, pushback: Pushback) -> Decision:
    return Decision(
        kind="rate_limit",
        code=said.code,
        reason=said.status_line(),
        wait_s=wait_s,
        pushback=pushback,
    )


def _transient(said: Said) -> Decision:
    reason = said.status_line()
    if said.status in (504, 524):
        reason += " (a gateway stopped waiting; --stream keeps long answers alive)"
    return Decision(
        kind="transient",
        code=said.number if said.codes[0] in _CLASSES else said.code,
        reason=reason,
        wait_s=named_wait(said.attempt),
        in_doubt=_may_be_billed(said),
        pushback="capacity" if said.status in _OVERLOADED else "none",
        may_be_outage=said.attempt.status in _NOBODY_BEHIND,
    )


def _rejected(said: Said, *, code: str = "", reason: str = "") -> Decision:
    code = code or said.code
    return Decision(
        kind="rejected",
        code=code,
        reason=reason or _what_is_wrong(said, code),
        in_doubt=_may_be_billed(said),
        alike="" if _is_the_rows_own(said) else f"{said.number}|{code}|{said.error.loc}",
    )


def _may_be_billed(said: Said) -> bool:
    if not said.attempt.sent:
        return False
    if said.status in _IN_DOUBT:
        return True
    # A 5xx is a refusal only when it was said whole, and before any answer had begun.
    was_refused = 400 <= said.status < 500
    return not was_refused and (said.came_late or said.attempt.failure is not None)


def _is_the_rows_own(said: Said) -> bool:
    """Too long, filtered or too large: such rows may stand first by chance and prove nothing."""
    return said.status == 413 or any(
        said.speaks_of(words) for words in (_CONTEXT_WORDS, _FILTER_WORDS, _TOO_LARGE_WORDS)
    )


def _what_is_wrong(said: Said, code: str) -> str:
    if not said.message:
        return said.status_line()
    loc = one_line(said.error.loc, 120)
    # Validators say "Extra inputs are not permitted" and leave the place to another member.
    return said.message if loc in said.message else f"{code}: {loc}: {said.message}"


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


def one_line(text: str, width: int = _SHOWN) -> str:
    """``text`` fit for one line of a terminal: no markup, no control characters, not too long.

    It is cut between words: half of a key that the endpoint echoes could not be recognised and
    removed later.
    """
    text = text[:LOOK_AT]
    if text.lstrip().startswith("<"):
        text = _MARKUP.sub(" ", text)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) < width and len(text) < LOOK_AT:
        return line
    return f"{_LAST_WORD.sub('', line[:width]).rstrip()} ...".lstrip()


def is_html(attempt: Attempt) -> bool:
    return "html" in attempt.headers.get("content-type", "").lower()
