"""Arrow data of a program as record batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from batchrun.errors import UsageError
from batchrun.inputs.rows import BATCH_BYTES
from batchrun.types import ArrowStream
from batchrun.words import kind


def record_batches(
    source: ArrowStream | Iterable[object], most_rows: int
) -> Iterator[pa.RecordBatch]:
    """The record batches of a table or stream, or of an iterable of such, in order.

    Each has at most ``most_rows`` rows and about 4 MB. UsageError for what is no Arrow data, and
    for a batch whose columns are not those of the first; one without a value may be of type null.
    """
    schema = None
    for record in _whole(source):
        schema = schema or record.schema
        if not record.schema.equals(schema):
            record = _like_first(record, schema)
        rows = record.num_rows
        most = max(1, min(most_rows, rows * BATCH_BYTES // max(1, record.nbytes)))
        for start in range(0, rows, most):
            yield record.slice(start, most)


def _like_first(record: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if record.schema.names != schema.names:
        odd = sorted({*record.schema.names} ^ {*schema.names})
        what = f"column {odd[0]!r} is in one and not in the other" if odd else "their order differs"
        raise UsageError(f"a batch has not the columns of the first: {what}")
    for field, first in zip(record.schema, schema, strict=True):
        if field.type != first.type and not pa.types.is_null(field.type):
            raise UsageError(
                f"column {field.name!r} is {field.type} in a batch and {first.type} in the first"
            )
    return record.cast(schema)


def _whole(source: ArrowStream | Iterable[object]) -> Iterator[pa.RecordBatch]:
    if hasattr(source, "__arrow_c_stream__"):
        yield from pa.RecordBatchReader.from_stream(source)
        return
    for each in source:
        if isinstance(each, pa.RecordBatch):
            yield each
        elif hasattr(each, "__arrow_c_stream__"):
            yield from pa.RecordBatchReader.from_stream(each)
        else:
            raise UsageError(f"{kind(each)} ({type(each).__name__}) is no Arrow data")
