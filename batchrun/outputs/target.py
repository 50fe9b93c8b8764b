"""The file that is published to: a temporary beside it, durable, then one rename."""

from __future__ import annotations

import errno
import filecmp
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from batchrun.errors import LocalIOError
from batchrun.files import Seen, create, make_durable, put, seen, sync_directory

TEMPORARY_SUFFIX = ".batchrun-tmp"
BACKUP_SUFFIX = ".bak"


class Target(NamedTuple):
    """Where to publish, and what was there when it was looked at."""

    shown: Path
    path: Path  # without links
    found: Seen | None
    mode: int | None  # of the file that was there

    @classmethod
    def at(cls, shown: Path) -> Target:
        with _mapped(str(shown)):
            path = Path(os.path.realpath(shown))
            found = seen(path)
            old = _regular_or_none(path)
            return cls(shown, path, found, None if old is None else stat.S_IMODE(old.st_mode))


def backup(path: Path) -> Path:
    """Keep ``path`` also as ``<path>.bak``, or ``.bak.2`` and so on: no file of that name goes.

    ``path`` stays there. A file that is kept already, by a run that was killed, is not kept twice.
    """
    with _mapped(f"{path}{BACKUP_SUFFIX}"):
        for kept in _backup_names(path):
            if _keep_as(path, kept):
                sync_directory(kept.parent)
                return kept
    raise AssertionError("there is no last name")


def _backup_names(path: Path) -> Iterator[Path]:
    first = path.with_name(path.name + BACKUP_SUFFIX)
    yield first
    for number in count(2):
        yield first.with_name(f"{first.name}.{number}")


def _keep_as(path: Path, kept: Path) -> bool:
    """Whether ``kept`` is now, or was, the same file as ``path``."""
    if os.path.lexists(kept):
        is_file = stat.S_ISREG(kept.lstat().st_mode)
        return is_file and filecmp.cmp(path, kept, shallow=False)
    try:
        os.link(os.path.realpath(path), kept)
    except FileExistsError:
        return False
    except OSError:
        _copy(path, kept)
    return True


def _copy(path: Path, kept: Path) -> None:
    """For file systems without links: whole or not at all, though not proof against a race."""
    temporary = temporary_of(path)
    try:
        shutil.copy2(path, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(kept)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clean_leftovers(path: Path) -> None:
    """Remove temporaries that killed publishes of ``path`` left; call it holding the lock."""
    path = Path(os.path.realpath(path))
    pattern = re.compile(
        re.escape(_temporary_prefix(path)) + r"(\d+)" + re.escape(TEMPORARY_SUFFIX)
    )
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            match = pattern.fullmatch(entry.name)
            if match and not _runs_elsewhere(int(match[1])):
                os.unlink(entry.path)


class Sink:
    """A file to write to whose failures are LocalIOErrors naming it, from wherever they come.

    pyarrow hands on what a Python file raises, so its writes pass here as well as ours.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._discarding = False
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        if not self._discarding:
            with _mapped(self._name):
                self._file.write(data)
        return len(data)

    def flush(self) -> None:
        if not self._discarding:
            with _mapped(self._name):
                self._file.flush()

    def discard(self) -> None:
        """Let every later write go nowhere."""
        self._discarding = True

    def close(self) -> None:
        """Closing is for whoever opened the file."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


@contextmanager
def replacing(target: Target) -> Iterator[Sink]:
    """A new file that takes the target's place when the block ends well, and else never existed."""
    shown = str(target.shown)
    with _mapped(shown):
        temporary = temporary_of(target.path)
        file = _create(temporary, target.mode)
    try:
        # What the block raises is not of this file's making and passes as it is.
        yield Sink(file, shown)
        with _mapped(shown):
            file.flush()
            make_durable(file.fileno())
            file.close()
            try:
                put(temporary, target.path, target.found)
            except FileExistsError as exc:
                raise _changed(shown) from exc
            sync_directory(target.path.parent)
    except BaseException:
        with suppress(OSError):  # closing writes what is buffered, and fails as the write before
            file.close()
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _changed(shown: str) -> LocalIOError:
    return LocalIOError(
        f"{shown}: was written by somebody else in the meantime, and was left as it is",
        next_steps=("run the same command again: no answer is lost",),
    )


def _regular_or_none(path: Path) -> os.stat_result | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return found


def _create(temporary: Path, mode: int | None) -> BinaryIO:
    descriptor = create(temporary, 0o666)
    if mode is not None:
        os.fchmod(descriptor, mode)
    return os.fdopen(descriptor, "wb")


def _temporary_prefix(path: Path) -> str:
    # A file name may have 255 bytes; the prefix leaves room for the number and the suffix.
    return "." + os.fsdecode(os.fsencode(path.name)[:220]) + "."


def temporary_of(path: Path) -> Path:
    return path.with_name(f"{_temporary_prefix(path)}{os.getpid()}{TEMPORARY_SUFFIX}")


def _runs_elsewhere(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _mapped(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "disk full" if full else exc.strerror or str(exc)
        raise LocalIOError(f"{name}: cannot be written: {why}") from exc


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as exc:
        why = getattr(exc, "strerror", None) or str(exc).splitlines()[0]
        raise LocalIOError(f"{path}: cannot be read: {why}") from exc
