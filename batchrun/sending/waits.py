"""The waits that an endpoint names, in headers, bodies and dates, as seconds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from batchrun.durations import DURATION, duration_s
from batchrun.types import Attempt, Reply

_NUMBER: Final = re.compile(r"\d{1,15}(?:\.\d{1,15})?")


_HINT: Final = re.compile(
    rf"\b(?:try again|retry|wait) (?:again )?(?:in|after|for) (?:about )?({DURATION})"
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


def named_wait(attempt: Attempt) -> float | None:
    return _header_wait(attempt.headers, attempt.finished_at_ms)


def _header_wait(headers: Mapping[str, str], now_ms: int) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None and milliseconds > 0:
        return milliseconds / 1000
    return _wait_until(headers.get("retry-after", ""), headers, now_ms)


def _hinted_wait(message: str) -> float | None:
    hint = _HINT.search(message[:LOOK_AT].lower())
    return _positive(duration_s(hint[1])) if hint else None


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
    if number is None and (wait_s := duration_s(text[:LOOK_AT])):
        return _positive(wait_s)
    # A bare number this large is an instant (OpenRouter: in milliseconds), not a duration.
    then_s = _date(text) if number is None else number / 1000 if number > _EPOCH_MS else number
    if then_s is None:
        return None
    now_s = _date(headers.get("date", ""))
    return _positive(then_s - (now_ms / 1000 if now_s is None else now_s))


def _number(text: str) -> float | None:
    text = text.strip()
    return float(text) if text.isascii() and _NUMBER.fullmatch(text) else None


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


LOOK_AT: Final = 2000
