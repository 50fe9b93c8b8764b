"""Files become rows: which files, which format, and one verdict for every row.

A line that is not a JSON object is a `BadRow`, with its place and reason; it never stops the
others. A file that cannot be read is one LocalIOError. Lines are split on ``\\n`` only.

What of a row is carried into the output is decided in two passes: `ColumnTypes` watches the first
and finds one type per column, `Carried` converts to it in the second.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import stat
import tempfile
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from functools import partial
from glob import glob, has_magic
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple, Protocol, TypeAlias, cast
from urllib.parse import unquote
from uuid import UUID

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from batchrun import foreign
from batchrun.answers import ANSWER_COLUMNS
from batchrun.config import CURRENT, STDIN, InputFormat, JSONValue
from batchrun.errors import LocalIOError, StoppedEarly, UsageError
from batchrun.files import make_durable
from batchrun.prompts import CUSTOM_ID, json_text, without_surrogates
from batchrun.state import StateDir
from batchrun.table_notes import TableNotes

Compression = Literal["", "gz", "zst"]

BATCH_ROWS: Final = 1024
HEAD_ROWS: Final = 1000
# A table's schema says what a table has; its first rows serve only to advise.
_TABLE_HEAD_ROWS: Final = 100
_BATCH_BYTES: Final = 4 << 20
_HEAD_BYTES: Final = 32 << 20
_LINE_LIMIT_BYTES: Final = 64 << 20
_READ_BYTES: Final = 1 << 20
# Split into lines at once: more leaves the processor's cache.
_PIECE_BYTES: Final = 256 << 10
# Deeper values decode in one place and overflow the stack in the next.
_DEPTH_LIMIT: Final = 400
_SHALLOW_BYTES: Final = 2 * _DEPTH_LIMIT
# One column per key: a file whose keys are data would make a table nobody can read.
_COLUMN_LIMIT: Final = 5_000
# Integers up to here are exact as doubles.
_EXACT: Final = 1 << 53

_SUFFIXES: Final[Mapping[str, InputFormat]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSIONS: Final[Mapping[str, Compression]] = {".gz": "gz", ".zst": "zst"}
_HIVE_NULL: Final = "__HIVE_DEFAULT_PARTITION__"
_COMPRESSED: Final[Mapping[bytes, Compression]] = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
}
_CLAIMED: Final[Mapping[str, str]] = {"gz": "gzip data", "zst": "zstd data"}


class BadRow(Struct, frozen=True, gc=False):
    """A line that is not a JSON object, and why: a code for programs, words for a person."""

    code: str
    reason: str


Row: TypeAlias = dict[str, JSONValue]
Rows: TypeAlias = list[Row | BadRow]


class Fingerprint(NamedTuple):
    """Changes when a file is written to or replaced."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


class InputFile(Struct, frozen=True):
    """One file to read. ``name`` is how people know it.

    ``folders`` are the columns that ``key=value`` folders on the way to it give to every row.
    """

    path: Path
    name: str
    format: InputFormat
    compression: Compression
    fingerprint: Fingerprint
    size_bytes: int
    folders: tuple[tuple[str, str | None], ...] = ()


class Resolved(NamedTuple):
    """The files of a run in reading order, and what directories and globs held besides."""

    files: list[InputFile]
    skipped: list[str]  # "data/old.parquet (made by batchrun)"


# --- which files -------------------------------------------------------------------------------


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
        self.files.append(file)

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
            raise UsageError(f"{path}: no .jsonl, .ndjson or .parquet file to read in it")

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
            raise _unreadable(str(directory), exc) from exc
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
        elif path.is_file() and _made_by_batchrun(path):
            self._skip(path, "made by batchrun")
        elif _format_of(path)[0] is None:
            self._skip(path, "not JSONL or Parquet")
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
        raise _unreadable(name, exc) from exc
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{name}: not a regular file; pipe it in with - instead")
    by_suffix, compression = _format_of(path)
    format_ = input_format or by_suffix
    if format_ is None:
        raise _unknown(path, name)
    if magic:
        compression = _compression_of(_start_of(path, name))
    return InputFile(
        path,
        name,
        format_,
        compression if format_ == "jsonl" else "",
        _fingerprint(status),
        status.st_size,
    )


def _unknown(path: Path, name: str) -> UsageError:
    """The error for a name that says no format; what is in the file says what to do."""
    found = foreign.recognise(start := _start_of(path, name))
    if found is None or found.suffix in (".jsonl", ".parquet"):
        return UsageError(
            f"{name}: not .jsonl or .ndjson (also .gz, .zst) or .parquet; "
            "say which with --input-format"
        )
    return foreign.refusal(path, name, "JSON lines or Parquet", start)


