"""Answers as they come, without a file or a journal."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import msgspec

from batchrun import chat
from batchrun.chat import CHAT, Builder, Invalid
from batchrun.config import JSONValue, RunConfig
from batchrun.console import Progress
from batchrun.errors import BatchrunError, EndpointRefused, UsageError
from batchrun.inputs import image_urls
from batchrun.outputs import InvalidRow
from batchrun.runs.asking import endpoint_to_send, prompt_settings
from batchrun.runs.equals import Equals, Settled
from batchrun.runs.spending import budget_of, check_bounded, check_price
from batchrun.sending import Budget, EarlyEnd, Feed, Sender, Spent, asked, outcome_of, refusal
from batchrun.types import Answer, Attempt, Decision, Outcome, Request, Result, Tries

# Requests read ahead, and results waiting for their reader: what bounds the memory.
READ_AHEAD = 64
UNREAD_RESULTS = 1024


Row: TypeAlias = str | Mapping[str, JSONValue]


@asynccontextmanager
async def complete(
    config: RunConfig, requests: Iterable[Row]
) -> AsyncIterator[AsyncIterator[Result]]:
    """Answers as they come, in no order, without a file or a journal.

    What a request may be, and how it ends, says ``api.complete``.
    """
    # Whoever leaves the block, or is refused, waits for nothing.
    hasty = replace(config, drain_s=0.0)
    async with settling(hasty, _one_by_one(requests)) as settled:
        yield (_result_of(each) async for each in settled)


async def _one_by_one(rows: Iterable[Row]) -> AsyncIterator[Row]:
    """Read on the caller's own thread, which lets others work now and then."""
    for number, row in enumerate(rows):
        yield row
        if number % READ_AHEAD == 0:
            await asyncio.sleep(0)


@asynccontextmanager
async def settling(
    config: RunConfig, rows: AsyncIterator[Row]
) -> AsyncIterator[AsyncIterator[Settled]]:
    """Rows as they are settled, in no order; leaving the block waits for nothing.

    What ends the run early is raised by the iteration, after what was in flight for up to
    ``config.drain_s`` seconds; so is what ``rows`` raises.
    """
    check_price(config)
    budget = budget_of(config)
    end = EarlyEnd()
    async with endpoint_to_send(config, end) as endpoint:
        how = asked(endpoint.send, config, end.requested.is_set)
        desk = _ResultDesk(endpoint.host, how.spent, Equals() if config.dedupe else None)
        reader = _Reader(_Builders(config, budget), rows, desk, end)
        sender = Sender(
            config, endpoint, desk, Progress(quiet=True), how, one_model=False, budget=budget
        )
        # Not a TaskGroup: it would wrap what the caller's own block raises.
        task = asyncio.create_task(_send(sender, reader, desk, end))
        try:
            yield _results(desk, reader, task)
        finally:
            end.tell(_Closed("no more results are wanted"), urgent=True)
            await task


async def _send(
    sender: Sender, reader: _Reader, desk: _ResultDesk, end: EarlyEnd
) -> BatchrunError | None:
    try:
        return await sender.run(reader.fill, end)
    finally:
        desk.end()


async def _results(
    desk: _ResultDesk, reader: _Reader, sending: asyncio.Task[BatchrunError | None]
) -> AsyncIterator[Settled]:
    while await desk.has_more():
        yield desk.take()
    if reader.error is not None:
        raise reader.error
    cause = await sending
    if cause is not None and not isinstance(cause, _Closed):
        raise cause


class _ResultDesk:
    """Hands what the pool reports to the caller: nothing is journaled."""

    def __init__(self, host: str, spent: Callable[[Request], Spent], equals: Equals | None) -> None:
        self._host = host
        self._spent = spent
        self._equals = equals
        self._ids: dict[int, str] = {}  # row -> custom_id, of rows on their way
        self._results: deque[Settled] = deque()
        self._ended = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    # For the caller

    async def has_more(self) -> bool:
        """Wait for a result to take; False when there will be none."""
        while not self._results and not self._ended:
            self._news.clear()
            await self._news.wait()
        return bool(self._results)

    def take(self) -> Settled:
        self._room.set()
        return self._results.popleft()

    # For the reader

    async def room(self) -> None:
        """Wait until neither too many rows are on their way nor too many results unread."""
        while len(self._results) >= UNREAD_RESULTS or self._on_their_way() >= UNREAD_RESULTS:
            self._room.clear()
            await self._room.wait()

    def _on_their_way(self) -> int:
        return len(self._ids) + (self._equals.waiting if self._equals else 0)

    def expect(self, request: Request, custom_id: str) -> bool:
        """Whether this request is to be sent; if not, its result is that of an equal one."""
        if self._equals is not None and not self._equals.is_first(
            request.hash, request.row, custom_id
        ):
            for settled in self._equals.ready(request.hash):
                self.give(settled)
            return False
        self._ids[request.row] = custom_id
        return True

    def give(self, settled: Settled) -> None:
        self._results.append(settled)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    # For the pool

    def sending(self, request: Request) -> None:
        """Nothing is journaled here."""

    def failed(
        self, request: Request, attempt: Attempt, decision: Decision, *, again: bool
    ) -> EndpointRefused | None:
        return refusal(self._host, decision) if decision.kind == "fatal" else None

    def settled(self, request: Request, attempt: Attempt, decision: Decision, tries: Tries) -> None:
        outcome = outcome_of(request, attempt, decision, tries, self._spent(request))
        settled = Settled(request.row, self._ids.pop(request.row), outcome)
        self.give(settled)
        if self._equals is not None:
            for copy in self._equals.settled(request.hash, settled):
                self.give(copy)
        self._room.set()

    def resent(self, times: int) -> None:
        """Each row tells its attempts itself."""

    def abandoned(self, request: Request) -> None:
        """Its row is simply not among the results."""

    def idle(self) -> None:
        """Nothing is buffered here."""


