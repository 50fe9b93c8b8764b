"""A published output of either format, recognised and read: the memory of the next run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa

from batchrun.chat import CHAT, Api
from batchrun.files import open_regular
from batchrun.outputs.footer import Footer
from batchrun.outputs.jsonl import Untyped, jsonl_footer, jsonl_outcomes, jsonl_slices
from batchrun.outputs.parquet import (
    parquet_file,
    parquet_footer,
    parquet_outcomes,
    parquet_slices,
)
from batchrun.outputs.rows import InvalidRow, Slice
from batchrun.outputs.target import reading
from batchrun.types import Outcome

_PARQUET: Final = b"PAR1"


def recognise(path: Path) -> Footer | None:
    """The footer of a file batchrun wrote; None for any other. LocalIOError when unreadable."""
    with reading(path), open(open_regular(path.resolve(), os.O_RDONLY), "rb") as file:
        return parquet_footer(path) if file.read(4) == _PARQUET else jsonl_footer(file)


def read_back(path: Path, api: Api = CHAT) -> Iterator[Outcome]:
    """Yield what a published file holds, in order, as a journal would hold it.

    Left out are rows of invalid input and rows whose ``request_hash`` has another version.
    ``occurrence`` is 0 throughout: numbering equal hashes is the caller's. An answer published
    without ``response_body`` comes with a body put together from its columns, ``rebuilt`` set.
    """
    with reading(path), path.open("rb") as raw:
        is_parquet = raw.read(4) == _PARQUET
    if not is_parquet:
        yield from jsonl_outcomes(path, api)
        return
    with parquet_file(path) as file:
        yield from parquet_outcomes(file, api)


def slices_of(path: Path, api: Api = CHAT) -> tuple[pa.Schema, Iterator[Slice]]:
    """A published Parquet file as what ``publish`` takes, to write it in another format."""
    schema, slices = parquet_slices(path, api)
    return schema, map(_placed, slices)


def untyped_slices(path: Path, api: Api = CHAT) -> Iterator[Untyped]:
    """A published JSONL file, likewise; the types of what it carries are still to be found."""
    return (each._replace(rows=_placed(each.rows)) for each in jsonl_slices(path, api))


# An invalid row is published as "file:line: reason"; published again it must say that once.
_PLACED: Final = re.compile(r"(.+?:\d+): (.*)", re.DOTALL)


def _placed(piece: Slice) -> Slice:
    sources, outcomes = list(piece.sources), list(piece.outcomes)
    for at, row in enumerate(outcomes):
        if type(row) is InvalidRow and (match := _PLACED.fullmatch(row.reason)):
            sources[at], outcomes[at] = match[1], InvalidRow(row.code, match[2])
    return piece._replace(sources=sources, outcomes=outcomes)


PARTIAL_SUFFIX = ".partial"


def partial_of(output: Path) -> Path:
    """Where ``collect`` writes what a run of ``output`` holds so far."""
    suffix = output.suffix or ".parquet"
    return output.with_name(f"{output.name.removesuffix(suffix)}{PARTIAL_SUFFIX}{suffix}")


def remove_partial(output: Path, run_id: str) -> Path | None:
    """Remove what ``collect`` wrote of this very run; the path of a partial file of another.

    A file that says nothing of the kind, or is reached through a link, is somebody else's.
    """
    path = partial_of(output)
    if path.is_symlink() or not path.is_file():
        return None
    footer = recognise(path)
    if footer is None or footer.complete or not footer.run_id:
        return None
    if footer.run_id != run_id:
        return path
    path.unlink(missing_ok=True)
    return None
