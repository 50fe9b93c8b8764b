"""The directory where an unfinished run lives: every name in it, and the only one who removes any.

*Ours* is a directory that we made, or found empty, and marked. Where the directory that was asked
for has files of somebody else, the state is a directory inside it, so that none of its names can
meet theirs. Removing takes away regular files of the names below and nothing else, through a
descriptor of the directory, and the directory itself only when we made it.

*Void at once.* When everything is published, the first segment changes its name: from that system
call on there is no journal, whatever a kill leaves behind, and the published file is the memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os.path import realpath as _real
from pathlib import Path

from batchrun.config import STATE_SUFFIX, STDOUT
from batchrun.errors import LocalIOError, UsageError
from batchrun.files import open_regular, reporting, sync_directory
from batchrun.journal import records

LOCK = "lock"
_MARK = "made-by-batchrun"
_FOUND = b"this directory was here, and empty, when batchrun began to use it\n"
_VOID = "journal-void"
_SEGMENT = re.compile(r"journal-(\d{6,})\.seg")
_FIRST = "journal-000001.seg"
# Earlier versions kept an index beside each segment.
_OF_A_JOURNAL = re.compile(r"journal-(\d{6,}\.(seg|new|idx)|table(\.new)?)")


_OURS = re.compile(
    _OF_A_JOURNAL.pattern
    + r"|(status|run|series)\.json(\.new)?|stdin\.(jsonl|parquet)|\.spool-[a-z0-9_]{8}"
)


# Somebody must give another directory; anything else the disk says is the disk's failure.
_NO_PLACE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ELOOP, errno.ENAMETOOLONG),
)


@dataclass(frozen=True, slots=True)
class StateDir:
    """A state directory and the names in it; whoever makes or removes any holds its lock."""

    path: Path

    # ── names ────────────────────────────────────────────────────────────────────────────────────

    @property
    def lock(self) -> Path:
        return self.path / LOCK

    @property
    def table(self) -> Path:
        return self.path / "journal-table"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def series(self) -> Path:
        """How the run went over time."""
        return self.path / "series.json"

    @property
    def saved_command(self) -> Path:
        return self.path / "run.json"

    @property
    def rows_spool(self) -> Path:
        """What was read from standard input, or the dicts of a Python program."""
        return self.path / "stdin.jsonl"

    @property
    def table_spool(self) -> Path:
        """The Arrow table of a Python program."""
        return self.path / "stdin.parquet"

    def spool(self) -> Path:
        """The input kept here, of whichever kind it is."""
        return self.table_spool if self.table_spool.is_file() else self.rows_spool

    @property
    def unfinished_table(self) -> Path:
        """What a process that is killed while it writes the table leaves."""
        return self.path / "journal-table.new"

    def segment(self, number: int) -> Path:
        return self.path / f"journal-{number:06d}.seg"

    def segments(self) -> list[int]:
        """The numbers of the journal's segments, ascending; none of a journal that is void."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as exc:
            raise LocalIOError(f"{self.path}: cannot be read: {exc.strerror or exc}") from exc
        if _VOID in names:
            return []
        return sorted(int(match[1]) for name in names if (match := _SEGMENT.fullmatch(name)))

    def has_journal(self) -> bool:
        return bool(self.segments())

    # ── making ───────────────────────────────────────────────────────────────────────────────────

    def make(self) -> bool:
        """Whether the directory had to be made. UsageError where none can be made."""
        try:
            self.path.mkdir(0o700)
        except FileExistsError:
            return False
        except OSError as exc:
            if exc.errno not in _NO_PLACE:
                raise
            raise UsageError(
                f"{self.path}: no state can be kept there: {exc.strerror}; name another directory"
                " with --state"
            ) from exc
        return True

    def mark(self, *, made: bool) -> None:
        """Say that what is in here is ours; call it holding the lock."""
        with contextlib.suppress(FileExistsError):
            fd = os.open(self.path / _MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(fd, b"" if made or self._has_our_suffix() else _FOUND)
            finally:
                os.close(fd)

    def forget_spools(self, but: Path) -> None:
        """Remove an input that an earlier run kept in the other form."""
        with reporting(self.path, "remove"):
            for spool in (self.rows_spool, self.table_spool):
                if spool != but:
                    spool.unlink(missing_ok=True)

    def check_apart(self, files: Iterable[Path]) -> None:
        """UsageError when one lies in here, where a name of ours could be its own."""
        place = _real(self.path)
        for file in files:
            if os.path.dirname(_real(file)) == place:
                raise _unsafe(self.path, f"holds {file}", "move that elsewhere")

    def _has_our_suffix(self) -> bool:
        return self.path.name.endswith(STATE_SUFFIX)

    def _was_made_by_us(self, fd: int) -> bool:
        with contextlib.suppress(OSError):
            mark = open_regular(Path(_MARK), os.O_RDONLY, dir_fd=fd)
            try:
                return os.read(mark, len(_FOUND)) != _FOUND
            finally:
                os.close(mark)
        return self._has_our_suffix()

    # ── removing ─────────────────────────────────────────────────────────────────────────────────

    def remove(self) -> None:
        """Take away all that is ours, the lock last: a kill leaves a journal whole, or none."""
        with reporting(self.path, "remove"), self._opened() as fd:
            made = self._was_made_by_us(fd)
            self._void(fd)
            _remove(fd, lambda name: _OURS.fullmatch(name) is not None)
            # Whoever finds the lock gone begins with an empty directory, and whoever had it open
            # finds another file in its place.
            for name in (_VOID, _MARK, LOCK):
                _remove(fd, name.__eq__)
            if made:
                with contextlib.suppress(OSError):
                    self.path.rmdir()

    def finish_removal(self) -> None:
        """Remove the rest of a journal that was void when its process was killed."""
        with self._opened() as fd:
            if _VOID in os.listdir(fd):
                _remove(fd, lambda name: _OF_A_JOURNAL.fullmatch(name) is not None)
                _remove(fd, _VOID.__eq__)

    def clear_journal(self) -> None:
        """Take all records away, the last segment first: a kill leaves a shorter journal, whole."""
        with self._opened() as fd:
            _remove(fd, lambda name: _OF_A_JOURNAL.fullmatch(name) is not None)
        sync_directory(self.path)

    def forget_table(self) -> None:
        """Take the kept table away; the segments say all that it does."""
        if _unlink(self.table):
            sync_directory(self.path)

    def forget_unfinished_table(self) -> None:
        _unlink(self.unfinished_table)

    def _void(self, fd: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.rename(_FIRST, _VOID, src_dir_fd=fd, dst_dir_fd=fd)
            # Before any other name goes: a power failure may keep what came later.
            sync_directory(self.path)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def _remove(fd: int, is_meant: Callable[[str], bool]) -> None:
    for name in sorted(filter(is_meant, os.listdir(fd)), reverse=True):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISREG(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=fd)


def _unlink(cache: Path) -> bool:
    """Whether it is gone now. One that cannot be taken away is no reason to end a run."""
    with contextlib.suppress(OSError):
        cache.unlink()
        return True
    return False


def locate(wanted: Path, output: str) -> StateDir:
    """The state of ``output`` in the directory ``wanted``, or in one inside it if others use that.

    UsageError where no state can be kept safely: a link, no directory, not ours, open to others.
    Makes nothing.
    """
    with reporting(wanted, "read"):
        if _may_be_a_state(wanted, output):
            return StateDir(wanted)
        name = os.path.basename(output).strip("-") or "stdout"
        inside = wanted / (name + STATE_SUFFIX)
        if _may_be_a_state(inside, output):
            return StateDir(inside)
    raise UsageError(
        f"{inside}: holds files that batchrun did not make; move them away, or name another"
        " directory with --state"
    )


def _may_be_a_state(path: Path, output: str) -> bool:
    """Whether it is one, or is empty or absent and can become one."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    if stat.S_ISLNK(found.st_mode):
        raise _unsafe(path, "is a link", f"name {_real(path)} itself with --state")
    if not stat.S_ISDIR(found.st_mode):
        raise _unsafe(path, "is not a directory", "move it away")
    try:
        names = set(os.listdir(path))
    except PermissionError as exc:
        raise _unsafe(path, "cannot be read", "move it away") from exc
    is_marked = _MARK in names or _is_segment(path / _FIRST)
    # Anybody may make files in such a directory, and nobody may touch another's.
    if found.st_mode & stat.S_ISVTX and not is_marked:
        return False
    _check_private(path, found)
    holds_output = output != STDOUT and _real(path) == os.path.dirname(_real(output))
    if is_marked:
        if holds_output:
            raise _unsafe(path, f"holds a run and {output} would join it", "choose another -o")
        return True
    is_empty = not names or (names == {LOCK} and _is_lock(path / LOCK))
    # A file system is never one run's alone.
    return is_empty and not holds_output and not os.path.ismount(path)


def _check_private(path: Path, found: os.stat_result) -> None:
    theirs, open_to = found.st_uid != os.geteuid(), found.st_mode & 0o022
    if not theirs and not open_to:
        return
    # Some file systems know no owners or modes, and show every directory so.
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as made:
        fresh = os.lstat(made)
        if (fresh.st_uid, fresh.st_mode & 0o022) == (found.st_uid, open_to):
            return
    if theirs:
        raise _unsafe(path, "belongs to another user", "name another directory with --state")
    raise _unsafe(path, "can be written by others", f"chmod go-w {path}")


def _unsafe(path: Path, why: str, advice: str) -> UsageError:
    return UsageError(f"{path}: {why}, so no state can be kept there; {advice}")


def _is_segment(path: Path) -> bool:
    return _begins_with(path, records.MAGIC)


def _is_lock(path: Path) -> bool:
    return path.lstat().st_size == 0 or _begins_with(path, b'{"pid":')


def _begins_with(path: Path, start: bytes) -> bool:
    with contextlib.suppress(OSError):
        fd = open_regular(path, os.O_RDONLY)
        try:
            return os.read(fd, len(start)) == start
        finally:
            os.close(fd)
    return False
