"""A file's bytes, whatever packs them; and what stands in the way of reading them, in one line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import pyarrow as pa

from batchrun.config import Compression
from batchrun.errors import LocalIOError, UsageError
from batchrun.inputs import foreign
from batchrun.inputs.rows import READ_BYTES, InputFile


class _Packing(NamedTuple):
    magic: bytes
    label: str


_PACKINGS: Final[Mapping[Compression, _Packing]] = {
    "gz": _Packing(b"\x1f\x8b", "gzip data"),
    "zst": _Packing(b"\x28\xb5\x2f\xfd", "zstd data"),
}


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@contextmanager
def opened(file: InputFile) -> Iterator[_Stream]:
    """The file's bytes, unpacked. Errors of what is packed are for ``mapped_errors``."""
    with file.path.open("rb", buffering=READ_BYTES) as raw:
        if not file.compression:
            yield raw
            return
        start = raw.read(4)
        raw.seek(0)
        if not start:
            raise EOFError("not even a header")
        if compression_of(start) != file.compression:
            raise refusal(file, _PACKINGS[file.compression].label, raw.read(foreign.HEAD_BYTES))
        if file.compression == "gz":
            with gzip.open(raw) as unpacked:
                yield io.BufferedReader(unpacked, READ_BYTES)
        else:
            with pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as unpacked:
                yield unpacked


def refusal(file: InputFile, claimed: str, start: bytes, otherwise: str = "") -> UsageError:
    """What to do about a file that is not what its name says."""
    return foreign.refusal(typed(file), file.name, claimed, start, otherwise)


def typed(file: InputFile) -> Path | None:
    """The file as a user can name it; None for a spool, which came through a pipe."""
    return None if file.name == file.path.stem else file.path


def start_of(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(foreign.HEAD_BYTES)
    except OSError as exc:
        raise unreadable(name, exc) from exc


def compression_of(start: bytes) -> Compression:
    """What packs a file, by its first bytes; its name has no say."""
    return next((kind for kind, each in _PACKINGS.items() if start.startswith(each.magic)), "")


@contextmanager
def mapped_errors(file: InputFile) -> Iterator[None]:
    """The libraries' errors become one line that names the file and what to do.

    What the system has no number for, and no packing explains, is the format's to explain.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise _packed_badly(file, cut=isinstance(exc, EOFError)) from exc
    except MemoryError as exc:
        what = "takes more memory than there is; or it is damaged, and says that it does"
        raise LocalIOError(f"{file.name}: {what}") from exc
    except OSError as exc:
        if exc.errno is not None:
            raise unreadable(file.name, exc) from exc
        if file.compression:
            raise _packed_badly(file, cut="Truncated" in str(exc)) from exc
        raise


def _packed_badly(file: InputFile, *, cut: bool) -> LocalIOError:
    what = "is cut short" if cut else f"is not whole {file.compression} data"
    return LocalIOError(f"{file.name}: {what}; copy or write it again")


def unreadable(name: str, exc: OSError) -> LocalIOError:
    return LocalIOError(f"{name}: cannot be read: {exc.strerror or exc}")
