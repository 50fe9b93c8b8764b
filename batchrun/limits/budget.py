"""A budget that binds: nothing leaves that could exceed it, whatever comes back.

What is on its way is reserved at its worst: every byte of the body a token, and as many tokens of
answer as the request allows. An answer then costs what it reports. What may have been billed
without an answer to tell stays at its worst.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from batchrun.errors import StoppedEarly
from batchrun.money import Price
from batchrun.types import Attempt, Decision, Request, Usage
from batchrun.words import dollars

# An image named by URL: more than providers make of one at its finest.
_IMAGE_TOKENS: Final = 30_000
_IMAGE: Final = b'"image_url":'


class _Bounds(Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None


_bounds: Final = msgspec.json.Decoder(_Bounds).decode


class Cost(NamedTuple):
    """Tokens and US dollars; the latter 0 where no price is given."""

    tokens: int = 0
    usd: float = 0.0

    def plus(self, other: Cost, times: int = 1) -> Cost:
        return Cost(self.tokens + times * other.tokens, self.usd + times * other.usd)


class Budget:
    """Of one output, over all its runs. Called from one thread.

    ``tokens`` and ``usd`` are what may be spent; None binds nothing. ``more_prompt`` are tokens
    that are added to a body on its way; with ``repairs`` an earlier answer may be, too.
    """

    def __init__(
        self,
        *,
        tokens: int | None,
        usd: float | None,
        price: Price | None,
        more_prompt: int = 0,
        repairs: bool = False,
    ) -> None:
        self._tokens = tokens
        self._usd = usd
        self._price = price
        self._more_prompt = more_prompt
        self._repairs = repairs
        self._spent = Cost()
        self._reserved = Cost()
        self._flying: dict[int, Cost] = {}  # id(request) ->
        self._wanted: Cost | None = None  # by a request that had no room since one last left

    def worst(self, body: bytes) -> Cost | None:
        """What one attempt may cost at most; None when its answer has no bound."""
        try:
            bounds = _bounds(body)
        except msgspec.DecodeError:
            return None
        answer = max(bounds.max_tokens or 0, bounds.max_completion_tokens or 0)
        if answer <= 0:
            return None
        prompt = len(body) + self._more_prompt + _IMAGE_TOKENS * body.count(_IMAGE)
        prompt += answer if self._repairs else 0
        answer *= max(1, bounds.n or 1)
        usd = 0.0 if self._price is None else self._price.most_usd(prompt, answer)
        return Cost(prompt + answer, usd)

    def spent_before(self, usage: Usage) -> None:
        """Count an answer that is held."""
        self._spent = self._spent.plus(self._of(usage, Cost()))

    def doubted_before(self, body: bytes, attempts: int) -> None:
        """Count attempts that may have been billed and never told."""
        self._spent = self._spent.plus(self.worst(body) or Cost(), attempts)

    def fits(self, request: Request) -> bool:
        """Whether it may leave now."""
        worst = self.worst(request.body) or Cost()
        would = self._spent.plus(self._reserved).plus(worst)
        if (self._tokens is not None and would.tokens > self._tokens) or (
            self._usd is not None and would.usd > self._usd
        ):
            self._wanted = worst
            return False
        return True

    def leaves(self, request: Request) -> None:
        worst = self.worst(request.body) or Cost()
        self._flying[id(request)] = worst
        self._reserved = self._reserved.plus(worst)
        self._wanted = None

    def came(self, request: Request, attempt: Attempt, decision: Decision) -> None:
        worst = self._landed(request)
        if decision.kind in ("ok", "invalid_answer"):
            usage = attempt.reply.usage if attempt.reply is not None else Usage()
            self._spent = self._spent.plus(self._of(usage, worst))
        elif decision.in_doubt:
            self._spent = self._spent.plus(worst)
        self._spent = self._spent.plus(worst, attempt.resent)

    def lost(self, request: Request) -> None:
        """It was cut off on its way."""
        self._spent = self._spent.plus(self._landed(request))

    def verdict(self) -> StoppedEarly | None:
        """Why nothing more can leave, asked while nothing is on its way."""
        if self._wanted is None:
            return None
        would = self._spent.plus(self._wanted)
        if self._usd is not None and would.usd > self._usd:
            flag, limit = "--max-cost", dollars(self._usd)
            spent, next_ = dollars(self._spent.usd), dollars(self._wanted.usd)
        elif self._tokens is None or would.tokens <= self._tokens:
            return None
        else:
            flag, limit = "--token-budget", f"{self._tokens:,}"
            spent, next_ = f"{self._spent.tokens:,}", f"{self._wanted.tokens:,}"
        return StoppedEarly(
            f"{flag} {limit} could be exceeded: {spent} spent, the next answer may take {next_}",
            next_steps=(f"the same command with a higher {flag} continues",),
        )

    def _landed(self, request: Request) -> Cost:
        worst = self._flying.pop(id(request))
        self._reserved = self._reserved.plus(worst, -1) if self._flying else Cost()
        return worst

    def _of(self, usage: Usage, unknown: Cost) -> Cost:
        """What was reported; ``unknown`` for what was not."""
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        if prompt is None or completion is None:
            return unknown
        usd = 0.0 if self._price is None else self._price.cost_usd(usage) or 0.0
        return Cost(max(prompt + completion, usage.total_tokens or 0), usd)
