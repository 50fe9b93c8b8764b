"""The output as Parquet: row groups of bounded size, written and read back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.chat import Api
from batchrun.files import from_json, to_json
from batchrun.outputs.batches import AnswerBatches
from batchrun.outputs.columns import INSTANT, NAMES, PAID_BY, Column, settled, told_once
from batchrun.outputs.footer import FOOTER_KEY, SERIES_KEY, Footer, footer, footer_json
from batchrun.outputs.parsed import names_of
from batchrun.outputs.rows import ANSWERED, GROUP_ROWS, PIECE_ROWS, InvalidRow, Rows, Slice
from batchrun.outputs.target import Sink, reading
from batchrun.series import Series
from batchrun.types import Answer, Outcome, Usage

# A group is in memory thrice while it is written: as arrays, as pages, and compressed.
GROUP_BYTES = 12_000_000


class ParquetWriter:
    """Collects pieces into row groups and writes each group in one call, without the GIL."""

    def __init__(
        self,
        sink: Sink,
        carried: pa.Schema,
        response_body: bool,
        more: Sequence[Column] = (),
        series: Series | None = None,
    ) -> None:
        """``more`` columns stand after the answer columns; ``series`` is kept in the metadata."""
        self._series = series
        self._batches = AnswerBatches(carried, response_body, more)
        self._schema = self._batches.schema
        columns = self._batches.columns
        repeating = [*carried.names, *(each.name for each in columns if each.repeats)]
        self._writer = pq.ParquetWriter(
            sink,
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=repeating,
        )
        self._group: list[pa.RecordBatch] = []
        self._group_rows = self._group_bytes = 0

    def write(self, rows: Rows, carried: pa.RecordBatch | None) -> None:
        batch = self._batches.batch(rows, carried)
        size = batch.nbytes
        count = len(rows.outcomes)
        if self._group_rows + count > GROUP_ROWS or self._group_bytes + size > GROUP_BYTES:
            self._close_group()
        self._group.append(batch)
        self._group_rows += count
        self._group_bytes += size

    def finish(self, footer: Footer) -> None:
        self._close_group()
        told = {FOOTER_KEY: footer_json(footer)}
        if self._series is not None:
            told[SERIES_KEY] = to_json(self._series)
        self._writer.add_key_value_metadata(told)
        self._writer.close()

    def _close_group(self) -> None:
        if self._group:
            table = pa.Table.from_batches(self._group, self._schema)
            self._group = []
            self._group_rows = self._group_bytes = 0
            self._writer.write_table(table, row_group_size=GROUP_ROWS)


def parquet_footer(path: Path) -> Footer | None:
    try:
        with path.open("rb") as raw:
            metadata = pq.read_metadata(raw).metadata or {}
    except pa.ArrowException:
        return None
    return footer(metadata.get(FOOTER_KEY, b""))


def parquet_series(path: Path) -> Series | None:
    """How the runs of a published file went over time, if it says so."""
    with reading(path), path.open("rb") as raw:
        text = (pq.read_metadata(raw).metadata or {}).get(SERIES_KEY)
    try:
        return None if text is None else from_json(text, Series)
    except (ValueError, RecursionError):
        return None


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    with (
        reading(path),
        path.open("rb") as raw,
        pq.ParquetFile(raw, pre_buffer=False, buffer_size=256_000) as file,
    ):
        yield file


_BACK: Final = NAMES[1:]  # the custom_id is the input's to say
# What an answer may be put together from; its further members say how it was read.
_SAID: Final = ("response", "finish_reason", "response_model", "usage", "reasoning", "tool_calls")


def parquet_outcomes(
    file: pq.ParquetFile, api: Api, groups: list[int] | None = None
) -> Iterator[Outcome]:
    """What a published file holds, in order, or some of its row groups: see ``told_once``."""
    present = [name for name in _BACK if name in file.schema_arrow.names]
    dedupes = _dedupes(file)
    read = [*present, PAID_BY.name] if dedupes else present
    for batch in file.iter_batches(PIECE_ROWS, row_groups=groups, columns=read, use_threads=False):
        paid_by: list[str | None] = [None] * batch.num_rows
        if dedupes:
            paid_by = batch.column(PAID_BY.name).to_pylist()
            attempts = batch.column("attempts").to_pylist()
            kept = [payer is None or n > 0 for payer, n in zip(paid_by, attempts, strict=True)]
            batch = batch.filter(pa.array(kept, pa.bool_()))
            paid_by = [payer for payer, keep in zip(paid_by, kept, strict=True) if keep]
        yield from told_once(_settled(batch, present, api), paid_by)


def own_batches(file: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A published file without the rows that are copies of others."""
    dedupes = _dedupes(file)
    read = [*columns, PAID_BY.name] if dedupes else columns
    for batch in file.iter_batches(rows, columns=read, use_threads=False):
        yield batch.filter(batch.column(PAID_BY.name).is_null()) if dedupes else batch


