"""What an output may still cost: its budget, less what its answers and doubts took already."""

from __future__ import annotations

from itertools import islice

import msgspec

from batchrun.config import RunConfig
from batchrun.errors import UsageError
from batchrun.journal import Held, Journal
from batchrun.runs import passes
from batchrun.runs.plan import BATCH_ROWS, Plan
from batchrun.runs.sources import CheckStop
from batchrun.sending import NO_BOUND, Budget, unbounded
from batchrun.types import Outcome, Request

# The words around a schema in a request, and around what was wrong with an answer.
_WORDS_BYTES = 2_000


def check_price(config: RunConfig) -> None:
    if config.max_cost is not None and config.price is None:
        raise UsageError(
            "--max-cost: no price is known",
            next_steps=("--price IN,OUT      in US dollars per million tokens",),
        )


def budget_of(config: RunConfig) -> Budget | None:
    """One of which nothing is spent yet; None where nothing binds."""
    if config.max_cost is None and config.token_budget is None:
        return None
    return Budget(
        tokens=config.token_budget,
        usd=config.max_cost,
        price=config.price,
        more_prompt=_added_bytes(config),
        repairs=config.schema is not None and config.max_schema_retries > 0,
    )


def _added_bytes(config: RunConfig) -> int:
    """What a body may get on its way: the schema, in some forms twice, and a longer model name."""
    added = len(msgspec.json.encode(config.escalate or ""))
    if config.schema is not None:
        added += 2 * len(msgspec.json.encode(config.schema)) + _WORDS_BYTES
    return added


def check_bounded(request: Request, config: RunConfig) -> None:
    """UsageError where no budget can bind."""
    if (why := unbounded(request.body)) is not None:
        flag = "--max-cost" if config.token_budget is None else "--token-budget"
        steps = ("--max-tokens N      bounds every answer",) if why == NO_BOUND else ()
        raise UsageError(
            f"{flag}: row {request.row + 1:,} may take any number of tokens: {why}",
            next_steps=steps,
        )


def count_before(
    budget: Budget, config: RunConfig, plan: Plan, journal: Journal, check_stop: CheckStop
) -> None:
    """Count what earlier runs of this output spent, or may have; every row to send has a bound."""
    to_send = passes.to_send(config)
    requests = passes.every(plan, journal, config, tuple(Held), tried_copies=True)
    while some := list(islice(requests, BATCH_ROWS)):
        check_stop()
        outcomes = journal.read_all([request.slot for request in some])
        for request, outcome in zip(some, outcomes, strict=True):
            if journal.held(request.slot) in to_send:
                check_bounded(request, config)
            _count(budget, request, outcome)
            if (doubts := journal.in_doubt(request.slot)) > 0:
                budget.doubted_before(request.body, doubts)


def _count(budget: Budget, request: Request, outcome: Outcome | None) -> None:
    if outcome is None or outcome.kind not in ("ok", "invalid_answer"):
        budget.spent_before(request.used, None)
    elif outcome.attempts:  # else another output paid for it
        used = outcome.usage if outcome.kind == "ok" else request.used
        budget.spent_before(used, request.body)
