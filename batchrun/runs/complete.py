"""Answers as they come, without a file or a journal."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from batchrun import chat, sending
from batchrun.chat import CHAT, Builder, Invalid
from batchrun.config import (
    MAX_CONCURRENCY,
    STDIN,
    STDOUT,
    JSONValue,
    RunConfig,
    default_output,
    output_format,
)
from batchrun.errors import BatchrunError, NoKey, UsageError
from batchrun.process import room_for_sockets
from batchrun.providers import resolve
from batchrun.runs.opening import chat_endpoint, prompt_settings
from batchrun.runs.status import look
from batchrun.sending import (
    Feed,
    Pool,
    Send,
    admission_for,
    outcome_of,
    persistence_for,
    refusal,
    watch_limits,
)
from batchrun.types import NO_USAGE, Answer, Attempt, Decision, Outcome, Request, Result, Tries

if TYPE_CHECKING:
    import pyarrow as pa

Rows: TypeAlias = "list[Mapping[str, object]] | pa.Table"


# Requests read ahead, and results waiting for their reader: what bounds the memory.
READ_AHEAD = 64


UNREAD_RESULTS = 1024


_ENDPOINT_WORDS = ("provider", "base_url", "api_key_env", "api_key_file")


def make_config(
    input: str | os.PathLike[str] | Rows,
    output: str | os.PathLike[str] | None = None,
    **options: Any,
) -> RunConfig:
    """What ``run`` takes, from the words of ``submit``; UsageError for one that does not exist.

    A mistake in the input is said before a missing key.
    """
    where = {name: options.pop(name, None) for name in _ENDPOINT_WORDS}
    allow_http = bool(options.pop("allow_http", False))
    known = {field.name for field in fields(RunConfig)} - {"inputs", "output", "endpoint"}
    if unknown := sorted(options.keys() - known):
        raise UsageError(f"{unknown[0]}=: no such option; there are: {', '.join(sorted(known))}")
    if output is None and not isinstance(input, str | os.PathLike):
        raise UsageError("rows that are not a file need output=, the path of the answers")
    mock = bool(options.get("mock"))
    inputs = (os.fspath(input),) if isinstance(input, str | os.PathLike) else (STDIN,)
    name = default_output(inputs, mock=mock) if output is None else os.fspath(output)
    options.setdefault("model_replaces", options.get("model") is not None)
    options.setdefault("params_replacing", frozenset(options.get("params", ())))
    config = RunConfig(inputs=inputs, output=name, output_format=output_format(name), **options)
    if mock:
        return config
    try:
        endpoint = resolve(
            **where,
            allow_http=allow_http,
            environ=os.environ,
            explicit_headers=frozenset(n.lower() for n, _ in config.headers),
        )
    except NoKey:
        look(config)
        raise
    return replace(config, endpoint=endpoint)


@asynccontextmanager
async def complete(
    requests: Iterable[str | Mapping[str, JSONValue]], **options: Any
) -> AsyncIterator[AsyncIterator[Result]]:
    """Answers as they come, in no order, without a file or a journal.

    ``requests`` are prompts, or rows as in an input file: dicts with ``prompt``, ``messages`` or
    ``custom_id`` and ``body``. They are read as they are needed, and no more than about a thousand
    answers wait to be read. A row's failure is a Result with status ``error``; what ends the run
    early (a refused key) is raised by the iteration. ``options`` are those of ``submit``.
    """
    config = make_config([], STDOUT, **options)
    async with chat_endpoint(config) as (endpoint, host):
        session = _Session(config, host, endpoint.send)
        # Not a TaskGroup: it would wrap what the caller's own block raises.
        task = asyncio.create_task(session.run(iter(requests)))
        try:
            yield session.results()
        finally:
            session.close()
            await task


class _Session:
    """One ``complete``: a pool between the caller's iterable and the caller's loop."""

    def __init__(self, config: RunConfig, host: str, send: Send) -> None:
        self._builders = _Builders(config)
        self._results: deque[Result] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None
        # Bounded by the results unread: a put that waited would stop the loop.
        room = room_for_sockets(config.concurrency or MAX_CONCURRENCY)
        self._limits = admission_for(config, host, room)
        self._feed = Feed(max_rows=2 * UNREAD_RESULTS, max_bytes=sys.maxsize)
        self._pool = Pool(
            feed=self._feed,
            send=send,
            judge=sending.classify,
            admission=self._limits,
            persistence=persistence_for(config),
            desk=self,
            drain_s=0.0,
            one_model=False,
        )
        self._host = host
        self._ids: dict[int, str] = {}

    async def run(self, rows: Iterator[str | Mapping[str, JSONValue]]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(self._read_all(rows)),
                    group.create_task(watch_limits(self._limits, self._pool)),
                ]
                try:
                    await self._pool.run()
                finally:
                    for helper in helpers:
                        helper.cancel()
        finally:
            self._ended = True
            self._news.set()

    async def results(self) -> AsyncIterator[Result]:
        while True:
            while self._results:
                result = self._results.popleft()
                self._room.set()
                yield result
            if self._ended:
                break
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        cause = self._pool.cause
        if cause is not None and not isinstance(cause, _Closed):
            raise cause

    def close(self) -> None:
        """The caller has had enough: what is in flight is cut off."""
        if not self._ended:
            self._pool.stop(_Closed("no more results are wanted"))

    async def _read_all(self, rows: Iterator[str | Mapping[str, JSONValue]]) -> None:
        try:
            await self._read(rows)
        except Exception as exc:  # the caller's iterable failed: it is theirs to see
            self._error = exc
            self.close()

    async def _read(self, rows: Iterator[str | Mapping[str, JSONValue]]) -> None:
        number = 0
        for number, row in enumerate(rows):
            while len(self._results) >= UNREAD_RESULTS or len(self._ids) >= UNREAD_RESULTS:
                self._room.clear()
                await self._room.wait()
            built = self._builders.request(number, row)
            if isinstance(built, Result):
                self._give(built)
                continue
            request, custom_id = built
            self._ids[number] = custom_id
            self._feed.put([request])
            self._pool.staff()
            if number % READ_AHEAD == 0:
                await asyncio.sleep(0)
        self._feed.end()
        self._pool.staff()

    def _give(self, result: Result) -> None:
        self._results.append(result)
        self._news.set()

    # What the pool reports

    def sending(self, request: Request) -> None:
        """Nothing is journaled here."""

    def failed(self, request: Request, decision: Decision, *, again: bool) -> None:
        if decision.kind == "fatal":
            self._pool.stop(refusal(self._host, decision))

    def settled(self, request: Request, attempt: Attempt, decision: Decision, tries: Tries) -> None:
        outcome = outcome_of(request, attempt, decision, tries)
        self._give(result_of(self._ids.pop(request.row), outcome))
        self._room.set()

    def resent(self, times: int) -> None:
        """Each row tells its attempts itself."""

    def abandoned(self, request: Request) -> None:
        """Its row is simply not among the results."""

    def idle(self) -> None:
        """Nothing is buffered here."""


class _Closed(BatchrunError):
    """The caller left the block early."""


class _Builders:
    """Requests from rows of any shape, decided row by row."""

    def __init__(self, config: RunConfig) -> None:
        self._settings = prompt_settings(config)
        self._config = config
        self._by_columns: dict[tuple[str, ...], Builder] = {}

    def request(
        self, number: int, row: str | Mapping[str, JSONValue]
    ) -> tuple[Request, str] | Result:
        """The request and its custom_id, or the error row of a row that cannot become one."""
        if isinstance(row, str):
            row = {self._config.prompt_column or "prompt": row}
        custom_id = chat.custom_id(row) or str(number + 1)
        try:
            built = self._builder(row).build(row)
            if isinstance(built, Invalid):
                return invalid_result(custom_id, built.code, built.reason)
        except UsageError as exc:
            return invalid_result(custom_id, "no_prompt", exc.message)
        request = Request(
            row=number,
            body=chat.encode(built.body),
            hash=built.hash,
            occurrence=0,
            slot=0,
            model=built.model,
            model_from_row=built.model_from_row,
        )
        return request, custom_id

    def _builder(self, row: Mapping[str, JSONValue]) -> Builder:
        columns = tuple(row)
        builder = self._by_columns.get(columns)
        if builder is None:
            layout = CHAT.detect(columns, [row], self._settings, self._config.shape, "the row")
            builder = CHAT.builder(layout, self._settings)
            if len(self._by_columns) < READ_AHEAD:
                self._by_columns[columns] = builder
        return builder


def result_of(custom_id: str, outcome: Outcome) -> Result:
    """One finished row as the Python API shows it."""
    ok = outcome.kind == "ok"
    answer = CHAT.answer(outcome.body) if ok else Answer()
    return Result(
        custom_id=custom_id,
        status="ok" if ok else "error",
        response=answer.response,
        finish_reason=answer.finish_reason,
        request_model=outcome.model or None,
        response_model=answer.response_model,
        usage=answer.usage if ok else outcome.usage,
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


def invalid_result(custom_id: str, code: str, reason: str) -> Result:
    """The error row of a row that cannot become a request."""
    return Result(
        custom_id=custom_id,
        status="error",
        response=None,
        finish_reason=None,
        request_model=None,
        response_model=None,
        usage=NO_USAGE,
        reasoning=None,
        tool_calls=None,
        error_kind="invalid_input",
        error_code=code,
        error_message=reason,
        http_status=None,
        attempts=0,
        in_doubt_attempts=0,
        latency_s=None,
        ttft_s=None,
        request_id=None,
        finished_at_ms=None,
        request_hash=None,
        response_body=None,
    )
