"""``--reuse``: answers that other outputs hold to equal requests."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from msgspec.structs import replace

from batchrun import outputs
from batchrun.addresses import is_address
from batchrun.config import RunConfig
from batchrun.errors import UsageError
from batchrun.journal import Journal
from batchrun.runs.sources import CheckStop
from batchrun.runs.unused import SLICE_ROWS, give
from batchrun.types import Outcome


def reuse(config: RunConfig, book: Journal, check_stop: CheckStop) -> int:
    """Give rows that lack an answer one of those; how many were given.

    UsageError for a file that is no output of batchrun, or holds synthetic answers where real ones
    are wanted. The files stay as they are.
    """
    taken = 0
    for path in _files(config):
        for outcomes in wanted(path, book):
            check_stop()
            # No attempt of this output's: its budget does not count what another paid.
            taken += give(
                book,
                [replace(each, attempts=0, in_doubt=0) for each in outcomes if each.kind == "ok"],
            )
    if taken:
        book.sync()
    return taken


def _files(config: RunConfig) -> list[Path]:
    found: dict[Path, None] = {}
    for name in config.reuse:
        if is_address(name):
            raise UsageError(f"--reuse {name}: only local files are read")
        paths = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name)))
        if not paths:
            raise UsageError(f"--reuse {name}: there is no such file")
        for path in paths:
            footer = outputs.recognise(path) if path.is_file() else None
            if footer is None or (not footer.run_id and footer.aside is None):
                raise UsageError(f"--reuse {path}: not an output of batchrun")
            if footer.synthetic is not config.mock:
                kind = "synthetic" if footer.synthetic else "real"
                raise UsageError(f"--reuse {path}: holds {kind} answers")
            found[path] = None
    return list(found)


def wanted(path: Path, book: Journal) -> Iterator[Sequence[Outcome]]:
    """The outcomes of requests that some row still has to send, not many at once."""

    def is_wanted(hash: bytes) -> bool:
        return next(book.lacking(hash), None) is not None

    if path.suffix == ".parquet":
        yield from outputs.read_wanted(path, is_wanted)
        return
    found = (each for each in outputs.read_back(path) if is_wanted(each.hash))
    while chunk := list(islice(found, SLICE_ROWS)):
        yield chunk
