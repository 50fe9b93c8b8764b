"""Whether and when a failed row is tried again; tenacity's objects decide."""

from __future__ import annotations

import random
from collections import Counter
from typing import Final

from msgspec import Struct
from tenacity import RetryCallState, Retrying
from tenacity.stop import stop_after_attempt, stop_base
from tenacity.wait import wait_base, wait_exponential

from batchrun.sending.classify import OK
from batchrun.types import Decision, Others, Request, Tries, Verdict

FIRST_BACKOFF_S: Final = 0.5
LONGEST_BACKOFF_S: Final = 30.0
# Of a row that is alone in its failure: twenty refusals take less than a minute then, not the ten
# that the whole run would wait for.
LONGEST_ALONE_S: Final = 5.0
# A row that is refused this often while its neighbours get through has something of its own.
MAX_REFUSALS: Final = 20
_PASSING_KINDS: Final = frozenset(("rate_limit", "transient", "timeout", "invalid_response"))


class Tally(Struct):
    """The failures of one unsettled row."""

    attempts: int = 0  # of this run
    in_doubt: int = 0  # of them, perhaps billed; with those of earlier runs
    retries: int = 0  # used up of --max-retries
    refusals: int = 0  # rate limits, and what seemed to be an outage
    passed_over: int = 0  # of them, while others got through, or when it was alone
    answered: int = 0  # of its model, when it failed last
    resent: int = 0  # of the attempts, those that went again at once


class Wait(Struct, frozen=True):
    """Try again after ``seconds``, never more than ``max_wait_s``."""

    seconds: float


class GiveUp(Struct, frozen=True):
    """Settle the row with the decision's kind and code.

    ``doubt_spent``: it may have been billed as often as is allowed, so only --retry-failed sends it
    again.
    """

    doubt_spent: bool = False


class Policy:
    """How often and how soon a failed row is tried again.

    A rate limit costs no retry: waiting it out is the endpoint's wish. Nor does an outage: it is
    for the limits to judge. But where others are answered it is the row, and it ends; also when it
    is alone, one of the last few of a run in which others have succeeded. After an attempt that may
    have been billed there are ``max_in_doubt_retries`` over all runs, and those are part of the
    ``max_retries``. A wait that the endpoint named is kept exactly; otherwise it is full jitter
    over a window that doubles from 0.5 to 30 s, so that rows which failed together do not return
    together.
    """

    def __init__(
        self,
        max_retries: int,
        max_in_doubt_retries: int,
        max_wait_s: float,
        rng: random.Random | None = None,
    ) -> None:
        rng = rng or random.Random()
        wait = _NamedOrJitter(max_wait_s, LONGEST_BACKOFF_S, rng)
        self._retries = _budget(stop_after_attempt(max_retries + 1), wait)
        self._in_doubt = _budget(stop_after_attempt(max_in_doubt_retries + 1), wait)
        self._refusals = _budget(stop_after_attempt(MAX_REFUSALS), wait)
        soon = _NamedOrJitter(max_wait_s, LONGEST_ALONE_S, rng)
        self._alone = _budget(stop_after_attempt(MAX_REFUSALS), soon)

    def next(
        self,
        tally: Tally,
        decision: Decision,
        *,
        others_succeed: bool = True,
        is_alone: bool = False,
    ) -> Wait | GiveUp:
        """Count one failed attempt in ``tally`` and say what becomes of its row.

        ``others_succeed``: rows of the same model have been answered since this one last failed.
        ``is_alone``: few rows are left, and others were answered. Without either, neither refusals
        nor what may be an outage ever end a row.
        """
        tally.attempts += 1
        tally.in_doubt += decision.in_doubt
        if decision.again:
            return Wait(0.0)
        if decision.kind not in _PASSING_KINDS:
            return GiveUp()
        if decision.unreachable:
            # No row's fault, so it ends none. Where others get through, a place is soon free.
            soon = others_succeed or is_alone
            return _pause(self._alone if soon else self._retries, tally.attempts, decision)
        if decision.in_doubt and _is_spent(self._in_doubt, tally.in_doubt, decision):
            return GiveUp(doubt_spent=True)
        if decision.kind == "rate_limit" or (decision.may_be_outage and not others_succeed):
            return self._after_refusal(tally, decision, others_succeed, is_alone)
        if _is_spent(self._retries, tally.retries + 1, decision):
            return GiveUp()
        tally.retries += 1
        return _pause(self._retries, tally.retries, decision)

    def _after_refusal(
        self, tally: Tally, decision: Decision, others_succeed: bool, is_alone: bool
    ) -> Wait | GiveUp:
        budget = self._alone if is_alone else self._refusals
        tally.refusals += 1
        tally.passed_over += others_succeed or is_alone
        if _is_spent(budget, tally.passed_over, decision):
            return GiveUp()
        return _pause(budget, tally.refusals, decision)


