"""What cannot be read twice (stdin, rows of a Python program) is kept as a file of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.errors import LocalIOError, UsageError
from batchrun.files import writing
from batchrun.inputs.rows import READ_BYTES
from batchrun.journal import StateDir

RowsOrTable: TypeAlias = Iterable[Mapping[str, object]] | pa.Table


def spool(source: BinaryIO | RowsOrTable, state: StateDir) -> Path:
    """Keep an input that cannot be read twice: a stream, dicts, or an Arrow table.

    The file appears whole, where ``StateDir.spool`` finds it.
    """
    if isinstance(source, pa.Table):
        path = _kept(state.table_spool, partial(pq.write_table, source))
    elif hasattr(source, "read"):
        path = _kept(state.rows_spool, partial(_copy, cast("BinaryIO", source)))
    else:
        path = _kept(state.rows_spool, partial(_write_rows, source))
    state.forget_spools(but=path)
    return path


def _kept(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """``path``, written whole or not at all, and durable."""
    temporary = path.with_name(f".spool-{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with writing(path, temporary, durable=True) as file:
            write(file)
    except OSError as exc:
        raise LocalIOError(f"{path}: cannot keep the input there: {exc.strerror or exc}") from exc
    return path


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while piece := source.read(READ_BYTES):
        target.write(piece)


def _write_rows(rows: Iterable[Mapping[str, object]], target: BinaryIO) -> None:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UsageError(f"row {number}: a dict is needed, not {type(row).__name__}")
        try:
            line = json.dumps(row, separators=(",", ":"), default=_plain)
        except (TypeError, ValueError, RecursionError) as exc:
            raise UsageError(f"row {number}: cannot be written as JSON: {exc}") from exc
        target.write(line.encode() + b"\n")


def _plain(value: object) -> object:
    """What JSON lacks, as JSON: numpy's scalars as numbers, dates as ISO text."""
    item = getattr(value, "item", None)
    return item() if callable(item) else msgspec.to_builtins(value)
