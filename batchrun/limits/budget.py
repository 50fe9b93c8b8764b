"""A budget that binds: nothing leaves that could exceed it, whatever comes back.

What is on its way is reserved at its worst: every byte of the body a token, and as many tokens of
answer as the request allows. An answer then costs what it reports. What may have been billed
without an answer to tell, or came without a word on tokens, stays at its worst.

A byte a token has room for the words that templates of models add to a prompt; an endpoint that
bills more than the worst all the same is believed from then on.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from batchrun.errors import StoppedEarly
from batchrun.money import Price
from batchrun.types import Attempt, Decision, Request, Usage
from batchrun.words import dollars

# An image named by URL: more than providers make of one at its finest (gpt-4o-mini: 48,169).
_IMAGE_TOKENS: Final = 50_000
_IMAGE: Final = b'"image_url":'
# What is named here and read there, however long. In a text the quotes are escaped, and no JSON
# Schema has such a type.
_OF_ANY_LENGTH: Final = {
    b'"type":"file"': "it has a file",
    b'"type":"document_url"': "it has a document",
    b'"type":"video_url"': "it has a video",
}
NO_BOUND: Final = "its answer has no bound"


class _Bounds(Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    web_search_options: msgspec.Raw | None = None

    @property
    def answer(self) -> int:
        return max(self.max_tokens or 0, self.max_completion_tokens or 0)


_decode: Final = msgspec.json.Decoder(_Bounds).decode


def _bounds(body: bytes) -> _Bounds:
    try:
        return _decode(body)
    except msgspec.DecodeError:  # a max_tokens that is no number
        return _Bounds()


def longest_answer(body: bytes) -> int:
    """Tokens of all its answers at most; 0 when they have no bound."""
    bounds = _bounds(body)
    return bounds.answer * max(1, bounds.n or 1)


def unbounded(body: bytes) -> str | None:
    """Why no budget can bind a request, for people; None when it has a bound."""
    bounds = _bounds(body)
    if bounds.answer <= 0:
        return NO_BOUND
    if bounds.web_search_options is not None:
        return "it searches the web"
    return next((words for mark, words in _OF_ANY_LENGTH.items() if mark in body), None)


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
        self._doubted = Cost()  # of what is spent
        self._reserved = Cost()
        self._beyond = Cost()  # what an answer cost more than its worst, at most so far
        self._flying: dict[int, Cost] = {}  # id(request) ->
        self._wanted: Cost | None = None  # by a request that had no room since one last left

    def worst(self, body: bytes) -> Cost:
        """What one attempt may cost at most, of a body that is not ``unbounded``."""
        bounds = _bounds(body)
        answer = bounds.answer
        prompt = len(body) + self._more_prompt + _IMAGE_TOKENS * body.count(_IMAGE)
        prompt += answer if self._repairs else 0
        answer *= max(1, bounds.n or 1)
        usd = 0.0 if self._price is None else self._price.most_usd(prompt, answer)
        return Cost(prompt + answer, usd)

    def spent_before(self, usage: Usage, body: bytes | None) -> None:
        """Count what earlier runs used; without a word on tokens it is the worst of ``body``."""
        self._spend(usage, Cost() if body is None else self.worst(body))

    def doubted_before(self, body: bytes, attempts: int) -> None:
        """Count attempts that may have been billed and never told."""
        self._doubt(self.worst(body), attempts)

    def takes(self, request: Request) -> bool:
        """Whether it may leave now; if so, its worst is reserved."""
        worst = self.worst(request.body)
        would = self._spent.plus(self._reserved).plus(worst)
        would = would.plus(self._beyond, len(self._flying) + 1)
        if (self._tokens is not None and would.tokens > self._tokens) or (
            self._usd is not None and would.usd > self._usd
        ):
            self._wanted = worst
            return False
        self._flying[id(request)] = worst
        self._reserved = self._reserved.plus(worst)
        self._wanted = None
        return True

    def came(self, request: Request, attempt: Attempt, decision: Decision) -> None:
        worst = self._landed(request)
        if decision.kind in ("ok", "invalid_answer"):
            usage = attempt.reply.usage if attempt.reply is not None else Usage()
            cost = self._spend(usage, worst)
            self._beyond = Cost(
                max(self._beyond.tokens, cost.tokens - worst.tokens),
                max(self._beyond.usd, cost.usd - worst.usd),
            )
        elif decision.in_doubt:
            self._doubt(worst)
        self._doubt(worst, attempt.resent)

    def lost(self, request: Request) -> None:
        """It was cut off on its way."""
        self._doubt(self._landed(request))

    def verdict(self) -> StoppedEarly | None:
        """Why nothing more can leave, asked while nothing is on its way."""
        if self._wanted is None:
            return None
        wanted = self._wanted.plus(self._beyond)
        would, doubts = self._spent.plus(wanted), self._doubted
        if self._usd is not None and would.usd > self._usd:
            flag, limit = "--max-cost", dollars(self._usd)
            amounts = [dollars(each.usd) for each in (self._spent, doubts, wanted)]
        elif self._tokens is not None and would.tokens > self._tokens:
            flag, limit = "--token-budget", f"{self._tokens:,}"
            amounts = [f"{each.tokens:,}" for each in (self._spent, doubts, wanted)]
        else:
            return None
        spent, doubted, next_ = amounts
        if doubts.tokens:
            spent += f" (of it {doubted} perhaps, by attempts that brought no answer)"
        return StoppedEarly(
            f"{flag} {limit} could be exceeded: {spent} spent, the next answer may take {next_}",
            next_steps=(f"the same command with a higher {flag} continues",),
        )

    def _spend(self, usage: Usage, unknown: Cost) -> Cost:
        cost = self._of(usage, unknown)
        self._spent = self._spent.plus(cost)
        return cost

    def _doubt(self, worst: Cost, attempts: int = 1) -> None:
        self._doubted = self._doubted.plus(worst, attempts)
        self._spent = self._spent.plus(worst, attempts)

    def _landed(self, request: Request) -> Cost:
        worst = self._flying.pop(id(request))
        self._reserved = self._reserved.plus(worst, -1) if self._flying else Cost()
        return worst

    def _of(self, usage: Usage, unknown: Cost) -> Cost:
        """What was reported; ``unknown`` for what was not."""
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        # No prompt has no tokens: some that do not count report zeros.
        if not prompt or completion is None:
            return unknown
        usd = 0.0 if self._price is None else self._price.cost_usd(usage) or 0.0
        return Cost(max(prompt + completion, usage.total_tokens or 0), usd)
