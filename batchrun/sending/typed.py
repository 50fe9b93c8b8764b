"""Answers that have to fit: asked for in a dialect the endpoint takes, checked, asked for again.

Stands between pool and endpoint. A form of asking that the endpoint does not know is replaced by
the next, before any row pays for it; an answer that does not fit is answered with what is wrong,
or given to a stronger model. All of it is more attempts of the same row: each has its SENT, each
its tokens.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from batchrun import chat
from batchrun.chat import AnswerSchema, Problem
from batchrun.config import RunConfig, SchemaDialect
from batchrun.outputs import is_filtered, is_truncated
from batchrun.providers import provider_of
from batchrun.sending.classify import OK, classify
from batchrun.types import NO_USAGE, Attempt, Decision, Request, Usage

Send: TypeAlias = Callable[[Request], Awaitable[Attempt]]

_SHOWN_WORDS: Final = 300
# What a refusal of the form, not of the row, speaks of.
_OF_THE_FORM: Final = re.compile(
    r"response_?format|json_?schema|json_?object|guided|structured|grammar|schema", re.IGNORECASE
)
_REFUSING: Final = frozenset((400, 404, 415, 422, 500, 501))
# Not worth another try by the same model: it would say the same, and be paid for it.
_FINAL: Final = frozenset(("truncated", "refused"))
_ON: Final[Mapping[str, frozenset[str]]] = {
    "schema": frozenset(("schema", "not_json")),
    "refusal": frozenset(("refused",)),
    "empty": frozenset(("empty",)),
    "length": frozenset(("truncated",)),
}


class Spent(NamedTuple):
    """What a settled row's earlier attempts used, and which model had the last word."""

    usage: Usage = NO_USAGE
    model: str = ""  # "": the request's own


NOTHING_SPENT: Final = Spent()


def nothing_spent(_: Request) -> Spent:
    """Of rows that are asked as they are, once."""
    return NOTHING_SPENT


class Asked(NamedTuple):
    """How requests are sent and attempts judged, and what a settled row's earlier ones used."""

    send: Send
    judge: Callable[[Attempt, Request], Decision]
    spent: Callable[[Request], Spent]
    said: Callable[[], Sequence[str]]  # notes on what was found out


def asked(send: Send, config: RunConfig, is_over: Callable[[], bool]) -> Asked:
    """As they are, unless answers have to fit. Once ``is_over`` nothing more is sent."""
    if config.schema is None and config.escalate is None:
        return Asked(send, classify, nothing_spent, tuple)
    schema = None if config.schema is None else AnswerSchema(config.schema)
    typed = TypedAnswers(send, schema, config, is_over)
    return Asked(typed.send, typed.judge, typed.spent, typed.said)


class _Row(Struct):
    """What is known of a row on its way."""

    dialect: SchemaDialect | None = None  # of the attempt in flight
    repairs: int = 0
    usage: Usage = NO_USAGE
    said: str = ""
    problem: Problem | None = None
    model: str = ""


class _Forms(Struct):
    """How one model is asked: the forms that are left, the first of them in use."""

    left: Sequence[SchemaDialect]
    asking: asyncio.Lock
    is_proven: bool = False


