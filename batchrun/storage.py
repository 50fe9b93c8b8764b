"""Files in object storage: found, fetched, put in place. Everything else works on local files.

Addresses are those of ``pyarrow.fs``: ``s3://``, ``gs://``, ``abfss://``, with its options behind a
``?``. Credentials come from where the libraries of each storage look for them, never from an
address. An object is there whole or not at all: it appears when its last part has arrived.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
from msgspec import Struct

from batchrun.addresses import address_of
from batchrun.errors import LocalIOError, UsageError
from batchrun.files import create

_WILD: Final = re.compile(r"[*?\[]")
_PIECE_BYTES: Final = 4 * 2**20
_GIVEN_UP: Final[list[object]] = []


class ObjectSeen(Struct, frozen=True):
    """What tells whether an object is still the one that was looked at."""

    size_bytes: int
    modified_ns: int


class Found(NamedTuple):
    """An object, and where it stands below what was asked for."""

    address: str
    below: str  # "part-0.parquet", "day=1/part-0.parquet"
    seen: ObjectSeen


class _Place(NamedTuple):
    files: pafs.FileSystem
    path: str
    base: str  # of it, what the address names before the key


@contextlib.contextmanager
def _at(address: str) -> Iterator[_Place]:
    """The file system and the path of an address; what goes wrong becomes an error of ours."""
    parts = address_of(address)
    try:
        # The key is given as it is: as part of a URI some of its letters would be others.
        files, base = pafs.FileSystem.from_uri(parts.at(""))
        base = base.strip("/")
        yield _Place(files, f"{base}/{parts.key}".strip("/"), base)
    except (pa.ArrowInvalid, ValueError) as exc:
        raise UsageError(f"{address}: {_in_a_line(exc)}") from exc
    except (OSError, pa.ArrowException) as exc:
        raise LocalIOError(f"{address}: {_in_a_line(exc)}") from exc


def _in_a_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__


def seen(address: str) -> ObjectSeen | None:
    """None where no object is. LocalIOError where nobody can tell, UsageError for no address."""
    with _at(address) as place:
        return _seen(place.files.get_file_info(place.path))


def _seen(info: pafs.FileInfo) -> ObjectSeen | None:
    if info.type != pafs.FileType.File:
        return None
    return ObjectSeen(info.size, info.mtime_ns or 0)


def find(address: str) -> list[Found]:
    """The object of that address, those that match it as a pattern, or all below it, by name.

    What is hidden (a part of its path begins with ``.`` or ``_``) is left out of the last two.
    UsageError where there is none.
    """
    with _at(address) as place:
        info = place.files.get_file_info(place.path)
        if (one := _seen(info)) is not None:
            return [Found(address, PurePosixPath(place.path).name, one)]
        found = _matching(place) if _WILD.search(place.path) else _below(place, place.path)
    if not found:
        raise UsageError(f"{address}: no such object, and none below it")
    parts = address_of(address)
    return [
        Found(parts.at(path.removeprefix(place.base).lstrip("/")), below, at)
        for path, below, at in found
    ]


def check_bucket(address: str) -> None:
    """UsageError where the bucket of an address is known not to be there."""
    try:
        with _at(address) as place:
            bucket = place.path.partition("/")[0]
            there = place.files.get_file_info(bucket).type != pafs.FileType.NotFound
    except LocalIOError:
        return  # who may write an object need not be allowed to ask
    if not there:
        raise UsageError(f"{address}: there is no bucket {bucket!r}")


def _matching(place: _Place) -> list[tuple[str, str, ObjectSeen]]:
    parts = place.path.split("/")
    fixed = next(at for at, part in enumerate(parts) if _WILD.search(part))
    folder = "/".join(parts[:fixed])
    pattern = parts[fixed:]
    return [
        each
        for each in _below(place, folder, deep=len(pattern) > 1)
        if len(names := each[1].split("/")) == len(pattern)
        and all(map(fnmatch.fnmatchcase, names, pattern))
    ]


def _below(place: _Place, folder: str, *, deep: bool = True) -> list[tuple[str, str, ObjectSeen]]:
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=deep)
    found = []
    for info in place.files.get_file_info(selector):
        below = info.path.removeprefix(folder).strip("/")
        hidden = any(part.startswith((".", "_")) for part in below.split("/"))
        if (at := _seen(info)) is not None and not hidden:
            found.append((info.path, below, at))
    return sorted(found)


def fetch(address: str, path: Path) -> None:
    """Copy an object to a new private file; LocalIOError when that ends early."""
    with (
        _at(address) as place,
        place.files.open_input_stream(place.path) as source,
        open(create(path, 0o600), "wb") as target,
    ):
        shutil.copyfileobj(source, target, _PIECE_BYTES)


def put(path: Path, address: str) -> None:
    """Copy a file to an address, where it replaces what is there once it has arrived whole."""
    with _at(address) as place, path.open("rb") as source:
        target = place.files.open_output_stream(place.path)
        try:
            shutil.copyfileobj(source, target, _PIECE_BYTES)
        except BaseException:
            # It would be closed when it is collected, and what came so far would be the object.
            _GIVEN_UP.append(target)
            raise
        target.close()
