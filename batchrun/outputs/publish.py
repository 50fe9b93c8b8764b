"""Rows to one finished file: whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec
import pyarrow as pa

from batchrun.chat import CHAT, Api
from batchrun.config import OutputFormat
from batchrun.outputs.columns import Column
from batchrun.outputs.csv import CsvWriter
from batchrun.outputs.footer import Footer
from batchrun.outputs.jsonl import JsonlWriter
from batchrun.outputs.parquet import ParquetWriter
from batchrun.outputs.rows import Rows, Slice, pieces, told
from batchrun.outputs.tally import OutputTally
from batchrun.outputs.target import Sink, Target, replacing
from batchrun.series import Series

MAX_FOOTER_ERRORS = 50


class _Writer(Protocol):
    def write(self, rows: Rows, carried: pa.RecordBatch | None) -> None: ...

    def finish(self, footer: Footer) -> None: ...


def publish(
    target: Path | Target | BinaryIO,
    fmt: OutputFormat,
    carried_schema: pa.Schema,
    slices: Iterable[Slice],
    footer: Footer,
    tally: OutputTally,
    *,
    response_body: bool,
    more: Sequence[Column] = (),
    api: Api = CHAT,
    series: Series | None = None,
) -> Footer:
    """Write every slice, in order, and return the footer with the counts filled in.

    ``more`` columns follow those that every output has; a Parquet file keeps ``series`` too. A path
    changes in one step, when all is written and durable: a reader sees the old file or the new
    one. What is there by then and was not when the Target was made, or a Path given, is never
    replaced. On any failure the old file stays and the temporary is removed. What cannot be written
    is a LocalIOError naming the path; what ``slices`` raises passes as it is. A stream is written
    as the rows come and flushed at the end; a BrokenPipeError of it passes as it is.
    """
    if isinstance(target, Path):
        target = Target.at(target)
    if not isinstance(target, Target):
        sink = Sink(target, "standard output")
        return _write(
            sink, fmt, carried_schema, slices, footer, tally, response_body, more, api, series
        )
    with replacing(target) as sink:
        return _write(
            sink, fmt, carried_schema, slices, footer, tally, response_body, more, api, series
        )


def _write(
    sink: Sink,
    fmt: OutputFormat,
    carried_schema: pa.Schema,
    slices: Iterable[Slice],
    footer: Footer,
    tally: OutputTally,
    response_body: bool,
    more: Sequence[Column],
    api: Api,
    series: Series | None,
) -> Footer:
    writer: _Writer
    if fmt == "parquet":
        writer = ParquetWriter(sink, carried_schema, response_body, more, series)
    elif fmt == "csv":
        writer = CsvWriter(sink, carried_schema, more)
    else:
        writer = JsonlWriter(sink, response_body, api, more)
    try:
        for whole in slices:
            for piece in pieces(whole):
                rows, carried = told(piece, tally, api)
                if rows.outcomes:
                    writer.write(rows, carried)
        footer = _filled_in(footer, tally)
        writer.finish(footer)
    except BaseException:
        # pyarrow writes a footer when its writer is collected; by then nobody wants it.
        sink.discard()
        raise
    sink.flush()
    return footer


def _filled_in(footer: Footer, tally: OutputTally) -> Footer:
    return msgspec.structs.replace(
        footer,
        rows=tally.rows,
        tokens=tally.tokens,
        errors=tally.errors[:MAX_FOOTER_ERRORS],
        request_models=tally.request_models,
    )
