"""``--reuse``: answers that other outputs hold to equal requests."""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from msgspec.structs import replace

from batchrun import outputs
from batchrun.chat import Identity
from batchrun.config import RunConfig
from batchrun.errors import UsageError
from batchrun.inputs import BadRow
from batchrun.journal import Journal
from batchrun.outputs import Mark
from batchrun.runs.sources import CheckStop, Chosen, Source, batches, invalid_of
from batchrun.runs.unused import SLICE_ROWS, give, mark_of
from batchrun.shards import parts_of, whole_of
from batchrun.types import Outcome


def reuse(
    config: RunConfig,
    sources: Sequence[Source],
    chosen: Chosen,
    book: Journal,
    check_stop: CheckStop,
) -> int:
    """Give rows that lack an answer one of those; how many were given.

    UsageError for a file that is no output of batchrun, or holds synthetic answers where real ones
    are wanted. The files stay as they are.
    """
    taken = 0
    if others := _other_parts(config):
        before = _asked_before(sources, chosen, book, check_stop)
        taken = _take_over(others, before, book, check_stop)
    for path in _files(config):
        for outcomes in _wanted(path, book):
            check_stop()
            # No attempt of this output's: its budget does not count what another paid.
            taken += give(
                book,
                [replace(each, attempts=0, in_doubt=0) for each in outcomes if each.kind == "ok"],
            )
    if taken:
        book.sync()
    return taken


def _other_parts(config: RunConfig) -> list[Path]:
    """Where answers to rows of this shard may be that was divided otherwise before, or not at all.

    Other parts of this division have rows of their own, but for those that an edit moved.
    """
    if config.shard is None or config.to_stdout:
        return []
    part = Path(config.output)
    whole = whole_of(part)
    others = [path for shard, path in parts_of(whole).items() if shard.of != config.shard.of]
    moved = part.parent.glob(f"{glob.escape(whole.stem)}.shard-*.unused.parquet")
    found = []
    for path in [whole, *others, *sorted(moved)]:
        footer = outputs.recognise(path) if path.is_file() else None
        if footer is not None and footer.synthetic is config.mock:
            found.append(path)
    return found


def _asked_before(
    sources: Sequence[Source], chosen: Chosen, book: Journal, check_stop: CheckStop
) -> Counter[bytes]:
    """How many rows before this part ask the same as one of it that lacks an answer."""
    before = Counter[bytes]()
    if not chosen.rows_before:
        return before
    rows_before = Chosen(chosen.rows_before, samples=chosen.samples)
    for source, batch in batches(sources, rows_before, check_stop):
        for row in batch.rows:
            found = invalid_of(row) if isinstance(row, BadRow) else source.builder.identify(row)
            if type(found) is Identity and next(book.lacking(found.hash), None) is not None:
                before[found.hash] += 1
    return before


def _take_over(
    paths: Sequence[Path], before: Mapping[bytes, int], book: Journal, check_stop: CheckStop
) -> int:
    """Give the rows of this part what is settled there; how many.

    The answers of equal rows are shared out in the order of the rows: those that earlier parts
    take are left to them.
    """
    taken = 0
    marks: dict[bytes, dict[Mark, int]] = defaultdict(dict)
    for path in paths:
        for outcomes in _wanted(path, book):
            check_stop()
            own = []
            for each in outcomes:
                if each.hash in before:
                    same = marks[each.hash]
                    if same.setdefault(mark_of(each), len(same)) < before[each.hash]:
                        continue
                if each.final:
                    own.append(each)
            taken += give(book, own)
    return taken


def _files(config: RunConfig) -> list[Path]:
    found: dict[Path, None] = {}
    for name in config.reuse:
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


def _wanted(path: Path, book: Journal) -> Iterator[Sequence[Outcome]]:
    """The outcomes of requests that some row still has to send, not many at once."""

    def is_wanted(hash: bytes) -> bool:
        return next(book.lacking(hash), None) is not None

    if path.suffix == ".parquet":
        yield from outputs.read_wanted(path, is_wanted)
        return
    wanted = (each for each in outputs.read_back(path) if is_wanted(each.hash))
    while chunk := list(islice(wanted, SLICE_ROWS)):
        yield chunk