class _Reader:
    """Builds requests from the caller's iterable, on the caller's own thread."""

    def __init__(
        self,
        builders: _Builders,
        rows: AsyncIterator[Row],
        desk: _ResultDesk,
        end: EarlyEnd,
    ) -> None:
        self._builders = builders
        self._rows = rows
        self._desk = desk
        self._end = end
        self.error: Exception | None = None

    async def fill(self, feed: Feed, staff: Callable[[], None]) -> None:
        try:
            await self._fill(feed, staff)
        except Exception as exc:  # the caller's iterable failed: it is theirs to see
            self.error = exc
            self._end.tell(_Closed("the requests cannot be read on"))

    async def _fill(self, feed: Feed, staff: Callable[[], None]) -> None:
        number = -1
        async for row in self._rows:
            number += 1
            await self._desk.room()
            request, custom_id = self._builders.request(number, row)
            if isinstance(request, InvalidRow):
                self._desk.give(Settled(number, custom_id, request))
                continue
            if not self._desk.expect(request, custom_id):
                continue
            if not feed.put([request], wait=False):
                return
            staff()
        feed.end()
        staff()


class _Closed(BatchrunError):
    """The caller left the block early."""


class _Builders:
    """Requests from rows of any shape, decided row by row."""

    def __init__(self, config: RunConfig, budget: Budget | None) -> None:
        self._binds = budget is not None
        self._settings = prompt_settings(config)
        self._config = config
        self._by_columns: dict[tuple[str, ...], Builder] = {}
        CHAT.detect((), (), self._settings, config.shape, "the rows")  # a bad template is said now

    def request(self, number: int, row: Row) -> tuple[Request | InvalidRow, str]:
        """The request, or why this row cannot become one, and its custom_id."""
        if isinstance(row, str):
            row = {self._config.prompt_column or "prompt": row}
        custom_id = chat.custom_id(row) or str(number + 1)
        try:
            built = self._builder(row).build(row)
            if isinstance(built, Invalid):
                return InvalidRow(built.code, built.reason), custom_id
        except UsageError as exc:
            return InvalidRow("no_prompt", exc.message), custom_id
        request = Request(
            row=number,
            body=chat.encode(built.body),
            hash=built.hash,
            occurrence=0,
            slot=0,
            model=built.model,
            model_from_row=built.model_from_row,
        )
        if self._binds:
            check_bounded(request, self._config)
        return request, custom_id

    def _builder(self, row: Mapping[str, JSONValue]) -> Builder:
        columns = tuple(row)
        builder = self._by_columns.get(columns)
        if builder is None:
            layout = CHAT.detect(columns, [row], self._settings, self._config.shape, "the row")
            builder = CHAT.builder(layout, self._settings, image_urls(Path()))
            if len(self._by_columns) < READ_AHEAD:
                self._by_columns[columns] = builder
        return builder


def _result_of(settled: Settled) -> Result:
    """One finished row as the Python API shows it."""
    _, custom_id, outcome, paid_by = settled
    if isinstance(outcome, InvalidRow):
        return _invalid_result(custom_id, outcome.code, outcome.reason)
    result = _answered(custom_id, outcome)
    return result if paid_by is None else msgspec.structs.replace(result, paid_by=paid_by)


def _answered(custom_id: str, outcome: Outcome) -> Result:
    ok = outcome.kind == "ok"
    has_answer = ok or outcome.kind == "invalid_answer"
    answer = CHAT.answer(outcome.body) if has_answer else Answer()
    return Result(
        custom_id=custom_id,
        status="ok" if ok else "error",
        response=answer.response,
        finish_reason=answer.finish_reason,
        request_model=outcome.model or None,
        response_model=answer.response_model,
        usage=outcome.usage,
        reasoning=answer.reasoning,
        tool_calls=answer.tool_calls,
        error_kind=None if ok else outcome.kind,
        error_code=None if ok else outcome.code,
        error_message=None if ok else outcome.message,
        http_status=outcome.http_status,
        attempts=outcome.attempts,
        in_doubt_attempts=outcome.in_doubt,
        latency_s=outcome.latency_s,
        ttft_s=outcome.ttft_s,
        request_id=outcome.request_id or None,
        finished_at_ms=outcome.finished_at_ms,
        request_hash=chat.format_hash(outcome.hash),
        response_body=chat.body_text(outcome.body) if outcome.body else None,
    )


def _invalid_result(custom_id: str, code: str, reason: str) -> Result:
    """The error row of a row that cannot become a request."""
    return Result(
        custom_id=custom_id,
        status="error",
        error_kind="invalid_input",
        error_code=code,
        error_message=reason,
    )
