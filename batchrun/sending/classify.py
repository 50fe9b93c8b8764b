"""What an attempt means for its row and for the run: a pure function to a Decision."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Final

from batchrun.sending.said import Said, fatal, first_match, is_html, one_line
from batchrun.types import Attempt, Decision, DecisionKind, ErrorBody, Failure, Reply, Request

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
        return first_match(Said.of(status, attempt, request))
    if reply is None or not reply.is_json:
        return _unreadable(attempt, status)
    if reply.error is not None:
        # The 200 had gone out before the error was known; its code stands in for the status.
        return first_match(Said.of(_status_of(reply.error), attempt, request))
    return _judge_completion(reply)


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
    if is_html(attempt):
        page = f"answered {status} with an HTML page, not a completion; is the base URL right?"
        return _unusable("bad_json", page)
    error = attempt.reply.error
    words = f": {one_line(error.message, 80)}" if error is not None and error.message else ""
    return _unusable("bad_json", f"answered {status} with something that is not whole JSON{words}")


def _unusable(code: str, reason: str, *, sent: bool = True) -> Decision:
    return Decision(
        kind="invalid_response", code=code, reason=reason, in_doubt=sent, alike=f"200|{code}|"
    )


_ERROR_STATUS: Final = re.compile(r"[45][0-9][0-9]")


def _status_of(error: ErrorBody) -> int:
    """The HTTP status an error inside a 200 names; 0 when it names none."""
    return int(error.code) if _ERROR_STATUS.fullmatch(error.code) else 0


def _passing(
    code: Failure, words: str, *, kind: DecisionKind = "transient"
) -> Callable[[Attempt], Decision]:
    def decide(attempt: Attempt) -> Decision:
        reason = one_line(attempt.detail) or words
        return Decision(kind=kind, code=code, reason=reason, in_doubt=attempt.sent)

    return decide


def _unreachable(code: Failure, words: str) -> Callable[[Attempt], Decision]:
    def decide(attempt: Attempt) -> Decision:
        reason = one_line(attempt.detail) or words
        return Decision(kind="transient", code=code, reason=reason, unreachable=True)

    return decide


def _configuration(code: Failure, words: str) -> Callable[[Attempt], Decision]:
    def decide(attempt: Attempt) -> Decision:
        detail = one_line(attempt.detail)
        return fatal(code, f"{words}: {detail}" if detail else words)

    return decide


def _timed_out(attempt: Attempt) -> Decision:
    reason = one_line(attempt.detail) or _no_answer_within(attempt.ended_s - attempt.started_s)
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
        "not_utf8", f"answered {attempt.status} with text that is not UTF-8", sent=attempt.sent
    ),
}
