"""Which files a command line means: paths, globs and directories, looked at without being read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from hashlib import blake2b
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import msgspec

from batchrun.chat import without_surrogates
from batchrun.config import CURRENT, INPUT_SUFFIXES, STDIN, InputFormat
from batchrun.errors import UsageError
from batchrun.inputs import foreign, formats
from batchrun.inputs.rows import READ_BYTES, Fingerprint, InputFile, Resolved
from batchrun.inputs.unpack import compression_of, mapped_errors, start_of, unreadable

_HIVE_NULL: Final = "__HIVE_DEFAULT_PARTITION__"


def resolve(
    paths: Sequence[str],
    input_format: InputFormat | None = None,
    *,
    spool: Path | None = None,
    output: Path | None = None,
) -> Resolved:
    """Find the files that ``paths`` mean, in the order given.

    A path is a file, a directory (its files, sorted, at any depth), a glob, or ``-`` for ``spool``.
    UsageError when one of them is missing, empty or of an unknown format.
    """
    search = _Search(input_format, output, alone=len(paths) == 1)
    for path in paths:
        search.begin(path)
        if path == STDIN:
            if spool is None:
                raise UsageError("-: standard input was not kept in a state directory")
            search.add_spool(spool)
        elif os.path.isdir(path):
            search.add_directory(Path(path))
        elif os.path.lexists(path):
            search.add_literal(Path(path))
        elif has_magic(path):
            search.add_glob(path)
        else:
            raise UsageError(f"{path}: no such file or directory")
    if not search.files:
        raise UsageError(
            f"{', '.join(paths)}: nothing to read; skipped {'; '.join(search.skipped)}"
        )
    return Resolved(search.files, search.skipped)


class _Search:
    """Collects the files of several paths."""

    def __init__(
        self, input_format: InputFormat | None, output: Path | None, *, alone: bool
    ) -> None:
        self.files: list[InputFile] = []
        self.skipped: list[str] = []
        self._format = input_format
        self._output = output
        self._alone = alone
        self._outside = 0

    def begin(self, path: str) -> None:
        """Search ``path``. Folders before a ``/./`` in it are only where it lies, as for rsync."""
        root, mark, _ = path.rpartition(CURRENT)
        self._outside = len(Path(root or "/").parts) if mark else 0

    def _add(self, path: Path) -> None:
        file = _input_file(path, str(path), self._format)
        folders = _columns_of_folders(path.parent.parts[self._outside :])
        self.files.append(msgspec.structs.replace(file, folders=folders))

    def add_spool(self, path: Path) -> None:
        file = _input_file(path, path.stem, self._format, magic=True)
        self.files.append(msgspec.structs.replace(file, is_spool=True))

    def add_literal(self, path: Path) -> None:
        if not self._is_output(path):
            self._add(path)
        elif self._alone:
            raise UsageError(f"{path}: is the output of this run and cannot be its input")
        else:
            self._skip(path, "the output of this run")

    def add_directory(self, path: Path) -> None:
        if path.name.endswith(".batchrun"):
            self._skip(path, "the state of a run")
            return
        before = len(self.files)
        self._walk(path)
        if len(self.files) == before:
            raise UsageError(f"{path}: no {formats.suffixes()} file to read in it")

    def add_glob(self, pattern: str) -> None:
        found = sorted(glob(pattern, recursive=True))
        if not found:
            raise UsageError(f"{pattern}: no file matches")
        for path in map(Path, found):
            if path.is_dir():
                # `**` names directories as well as what is in them.
                if not pattern.endswith("**"):
                    self._walk(path)
            else:
                self._consider(path)

    def _walk(self, directory: Path) -> None:
        try:
            entries = sorted(directory.iterdir())
        except OSError as exc:
            raise unreadable(str(directory), exc) from exc
        for path in entries:
            if path.name.startswith("."):
                self._skip(path, "hidden")
            elif path.name.endswith(".batchrun"):
                self._skip(path, "the state of a run")
            elif path.is_dir():
                # A link may lead back to where we came from.
                if path.is_symlink():
                    self._skip(path, "a linked directory")
                else:
                    self._walk(path)
            else:
                self._consider(path)

    def _consider(self, path: Path) -> None:
        """A file somebody did not name themselves: read only if it is plainly an input."""
        if self._is_output(path):
            self._skip(path, "the output of this run")
        elif path.name.startswith("."):
            self._skip(path, "hidden")
        elif any(parent.name.endswith(".batchrun") for parent in path.parents):
            self._skip(path, "the state of a run")
        elif path.is_file() and formats.made_by_batchrun(path):
            self._skip(path, "made by batchrun")
        elif formats.by_name(path)[0] is None:
            self._skip(path, f"not {formats.labels()}")
        elif path.exists() and not path.is_file():
            # To open a pipe that nobody writes to is to wait for ever.
            self._skip(path, "not a regular file")
        else:
            self._add(path)

    def _skip(self, path: Path, why: str) -> None:
        self.skipped.append(f"{without_surrogates(str(path))} ({why})")

    def _is_output(self, path: Path) -> bool:
        if self._output is None:
            return False
        return path.absolute() == self._output.absolute() or (
            path.exists() and self._output.exists() and path.samefile(self._output)
        )


def _columns_of_folders(folders: Iterable[str]) -> tuple[tuple[str, str | None], ...]:
    """The columns of folders named as Hive, Spark and DuckDB name the parts of a table."""
    pairs = (folder.partition("=") for folder in folders)
    found = {unquote(key): unquote(value) for key, equals, value in pairs if key and equals}
    return tuple((key, None if value == _HIVE_NULL else value) for key, value in found.items())


def _input_file(
    path: Path, name: str, input_format: InputFormat | None, *, magic: bool = False
) -> InputFile:
    name = without_surrogates(name)
    try:
        status = path.stat()
    except OSError as exc:
        raise unreadable(name, exc) from exc
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{name}: not a regular file; pipe it in with - instead")
    by_suffix, compression = formats.by_name(path)
    format_ = input_format or by_suffix
    if format_ is None:
        raise _unknown(path, name)
    if magic:
        compression = compression_of(start_of(path, name))
    return InputFile(
        path,
        name,
        format_,
        compression if formats.may_be_packed(format_) else "",
        _fingerprint(status),
        status.st_size,
    )


def _unknown(path: Path, name: str) -> UsageError:
    """The error for a name that says no format; what is in the file says what to do."""
    found = foreign.recognise(start := start_of(path, name))
    if found is None or found.suffix in INPUT_SUFFIXES:
        return UsageError(f"{name}: not {formats.file_names()}; say which with --input-format")
    return foreign.refusal(path, name, formats.labels(), start)


def _fingerprint(status: os.stat_result) -> Fingerprint:
    return Fingerprint(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def unchanged(file: InputFile) -> bool:
    """Whether the file is still the one that was resolved."""
    try:
        return _fingerprint(file.path.stat()) == file.fingerprint
    except OSError:
        return False


def content_digest(files: Iterable[InputFile]) -> str:
    """32 hex digits over the bytes of all files, in order; about 1 GB/s."""
    digest = blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.format} {file.compression} {file.size_bytes}\n".encode())
        if file.folders:
            digest.update(json.dumps(file.folders).encode())
        with mapped_errors(file), file.path.open("rb") as source:
            while piece := source.read(READ_BYTES):
                digest.update(piece)
    return digest.hexdigest()