def _format_of(path: Path) -> tuple[InputFormat | None, Compression]:
    compression = _COMPRESSIONS.get(path.suffix.lower(), "")
    inner = Path(path.stem) if compression else path
    format_ = _SUFFIXES.get(inner.suffix.lower())
    return (None if compression and format_ == "parquet" else format_), compression


def _made_by_batchrun(path: Path) -> bool:
    """Outputs bear a mark: Parquet in the file's metadata, JSONL in the first line."""
    suffix = Path(path.name.removesuffix(".bak")).suffix.lower()
    try:
        if suffix == ".parquet":
            with path.open("rb") as table:
                return b"batchrun" in (pq.read_metadata(table).metadata or {})
        if suffix == ".jsonl":
            with path.open("rb") as lines:
                first = msgspec.json.decode(lines.readline(_LINE_LIMIT_BYTES))
            mark = first.get("batchrun") if isinstance(first, dict) else None
            return isinstance(mark, dict) and "request_hash" in mark
    except (OSError, ValueError, RecursionError, pa.ArrowException):
        pass  # Not readable as an output; reading it as an input will say what is wrong.
    return False


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
        with _mapped_errors(file), file.path.open("rb") as source:
            while piece := source.read(_READ_BYTES):
                digest.update(piece)
    return digest.hexdigest()


# --- what does not come as a file --------------------------------------------------------------


RowsOrTable: TypeAlias = Iterable[Mapping[str, object]] | pa.Table


def spool(source: BinaryIO | RowsOrTable, directory: Path) -> Path:
    """Keep an input that cannot be read twice: a stream, dicts, or an Arrow table.

    The file appears whole, where ``StateDir.spool`` finds it.
    """
    state = StateDir(directory)
    if isinstance(source, pa.Table):
        path = _kept(state.table_spool, partial(pq.write_table, source))
    elif hasattr(source, "read"):
        path = _kept(state.rows_spool, partial(_copy, cast("BinaryIO", source)))
    else:
        path = _kept(state.rows_spool, partial(_write_rows, source))
    state.forget_spools(but=path)
    return path


