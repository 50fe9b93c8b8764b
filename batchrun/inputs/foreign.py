"""What a file is that is not what its name says, and the line that makes it readable here.

All that is looked at are the first bytes. The lines need what every machine with Python has.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from batchrun import shell
from batchrun.config import COMPRESSED_SUFFIXES, INPUT_SUFFIXES, Compression
from batchrun.errors import UsageError
from batchrun.words import count

HEAD_BYTES: Final = 64 << 10
_SHOWN_CHARACTERS: Final = 40
_COMPARED_ROWS: Final = 5


class Found(NamedTuple):
    """What a file seems to be: words for people, its right suffix, and a conversion or advice.

    A suffix that can be read here is enough; what it says is done otherwise.
    """

    what: str
    suffix: str = ""
    convert: str = ""  # a filter from this format to JSON lines
    advice: str = ""
    is_encoding: bool = False  # the filter changes the letters' bytes and leaves the format


def _encoded(what: str, encoding: str) -> Found:
    return Found(what, convert=f"iconv -f {encoding} -t UTF-8", is_encoding=True)


_CONVERT_FIRST: Final = "write it as JSON lines (one object a line) or as Parquet first"


_MAGIC: Final[Mapping[bytes, Found]] = {
    b"\x1f\x8b": Found("gzip data", ".gz"),
    b"\x28\xb5\x2f\xfd": Found("zstd data", ".zst"),
    b"PAR1": Found("Parquet", ".parquet"),
    b"PARE": Found("encrypted Parquet", advice="write it without encryption first"),
    b"\xff\xfe": _encoded("UTF-16 text", "UTF-16"),
    b"\xfe\xff": _encoded("UTF-16 text", "UTF-16"),
    b"{\0": _encoded("UTF-16 text", "UTF-16LE"),
    b"\0{": _encoded("UTF-16 text", "UTF-16BE"),
    b"BZh": Found("bzip2 data", convert="bzip2 -dc"),
    b"\xfd7zXZ\0": Found("xz data", convert="xz -dc"),
    b"\x04\x22\x4d\x18": Found("lz4 data", convert="lz4 -dc"),
    b"PK\x03\x04": Found("a ZIP archive or an Excel file", advice=_CONVERT_FIRST),
    b"\xd0\xcf\x11\xe0": Found("an old Excel file", advice=_CONVERT_FIRST),
    b"ARROW1": Found("an Arrow file", advice="write it as Parquet first"),
    b"Obj\x01": Found("Avro", advice=_CONVERT_FIRST),
    b"ORC": Found("ORC", advice="write it as Parquet first"),
    b"SQLite format 3\0": Found("an SQLite database", advice=_CONVERT_FIRST),
}


_PYTHON: Final = "python3 -c 'import {modules}; [print(json.dumps(r)) for r in {rows}]'"


_ARRAY: Final = Found(
    "one JSON array", convert=_PYTHON.format(modules="json", rows="json.load(open(0))")
)


_PRETTY: Final = Found(
    "JSON spread over several lines",
    convert=_PYTHON.format(
        modules="json,re",
        rows='json.loads("[" + re.sub(r"(?m)^}\\s*{", "},{", open(0).read()) + "]")',
    ),
)


_LITERALS: Final = Found(
    "Python's own notation",
    convert=_PYTHON.format(modules="ast,json", rows="map(ast.literal_eval, open(0))"),
)


_PLAIN: Final = Found(
    "plain text",
    convert=_PYTHON.format(modules="json", rows='({"prompt": l.rstrip("\\n")} for l in open(0))'),
)


_LINES: Final = Found("JSON lines", ".jsonl")
_OPEN_ENDS: Final = ("{", "[", ",")
_PROMPT_NAMES: Final = frozenset({"prompt", "question", "query", "text", "input", "instruction"})


def binary(start: bytes) -> Found | None:
    """What the first bytes of a file say that is no UTF-8 text."""
    return next((found for magic, found in _MAGIC.items() if start.startswith(magic)), None)


def is_no_text(start: bytes) -> bool:
    """Whether no line of the file can be text; what a line of text may begin with is no proof."""
    found = next((magic for magic in _MAGIC if start.startswith(magic)), b"")
    return found == b"PAR1" or not found.isascii()


def is_one_document(start: bytes) -> bool:
    """Whether a text is JSON over many lines, of which some may happen to be objects."""
    first = _first_line(_text(start))
    return first in ("[", "{") or (first.startswith("[") and first.endswith(","))


def recognise(start: bytes) -> Found | None:
    """What a file seems to be; None when nothing fits."""
    if (found := binary(start)) is not None:
        return found
    text = _text(start)
    first = _first_line(text)
    if first.startswith("["):
        second = _second_line(text)
        return None if second and _is_json(first) and _is_json(second) else _ARRAY
    if first.startswith("{'"):
        return _LITERALS
    if first.startswith("{"):
        return _LINES if _is_json(first) else _PRETTY if first.endswith(_OPEN_ENDS) else None
    if first.startswith("<"):
        return Found("XML or HTML", advice=_CONVERT_FIRST)
    if not first or "\0" in text or _is_json(first):
        return None
    return _csv(text, is_utf8=_is_utf8(start)) or _PLAIN


def refusal(
    path: Path | None, name: str, claimed: str, start: bytes, otherwise: str = ""
) -> UsageError:
    """The error for a file that is not ``claimed``; ``otherwise`` is said when nothing is known.

    Without a path the bytes came in through a pipe.
    """
    found = recognise(start)
    if found is None:
        wrong = otherwise or "nor anything else known here"
        return UsageError(f"{name} is not {claimed}: {wrong}", next_steps=(_CONVERT_FIRST,))
    seems = f"is {found.what}" if binary(start) else f"looks like {found.what}"
    text = f"{name} is not {claimed}: it {seems}"
    if found.suffix in INPUT_SUFFIXES or found.suffix in COMPRESSED_SUFFIXES:
        if path is None:
            format_ = INPUT_SUFFIXES.get(found.suffix)
            step = f"--input-format {format_}" if format_ else "--input-format says what it is"
            return UsageError(text, next_steps=(step,))
        return UsageError(f"{text}. Rename it:", next_steps=(_renaming(found, path),))
    if found.convert:
        return UsageError(f"{text}. Convert it:", next_steps=(_conversion(found, path),))
    return UsageError(f"{text}; {found.advice}")


def not_utf8(
    path: Path | None, place: str, compression: Compression, *, encoding: str = "WINDOWS-1252"
) -> UsageError:
    """The error for a text of which the line at ``place`` is no UTF-8; most such are Windows'."""
    step = _conversion(_encoded("text", encoding), path, unpack=_UNPACK[compression])
    return UsageError(f"{place}: not UTF-8. Convert the file:", next_steps=(step,))