def _dedupes(file: pq.ParquetFile) -> bool:
    known = footer((file.metadata.metadata or {}).get(FOOTER_KEY, b""))
    return known is not None and known.dedupes


def parquet_slices(path: Path, api: Api) -> tuple[pa.Schema, Iterator[Slice]]:
    """A published file as what ``publish`` takes, with the schema of the carried columns."""
    with reading(path), path.open("rb") as raw:
        schema = pq.read_schema(raw)
    known = parquet_footer(path)
    taken = names_of(known or Footer())
    fields = [field for field in schema if field.name not in taken]
    carried = pa.schema(fields, metadata=schema.metadata)
    dedupes = known is not None and known.dedupes
    return carried, _slices(path, carried.names, api, dedupes=dedupes)


def _slices(path: Path, carried: list[str], api: Api, *, dedupes: bool) -> Iterator[Slice]:
    done = 0
    with parquet_file(path) as file:
        for batch in file.iter_batches(PIECE_ROWS, use_threads=False):
            names = batch.schema.names
            outcomes = _settled(batch, [name for name in _BACK if name in names], api)
            sources = [f"{path}:{done + at}" for at in range(1, batch.num_rows + 1)]
            done += batch.num_rows
            custom_ids = batch.column("custom_id").to_pylist()
            paid_by = batch.column(PAID_BY.name).to_pylist() if dedupes else None
            yield Slice(batch.select(carried), custom_ids, sources, outcomes, paid_by)


def _settled(batch: pa.RecordBatch, names: Collection[str], api: Api) -> list[Outcome | InvalidRow]:
    """A row published without ``response_body`` gets one put together from its columns."""
    table = {name: back_values(batch.column(name)) for name in names}
    absent = [None] * batch.num_rows
    usages = list(map(Usage, *(table.get(name, absent) for name in Usage.__struct_fields__)))
    texts = table.get("response_body", absent)
    kinds = table.get("error_kind", absent)
    rebuilt = [
        text is None and (status == "ok" or kind in ANSWERED)
        for text, status, kind in zip(texts, table["status"], kinds, strict=True)
    ]
    bodies = [(text or "").encode() for text in texts]
    if any(rebuilt):
        said = {**table, "usage": usages}
        answers = map(Answer, *(said.get(name, absent) for name in _SAID))
        for at, answer in enumerate(answers):
            if rebuilt[at]:
                bodies[at] = api.rebuild(answer)
    return settled(table, usages, bodies, rebuilt)


def back_values(column: pa.Array) -> list[Any]:
    """The values as Python has them; instants as Unix milliseconds."""
    if pa.types.is_timestamp(column.type):
        # A cast would load another library, in the middle of a run.
        column = (column if column.type == INSTANT else column.cast(INSTANT)).view(pa.int64())
    return cast("list[Any]", column.to_pylist())


def table_of(source: Path | BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
    """A published file as one Arrow table, all of it or some of its columns."""
    if not isinstance(source, Path):
        return pq.ParquetFile(source).read(columns)
    with parquet_file(source) as file:
        return file.read(columns)
