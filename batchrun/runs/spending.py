"""What an output may still cost: its budget, less what its answers and doubts took already."""

from __future__ import annotations

import msgspec

from batchrun.config import RunConfig
from batchrun.errors import UsageError
from batchrun.journal import Held, Journal
from batchrun.runs import passes
from batchrun.runs.plan import BATCH_ROWS, INVALID, Plan
from batchrun.runs.sources import CheckStop
from batchrun.sending import Budget

# The words around a schema in a request, and around what was wrong with an answer.
_WORDS_BYTES = 2_000


def check_price(config: RunConfig) -> None:
    if config.max_cost is not None and config.price is None:
        raise UsageError(
            "--max-cost: no price is known",
            next_steps=("--price IN,OUT      in US dollars per million tokens",),
        )


def budget_of(
    config: RunConfig, plan: Plan, journal: Journal, check_stop: CheckStop
) -> Budget | None:
    """None where nothing binds. UsageError when it cannot: there are answers without a bound."""
    if config.max_cost is None and config.token_budget is None:
        return None
    schema_bytes = 0 if config.schema is None else 2 * len(msgspec.json.encode(config.schema))
    budget = Budget(
        tokens=config.token_budget,
        usd=config.max_cost,
        price=config.price,
        more_prompt=0 if config.schema is None else schema_bytes + _WORDS_BYTES,
        repairs=config.schema is not None and config.max_schema_retries > 0,
    )
    _count_held(budget, plan, journal, check_stop)
    _count_doubts(budget, plan, journal, config, check_stop)
    return budget


def _count_held(budget: Budget, plan: Plan, journal: Journal, check_stop: CheckStop) -> None:
    for first in range(0, len(plan.slots), BATCH_ROWS):
        check_stop()
        slots = [slot for slot in plan.slots[first : first + BATCH_ROWS] if slot != INVALID]
        for outcome in journal.read_all(slots):
            if outcome is not None:
                budget.spent_before(outcome.usage)


def _count_doubts(
    budget: Budget, plan: Plan, journal: Journal, config: RunConfig, check_stop: CheckStop
) -> None:
    """What may have been billed, and whether every answer to come has a bound."""
    to_send = passes.to_send(config)
    for request in passes.every(plan, journal, config, tuple(Held)):
        check_stop()
        if journal.held(request.slot) in to_send and budget.worst(request.body) is None:
            flag = "--max-cost" if config.token_budget is None else "--token-budget"
            raise UsageError(
                f"{flag}: row {request.row + 1:,} sets no bound to its answer",
                next_steps=("--max-tokens N      bounds every answer",),
            )
        if (doubts := journal.in_doubt(request.slot)) > 0:
            budget.doubted_before(request.body, doubts)
