"""Answers as CSV, for spreadsheets. A copy only: it cannot say what it is made of."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa

from batchrun.chat import json_text
from batchrun.outputs.columns import COLUMNS, INSTANT, Column
from batchrun.outputs.footer import Footer
from batchrun.outputs.rows import Rows, cleaned
from batchrun.outputs.target import Sink

BYTE_ORDER_MARK: Final = "\ufeff"  # without it Excel takes UTF-8 for something else


class CsvWriter:
    """RFC 4180 after a byte order mark; nulls are empty, nested values JSON. The endpoint's whole
    reply is left out: it is longer than a spreadsheet's cell.
    """

    def __init__(self, sink: Sink, carried: pa.Schema, more: Sequence[Column] = ()) -> None:
        self._sink = sink
        self._columns = (*COLUMNS[:-1], *more)
        names = [*carried.names, *(column.name for column in self._columns)]
        self._write_rows(BYTE_ORDER_MARK, [names])

    def write(self, rows: Rows, carried: pa.RecordBatch | None) -> None:
        columns = [] if carried is None else [column.to_pylist() for column in carried.columns]
        rows = cleaned(rows)
        for column in self._columns:
            values = column.values(rows)
            values = values.to_pylist() if isinstance(values, pa.Array) else values
            columns.append(list(map(_instant, values)) if column.type == INSTANT else list(values))
        self._write_rows("", [list(map(_cell, row)) for row in zip(*columns, strict=True)])

    def finish(self, footer: Footer) -> None:
        """There is no place for it."""

    def _write_rows(self, start: str, rows: Sequence[Sequence[object]]) -> None:
        text = io.StringIO(start)
        text.seek(0, io.SEEK_END)
        csv.writer(text).writerows(rows)
        self._sink.write(text.getvalue().encode("utf-8", "replace"))


def _instant(unix_ms: object) -> str | None:
    if not isinstance(unix_ms, int) or not unix_ms:
        return None
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        return json_text(value)
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    return value