class Persistence:
    """Remembers the failures of unsettled rows and applies the Policy to them.

    It holds as many tallies as rows have failed and are not settled yet, and none at the end.
    """

    def __init__(
        self,
        *,
        max_retries: int,
        max_in_doubt_retries: int,
        max_wait_s: float = 600.0,
        rng: random.Random | None = None,
    ) -> None:
        self._policy = Policy(max_retries, max_in_doubt_retries, max_wait_s, rng)
        self._tallies: dict[int, Tally] = {}
        self._answered: Counter[str] = Counter()

    def after(
        self,
        request: Request,
        decision: Decision,
        others: Others = "now",
        *,
        few_left: bool = False,
    ) -> Verdict:
        """How a row goes on after a failed attempt; forgets it when it ends.

        ``few_left``: so few rows are unsettled that all of them may fail for reasons of their own.
        """
        tally = self._tallies.pop(request.row, None) or Tally(in_doubt=request.in_doubt)
        step = self._policy.next(
            tally,
            decision,
            others_succeed=self._others_succeed(request, decision, tally, others),
            is_alone=few_left and others != "never",
        )
        tries = Tries(tally.attempts, tally.in_doubt - request.in_doubt + tally.resent)
        if isinstance(step, GiveUp):
            return Verdict(None, tries._replace(doubt_spent=step.doubt_spent))
        self._tallies[request.row] = tally
        return Verdict(step.seconds, tries)

    def settle(self, request: Request) -> Tries | None:
        """All attempts of a row that now has its answer; None when this was the first."""
        if not self._tallies:
            return None
        self._answered[request.model] += 1
        tally = self._tallies.pop(request.row, None)
        if tally is None:
            return None
        in_doubt = tally.in_doubt - request.in_doubt + tally.resent
        return Tries(tally.attempts + 1, in_doubt)

    def resent(self, request: Request, times: int) -> None:
        """Count attempts that went again at once: perhaps billed, and outside every budget."""
        tally = self._tallies.setdefault(request.row, Tally(in_doubt=request.in_doubt))
        tally.attempts += times
        tally.resent += times

    def _others_succeed(
        self, request: Request, decision: Decision, tally: Tally, others: Others
    ) -> bool:
        before, tally.answered = tally.answered, self._answered[request.model]
        if decision.kind == "rate_limit":
            # The first has nothing to compare with: what was answered before it proves nothing.
            return tally.refusals > 0 and tally.answered > before
        # An outage is what comes after answers; before any, every failure is the row's.
        return others != "before" or (tally.attempts > 0 and tally.answered > before)


class _NamedOrJitter(wait_base):
    def __init__(self, max_wait_s: float, longest_s: float, rng: random.Random) -> None:
        self._max_wait_s = max_wait_s
        self._rng = rng
        self._window = wait_exponential(multiplier=FIRST_BACKOFF_S, max=longest_s)

    def __call__(self, retry_state: RetryCallState) -> float:
        named = _decision(retry_state).wait_s
        # tenacity's own full jitter draws from the global generator; ours can be seeded.
        wait_s = self._rng.uniform(0, self._window(retry_state)) if named is None else named
        return min(wait_s, self._max_wait_s)


def _budget(stop: stop_base, wait: wait_base) -> Retrying:
    return Retrying(stop=stop, wait=wait, reraise=True)


def _is_spent(budget: Retrying, attempts: int, decision: Decision) -> bool:
    return bool(budget.stop(_state(budget, attempts, decision)))


def _pause(budget: Retrying, attempts: int, decision: Decision) -> Wait:
    return Wait(float(budget.wait(_state(budget, attempts, decision))))


def _state(budget: Retrying, attempts: int, decision: Decision) -> RetryCallState:
    state = RetryCallState(budget, None, (), {})
    state.attempt_number = attempts
    state.set_result(decision)
    return state


def _decision(state: RetryCallState) -> Decision:
    result = state.outcome.result() if state.outcome is not None else None
    return result if isinstance(result, Decision) else OK
