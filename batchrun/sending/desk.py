"""Journals what the pool reports, counts it, and ends a run that fails from its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from msgspec.structs import replace

from batchrun import chat
from batchrun.errors import EndpointRefused
from batchrun.journal import Held, Journal
from batchrun.money import Price
from batchrun.sending.classify import NEXT_STEPS
from batchrun.sending.tally import RunTally
from batchrun.sending.typed import NOTHING_SPENT, Spent, nothing_spent
from batchrun.types import NO_USAGE, Attempt, Decision, Outcome, Reply, Request, Tries, Usage

# An endpoint's error page is kept for the record; beyond this it is somebody's web site.
MAX_ERROR_BODY = 2**20


REQUEST_ID_HEADERS = (
    *("x-request-id", "mistral-correlation-id", "request-id", "x-litellm-call-id", "cf-ray"),
)


def refusal(host: str, decision: Decision) -> EndpointRefused:
    """What a fatal decision ends the run with; its reason reads on after the host's name."""
    advice = NEXT_STEPS.get(decision.code)
    return EndpointRefused(f"{host} {decision.reason}", next_steps=(advice,) if advice else ())


# Hears of every settled row, which is given from 0, once it is in the journal.
Told: TypeAlias = Callable[[Outcome, int], None]


class JournalDesk:
    """A pool's desk. After ``abort_after`` rows that failed alike, with never an answer, it ends
    the run and opens those rows again; 0 compares nothing.
    """

    def __init__(
        self,
        journal: Journal,
        host: str,
        *,
        abort_after: int,
        spent: Callable[[Request], Spent] = nothing_spent,
        price: Price | None = None,
        told: Told | None = None,
    ) -> None:
        self.tally = RunTally(price)
        self._told = told
        self.reopened = 0
        self.wrong_model = False
        self._journal = journal
        self._host = host
        self._unwritten: list[tuple[Outcome, Reply | None, int]] = []
        self._abort_after = abort_after
        self._spent = spent
        self._ever_ok = journal.count(Held.OK) > 0
        self._alike: dict[str, list[int]] = {}

    def sending(self, request: Request) -> None:
        self._journal.sending(request.hash, request.occurrence, request.slot)
        self._write()

    def failed(
        self, request: Request, attempt: Attempt, decision: Decision, *, again: bool
    ) -> EndpointRefused | None:
        in_doubt, usage = decision.in_doubt, _usage(attempt, decision)
        self._journal.failed(request.hash, request.occurrence, request.slot, in_doubt, usage)
        self.tally.attempt_failed(decision, again=again)
        if decision.kind != "fatal":
            return None
        self.wrong_model = decision.code == "model_not_found"
        return refusal(self._host, decision)

    def settled(
        self, request: Request, attempt: Attempt, decision: Decision, tries: Tries
    ) -> EndpointRefused | None:
        outcome = outcome_of(request, attempt, decision, tries, self._spent(request))
        self._unwritten.append((outcome, attempt.reply, request.row))
        if request.used is not NO_USAGE:
            outcome = replace(outcome, usage=request.used + outcome.usage)
        self._journal.settled(request.slot, outcome)
        if decision.kind == "ok":
            self._ever_ok = True
            return None
        self.tally.attempt_failed(decision, again=False)
        # Rows that may have been billed so often are not opened again for a next run to pay for.
        may_compare = self._abort_after and decision.alike and not tries.doubt_spent
        if may_compare and not self._ever_ok:
            return self._compare(request.slot, decision)
        return None

    def resent(self, times: int) -> None:
        self.tally.resent(times)

    def abandoned(self, request: Request) -> None:
        # The SENT record without an end says so in the journal.
        self.tally.withdrawn()

    def idle(self) -> None:
        self._write()

    def _write(self) -> None:
        self._journal.flush()
        if self._unwritten:
            for outcome, reply, row in self._unwritten:
                self.tally.add(outcome, reply, row)
                if self._told is not None:
                    self._told(outcome, row)
            self._unwritten.clear()

    def _compare(self, slot: int, decision: Decision) -> EndpointRefused | None:
        if self.reopened:
            # Those in flight when the run was ended: of the same cause, or no better known.
            self._journal.reopen(slot)
            self.reopened += 1
            return None
        slots = self._alike.setdefault(decision.alike, [])
        slots.append(slot)
        if len(slots) < self._abort_after:
            return None
        for refused in slots:
            self._journal.reopen(refused)
        self.reopened = len(slots)
        first = f"{len(slots):,} rows all failed the same way" if slots[1:] else "row failed"
        return EndpointRefused(f"the first {first}: {decision.reason}")


def outcome_of(
    request: Request,
    attempt: Attempt,
    decision: Decision,
    tries: Tries,
    spent: Spent = NOTHING_SPENT,
) -> Outcome:
    """What the journal keeps of a settled request."""
    kind = decision.kind
    assert kind != "fatal"
    body = attempt.body
    ok = kind == "ok"
    is_answer = ok or kind == "invalid_answer"
    usage = _usage(attempt, decision)
    if not is_answer and len(body) > MAX_ERROR_BODY:
        body = b""
    return Outcome(
        hash=request.hash,
        occurrence=request.occurrence,
        kind=kind,
        final=is_answer or kind == "rejected" or tries.doubt_spent,
        attempts=tries.attempts,
        in_doubt=request.in_doubt + tries.in_doubt,
        http_status=attempt.status,
        code="" if ok else decision.code,
        message="" if ok else decision.reason,
        request_id=_request_id(attempt),
        model=spent.model or request.model,
        latency_s=attempt.ended_s - attempt.started_s,
        ttft_s=attempt.ttft_s,
        finished_at_ms=attempt.finished_at_ms,
        usage=usage if spent is NOTHING_SPENT else spent.usage + usage,
        body=body,
    )


def _usage(attempt: Attempt, decision: Decision) -> Usage:
    """What an answer was billed for.

    Tokens that a broken one mentions belong to an attempt in doubt, not to an answer.
    """
    is_answer = decision.kind in ("ok", "invalid_answer")
    return attempt.reply.usage if is_answer and attempt.reply is not None else NO_USAGE


def _request_id(attempt: Attempt) -> str:
    headers = attempt.headers
    for name in REQUEST_ID_HEADERS:
        if value := headers.get(name):
            return value
    return chat.request_id(attempt.body)
