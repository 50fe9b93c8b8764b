"""The stand-in's rate limits, and the headers that announce them."""

from __future__ import annotations

import math

from batchrun.mock.knobs import Knobs


class _Bucket:
    """A token bucket: ``per_minute`` refilled evenly, at most a minute of it held."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._per_second = per_minute / 60
        self.capacity = max(1.0, per_minute)
        self._level = self.capacity
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self.capacity, self._level + (now - self._at) * self._per_second)
        self._at = now
        return self._level

    def wait_s(self, cost: float, now: float) -> float:
        return max(0.0, (cost - self.level(now)) / self._per_second)

    def take(self, cost: float, now: float) -> None:
        self._level = self.level(now) - cost

    def reset_s(self, now: float) -> float:
        return (self.capacity - self.level(now)) / self._per_second


class Quota:
    """Requests and tokens of one model; a refused request takes neither."""

    def __init__(self, knobs: Knobs, now: float) -> None:
        self._knobs = knobs
        self._requests = _Bucket(knobs.rpm, now) if knobs.rpm else None
        self._tokens = _Bucket(knobs.tpm, now) if knobs.tpm else None

    def fits(self, tokens: int) -> bool:
        """Whether so many tokens could ever be taken at once."""
        return self._tokens is None or tokens <= self._tokens.capacity

    def take(self, tokens: int, now: float) -> float:
        """0.0 when taken, else the seconds until it could be."""
        wait_s = max(
            self._requests.wait_s(1, now) if self._requests else 0.0,
            self._tokens.wait_s(tokens, now) if self._tokens else 0.0,
        )
        # A rounding error in the refill is not a reason to refuse.
        if wait_s > 1e-9:
            return wait_s
        if self._requests:
            self._requests.take(1, now)
        if self._tokens:
            self._tokens.take(tokens, now)
        return 0.0

    def headers(self, tokens: int, now: float) -> dict[str, str]:
        """What an answer of so many tokens tells of the limits, in the dialect asked for."""
        if self._knobs.limit_headers == "openai":
            return self._openai_headers(now)
        if self._knobs.limit_headers == "mistral":
            return self._mistral_headers(tokens, now)
        return {}

    def _openai_headers(self, now: float) -> dict[str, str]:
        told = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{name}"] = f"{bucket.per_minute:.0f}"
                told[f"x-ratelimit-remaining-{name}"] = _whole(bucket.level(now))
                told[f"x-ratelimit-reset-{name}"] = go_duration(bucket.reset_s(now))
        return told

    def _mistral_headers(self, tokens: int, now: float) -> dict[str, str]:
        told = {}
        for name, bucket in (("req", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{name}-minute"] = f"{bucket.per_minute:.0f}"
                told[f"x-ratelimit-remaining-{name}-minute"] = _whole(bucket.level(now))
        if self._tokens is not None:
            told["x-ratelimit-tokens-query-cost"] = str(tokens)
        return told


def _whole(level: float) -> str:
    return str(max(0, math.floor(level + 1e-9)))


def go_duration(seconds: float) -> str:
    """``seconds`` as OpenAI's reset headers write it: ``20ms``, ``1.5s``, ``6m0s``, ``1h2m3s``."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if ms < 1000:
        return f"{ms}ms"
    whole_minutes, rest_ms = divmod(ms, 60_000)
    hours, minutes = divmod(whole_minutes, 60)
    text = f"{rest_ms / 1000:g}s"
    if whole_minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text
