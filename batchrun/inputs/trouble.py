"""Whatever a library says of a file that cannot be read, as one line for a person."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from batchrun.errors import LocalIOError
from batchrun.inputs.rows import InputFile


@contextmanager
def mapped_errors(file: InputFile) -> Iterator[None]:
    """The libraries' errors become one line that names the file and what to do."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise _packed_badly(file, cut=isinstance(exc, EOFError)) from exc
    except MemoryError as exc:
        what = "takes more memory than there is; or it is damaged, and says that it does"
        raise LocalIOError(f"{file.name}: {what}") from exc
    # A damaged footer may hold names that are no text.
    except (pa.ArrowException, UnicodeDecodeError) as exc:
        raise LocalIOError(f"{file.name}: {_table_trouble(file, exc)}") from exc
    except OSError as exc:
        if exc.errno is not None:
            raise unreadable(file.name, exc) from exc
        if file.compression:
            raise _packed_badly(file, cut="Truncated" in str(exc)) from exc
        raise LocalIOError(f"{file.name}: {_table_trouble(file, exc)}") from exc


def _packed_badly(file: InputFile, *, cut: bool) -> LocalIOError:
    what = "is cut short" if cut else f"is not whole {file.compression} data"
    return LocalIOError(f"{file.name}: {what}; copy or write it again")


def unreadable(name: str, exc: OSError) -> LocalIOError:
    return LocalIOError(f"{name}: cannot be read: {exc.strerror or exc}")


def _table_trouble(file: InputFile, exc: BaseException) -> str:
    """What is wrong with a Parquet file: its end says whether it is whole."""
    try:
        with file.path.open("rb") as raw:
            raw.seek(-min(4, file.path.stat().st_size), os.SEEK_END)
            end = raw.read(4)
    except OSError:
        end = b""
    if end == b"PARE":
        return "is encrypted Parquet, which cannot be read; decrypt it first"
    if end != b"PAR1":
        return "is cut short (a Parquet file without its end); copy or write it again"
    first_line = str(exc).strip().splitlines()[0][:200] if str(exc).strip() else type(exc).__name__
    return f"is damaged Parquet ({first_line}); copy or write it again"
