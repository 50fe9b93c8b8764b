"""Answers to rows of a shard that the table, divided otherwise or not at all, got before."""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from batchrun import outputs
from batchrun.chat import Identity
from batchrun.config import RunConfig
from batchrun.inputs import BadRow
from batchrun.journal import Journal
from batchrun.outputs import Mark
from batchrun.runs.reuse import wanted
from batchrun.runs.sources import CheckStop, Chosen, Source, batches
from batchrun.runs.unused import give, mark_of
from batchrun.shards import parts_of, whole_of
from batchrun.types import NO_USAGE, Outcome


def take_over(
    config: RunConfig,
    sources: Sequence[Source],
    chosen: Chosen,
    book: Journal,
    check_stop: CheckStop,
) -> int:
    """Give the rows of this shard what is settled there; how many. The files stay as they are."""
    if not (others := _other_parts(config)):
        return 0
    before = _asked_before(sources, chosen, book, check_stop)
    taken = _share_out(others, before, book, check_stop)
    if config.dedupe:
        # An answer that an earlier part has is not asked for again; that part tells what it cost.
        taken += _share_out(others, {}, book, check_stop, paid_elsewhere=True)
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
        identify = source.builder.identify
        for row in batch.rows:
            if isinstance(row, BadRow) or type(found := identify(row)) is not Identity:
                continue
            if next(book.lacking(found.hash), None) is not None:
                before[found.hash] += 1
    return before


def _share_out(
    paths: Sequence[Path],
    before: Mapping[bytes, int],
    book: Journal,
    check_stop: CheckStop,
    *,
    paid_elsewhere: bool = False,
) -> int:
    """Give the rows of this part what is settled there; how many.

    The answers of equal rows are shared out in the order of the rows: those that earlier parts
    take are left to them.
    """
    taken = 0
    marks: dict[bytes, dict[Mark, int]] = defaultdict(dict)
    for path in paths:
        for outcomes in wanted(path, book):
            check_stop()
            own = []
            for each in outcomes:
                if each.hash in before:
                    same = marks[each.hash]
                    if same.setdefault(mark_of(each), len(same)) < before[each.hash]:
                        continue
                if each.final:
                    own.append(_without_effort(each) if paid_elsewhere else each)
            taken += give(book, own)
    return taken


def _without_effort(outcome: Outcome) -> Outcome:
    return replace(outcome, attempts=0, in_doubt=0, usage=NO_USAGE)