_UNPACK: Final[Mapping[Compression, str]] = {"": "", "gz": "gzip -dc", "zst": "zstd -dc"}


def _conversion(found: Found, path: Path | None, unpack: str = "") -> str:
    if path is None:
        filters = f"{unpack} | {found.convert}" if unpack else found.convert
        return f"... | {filters} | batchrun submit - ..."
    stem = path.name.partition(".")[0] or path.name
    own = path.with_suffix("").suffix if unpack else path.suffix
    suffix = own if found.is_encoding and own in INPUT_SUFFIXES else ".jsonl"
    target = path.with_name(f"{stem}{suffix}")
    if target == path:
        target = path.with_name(f"{stem}.converted{suffix}")
    source = f"< {shell.file(str(path))}"
    filters = f"{unpack} {source} | {found.convert}" if unpack else f"{found.convert} {source}"
    return f"{filters} > {shell.file(str(target))}"


def _renaming(found: Found, path: Path) -> str:
    if found.suffix in (".gz", ".zst"):
        target = path.with_name(path.name.removesuffix(found.suffix) + found.suffix)
    else:
        name = path.name.removesuffix(".gz").removesuffix(".zst")
        target = path.with_name(name).with_suffix(found.suffix)
    return f"mv {shell.file(str(path))} {shell.file(str(target))}"


def _text(start: bytes) -> str:
    return start.decode("utf-8-sig", errors="replace")


def _is_utf8(start: bytes) -> bool:
    try:
        start.decode()
    except UnicodeDecodeError as exc:
        return exc.start >= len(start) - 3 and len(start) >= HEAD_BYTES  # cut in a character
    return True


def _first_line(text: str) -> str:
    return text.lstrip().partition("\n")[0].rstrip()


def _second_line(text: str) -> str:
    return text.lstrip().partition("\n")[2].lstrip().partition("\n")[0]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _csv(text: str, *, is_utf8: bool) -> Found | None:
    """A table of texts: a header and rows of as many fields."""
    lines = [line for line in text.split("\n") if line.strip()]
    tables = {mark: _fields(lines, mark) for mark in (",", "\t", ";", "|")}
    fitting = [mark for mark, rows in tables.items() if _is_table(rows)]
    if not fitting:
        if lines[0].strip().strip('"').casefold() not in _PROMPT_NAMES:
            return None
        fitting = [","]
    mark = max(fitting, key=lambda each: len(tables[each][0]))
    header = tables[mark][0]
    columns = count(len(header), "column")
    first = header[0] if len(header[0]) <= _SHOWN_CHARACTERS else f"{header[0][:37]}..."
    delimiter = {",": "", "\t": ', delimiter="\\t"'}.get(mark, f', delimiter="{mark}"')
    encoding = "utf-8-sig" if is_utf8 else "cp1252"
    source = f'open(0, encoding="{encoding}", newline="")'
    suffix = ".tsv" if mark == "\t" else ".csv"
    return Found(
        f'{"tab-separated text" if mark == chr(9) else "CSV"} ({columns}, "{first}" first)',
        suffix if is_utf8 else "",
        convert=_PYTHON.format(modules="csv,json", rows=f"csv.DictReader({source}{delimiter})"),
    )


def _fields(lines: Sequence[str], mark: str) -> list[list[str]]:
    reader = csv.reader(lines[: 10 * _COMPARED_ROWS], delimiter=mark)
    try:
        return [row for row, _ in zip(reader, range(_COMPARED_ROWS), strict=False)]
    except csv.Error:
        return [[]]


def _is_table(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the rows are alike; the last one may be cut off where our reading ended."""
    header = rows[0]
    alike = [len(row) == len(header) for row in rows[1:]]
    return len(header) > 1 and all(name.strip() for name in header) and all(alike)
