"""Answers whose rows are gone from the input, as a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa

from batchrun import chat
from batchrun.chat import CHAT, Api
from batchrun.outputs.columns import INSTANT
from batchrun.outputs.parquet import back_values, own_batches, parquet_file, parquet_outcomes
from batchrun.outputs.rows import GROUP_ROWS, Slice
from batchrun.types import Outcome

ASIDE_SCHEMA: Final[pa.Schema] = pa.schema([("unused_since", INSTANT)])
_MARK_COLUMNS = ("request_hash", "finished_at", "request_id", "unused_since")


class Mark(NamedTuple):
    """What tells an answer set aside from every other, and when its row was gone."""

    hash: bytes
    finished_at_ms: int
    request_id: str
    since_ms: int


def aside_slice(outcomes: Sequence[Outcome], since_ms: Sequence[int]) -> Slice:
    """Answers whose rows are gone, to be published with ASIDE_SCHEMA."""
    since = pa.array(since_ms, INSTANT)
    hashes = [chat.format_hash(outcome.hash) for outcome in outcomes]
    carried = pa.RecordBatch.from_arrays([since], schema=ASIDE_SCHEMA)
    return Slice(carried, hashes, hashes, outcomes)


def read_marks(path: Path) -> Iterator[list[Mark]]:
    """The marks of the rows that ``read_back`` gives of a file set aside, in the same order."""
    with parquet_file(path) as file:
        for batch in file.iter_batches(GROUP_ROWS, columns=_MARK_COLUMNS, use_threads=False):
            hashes, ended, ids, since = (back_values(batch[name]) for name in _MARK_COLUMNS)
            digests = [chat.parse_hash(text or "") for text in hashes]
            yield [
                Mark(digest, at or 0, identity or "", left or 0)
                for digest, at, identity, left in zip(digests, ended, ids, since, strict=True)
                if digest is not None
            ]


def answers_in(path: Path) -> Iterator[Mark]:
    """What marks each answer of a published Parquet file, in order."""
    with parquet_file(path) as file:
        names = ["status", *_MARK_COLUMNS[:3]]
        for batch in own_batches(file, GROUP_ROWS, names):
            for status, text, ended, identity in zip(
                *(back_values(batch[name]) for name in names), strict=True
            ):
                digest = chat.parse_hash(text or "")
                if status == "ok" and digest is not None:
                    yield Mark(digest, ended or 0, identity or "", 0)


def read_wanted(
    path: Path, is_wanted: Callable[[bytes], bool], api: Api = CHAT
) -> Iterator[list[Outcome]]:
    """What ``read_back`` gives of a Parquet file, only of wanted hashes; a row group at a time."""
    with parquet_file(path) as file:
        for group in range(file.num_row_groups):
            hashes = file.read_row_group(group, columns=["request_hash"], use_threads=False)
            texts = hashes.column(0).to_pylist()
            digests = map(chat.parse_hash, filter(None, texts))
            wanted = {digest for digest in digests if digest is not None and is_wanted(digest)}
            if wanted:
                found = parquet_outcomes(file, api, [group])
                yield [outcome for outcome in found if outcome.hash in wanted]
