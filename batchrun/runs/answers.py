"""Arrow in, Arrow out: rows that stream through one pool and come out in order, without a file.

The caller pulls; requests are made in a thread with an event loop of its own, and the caller's
batches are read in another one, so that neither waits for the other. What is between them is
bounded: some thousand rows, whatever flows through.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from operator import attrgetter
from types import TracebackType
from typing import Final, Self, cast

from batchrun import inputs, outputs
from batchrun.chat import CHAT
from batchrun.config import MAX_CONCURRENCY, RunConfig
from batchrun.errors import UsageError
from batchrun.inputs import ColumnTypes
from batchrun.outputs import (
    AnswerBatches,
    Footer,
    InvalidRow,
    OutputTally,
    RecordBatch,
    Schema,
    Slice,
)
from batchrun.runs.asking import answer_schema, check_endpoint, check_engine, prompt_settings
from batchrun.runs.complete import Row, settling
from batchrun.runs.equals import Settled
from batchrun.types import ArrowStream, Outcome

PIECE_ROWS: Final = 512
# Beside those in flight: one that is read, one that is full, one that the caller has.
MORE_PIECES: Final = 3
# What needs the whole table, or a file to keep answers in.
_OF_FILES: Final = ("samples", "sample", "limit", "shard", "reuse")


class Answers(Iterator[RecordBatch]):
    """Record batches with answer columns, in the order of the rows. Iterate once; see ``api``."""

    def __init__(self, config: RunConfig, source: ArrowStream | Iterable[object]) -> None:
        self._shape: _Shape | None = None
        _check(config)
        self._config = config
        self._read = inputs.record_batches(source, PIECE_ROWS)
        self._first: RecordBatch | None = None
        self._running = self._run()

    @property
    def schema(self) -> Schema:
        """What every batch has; the first batch is read for it. UsageError where there is none."""
        if self._shape is None and self._look() is None:
            raise UsageError("no batch came, so nothing says which columns there are")
        assert self._shape is not None
        return self._shape.schema

    def _look(self) -> RecordBatch | None:
        if self._first is None and (first := next(self._read, None)) is not None:
            self._first, self._shape = first, _Shape(first.schema, self._config)
        return self._first

    def __next__(self) -> RecordBatch:
        return next(self._running)

    def close(self) -> None:
        """Send nothing more, and wait for nothing."""
        self._running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> Generator[RecordBatch, None, None]:
        first = self._look()
        if first is None:
            return
        assert self._shape is not None
        self._first = None
        stream = _Stream(self._config, chain([first], self._read), self._shape)
        try:
            yield from stream.batches()
        finally:
            stream.close()


def answers_schema(config: RunConfig, schema: Schema) -> Schema:
    """The schema of the answers to record batches of ``schema``."""
    _check(config)
    return _Shape(schema, config).schema


def _check(config: RunConfig) -> None:
    check_endpoint(config)
    check_engine(config)
    usual = {field: RunConfig.__dataclass_fields__[field].default for field in _OF_FILES}
    for field in _OF_FILES:
        if getattr(config, field) != usual[field]:
            raise UsageError(f"{field}= is for runs with files; answers() takes all rows once")


class _Shape:
    """How rows become record batches, known from the columns alone."""

    def __init__(self, schema: Schema, config: RunConfig) -> None:
        typed = answer_schema(config)
        types = ColumnTypes(config.carry, outputs.names(typed, dedupe=config.dedupe))
        types.observe_schema(schema)
        row = dict.fromkeys(schema.names)  # what the columns are called decides
        CHAT.detect(schema.names, [row], prompt_settings(config), config.shape, "the batches")
        self._carried = types.carried()
        settings = {} if config.schema is None else {"schema": config.schema}
        footer = Footer(settings=settings, publishing=config.publishing_settings())
        more = outputs.more_columns(footer)
        self._batches = AnswerBatches(self._carried.schema, config.response_body, more)
        self._price = config.price

    @property
    def schema(self) -> Schema:
        return self._batches.schema

    def batches(self, piece: _Piece) -> Iterator[RecordBatch]:
        """Those of its rows that are settled."""
        numbers = range(piece.start + 1, piece.start + 1 + len(piece.outcomes))
        whole = Slice(
            self._carried.from_table(piece.record),
            piece.custom_ids,
            [f"row {number}" for number in numbers],
            piece.outcomes,
            piece.paid_by,
        )
        return self._batches.batches(whole, OutputTally(self._price))


class _Piece:
    """Some consecutive rows on their way."""

    def __init__(self, start: int, record: RecordBatch) -> None:
        count = record.num_rows
        self.start = start
        self.record = record
        self.left = count
        self.custom_ids = [""] * count
        self.outcomes: list[Outcome | InvalidRow | None] = [None] * count
        self.paid_by: list[str | None] | None = None

    def settle(self, settled: Settled) -> None:
        at = settled.number - self.start
        self.custom_ids[at], self.outcomes[at] = settled.custom_id, settled.outcome
        self.left -= 1
        if settled.paid_by is not None:
            if self.paid_by is None:
                self.paid_by = [None] * len(self.outcomes)
            self.paid_by[at] = settled.paid_by


class _Stream:
    """Rows in, pieces out; made and closed by who takes the pieces, in one thread."""

    def __init__(self, config: RunConfig, read: Iterator[RecordBatch], shape: _Shape) -> None:
        self._config = config
        self._read = read
        self._shape = shape
        in_flight = config.concurrency or MAX_CONCURRENCY * (config.processes or 1)
        self._most = -(-in_flight // PIECE_ROWS) + MORE_PIECES
        self._open: deque[_Piece] = deque()  # on their way, in order
        self._full = 0  # not yet taken
        self._room = asyncio.Event()
        self._out: queue.SimpleQueue[_Piece | BaseException | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._send())
        self._thread = threading.Thread(target=self._work, name="batchrun-answers", daemon=True)
        self._thread.start()

    # For the caller

    def batches(self) -> Iterator[RecordBatch]:
        while (piece := self._out.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield from self._shape.batches(piece)
            self._tell(self._taken)

    def close(self) -> None:
        self._tell(self._task.cancel)
        self._thread.join()

    def _tell(self, what: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: everything came
            self._loop.call_soon_threadsafe(what)  # type: ignore[arg-type]

    # In the thread

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._ended())

    async def _ended(self) -> None:
        """Run to the end, and say how it came."""
        end: BaseException | None = None
        try:
            await self._task
        except asyncio.CancelledError:
            return
        except BaseException as exc:
            end = exc
        # What was paid for goes out before the reason why there is no more.
        for piece in self._open:
            self._out.put(piece)
        self._out.put(end)

    async def _send(self) -> None:
        reading = ThreadPoolExecutor(1, "batchrun-read")
        try:
            async with settling(self._config, self._rows(reading)) as settled:
                async for each in settled:
                    self._settle(each)
        finally:
            # A source that hangs is left behind.
            reading.shutdown(wait=False, cancel_futures=True)

    async def _rows(self, reading: ThreadPoolExecutor) -> AsyncIterator[Row]:
        start = 0
        while True:
            while len(self._open) + self._full >= self._most:
                self._room.clear()
                await self._room.wait()
            found = await self._loop.run_in_executor(reading, self._next)
            if found is None:
                return
            record, rows = found
            self._open.append(_Piece(start, record))
            start += record.num_rows
            for row in rows:
                yield row

    def _next(self) -> tuple[RecordBatch, Sequence[Row]] | None:
        """In the thread that reads."""
        record = next(self._read, None)
        # What Arrow holds is never a line that cannot be read.
        return None if record is None else (record, cast("list[Row]", inputs.rows_of(record)))

    def _settle(self, settled: Settled) -> None:
        at = bisect_right(self._open, settled.number, key=attrgetter("start")) - 1
        self._open[at].settle(settled)
        while self._open and not self._open[0].left:
            self._full += 1
            self._out.put(self._open.popleft())

    def _taken(self) -> None:
        self._full -= 1
        self._room.set()