def _kept(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """``path``, written whole or not at all, and durable."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".spool-", delete=False) as file:
            try:
                write(file)  # type: ignore[arg-type]  # its wrapper is a BinaryIO in all but name
                file.flush()
                make_durable(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as exc:
        raise LocalIOError(f"{path}: cannot keep the input there: {exc.strerror or exc}") from exc
    return path


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while piece := source.read(_READ_BYTES):
        target.write(piece)


def _write_rows(rows: Iterable[Mapping[str, object]], target: BinaryIO) -> None:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UsageError(f"row {number}: a dict is needed, not {type(row).__name__}")
        try:
            line = json.dumps(row, separators=(",", ":"), default=_plain)
        except (TypeError, ValueError, RecursionError) as exc:
            raise UsageError(f"row {number}: cannot be written as JSON: {exc}") from exc
        target.write(line.encode() + b"\n")


def _plain(value: object) -> object:
    """What JSON lacks, as JSON: numpy's scalars as numbers, dates as ISO text."""
    item = getattr(value, "item", None)
    return item() if callable(item) else msgspec.to_builtins(value)


# --- reading -----------------------------------------------------------------------------------


class Batch:
    """At most 1,024 rows, in order.

    ``lines`` are 1-based: lines of a JSONL file, rows of a table. ``rows`` holds at least the
    columns asked for, and is often made only when first looked at.
    """

    __slots__ = ("_make", "_rows", "carried", "lines")

    def __init__(
        self,
        lines: Sequence[int],
        rows: Rows | Callable[[], Rows],
        carried: pa.RecordBatch | None,
    ) -> None:
        self.lines = lines
        self.carried = carried
        self._rows = rows if isinstance(rows, list) else None
        self._make = None if isinstance(rows, list) else rows

    @property
    def rows(self) -> Rows:
        if self._rows is None:
            assert self._make is not None
            self._rows = self._make()
            self._make = None
        return self._rows

    def __len__(self) -> int:
        return len(self.lines)


def head(file: InputFile, rows: int = HEAD_ROWS) -> tuple[list[str], list[Row]]:
    """The columns of a file and its first good rows: what `prompts.detect` decides from.

    Columns are a table's schema, or the keys of the JSONL rows, in order of appearance. Fewer rows
    are read of a table, and of lines that are very long.
    """
    if file.format == "parquet":
        with _table(file) as table:
            size = min(rows, _TABLE_HEAD_ROWS, _batch_rows(table.metadata))
            batches = table.iter_batches(size, use_threads=False)
            first = next(batches, None)
            found = [] if first is None else _rows_of(first)
            found = _with_folders(file, found)
            names = _schema_of(file, table).names
            return names, [row for row in found if isinstance(row, dict)]
    return _head_of_lines(file, rows)


def _head_of_lines(file: InputFile, wanted: int) -> tuple[list[str], list[Row]]:
    """UsageError for a file that has lines, and no JSON object among them."""
    good: list[Row] = []
    first_bad: tuple[int, BadRow] | None = None
    size_bytes = 0
    with _mapped_errors(file), _opened(file) as stream:
        start = stream.read(foreign.HEAD_BYTES)
    if foreign.is_one_document(start):
        raise _refusal(file, "JSON lines", start)
    for numbers, rows, group_bytes in _groups(file):
        good += [row for row in rows if isinstance(row, dict)]
        if not good and first_bad is None:
            first_bad = numbers[0], cast("BadRow", rows[0])
        size_bytes += group_bytes
        if len(good) >= wanted or (good and size_bytes >= _HEAD_BYTES):
            break
    if first_bad is not None and not good:
        number, row = first_bad
        why = f"no line of it is a JSON object (line {number}: {row.reason})"
        raise _refusal(file, "JSON lines", start, why)
    del good[wanted:]
    return list(dict.fromkeys(itertools.chain.from_iterable(good))), good


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
    if file.format == "parquet":
        return _read_table(file, columns, carry)
    return _read_lines(file, carry)


def _read_lines(file: InputFile, carry: Carried | None) -> Iterator[Batch]:
    nothing = True
    first = 1
    for lines, _ in _lines(file):
        batch = _batch_of(file, first, lines, carry)
        first += len(lines)
        if len(batch):
            yield batch
            nothing = False
    if nothing:
        yield Batch([], [], carry.from_rows([]) if carry else None)


def _batch_of(file: InputFile, first: int, lines: list[bytes], carry: Carried | None) -> Batch:
    def rows_made() -> Rows:
        return _with_folders(file, _verdicts(first, lines)[1])

    if carry is None and {line[:1] for line in lines} == {b"{"}:
        # None is blank, so it is known how many rows they are before anybody looks at one.
        return Batch(range(first, first + len(lines)), rows_made, None)
    numbers, rows = _verdicts(first, lines)
    rows = _with_folders(file, rows)
    return Batch(numbers, rows, carry.from_rows(rows) if carry else None)


# --- JSON lines --------------------------------------------------------------------------------


def _groups(file: InputFile) -> Iterator[tuple[Sequence[int], Rows, int]]:
    """Numbers and verdicts of the lines that are not blank, by the batch, and its bytes."""
    first = 1
    for lines, size_bytes in _lines(file):
        numbers, rows = _verdicts(first, lines)
        first += len(lines)
        if rows:
            yield numbers, _with_folders(file, rows), size_bytes


def _with_folders(file: InputFile, rows: Rows) -> Rows:
    """The rows, fresh from reading, with the columns of the file's folders that they lack."""
    for name, value in file.folders:
        for row in rows:
            if type(row) is dict:
                row.setdefault(name, value)
    return rows


def _lines(file: InputFile) -> Iterator[tuple[list[bytes], int]]:
    """All lines, as many at a time as make a batch, and their bytes; over-long ones cut."""
    with _mapped_errors(file), _opened(file) as stream:
        start = stream.read(_PIECE_BYTES)
        if foreign.is_no_text(start):
            raise _refusal(file, "JSON lines", start[: foreign.HEAD_BYTES])
        more = iter(partial(stream.read, _PIECE_BYTES), b"")
        waiting: list[bytes] = []
        size_bytes = 0
        for lines in _split(itertools.chain((start.removeprefix(b"\xef\xbb\xbf"),), more)):
            waiting += lines
            size_bytes += sum(map(len, lines))
            while len(waiting) >= BATCH_ROWS or size_bytes >= _BATCH_BYTES:
                batch = waiting[:BATCH_ROWS]
                del waiting[:BATCH_ROWS]
                batch_bytes = sum(map(len, batch))
                size_bytes -= batch_bytes
                yield batch, batch_bytes
        yield waiting, size_bytes


def _split(pieces: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The lines of a text without their ends; of one over the limit, as much as is over it."""
    begun: list[bytes] = []
    begun_bytes = 0
    for piece in pieces:
        lines = piece.split(b"\n")
        rest = lines.pop()
        if lines:
            if begun:
                lines[0] = b"".join((*begun, lines[0]))
                begun, begun_bytes = [], 0
            yield lines
        if rest and begun_bytes < _LINE_LIMIT_BYTES:
            begun.append(rest)
            begun_bytes += len(rest)
    if begun:
        yield [b"".join(begun)]


_decode: Final = msgspec.json.Decoder().decode
_ONLY_OBJECTS: Final = {dict}


def _verdicts(first: int, lines: list[bytes]) -> tuple[Sequence[int], Rows]:
    """Number and verdict of every line that is not blank."""
    try:
        # One call for all: nearly every line is an object, and a short one cannot nest deeply.
        values = list(map(_decode, lines))
    except (ValueError, RecursionError):
        values = []
    if values and set(map(type, values)) == _ONLY_OBJECTS:
        if max(map(len, lines)) > _SHALLOW_BYTES:
            values = list(map(_checked, lines, values))
        return range(first, first + len(lines)), values
    told = [(n, _row(line)) for n, line in enumerate(lines, first) if line and not line.isspace()]
    return [number for number, _ in told], [row for _, row in told]


def _row(line: bytes) -> Row | BadRow:
    """The verdict on one line."""
    try:
        value = _decode(line)
    except (ValueError, RecursionError):
        # msgspec also refuses what is JSON: 1e400, escapes of lone surrogates; and NaN.
        value = _decoded_slowly(line)
    return _checked(line, value)


def _checked(line: bytes, value: JSONValue | Decimal | BadRow) -> Row | BadRow:
    """``value`` if it is an object and within the limits."""
    if len(line) >= _LINE_LIMIT_BYTES:
        return BadRow("too_long", f"longer than {_LINE_LIMIT_BYTES >> 20} MB")
    if isinstance(value, dict):
        nested = len(line) > _SHALLOW_BYTES and line.count(b"[") + line.count(b"{")
        if nested > _DEPTH_LIMIT and _is_deep(value):
            return BadRow("too_deep", f"nested more than {_DEPTH_LIMIT} levels deep")
        return value
    if isinstance(value, BadRow):
        return value
    return BadRow("not_an_object", f"{_KINDS[type(value)]}, not an object")


_KINDS: Final[Mapping[type, str]] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    str: "text",
    list: "a list",
}


def _decoded_slowly(line: bytes) -> JSONValue | Decimal | BadRow:
    try:
        text = line.rstrip(b"\r").decode()
    except UnicodeDecodeError as exc:
        return BadRow("not_utf8", f"not UTF-8 at byte {exc.start + 1}")
    try:
        value: JSONValue = json.loads(text, parse_float=_float)
    except json.JSONDecodeError as exc:
        what = "a NUL byte" if text[exc.pos : exc.pos + 1] == "\0" else "broken JSON"
        return BadRow("broken_json", f"{what} at column {exc.colno}")
    except RecursionError:
        return BadRow("too_deep", f"nested more than {_DEPTH_LIMIT} levels deep")
    except (ValueError, InvalidOperation):
        return BadRow("long_number", "a number of too many digits")
    return value


def _float(digits: str) -> float | Decimal:
    """A double, or what a double cannot hold as it was written."""
    value = float(digits)
    return Decimal(digits) if value in (float("inf"), float("-inf")) else value


def _is_deep(value: JSONValue) -> bool:
    level: list[JSONValue] = [value]
    for _ in range(_DEPTH_LIMIT):
        below: list[JSONValue] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return False
        level = below
    return True


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@contextmanager
def _opened(file: InputFile) -> Iterator[_Stream]:
    """The file's bytes, unpacked. Errors of what is packed are for ``_mapped_errors``."""
    with file.path.open("rb", buffering=_READ_BYTES) as raw:
        if not file.compression:
            yield raw
            return
        start = raw.read(4)
        raw.seek(0)
        if not start:
            raise EOFError("not even a header")
        if _compression_of(start) != file.compression:
            claimed = _CLAIMED[file.compression]
            raise _refusal(file, claimed, raw.read(foreign.HEAD_BYTES))
        if file.compression == "gz":
            with gzip.open(raw) as unpacked:
                yield io.BufferedReader(unpacked, _READ_BYTES)
        else:
            with pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as unpacked:
                yield unpacked


def _refusal(file: InputFile, claimed: str, start: bytes, otherwise: str = "") -> UsageError:
    """What to do about a file that is not what its name says; a spool has no name to type."""
    typed = None if file.name == file.path.stem else file.path
    return foreign.refusal(typed, file.name, claimed, start, otherwise)


def _compression_of(start: bytes) -> Compression:
    return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), "")


