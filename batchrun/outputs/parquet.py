"""The output as Parquet: row groups of bounded size, strings without a dictionary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun import chat
from batchrun.outputs.footer import FOOTER_KEY, Footer, footer_json
from batchrun.outputs.rows import GROUP_ROWS, Rows, clean
from batchrun.outputs.tally import INVALID_INPUT
from batchrun.outputs.target import Sink
from batchrun.types import Outcome

# A group is in memory thrice while it is written: as arrays, as pages, and compressed.
GROUP_BYTES = 12_000_000


_TYPES: Final[Mapping[str, pa.DataType]] = {
    **dict.fromkeys(chat.ANSWER_COLUMNS, pa.string()),
    **dict.fromkeys(
        ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens"),
        pa.int64(),
    ),
    **dict.fromkeys(("http_status", "attempts", "in_doubt_attempts"), pa.int32()),
    **dict.fromkeys(("latency_s", "ttft_s"), pa.float64()),
    "finished_at": pa.timestamp("ms", tz="UTC"),
}


# Nearly every value of these differs: a dictionary would be built, found useless and dropped.
_DISTINCT = frozenset(
    {"custom_id", "response", "reasoning", "tool_calls", "error_message", "latency_s", "ttft_s"}
    | {"request_id", "finished_at", "request_hash", "response_body"}
)


_CELL_TYPES: Final = [_TYPES[name] for name in chat.ANSWER_COLUMNS[:-1]]


class ParquetWriter:
    """Collects pieces into row groups and writes each group in one call, without the GIL."""

    def __init__(self, sink: Sink, carried: pa.Schema, response_body: bool) -> None:
        names = chat.ANSWER_COLUMNS if response_body else chat.ANSWER_COLUMNS[:-1]
        own = [pa.field(name, _TYPES[name]) for name in names]
        metadata = {k: v for k, v in (carried.metadata or {}).items() if k != FOOTER_KEY}
        self._schema = pa.schema([*carried, *own], metadata=metadata or None)
        self._response_body = response_body
        self._writer = pq.ParquetWriter(
            sink,
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[name for name in self._schema.names if name not in _DISTINCT],
        )
        self._group: list[pa.RecordBatch] = []
        self._group_rows = self._group_bytes = 0

    def write(self, rows: Rows, carried: pa.RecordBatch | None) -> None:
        arrays = list(carried.columns) if carried is not None else []
        arrays += map(_array, _columns(rows), _CELL_TYPES)
        if self._response_body:
            arrays.append(_bodies(rows.outcomes))
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        size = batch.nbytes
        count = len(rows.outcomes)
        if self._group_rows + count > GROUP_ROWS or self._group_bytes + size > GROUP_BYTES:
            self._close_group()
        self._group.append(batch)
        self._group_rows += count
        self._group_bytes += size

    def finish(self, footer: Footer) -> None:
        self._close_group()
        self._writer.add_key_value_metadata({FOOTER_KEY: footer_json(footer)})
        self._writer.close()

    def _close_group(self) -> None:
        if self._group:
            table = pa.Table.from_batches(self._group, self._schema)
            self._group = []
            self._group_rows = self._group_bytes = 0
            self._writer.write_table(table, row_group_size=GROUP_ROWS)


def _columns(rows: Rows) -> list[Sequence[object]]:
    """The values in the order of ANSWER_COLUMNS, but for the last: the body."""
    outcomes, tokens, said = rows.outcomes, rows.tokens, rows.answers
    return [
        rows.custom_ids,
        ["ok" if o.kind == "ok" else "error" for o in outcomes],
        said.responses,
        said.finish_reasons,
        [o.model or None for o in outcomes],
        said.response_models,
        *tokens,
        said.reasonings,
        said.tool_calls,
        *_error_columns(rows),
        [o.http_status for o in outcomes],
        [o.attempts for o in outcomes],
        [o.in_doubt for o in outcomes],
        [o.latency_s for o in outcomes],
        [o.ttft_s for o in outcomes],
        [o.request_id or None for o in outcomes],
        [o.finished_at_ms or None for o in outcomes],
        chat.format_hashes([o.hash for o in outcomes]),
    ]


def _error_columns(rows: Rows) -> Iterable[Sequence[object]]:
    """Kind, code and message; null where a row is ok."""
    failed = [None if o.kind == "ok" else o for o in rows.outcomes]
    if failed.count(None) == len(failed):
        return failed, failed, failed
    return (
        [o and (o.kind if o.hash else INVALID_INPUT) for o in failed],
        [o and (o.code or None) for o in failed],
        [o and (text or None) for o, text in zip(failed, rows.messages, strict=True)],
    )


def _array(values: Sequence[object], kind: pa.DataType) -> pa.Array:
    first = values[0]
    try:
        if values.count(first) == len(values):  # most columns are of one value, or of none
            return pa.repeat(pa.scalar(first, kind), len(values))
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([clean(v) if isinstance(v, str) else v for v in values], kind)


def _bodies(outcomes: Sequence[Outcome]) -> pa.Array:
    """The column response_body; a body put together from columns is not the endpoint's."""
    bodies = [o.body if o.body and not o.rebuilt else None for o in outcomes]
    try:
        return pa.array(bodies, pa.string())  # checks the UTF-8 and copies, no text in between
    except pa.ArrowInvalid:
        texts = [None if body is None else chat.body_text(body) for body in bodies]
        return pa.array(texts, pa.string())
