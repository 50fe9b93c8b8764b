"""A text by the line: as many lines at a time as make a batch, and no line without bound."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Final

from batchrun.inputs import foreign
from batchrun.inputs.rows import BATCH_BYTES, BATCH_ROWS, LINE_LIMIT_BYTES, InputFile
from batchrun.inputs.unpack import mapped_errors, opened, refusal

# Split into lines at once: more leaves the processor's cache.
_PIECE_BYTES: Final = 256 << 10


def lines_of(file: InputFile, claimed: str) -> Iterator[tuple[list[bytes], int]]:
    """All lines, as many at a time as make a batch, and their bytes; over-long ones cut.

    They end at line feeds only, and come without them. UsageError when the file is no text;
    ``claimed`` is what it is said to be.
    """
    with mapped_errors(file), opened(file) as stream:
        start = stream.read(_PIECE_BYTES)
        if foreign.is_no_text(start):
            raise refusal(file, claimed, start[: foreign.HEAD_BYTES])
        more = iter(partial(stream.read, _PIECE_BYTES), b"")
        waiting: list[bytes] = []
        size_bytes = 0
        for lines in _split(itertools.chain((start.removeprefix(b"\xef\xbb\xbf"),), more)):
            waiting += lines
            size_bytes += sum(map(len, lines))
            while len(waiting) >= BATCH_ROWS or size_bytes >= BATCH_BYTES:
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
        if rest and begun_bytes < LINE_LIMIT_BYTES:
            begun.append(rest)
            begun_bytes += len(rest)
    if begun:
        yield [b"".join(begun)]
