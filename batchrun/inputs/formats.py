"""What an input can be: every format in one table. A new one is a room beside this and a line here.

Its name, for people and in file names, stands in ``config.INPUT_FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from batchrun.config import (
    COMPRESSED_SUFFIXES,
    INPUT_FORMATS,
    INPUT_SUFFIXES,
    Compression,
    InputFormat,
)
from batchrun.inputs import csv, jsonl, parquet
from batchrun.inputs.carried import Carried, TableColumns
from batchrun.inputs.rows import Batch, Head, InputFile

HEAD_ROWS: Final = 1000


class _Format(NamedTuple):
    head: Callable[[InputFile, int], Head]
    read: Callable[[InputFile, Collection[str] | None, Carried | None], Iterator[Batch]]
    # A table knows its columns and their types; else they are found in the values.
    columns_of: Callable[[InputFile], TableColumns] | None = None
    # Whether a file is an output of batchrun; None: outputs are never of this format.
    bears_our_mark: Callable[[Path], bool] | None = None
    may_be_packed: bool = True


_TEXT_TABLE: Final = _Format(csv.head, csv.read, csv.columns_of)


_FORMATS: Final[Mapping[InputFormat, _Format]] = {
    "jsonl": _Format(jsonl.head, jsonl.read, bears_our_mark=jsonl.bears_our_mark),
    "csv": _TEXT_TABLE,
    "tsv": _TEXT_TABLE,
    "parquet": _Format(
        parquet.head,
        parquet.read,
        parquet.columns_of,
        parquet.bears_our_mark,
        may_be_packed=False,
    ),
}


def head(file: InputFile, rows: int = HEAD_ROWS) -> Head:
    """The columns of a file and its first good rows: what ``chat.detect`` decides from.

    Columns are those of a table's schema or header, or the keys of the JSONL rows, in order of
    appearance. Fewer rows are read of a table, and of lines that are very long.
    """
    return _FORMATS[file.format].head(file, rows)


def read(
    file: InputFile,
    *,
    columns: Collection[str] | None = None,
    carry: Carried | None = None,
) -> Iterator[Batch]:
    """The rows of a file in batches; a file without rows gives one empty batch.

    ``columns`` are those that ``rows`` must hold (None: all); a table reads no others. In a table
    a null is an absent member, at every depth. With ``carry``, ``carried`` holds its columns.
    LocalIOError when the file cannot be read to its end.
    """
    return _FORMATS[file.format].read(file, columns, carry)


def columns_of(file: InputFile) -> TableColumns | None:
    """What a table says of its columns, at the cost of opening it; None: look at the values."""
    of_format = _FORMATS[file.format].columns_of
    return None if of_format is None else of_format(file)


def by_name(path: Path) -> tuple[InputFormat | None, Compression]:
    """The format and the packing that a file's name says."""
    suffix = path.suffix.lower()
    compression = COMPRESSED_SUFFIXES.get(suffix, "")
    inner = Path(path.stem) if compression else path
    format_ = INPUT_SUFFIXES.get(inner.suffix.lower())
    if compression and format_ is not None and not may_be_packed(format_):
        return None, compression
    return format_, compression


def may_be_packed(format_: InputFormat) -> bool:
    return _FORMATS[format_].may_be_packed


def made_by_batchrun(path: Path) -> bool:
    """Whether the file is an output, or one that made way for a newer."""
    format_, compression = by_name(path.with_name(path.name.removesuffix(".bak")))
    if format_ is None or compression:
        return False
    bears_mark = _FORMATS[format_].bears_our_mark
    return bears_mark is not None and bears_mark(path)


def labels() -> str:
    """``JSONL, CSV, TSV or Parquet``."""
    return _either([each.label for each in INPUT_FORMATS.values()])


def suffixes() -> str:
    """``.jsonl, .ndjson, .csv, .tsv or .parquet``."""
    return _either(list(INPUT_SUFFIXES))


def file_names() -> str:
    """``.jsonl, .ndjson, .csv or .tsv (also .gz, .zst) or .parquet``."""
    packed = [suffix for suffix, name in INPUT_SUFFIXES.items() if may_be_packed(name)]
    others = [suffix for suffix in INPUT_SUFFIXES if suffix not in packed]
    return " or ".join((f"{_either(packed)} (also {', '.join(COMPRESSED_SUFFIXES)})", *others))


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
