"""Add up outcomes: rows by kind, failures by cause, tokens, and what they cost.

Two ledgers. ``RunTally`` counts what this run did, live, for the bar and ``this_run``.
``OutputTally`` counts what the output holds, row by row while it is published, whoever asked for
it and when. Both cost under a microsecond a row and do not grow with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

from batchrun.money import Price
from batchrun.summary import ErrorCount, ErrorExample, RowCounts, TokenCounts
from batchrun.types import NO_USAGE, Answer, Answers, Outcome, Tokens, Usage

# Codes are the endpoint's words: one that puts a request id into its code must not fill the memory.
MAX_CAUSES = 1_000
OTHER_CODES = "(other codes)"
MAX_MODELS = 100
INVALID_INPUT = "invalid_input"


def is_truncated(finish_reason: str | None) -> bool:
    """The answer ended at a token limit; ``model_length`` is Mistral's word for the context."""
    return finish_reason in ("length", "model_length")


def is_filtered(finish_reason: str | None, refusal: bool) -> bool:
    return refusal or finish_reason == "content_filter"


class TokenSums:
    """Sums of reported tokens. A sum of nothing reported stays ``None``, never 0."""

    __slots__ = (
        *("cached", "completion", "cost_usd", "price"),
        *("prompt", "reasoning", "rows_without_usage", "total"),
    )

    def __init__(self, price: Price | None = None) -> None:
        self.price = price
        self.cost_usd: float | None = None
        self.prompt: int | None = None
        self.completion: int | None = None
        self.total: int | None = None
        self.cached: int | None = None
        self.reasoning: int | None = None
        self.rows_without_usage = 0

    def add(self, usage: Usage) -> None:
        prompt, completion, total = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
        if prompt is None and completion is None and total is None:
            self.rows_without_usage += 1
        if prompt is not None:
            self.prompt = (self.prompt or 0) + prompt
        if completion is not None:
            self.completion = (self.completion or 0) + completion
        if total is not None:
            self.total = (self.total or 0) + total
        if usage.cached_tokens is not None:
            self.cached = (self.cached or 0) + usage.cached_tokens
        if usage.reasoning_tokens is not None:
            self.reasoning = (self.reasoning or 0) + usage.reasoning_tokens
        if self.price is not None:
            self.add_costs((self.price.cost_usd(usage),))

    def add_costs(self, costs: Iterable[float | None]) -> None:
        known = [cost for cost in costs if cost is not None]
        if known:
            self.cost_usd = math.fsum((self.cost_usd or 0.0, *known))

    def add_all(self, tokens: Tokens) -> None:
        """As ``add`` for many rows."""
        self.prompt = _plus_all(self.prompt, tokens.prompt)
        self.completion = _plus_all(self.completion, tokens.completion)
        self.total = _plus_all(self.total, tokens.total)
        self.cached = _plus_all(self.cached, tokens.cached)
        self.reasoning = _plus_all(self.reasoning, tokens.reasoning)
        if None in tokens.prompt:
            told = zip(tokens.prompt, tokens.completion, tokens.total, strict=True)
            self.rows_without_usage += list(told).count((None, None, None))

    @property
    def spent(self) -> int:
        """Tokens for a speed shown to people: the total where reported, else the sum of both."""
        return max(self.total or 0, (self.prompt or 0) + (self.completion or 0))

    def counts(self) -> TokenCounts:
        return TokenCounts(
            prompt=self.prompt,
            completion=self.completion,
            total=self.total,
            cached=self.cached,
            reasoning=self.reasoning,
            rows_without_usage=self.rows_without_usage,
            cost_usd=self.cost_usd,
            saved_usd=None if self.price is None else self.price.saved_usd(self.cached),
        )


def _plus_all(total: int | None, tokens: Sequence[int | None]) -> int | None:
    reported = [each for each in tokens if each is not None] if None in tokens else tokens
    return (total or 0) + sum(cast("Sequence[int]", reported)) if reported else total


