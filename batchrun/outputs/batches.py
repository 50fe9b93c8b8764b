"""Rows with their answers as Arrow record batches, for a Parquet file or without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from batchrun.chat import CHAT, Api
from batchrun.outputs.columns import COLUMNS, Column
from batchrun.outputs.footer import FOOTER_KEY, SERIES_KEY
from batchrun.outputs.rows import Rows, Slice, cleaned, pieces, told
from batchrun.outputs.tally import OutputTally


class AnswerBatches:
    """Makes record batches of one ``schema``: carried columns, answer columns, ``more`` columns."""

    def __init__(
        self, carried: pa.Schema, response_body: bool, more: Sequence[Column] = ()
    ) -> None:
        self.columns = (*(COLUMNS if response_body else COLUMNS[:-1]), *more)
        own = [pa.field(column.name, column.type) for column in self.columns]
        ours = (FOOTER_KEY, SERIES_KEY)
        metadata = {k: v for k, v in (carried.metadata or {}).items() if k not in ours}
        self.schema = pa.schema([*carried, *own], metadata=metadata or None)

    def batch(self, rows: Rows, carried: pa.RecordBatch | None) -> pa.RecordBatch:
        """One piece as a record batch; ``carried`` has its other columns."""
        arrays = list(carried.columns) if carried is not None else []
        try:
            arrays += self._arrays(rows)
        except UnicodeEncodeError:
            arrays += self._arrays(cleaned(rows))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def batches(
        self, whole: Slice, tally: OutputTally, api: Api = CHAT
    ) -> Iterator[pa.RecordBatch]:
        """A slice as record batches of bounded size; rows without an outcome are left out."""
        for piece in pieces(whole):
            rows, carried = told(piece, tally, api)
            if rows.outcomes:
                yield self.batch(rows, carried)

    def _arrays(self, rows: Rows) -> list[pa.Array]:
        return [_array(column.values(rows), column.type) for column in self.columns]


def _array(values: Sequence[object] | pa.Array, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    first = values[0]
    if values.count(first) == len(values):  # most columns are of one value, or of none
        return pa.repeat(pa.scalar(first, kind), len(values))
    return pa.array(values, kind)
