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
from batchrun.types import ArrowStream

RowsOrTable: TypeAlias = Iterable[Mapping[str, object]] | ArrowStream


def spool(source: BinaryIO | RowsOrTable, state: StateDir) -> Path:
    """Keep an input that cannot be read twice: a stream, dicts, or an Arrow table or stream.

    The file appears whole, where ``StateDir.spool`` finds it.
    """
    if hasattr(source, "__arrow_c_stream__"):
        path = _kept(state.table_spool, partial(_write_table, cast("ArrowStream", source)))
    elif hasattr(source, "read"):
        path = _kept(state.rows_spool, partial(_copy, cast("BinaryIO", source)))
    else:
        path = _kept(
            state.rows_spool, partial(_write_rows, cast("Iterable[Mapping[str, object]]", source))
        )
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


def _write_table(source: ArrowStream, target: BinaryIO) -> None:
    """Batch by batch; types that Parquet has not become those nearest to them."""
    try:
        reader = pa.RecordBatchReader.from_stream(source)
        schema = pa.schema(
            [field.with_type(_stored(field.type)) for field in reader.schema],
            metadata=reader.schema.metadata,
        )
        with pq.ParquetWriter(target, schema) as writer:
            for batch in reader:
                writer.write_batch(batch if batch.schema == schema else batch.cast(schema))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as exc:
        raise UsageError(f"the table cannot be kept as Parquet: {exc}") from exc


def _stored(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_stored(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_stored(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_stored(kind.value_type)))
    return kind


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
