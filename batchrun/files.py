"""What outlives the process: files written whole and durable, and the system's errors as ours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import msgspec

from batchrun.errors import LocalIOError

# A link is not followed, and opening a FIFO or a device does not wait for its other end.
_CAREFUL = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_regular(path: Path, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
    """A descriptor of a regular file; OSError for a link, a FIFO, a directory or a device."""
    name = path if dir_fd is None else path.name
    fd = os.open(name, flags | _CAREFUL, mode, dir_fd=dir_fd)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def create(path: Path, mode: int) -> int:
    """A descriptor of a new file; what a killed process left under its name makes way."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFUL
    try:
        return os.open(path, flags, mode)
    except FileExistsError:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise
        path.unlink()
        return os.open(path, flags, mode)


def read_regular(path: Path) -> bytes:
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        return file.read()


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_WRONLY) -> Iterator[int]:
    fd = open_regular(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def make_durable(fd: int) -> None:
    if sys.platform == "darwin":
        # Plain fsync there leaves the data in the drive's cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        # Some network file systems cannot sync a directory; their renames need no help.
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def make_private(directory: Path) -> bool:
    """Whether it had to be made."""
    try:
        directory.mkdir(0o700)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def writing(path: Path, temporary: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A private file that is at ``path`` when the block ends well, and else never existed.

    It appears in one step: a reader finds the old one or the new one. ``durable`` makes its bytes
    so; the name is durable when the directory is synced.
    """
    file = os.fdopen(create(temporary, 0o600), "wb")
    try:
        with file:
            yield file
            file.flush()
            if durable:
                make_durable(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_whole(
    path: Path, temporary: Path, *parts: bytes | memoryview, durable: bool = False
) -> None:
    """``writing`` of what is in memory."""
    with writing(path, temporary, durable=durable) as file:
        file.writelines(parts)


def to_json(value: msgspec.Struct, *, strict: bool = False) -> bytes:
    """JSON of what may hold file names that are no UTF-8.

    ``from_json`` gives them back; ``strict`` has U+FFFD in them, so that any reader takes it.
    """
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(value), ensure_ascii=not strict)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


_T = TypeVar("_T")


def from_json(text: bytes, kind: type[_T]) -> _T:
    """What ``to_json`` wrote; ValueError or RecursionError when it is no such thing."""
    try:
        return msgspec.json.decode(text, type=kind)
    except ValueError:
        return msgspec.convert(json.loads(text), type=kind)


def write_json(path: Path, value: msgspec.Struct) -> None:
    """Put ``value`` in the place of ``path``, whole, for ``read_json``."""
    write_whole(path, path.with_name(f"{path.name}.new"), to_json(value))


def read_json(path: Path, kind: type[_T]) -> _T:
    """What ``write_json`` wrote; OSError, ValueError or RecursionError when that cannot be."""
    return from_json(read_regular(path), kind)


class Seen(NamedTuple):
    """What tells whether a file is still the one that was looked at."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int


def seen(path: Path) -> Seen | None:
    """None where nothing is."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return Seen(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def put(temporary: Path, path: Path, expected: Seen | None) -> None:
    """Give a finished file its name, unless something else has it by now: FileExistsError.

    What was expected there and is gone is missed by nobody.
    """
    found = seen(path)
    if found is None:
        _put_new(temporary, path)
    elif found == expected:
        temporary.replace(path)
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


# What file systems without hard links say.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def _put_new(temporary: Path, path: Path) -> None:
    """A rename would replace what appeared a moment ago; a link cannot."""
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        temporary.rename(path)
    else:
        temporary.unlink()


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