class Causes:
    """Failures by kind, code and whether a rerun tries them again, with one example each."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, bool], ErrorCount] = {}

    def add(self, kind: str, code: str, retried_on_rerun: bool) -> ErrorCount:
        """Count one row and return its group; whoever gets a new group gives it an example."""
        group = self._counts.get((kind, code, retried_on_rerun))
        if group is None:
            group = self._new(kind, code, retried_on_rerun)
        group.rows += 1
        return group

    def _new(self, kind: str, code: str, retried_on_rerun: bool) -> ErrorCount:
        if len(self._counts) >= MAX_CAUSES:
            code = OTHER_CODES
        key = (kind, code, retried_on_rerun)
        return self._counts.setdefault(key, ErrorCount(kind, code, 0, retried_on_rerun))

    def largest_first(self) -> list[ErrorCount]:
        return sorted(self._counts.values(), key=lambda group: -group.rows)


class OutputTally:
    """What an output holds: every row of it is told once, by ``add`` or ``add_ok``."""

    __slots__ = ("_causes", "_models", "_tokens", "price", "rows")

    def __init__(self, price: Price | None = None) -> None:
        self.rows = RowCounts(total=0)  # ``reused`` is not an output's to know
        self.price = price
        self._tokens = TokenSums(price)
        self._causes = Causes()
        self._models: dict[str, None] = {}

    def add(
        self,
        outcome: Outcome | None,
        invalid_reason: str | None,
        answer: Answer | None,
        custom_id: str,
        source: str,
        *,
        invalid_code: str = "",
    ) -> None:
        """Count one row: an outcome with its answer, or why it is invalid, or neither: pending."""
        self._count(1)
        if outcome is None:
            self._without_outcome(invalid_code, invalid_reason, custom_id, source)
            return
        self._tokens.add(outcome.usage)
        if outcome.occurrence:
            self.rows.duplicate += 1
        self.note_models((outcome.model,))
        if outcome.kind != "ok":
            passing = not outcome.final
            self.rows.passing += passing
            self._failed(outcome.kind, outcome.code, passing, outcome.message, custom_id, source)
            return
        self.rows.ok += 1
        if answer is not None:
            self._judge(answer.finish_reason, answer.response, answer.tool_calls, answer.refusal)

    def add_ok(
        self, models: Iterable[str], occurrences: Sequence[int], tokens: Tokens, answers: Answers
    ) -> None:
        """Count rows that are ok, as ``add`` does one by one."""
        self._count(len(occurrences))
        self.rows.ok += len(occurrences)
        self._tokens.add_all(tokens)
        if self.price is not None:
            usages = map(Usage, *tokens)
            self._tokens.add_costs(map(self.price.cost_usd, usages))
        self.rows.duplicate += len(occurrences) - occurrences.count(0)
        self.note_models(models)
        reasons, responses, refusals = answers.finish_reasons, answers.responses, answers.refusals
        if set(reasons) != {"stop"} or not all(responses) or any(refusals):
            judged = zip(reasons, responses, answers.tool_calls, refusals, strict=True)
            for reason, response, tool_calls, refusal in judged:
                self._judge(reason, response, tool_calls, refusal)

    def _count(self, rows: int) -> None:
        self.rows.total = (self.rows.total or 0) + rows

    def note_copy(self, usage: Usage) -> None:
        """One of the rows told has another one's answer, whose usage that one told."""
        self.rows.copied += 1
        self.rows.duplicate += 1
        if usage == NO_USAGE:
            self._tokens.rows_without_usage -= 1

    def note_models(self, models: Iterable[str]) -> None:
        """Models asked, in the order in which rows ask them."""
        for model in dict.fromkeys(models):
            if model not in self._models and len(self._models) < MAX_MODELS:
                self._models[model] = None

    def _judge(
        self, finish_reason: str | None, response: str | None, tool_calls: str | None, refusal: bool
    ) -> None:
        if is_truncated(finish_reason):
            self.rows.truncated += 1
        if is_filtered(finish_reason, refusal):
            self.rows.filtered += 1
        elif not response and tool_calls is None:
            self.rows.empty += 1

    def _without_outcome(
        self, invalid_code: str, invalid_reason: str | None, custom_id: str, source: str
    ) -> None:
        if invalid_reason is None:
            self.rows.pending += 1
            return
        self._tokens.rows_without_usage += 1
        self._failed(INVALID_INPUT, invalid_code, False, invalid_reason, custom_id, source)

    def _failed(
        self, kind: str, code: str, passing: bool, message: str, custom_id: str, source: str
    ) -> None:
        self.rows.error += 1
        cause = self._causes.add(kind, code, passing)
        if cause.example is None:
            cause.example = ErrorExample(custom_id, source, message)

    @property
    def tokens(self) -> TokenCounts:
        return self._tokens.counts()

    @property
    def errors(self) -> list[ErrorCount]:
        """Failures by cause, largest first."""
        return self._causes.largest_first()

    @property
    def request_models(self) -> list[str]:
        """The models asked, in the order they first appear."""
        return [model for model in self._models if model]
