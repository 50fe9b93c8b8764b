"""What outlives the process: private files, made durable, and the system's errors as ours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from batchrun.errors import LocalIOError


def make_durable(fd: int) -> None:
    if sys.platform == "darwin":
        # Plain fsync there leaves the data in the drive's cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private(directory: Path) -> bool:
    """Whether it had to be made."""
    try:
        directory.mkdir(0o700)
    except FileExistsError:
        return False
    return True


def write_private(path: Path, *parts: bytes | memoryview, durable: bool = False) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]
        if durable:
            make_durable(file.fileno())


def io_error(path: Path, doing: str, error: OSError) -> LocalIOError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, then run the same command: it continues"
        return LocalIOError(f"{path}: cannot {doing}: disk full", next_steps=(advice,))
    return LocalIOError(f"{path}: cannot {doing}: {error.strerror or error}")


@contextlib.contextmanager
def reporting(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise io_error(Path(exc.filename or path), doing, exc) from exc
