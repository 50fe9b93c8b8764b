"""The inputs laid out: each file with the way its rows become requests, read batch by batch."""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from batchrun import inputs
from batchrun.chat import CHAT, Api, Builder, Built, Invalid, Layout, PromptSettings
from batchrun.config import RunConfig
from batchrun.errors import StoppedEarly
from batchrun.inputs import BadRow, Batch, Carried, InputFile, Row

CheckStop = Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One input file and how its rows become requests."""

    file: InputFile
    layout: Layout
    builder: Builder


def lay_out(
    files: Sequence[InputFile], settings: PromptSettings, config: RunConfig, api: Api = CHAT
) -> list[Source]:
    """Decide each file's shape from its schema or its first good rows."""
    sources = []
    for file in files:
        columns, rows = inputs.head(file)
        layout = api.detect(columns, rows, settings, config.shape, file.name)
        image_url = inputs.image_urls(Path() if file.is_spool else file.path.parent)
        sources.append(Source(file, layout, api.builder(layout, settings, image_url)))
    return sources


def shapes(sources: Sequence[Source]) -> tuple[str, str | None]:
    """The shape and prompt column that bind a rerun; several shapes are joined in order."""
    kinds = sorted({source.layout.shape for source in sources})
    columns = sorted({s.layout.prompt_column for s in sources if s.layout.prompt_column})
    return ",".join(kinds), ",".join(columns) or None


def needed(source: Source) -> Collection[str] | None:
    return source.layout.columns_needed


class Chosen(NamedTuple):
    """Which rows of the input this run is about; neither: all."""

    limit: int | None = None  # so many from the beginning
    sample: Sequence[int] | None = None  # these, 0-based over all sources, ascending
    rows_before: int = 0  # of the input, before the first of these; known of a part only
    samples: int = 1  # each of them so many times, one after another


EVERY_ROW: Final = Chosen()


def choose(sources: Sequence[Source], config: RunConfig, check_stop: CheckStop) -> Chosen:
    """The first rows, a part, or a sample: with the same seed a larger one holds the smaller."""
    if config.sample is None and config.shard is None:
        return Chosen(config.limit, samples=config.samples)
    nothing: Collection[str] = ()
    reading = batches(sources, EVERY_ROW, check_stop, columns=lambda _: nothing)
    total = sum(len(batch) for _, batch in reading)
    if config.shard is not None:
        part = config.shard.rows(total)
        return Chosen(sample=part, rows_before=part.start, samples=config.samples)
    assert config.sample is not None
    drawn = heapq.nsmallest(config.sample, range(total), partial(_lot, config.seed))
    return Chosen(sample=array("Q", sorted(drawn)), samples=config.samples)


_WORD: Final = (1 << 64) - 1


def _lot(seed: int, row: int) -> int:
    """A number that seems random (SplitMix64), the same on every machine for ever."""
    mixed = (seed * 0xD1342543DE82EF95 + (row + 1) * 0x9E3779B97F4A7C15) & _WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
    return mixed ^ (mixed >> 31)


def never_stop() -> None:
    """The check of a pass that nobody interrupts."""


def batches(
    sources: Sequence[Source],
    chosen: Chosen,
    check_stop: CheckStop = never_stop,
    *,
    columns: Callable[[Source], Collection[str] | None] = needed,
    carried: Carried | None = None,
    observe: Callable[[InputFile, Batch], None] | None = None,
) -> Iterator[tuple[Source, Batch]]:
    """Every source's batches, of the chosen rows; StoppedEarly for a changed file."""
    left, sample, first = chosen.limit, chosen.sample, 0
    for source in sources:
        for batch in _read(source, columns(source), carried):
            check_stop()
            # Whole, for publishing converts whole batches too, whatever the limit.
            if observe is not None:
                observe(source.file, batch)
            if sample is not None:
                start = bisect_left(sample, first)
                end = bisect_left(sample, first + len(batch))
                places = [row - first for row in sample[start:end]]
                first += len(batch)
                batch = batch.take(places)
            if left is not None:
                batch = _first(batch, left)
                left -= len(batch)
            if len(batch):
                yield source, batch if chosen.samples == 1 else batch.repeated(chosen.samples)
            if left == 0:
                return


def _read(
    source: Source, columns: Collection[str] | None, carried: Carried | None
) -> Iterator[Batch]:
    check_unchanged((source,))
    try:
        yield from inputs.read(source.file, columns=columns, carry=carried)
    except Exception:
        # Half of a file that is being written reads as anything: its change is what went wrong.
        check_unchanged((source,))
        raise


def _first(batch: Batch, rows: int) -> Batch:
    if len(batch) <= rows:
        return batch
    carried = batch.carried.slice(0, rows) if batch.carried is not None else None
    return Batch(batch.lines[:rows], batch.rows[:rows], carried)


def check_unchanged(sources: Sequence[Source]) -> None:
    """StoppedEarly when a file is no longer the one this run began to read."""
    for source in sources:
        if not inputs.unchanged(source.file):
            raise changed(source.file)


def changed(file: InputFile) -> StoppedEarly:
    return StoppedEarly(f"{file.name} changed while it was read; nothing was published")


def identified(builder: Builder, row: Row | BadRow) -> Built | Invalid:
    return invalid_of(row) if isinstance(row, BadRow) else builder.build(row)


def invalid_of(row: BadRow) -> Invalid:
    return Invalid(row.code, row.reason)
