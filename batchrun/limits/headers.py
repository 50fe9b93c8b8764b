"""Rate-limit headers, in every dialect, as a quota."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from batchrun.durations import duration_s

# With this share of a minute's tokens left, no single request is too large.
PLENTY_LEFT = 0.1
NEVER = float("inf")


class NamedQuota(NamedTuple):
    """What one answer's headers say; None where they are silent."""

    requests_per_s: float | None = None
    requests_left: float | None = None
    tokens_per_s: float | None = None
    tokens_left: float | None = None
    input_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None

    @property
    def has_left(self) -> bool:
        """Whether a request has room for certain; how many tokens it was counted as is not told."""
        if not self.requests_left:
            return False
        if self.tokens_left is not None and self.tokens_per_s is not None:
            return self.tokens_left > PLENTY_LEFT * self.tokens_per_s * MINUTE_S
        return self.tokens_per_s is None and self.output_tokens_per_s is None

    def shared(self, share: float) -> NamedQuota:
        """What of it one of several clients may use."""
        if share == 1.0:
            return self
        return NamedQuota(*(None if each is None else each * share for each in self))


class _Names(NamedTuple):
    limit: str
    remaining: str
    reset: str = ""  # only where it tells a day's quota from a minute's


_REQUEST_NAMES = (
    _Names("x-ratelimit-limit-req-minute", "x-ratelimit-remaining-req-minute"),  # Mistral
    _Names(  # OpenAI, Azure: per minute; Groq and small OpenAI tiers: per day
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
    ),
    _Names("anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining"),
)


_TOKEN_NAMES = (
    _Names("x-ratelimit-limit-tokens-minute", "x-ratelimit-remaining-tokens-minute"),
    _Names("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    _Names("anthropic-ratelimit-tokens-limit", "anthropic-ratelimit-tokens-remaining"),
)


_INPUT_NAMES = (
    _Names("anthropic-ratelimit-input-tokens-limit", "anthropic-ratelimit-input-tokens-remaining"),
)


_OUTPUT_NAMES = (
    _Names(
        "anthropic-ratelimit-output-tokens-limit", "anthropic-ratelimit-output-tokens-remaining"
    ),
)


MINUTE_S = 60.0
DAY_S = 86_400.0


def quota_named(headers: Mapping[str, str]) -> NamedQuota:
    """Read the quota of §5.1's dialects: Mistral, OpenAI, Azure, Groq, Cerebras, Anthropic.

    A day's quota sets no pace: spread over the day it would idle what the user may spend now. When
    it is used up, the refusal names its wait.
    """
    return NamedQuota(
        *_rate(headers, _REQUEST_NAMES),
        *_rate(headers, _TOKEN_NAMES),
        input_tokens_per_s=_rate(headers, _INPUT_NAMES)[0],
        output_tokens_per_s=_rate(headers, _OUTPUT_NAMES)[0],
    )


def _rate(
    headers: Mapping[str, str], dialects: tuple[_Names, ...]
) -> tuple[float | None, float | None]:
    for names in dialects:
        limit = _number(headers.get(names.limit))
        if limit is None or limit <= 0:  # Azure sends -1 and 0 for "not told"
            continue
        remaining = _number(headers.get(names.remaining))
        if _period_s(limit, remaining, headers.get(names.reset)) > MINUTE_S:
            return None, None
        return limit / MINUTE_S, remaining
    return None, None


def _period_s(limit: float, remaining: float | None, reset: str | None) -> float:
    """Whether a limit is a minute's or a day's: the reset is the time to regain what was used."""
    reset_s = duration_s(reset, unitless=True) if reset else None
    if reset_s is None or remaining is None or remaining >= limit:
        return MINUTE_S
    period_s = reset_s * limit / (limit - remaining)
    # Halfway between the two on a logarithmic scale: rounding of resets is far smaller than that.
    return DAY_S if period_s > (MINUTE_S * DAY_S) ** 0.5 else MINUTE_S


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else None
    except ValueError:
        return None
    return number if number is not None and abs(number) < NEVER else None