def _start_of(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(foreign.HEAD_BYTES)
    except OSError as exc:
        raise _unreadable(name, exc) from exc


# --- tables ------------------------------------------------------------------------------------


@contextmanager
def _table(file: InputFile) -> Iterator[pq.ParquetFile]:
    """The Parquet file, opened so that a big row group is not read into memory at once."""
    with _mapped_errors(file):
        start = _start_of(file.path, file.name)
        if not start:
            raise LocalIOError(f"{file.name}: is empty (0 bytes), not a Parquet file")
        if not start.startswith(b"PAR1"[: len(start)]):
            raise _refusal(file, "Parquet", start)
        # By its descriptor: pyarrow takes some names for addresses, and those that are no UTF-8
        # for mistakes.
        with (
            file.path.open("rb") as raw,
            pq.ParquetFile(raw, pre_buffer=False, buffer_size=_READ_BYTES) as table,
        ):
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UsageError(f'{file.name}: two columns are named "{twice}"; rename one')
            yield table


def _read_table(
    file: InputFile, columns: Collection[str] | None, carry: Carried | None
) -> Iterator[Batch]:
    with _table(file) as table:
        names = _schema_of(file, table).names
        for_rows = [name for name in names if columns is None or name in columns]
        carried = carry.sources if carry else ()
        read_names = [name for name in names if name in for_rows or name in carried]
        own = [name for name in read_names if name in table.schema_arrow.names]
        done = 0
        for record in _records(table, own):
            record = _with_folder_columns(file, record, read_names)
            lines = range(done + 1, done + 1 + record.num_rows)
            done += record.num_rows
            rows = partial(_rows_of, record.select(for_rows))
            yield Batch(lines, rows, carry.from_table(record) if carry else None)


def _schema_of(file: InputFile, table: pq.ParquetFile) -> pa.Schema:
    """The table's schema and, behind it, the columns of the file's folders that it lacks."""
    schema = table.schema_arrow
    for name, _ in file.folders:
        if name not in table.schema_arrow.names:
            schema = schema.append(pa.field(name, pa.string()))
    return schema


def _with_folder_columns(
    file: InputFile, record: pa.RecordBatch, wanted: Sequence[str]
) -> pa.RecordBatch:
    for name, value in file.folders:
        if name in wanted and name not in record.schema.names:
            column = pa.repeat(pa.scalar(value, pa.string()), record.num_rows)
            record = record.append_column(name, column)
    return record


def _records(table: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    if table.metadata.num_rows == 0:
        schema = pa.schema([table.schema_arrow.field(name) for name in names])
        yield pa.RecordBatch.from_pylist([], schema=schema)
        return
    yield from table.iter_batches(_batch_rows(table.metadata), columns=names, use_threads=False)


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """How many rows of this table make about 4 MB; at most 1,024."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    widest = max((g.total_byte_size // g.num_rows for g in groups if g.num_rows), default=0)
    return max(1, min(BATCH_ROWS, _BATCH_BYTES // max(1, widest)))


def _rows_of(record: pa.RecordBatch) -> Rows:
    """A record batch as JSON-like dicts; nulls are absent members, at every depth."""
    names = record.schema.names
    columns = [_values(record.column(name), name) for name in names]
    if not columns:
        return [{} for _ in range(record.num_rows)]
    if not any(column.null_count for column in record.columns):
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return [
        {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for values in zip(*columns, strict=True)
    ]


def _values(column: pa.Array, name: str) -> list[JSONValue]:
    """A column's values as JSON has them; temporal ones as text, UTF-8 bytes too."""
    try:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        wanted = _json_type(column.type)
        if wanted != column.type:
            column = column.cast(wanted)
        values: list[JSONValue] = column.to_pylist(maps_as_pydicts="lossy")
    except (pa.ArrowException, ValueError, OverflowError) as exc:
        raise UsageError(
            f'column "{name}": its type {column.type} has no form in JSON; leave it out or cast it'
        ) from exc
    return values if _is_plain(column.type) else [_json_value(value) for value in values]


def _is_plain(kind: pa.DataType) -> bool:
    """Whether Python's values of this type are JSON's already."""
    types = pa.types
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
    )


def _json_type(kind: pa.DataType) -> pa.DataType:
    """``kind`` with everything temporal, at any depth, as text: Python's types hold less."""
    types = pa.types
    if types.is_temporal(kind) and not types.is_duration(kind):
        return pa.string()
    if types.is_duration(kind):
        return pa.int64()
    if types.is_struct(kind):
        return pa.struct([field.with_type(_json_type(field.type)) for field in kind])
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_json_type(kind.value_type)))
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_json_type(kind.value_type)))
    return kind