class TypedAnswers:
    """Sends and judges as an endpoint and ``classify`` do; ``spent`` is asked of a settled row."""

    def __init__(
        self,
        send: Send,
        schema: AnswerSchema | None,
        config: RunConfig,
        is_over: Callable[[], bool],
    ) -> None:
        self._send = send
        self._is_over = is_over
        self._schema = schema
        self._repairs = config.max_schema_retries if schema is not None else 0
        self._escalate = config.escalate or ""
        self._escalates = frozenset[str]().union(*(_ON[name] for name in config.escalate_on))
        self._left = _forms(schema, config)
        self._forms: dict[str, _Forms] = {}
        self._rows: dict[int, _Row] = {}
        self._stepped: dict[SchemaDialect, None] = {}  # forms that were refused, in order

    def said(self) -> Sequence[str]:
        """The forms in use, and those that were refused."""
        used = sorted({forms.left[0] for forms in self._forms.values()})
        if not used:
            return ()
        refused = [f"{form} was refused" for form in self._stepped]
        return (f"schema asked for as {', '.join(used)}" + "".join(f"; {w}" for w in refused),)

    async def send(self, request: Request) -> Attempt:
        """While nobody knows whether the endpoint takes the form, one row asks for all."""
        if self._schema is None:
            return await self._send(self._prepared(request, None))
        forms = self._forms_of(request)
        if forms.is_proven or len(forms.left) < 2:
            return await self._send(self._prepared(request, forms.left[0]))
        async with forms.asking:
            if self._is_over():
                raise asyncio.CancelledError
            attempt = await self._send(self._prepared(request, forms.left[0]))
            if not forms.is_proven:
                decision = classify(attempt, request)
                forms.is_proven = decision.kind == "ok" or len(forms.left) < 2
                self._step_down(forms, forms.left[0], attempt, decision)
            return attempt

    def judge(self, attempt: Attempt, request: Request) -> Decision:
        decision = classify(attempt, request)
        row = self._rows.get(request.row)
        if decision.kind != "ok":
            if row is not None and row.dialect is not None:
                forms = self._forms_of(request)
                used, row.dialect = row.dialect, None
                if self._step_down(forms, used, attempt, decision) or _was_refused(
                    used, forms, attempt, decision
                ):
                    return replace(decision, again=True)
            return decision
        problem = self._problem(attempt)
        if problem is None:
            return OK
        row = self._rows.setdefault(request.row, _Row())
        return self._after(problem, row, attempt)

    def _forms_of(self, request: Request) -> _Forms:
        """Those of the model that is asked now, which may be the stronger one."""
        row = self._rows.get(request.row)
        model = row.model if row is not None and row.model else request.model
        return self._forms.setdefault(model, _Forms(self._left, asyncio.Lock()))

    def spent(self, request: Request) -> Spent:
        """Forget a row that has its outcome."""
        row = self._rows.pop(request.row, None)
        return NOTHING_SPENT if row is None else Spent(row.usage, row.model)

    def _prepared(self, request: Request, dialect: SchemaDialect | None) -> Request:
        row = self._rows.get(request.row)
        if dialect is not None:
            row = self._rows.setdefault(request.row, _Row())
            row.dialect = dialect
        body = request.body
        if row is not None and row.problem is not None and row.said:
            body = chat.repairing(body, row.said, row.problem)
        if row is not None and row.model:
            body = chat.with_model(body, row.model)
        if dialect is not None and self._schema is not None:
            body = chat.asking(body, self._schema, dialect)
        return request if body is request.body else replace(request, body=body)

    def _step_down(
        self, forms: _Forms, used: SchemaDialect, attempt: Attempt, decision: Decision
    ) -> bool:
        """Go on with the next form if the endpoint refused this one."""
        if forms.left[0] != used or len(forms.left) < 2 or not _refuses(attempt, decision):
            return False
        forms.left = forms.left[1:]
        forms.is_proven = False
        self._stepped[used] = None
        return True

    def _problem(self, attempt: Attempt) -> Problem | None:
        answer = chat.CHAT.answer(attempt.body)
        text = answer.response
        if is_filtered(answer.finish_reason, answer.refusal):
            return Problem("refused", f"the model refused: {text or 'no text'}"[:_SHOWN_WORDS])
        if answer.tool_calls is None and (text is None or not text.strip()):
            return Problem("empty", "the answer is empty")
        found = None if self._schema is None else self._schema.value(text or "")
        if is_truncated(answer.finish_reason) and not isinstance(found, dict):
            return Problem("truncated", "the answer was cut at its length limit")
        return found if isinstance(found, Problem) else None

    def _after(self, problem: Problem, row: _Row, attempt: Attempt) -> Decision:
        """Ask again, ask a stronger model, or let the row be what it is."""
        wanted = problem.code in self._escalates and self._escalate and not row.model
        if self._schema is None and not wanted:
            return OK
        decision = Decision(kind="invalid_answer", code=problem.code, reason=problem.words)
        repairs = problem.code not in _FINAL and row.repairs < self._repairs
        if not repairs and not wanted:
            return decision
        reply = attempt.reply
        row.usage += NO_USAGE if reply is None else reply.usage
        if repairs:
            row.repairs += 1
            row.problem = problem
            row.said = chat.CHAT.answer(attempt.body).response or ""
        else:
            row.model, row.problem, row.repairs = self._escalate, None, 0
        return replace(decision, again=True)


def _forms(schema: AnswerSchema | None, config: RunConfig) -> Sequence[SchemaDialect]:
    if schema is None:
        return ()
    if config.schema_dialect != "auto":
        return (config.schema_dialect,)
    provider = provider_of(config.endpoint.url)
    return chat.dialects(schema, provider.name if provider else None)


def _refuses(attempt: Attempt, decision: Decision) -> bool:
    """Whether the endpoint refused the form: in words that speak of it."""
    error = attempt.reply.error if attempt.reply is not None else None
    if attempt.status not in _REFUSING or decision.kind not in ("rejected", "transient", "fatal"):
        return False
    if error is None:
        return False
    return bool(_OF_THE_FORM.search(f"{error.message} {error.loc} {error.code} {error.type}"))


def _was_refused(used: SchemaDialect, forms: _Forms, attempt: Attempt, decision: Decision) -> bool:
    """Whether this was one of those in flight when the form was given up."""
    return used not in forms.left and _refuses(attempt, decision)
