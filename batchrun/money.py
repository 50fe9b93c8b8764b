"""What tokens cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from batchrun.errors import UsageError

if TYPE_CHECKING:
    from batchrun.types import Usage

_MILLION: Final = 1_000_000
AUTO_PRICE: Final = "auto"  # that of the list


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens. ``cached`` is for prompt tokens the endpoint had cached."""

    input: float
    output: float
    cached: float | None = None  # None: the input's

    @classmethod
    def parse(cls, text: str) -> Price:
        """``IN,OUT`` or ``IN,OUT,CACHED``; UsageError for anything else."""
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (2, 3) or not all(map(_is_price, numbers)):
            raise UsageError(
                f"--price {text}: write IN,OUT or IN,OUT,CACHED, in US dollars per million tokens,"
                " or auto"
            )
        return cls(*numbers)

    def cost_usd(self, usage: Usage) -> float | None:
        """What this usage costs; None where prompt or completion were not reported.

        Reasoning that an endpoint counts in the total only is billed as completion.
        """
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        if prompt is None or completion is None:
            return None
        if usage.total_tokens is not None:
            completion = max(completion, usage.total_tokens - prompt)
        cached = min(usage.cached_tokens or 0, prompt) if self.cached is not None else 0
        return (
            (prompt - cached) * self.input
            + cached * (self.cached or 0.0)
            + completion * self.output
        ) / _MILLION

    def saved_usd(self, cached_tokens: int | None) -> float | None:
        """What so many cached tokens cost less than others; None where that is not known."""
        if self.cached is None or cached_tokens is None:
            return None
        return cached_tokens * (self.input - self.cached) / _MILLION

    def most_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost at the very most, however many of them were cached."""
        dearest = max(self.input, self.cached or 0.0)
        return (prompt_tokens * dearest + completion_tokens * self.output) / _MILLION

    def told(self) -> list[float]:
        """As an output remembers it."""
        return [self.input, self.output, *([] if self.cached is None else [self.cached])]

    @classmethod
    def remembered(cls, settings: Mapping[str, object]) -> Price | None:
        """That of an output's settings, if they have one."""
        numbers = settings.get("price")
        return cls(*numbers) if isinstance(numbers, list) and len(numbers) in (2, 3) else None


def _is_price(number: float) -> bool:
    return math.isfinite(number) and 0 <= number < _MILLION