def _json_value(value: object) -> JSONValue:
    """Nulls in structs become absent members; those in lists are elements and stay."""
    if isinstance(value, dict):
        return {k: _json_value(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass  # stays bytes: the row says so when it is to be sent
    if isinstance(value, UUID):
        return str(value)
    return cast("JSONValue", value)


# --- errors of reading -------------------------------------------------------------------------


@contextmanager
def _mapped_errors(file: InputFile) -> Iterator[None]:
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
            raise _unreadable(file.name, exc) from exc
        if file.compression:
            raise _packed_badly(file, cut="Truncated" in str(exc)) from exc
        raise LocalIOError(f"{file.name}: {_table_trouble(file, exc)}") from exc


def _packed_badly(file: InputFile, *, cut: bool) -> LocalIOError:
    what = "is cut short" if cut else f"is not whole {file.compression} data"
    return LocalIOError(f"{file.name}: {what}; copy or write it again")


def _unreadable(name: str, exc: OSError) -> LocalIOError:
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


# --- carried columns ---------------------------------------------------------------------------


class _Wide:
    """The kind of an integer that a double may not hold exactly."""


class _Huge:
    """The kind of an integer beyond 64 bits."""


_NULL: Final = type(None)


class ColumnTypes:
    """Finds one type for every carried column, over all rows of all files.

    ``carry`` names the columns to carry, in that order; None carries all, in order of appearance.
    """

    def __init__(self, carry: tuple[str, ...] | None) -> None:
        self._carry = carry
        self._kinds: dict[str, set[type]] = {}  # of the values of JSONL rows
        self._types: dict[str, list[_TableType]] = {}  # of the columns of tables
        self._order: dict[str, None] = {}
        self._tables: set[Path] = set()
        self._notes = TableNotes()
        self._rows = 0
        for name in carry or ():
            self._kinds[name] = set()

    def observe(self, file: InputFile, batch: Batch) -> None:
        """Take note of a batch. Of tables the schema suffices; their rows are not looked at."""
        self._rows += len(batch)
        if file.format == "parquet":
            if file.path not in self._tables:
                self._tables.add(file.path)
                self._observe_table(file)
        elif self._carry is None:
            self._observe_all(batch.rows)
        elif self._carry:
            self._observe_named(batch.rows)

    def _observe_all(self, rows: Rows) -> None:
        columns = _columns_of(rows)
        if columns is None:
            for row in rows:
                if type(row) is dict:
                    for name, value in row.items():
                        self._note(name, _kinds_of((value,)))
            return
        for name, values in columns.items():
            self._note(name, _kinds_of(values))

    def _note(self, name: str, kinds: set[type]) -> None:
        try:
            self._kinds[name] |= kinds
        except KeyError:
            self._admit(name)
            self._kinds[name] = kinds

    def _observe_named(self, rows: Rows) -> None:
        for name in self._carry or ():
            values = [row[name] for row in rows if type(row) is dict and name in row]
            if values:
                self._order[name] = None
                self._note(name, _kinds_of(values))

    def _observe_table(self, file: InputFile) -> None:
        with _table(file) as table:
            schema = _schema_of(file, table)
            self._notes.add(schema)
            for field in schema:
                if self._carry is None or field.name in self._carry:
                    self._admit(field.name)
                    seen = _TableType(field.type, _fits_double(table.metadata, field))
                    self._types.setdefault(field.name, []).append(seen)

    def _admit(self, name: str) -> None:
        self._order[name] = None
        if len(self._order) > _COLUMN_LIMIT:
            raise UsageError(
                f"more than {_COLUMN_LIMIT:,} different columns; name those to keep with --carry"
            )

    def carried(self) -> Carried:
        """What was found. UsageError when a column named by --carry is nowhere."""
        names = list(self._order) if self._carry is None else list(self._carry)
        if self._carry and self._rows:
            for name in self._carry:
                if name not in self._order:
                    raise UsageError(f"--carry {name}: no row has a column of that name")
        types = {name: self._type(name) for name in names if name != CUSTOM_ID}
        unchanged = {
            name
            for name, kind in types.items()
            if all(seen.type == kind for seen in self._types.get(name, ()))
        }
        as_text = [
            name
            for name, kind in types.items()
            if _is_text(kind) and not self._kinds.get(name, set()) <= {str, _NULL}
        ]
        return Carried(types, self._notes, unchanged, as_text)

    def _type(self, name: str) -> pa.DataType:
        found = list(self._types.get(name, ()))
        if kinds := self._kinds.get(name):
            found.append(_type_of_kinds(kinds))
        merged = found[0] if found else _TableType(pa.null(), True)
        for other in found[1:]:
            merged = _merged(merged, other)
        # Only a table's own column of nulls keeps that type.
        keep_null = name in self._types
        return pa.string() if pa.types.is_null(merged.type) and not keep_null else merged.type


class RepeatedIds:
    """Finds rows whose ``custom_id`` an earlier row has, in eight bytes a row."""

    def __init__(self) -> None:
        self._hashes = array("q")  # 0: a row without one

    def add(self, rows: Rows) -> None:
        self._hashes.extend(map(_id_hash, rows))

    def found(self) -> tuple[int, int, int] | None:
        """How many rows do, and the numbers of two that share one; None when none does."""
        import pyarrow.compute as pc  # only here, and not for nothing

        buffers = [None, pa.py_buffer(self._hashes)]
        hashes = pa.Array.from_buffers(pa.int64(), len(self._hashes), buffers)
        in_order = hashes.sort()
        later = in_order[1:]
        repeated = pc.and_(pc.equal(later, in_order[:-1]), pc.not_equal(later, 0))
        at = pc.index(repeated, True).as_py()
        if at < 0:
            return None
        value = later[at].as_py()
        first = self._hashes.index(value)
        again = self._hashes.index(value, first + 1)
        return repeated.true_count, first + 1, again + 1


def _id_hash(row: Row | BadRow) -> int:
    name = row.get(CUSTOM_ID) if type(row) is dict else None
    if name is None:
        return 0
    text = name if isinstance(name, str) else json_text(name)
    return (hash(text) or 1) if text else 0


class _TableType(NamedTuple):
    type: pa.DataType
    fits_double: bool  # every integer in it is exact as a double


def _columns_of(rows: Rows) -> dict[str, list[JSONValue]] | None:
    """The values by column; None unless all rows are good and have the same columns."""
    good = cast("list[Row]", rows)
    try:
        if len(set(map(len, good))) > 1:
            return None
        return {name: list(map(itemgetter(name), good)) for name in good[0]}
    except (IndexError, KeyError, TypeError):
        return None


def _kinds_of(values: Sequence[JSONValue]) -> set[type]:
    kinds = set(map(type, values))
    if int in kinds:
        whole = [value for value in values if type(value) is int]
        if min(whole) < -_EXACT or max(whole) > _EXACT:
            kinds |= {_int_kind(value) for value in whole if not -_EXACT <= value <= _EXACT}
    return kinds


def _int_kind(value: int) -> type:
    return _Wide if -(1 << 63) <= value < 1 << 63 else _Huge


def _type_of_kinds(kinds: set[type]) -> _TableType:
    """One type for JSON values of these kinds (contract §4)."""
    kinds = kinds - {_NULL}
    exact = _Wide not in kinds
    if not kinds:
        return _TableType(pa.null(), True)
    if kinds == {bool}:
        return _TableType(pa.bool_(), True)
    if kinds <= {int, _Wide}:
        return _TableType(pa.int64(), exact)
    if kinds <= {int, float}:
        return _TableType(pa.float64(), True)
    return _TableType(pa.string(), True)


def _merged(a: _TableType, b: _TableType) -> _TableType:
    """The type of one column in two files: a wider one that loses nothing, else text."""
    types = pa.types
    exact = a.fits_double and b.fits_double
    if a.type == b.type or types.is_null(b.type):
        return _TableType(a.type, exact)
    if types.is_null(a.type):
        return _TableType(b.type, exact)
    if types.is_integer(a.type) and types.is_integer(b.type):
        wider = _wider_integer(a.type, b.type)
        return _TableType(wider, exact)
    if _is_number(a.type) and _is_number(b.type) and exact:
        return _TableType(pa.float64(), True)
    if types.is_large_string(a.type) or types.is_large_string(b.type):
        return _TableType(pa.large_string(), True)
    return _TableType(pa.string(), True)


def _wider_integer(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    signed = pa.types.is_signed_integer
    if signed(a) == signed(b):
        return a if a.bit_width >= b.bit_width else b
    if pa.uint64() in (a, b):
        return pa.string()
    return pa.int64()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _fits_double(metadata: pq.FileMetaData, field: pa.Field) -> bool:
    """Whether a column's integers are all exact as doubles, as far as its statistics tell."""
    if not pa.types.is_integer(field.type) or field.type.bit_width < 64:
        return True
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            column = group.column(c)
            if column.path_in_schema == field.name:
                bounds = column.statistics
                if bounds is None or not bounds.has_min_max:
                    return False
                if max(abs(bounds.min), abs(bounds.max)) > _EXACT:
                    return False
    return True


class Carried:
    """The input's columns as the output has them, and how to make them.

    ``renamed`` lists (column, carried as); ``as_text`` names the columns of JSONL whose values are
    written as JSON, for want of one type; ``surrogates`` counts the lone surrogates that became
    U+FFFD in what was converted so far.
    """

    def __init__(
        self,
        types: Mapping[str, pa.DataType],
        notes: TableNotes | None = None,
        unchanged: Collection[str] = (),
        as_text: Sequence[str] = (),
    ) -> None:
        """``notes`` are of tables whose columns ``unchanged`` have the types they had there."""
        self.as_text = as_text
        self._columns = list(types.items())
        outputs = _output_names(types)
        self.sources = frozenset(types)
        carried_as = dict(zip(types, outputs, strict=True))
        notes = notes or TableNotes()
        self.schema = pa.schema(
            [
                pa.field(
                    carried_as[name],
                    kind,
                    metadata=notes.of_field(name) if name in unchanged else None,
                )
                for name, kind in types.items()
            ],
            metadata=notes.of_schema(carried_as, set(unchanged)),
        )
        self.renamed = [(n, out) for n, out in zip(types, outputs, strict=True) if n != out]
        self.surrogates = 0

    def from_rows(self, rows: Rows) -> pa.RecordBatch:
        """The carried columns of JSONL rows; a bad row has nulls.

        StoppedEarly when a value does not fit the type found before: the file was changed.
        """
        good = [row if type(row) is dict else {} for row in rows]
        arrays = [self._column(name, kind, good) for name, kind in self._columns]
        return self._batch(arrays, len(rows))

    def _column(self, name: str, kind: pa.DataType, rows: Sequence[Row]) -> pa.Array:
        values = [row.get(name) for row in rows]
        if not _is_text(kind):
            try:
                return pa.array(values, kind)
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as exc:
                raise StoppedEarly(
                    f'column "{name}" changed while the input was read; run the command again'
                ) from exc
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, ValueError, TypeError):
            return pa.array([self._text(value) for value in values], kind)

    def _text(self, value: JSONValue) -> str | None:
        if value is None:
            return None
        text = value if isinstance(value, str) else json_text(value)
        clean = without_surrogates(text)
        if clean != text:
            self.surrogates += sum(a != b for a, b in zip(text, clean, strict=True))
        return clean

    def from_table(self, record: pa.RecordBatch) -> pa.RecordBatch:
        """The carried columns of a table's rows."""
        arrays = []
        for name, kind in self._columns:
            at = record.schema.get_field_index(name)
            if at < 0:
                arrays.append(pa.nulls(record.num_rows, kind))
            else:
                arrays.append(self._converted(record.column(at), kind, name))
        return self._batch(arrays, record.num_rows)

    def _converted(self, column: pa.Array, kind: pa.DataType, name: str) -> pa.Array:
        if column.type == kind:
            return column
        if _is_text(kind) and not _is_text(column.type):
            return pa.array([self._text(value) for value in _values(column, name)], kind)
        return column.cast(kind)

    def _batch(self, arrays: list[pa.Array], rows: int) -> pa.RecordBatch:
        if arrays:
            return pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        # Without columns a batch cannot know its length; its users take it from the rows.
        return pa.RecordBatch.from_pylist([{}] * rows, schema=self.schema)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _output_names(names: Iterable[str]) -> list[str]:
    """Names that clash with neither the answer columns, case aside, nor each other."""
    names = list(names)
    taken = {without_surrogates(name) for name in names}
    outputs: list[str] = []
    for name in names:
        output = without_surrogates(name)
        while output.casefold() in ANSWER_COLUMNS or (output != name and output in taken):
            output = f"input_{output}"
        taken.add(output)
        outputs.append(output)
    return outputs
