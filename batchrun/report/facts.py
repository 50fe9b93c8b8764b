"""What a page says, gathered from a published Parquet file in two passes of bounded memory.

The first reads the columns of numbers and kinds, a batch at a time; the second the few rows that
are shown in full.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun import outputs
from batchrun.outputs import Footer
from batchrun.report.bins import LogBins, Values
from batchrun.series import Series

BATCH_ROWS: Final = 16_384
SAMPLED: Final = 20
EXTREMES: Final = 3  # longest, shortest, truncated
EXAMPLES: Final = 3  # of each cause
MOST_CAUSES: Final = 50
MOST_TYPED: Final = 40
SHOWN_CHARS: Final = 4_000


class Shown(NamedTuple):
    """A row in full, or as much of it as one reads."""

    number: int  # in the output, from 1
    custom_id: str
    asked: Sequence[tuple[str, str]]  # the input's columns by name
    answer: str | None
    error: str | None
    facts: str  # tokens, seconds, finish reason


class Cause(NamedTuple):
    kind: str
    code: str
    rows: int
    examples: Sequence[Shown]
    source: str  # file and line of the first, where the run noted it


class Typed(NamedTuple):
    """One typed column: its numbers or its values."""

    name: str
    type: str
    nulls: int
    numbers: LogBins | None
    negative: int
    values: Values | None


class Facts(NamedTuple):
    """All that is on a page, not yet escaped."""

    output: str
    footer: Footer
    series: Series | None
    latency: LogBins
    ttft: LogBins
    prompt_tokens: LogBins
    completion_tokens: LogBins
    finish_reasons: Values
    causes: Sequence[Cause]
    typed: Sequence[Typed]
    sampled: Sequence[Shown]
    longest: Sequence[Shown]
    shortest: Sequence[Shown]
    truncated: Sequence[Shown]


class _Light:
    """The first pass."""

    def __init__(self, typed: Iterable[pa.Field]) -> None:
        self.latency, self.ttft = LogBins(), LogBins()
        self.prompt, self.completion = LogBins(), LogBins()
        self.finish = Values()
        self.causes: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.truncated: list[int] = []
        self._long: list[tuple[int, int]] = []
        self._short: list[tuple[int, int]] = []
        self._typed = [_TypedColumn(field) for field in typed][:MOST_TYPED]

    def add(self, first: int, batch: pa.RecordBatch) -> None:
        """A batch whose first row is the ``first`` of the file, from 0."""
        self.latency.add(batch.column("latency_s"))
        self.ttft.add(batch.column("ttft_s"))
        self.prompt.add(batch.column("prompt_tokens"))
        self.completion.add(batch.column("completion_tokens"))
        ok = pc.equal(batch.column("status"), "ok")
        self.finish.add(batch.column("finish_reason").filter(ok))
        for column in self._typed:
            column.add(batch.column(column.field.name))
        self._add_failures(first, batch, ok)
        self._add_lengths(first, batch, ok)
        if len(self.truncated) < EXTREMES:
            cut = pc.and_(ok, pc.equal(batch.column("finish_reason"), "length"))
            self.truncated += [first + at for at in _places(cut)[: EXTREMES - len(self.truncated)]]

    def _add_failures(self, first: int, batch: pa.RecordBatch, ok: pa.Array) -> None:
        failed = _places(pc.invert(ok))
        kinds, codes = (
            batch.column(name).take(pa.array(failed, pa.int64())).to_pylist()
            for name in ("error_kind", "error_code")
        )
        for at, kind, code in zip(failed, kinds, codes, strict=True):
            cause = (kind or "error", code or "")
            if cause not in self.causes and len(self.causes) >= MOST_CAUSES:
                cause = ("other", "")
            self.causes[cause] += 1
            if len(self.examples[cause]) < EXAMPLES:
                self.examples[cause].append(first + at)

    def _add_lengths(self, first: int, batch: pa.RecordBatch, ok: pa.Array) -> None:
        answered = _places(ok)
        lengths = pc.utf8_length(batch.column("response").take(pa.array(answered, pa.int64())))
        for heap, sign, best in (
            (self._long, 1, pc.top_k_unstable(lengths, EXTREMES)),
            (self._short, -1, pc.bottom_k_unstable(lengths, EXTREMES)),
        ):
            for at in best.to_pylist():
                if (length := lengths[at].as_py()) is not None:
                    heapq.heappush(heap, (sign * length, -(first + answered[at])))
            while len(heap) > EXTREMES:
                heapq.heappop(heap)

    @property
    def longest(self) -> list[int]:
        return [-row for _, row in sorted(self._long, reverse=True)]

    @property
    def shortest(self) -> list[int]:
        return [-row for _, row in sorted(self._short, reverse=True)]

    @property
    def typed(self) -> list[Typed]:
        return [column.told() for column in self._typed]


class _TypedColumn:
    def __init__(self, field: pa.Field) -> None:
        self.field = field
        kind = field.type
        self._numbers = (
            LogBins() if pa.types.is_integer(kind) or pa.types.is_floating(kind) else None
        )
        self._values = Values()
        self._nulls = self._negative = 0

    def add(self, column: pa.Array) -> None:
        self._nulls += column.null_count
        if self._numbers is not None:
            self._negative += pc.sum(pc.less(column, 0)).as_py() or 0
            self._numbers.add(column.filter(pc.greater_equal(column, 0)))
        if pa.types.is_nested(column.type):
            return
        self._values.add(column)

    def told(self) -> Typed:
        return Typed(
            self.field.name.removeprefix("parsed_"),
            str(self.field.type),
            self._nulls,
            self._numbers,
            self._negative,
            None if pa.types.is_nested(self.field.type) else self._values,
        )


def _places(mask: pa.Array) -> list[int]:
    places: list[int] = pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist()
    return places


def gather(path: Path, footer: Footer, series: Series | None) -> Facts:
    """Read the published Parquet file at ``path``; LocalIOError when it cannot be read.

    Which rows are sampled depends on the publication alone: a page that is made again is the same.
    """
    with outputs.parquet_file(path) as file:
        names = file.schema_arrow.names
        own = outputs.names_of(footer)
        light = _Light(
            file.schema_arrow.field(n) for n in own if n in names and n.startswith("parsed_")
        )
        rows = file.metadata.num_rows
        wanted = ["status", "response", "finish_reason", "error_kind", "error_code", "latency_s"]
        wanted += ["ttft_s", "prompt_tokens", "completion_tokens"]
        wanted += [n for n in own if n in names and n.startswith("parsed_")]
        first = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
            light.add(first, batch)
            first += batch.num_rows
        sampled = random.Random(footer.publication).sample(range(rows), min(SAMPLED, rows))
        causes = light.causes.most_common()
        shown = {
            *sampled,
            *light.longest,
            *light.shortest,
            *light.truncated,
            *(row for cause, _ in causes for row in light.examples[cause]),
        }
        carried = [name for name in names if name not in own]
        read = dict(_rows(file, sorted(shown), carried, footer))
    sources = {(each.kind, each.code): each.example for each in footer.errors}
    return Facts(
        output=str(path),
        footer=footer,
        series=series,
        latency=light.latency,
        ttft=light.ttft,
        prompt_tokens=light.prompt,
        completion_tokens=light.completion,
        finish_reasons=light.finish,
        causes=[
            Cause(
                *cause,
                count,
                [read[row] for row in light.examples[cause]],
                example.source if (example := sources.get(cause)) else "",
            )
            for cause, count in causes
        ],
        typed=light.typed,
        sampled=[read[row] for row in sorted(sampled)],
        longest=[read[row] for row in light.longest],
        shortest=[read[row] for row in light.shortest],
        truncated=[read[row] for row in light.truncated],
    )


def _rows(
    file: pq.ParquetFile, rows: Sequence[int], carried: Sequence[str], footer: Footer
) -> Iterator[tuple[int, Shown]]:
    """These rows in full; of each row group only the batches that hold any."""
    column = footer.settings.get("prompt_column")
    ordered = sorted(carried, key=lambda name: name != column)
    own = ["custom_id", "status", "response", "finish_reason", "error_message", "latency_s"]
    own += ["http_status", "attempts", "prompt_tokens", "completion_tokens"]
    start, at = 0, 0
    for group in range(file.metadata.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if at < len(rows) and rows[at] < end:
            first = start
            for batch in file.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[*ordered, *own], use_threads=False
            ):
                while at < len(rows) and rows[at] < first + batch.num_rows:
                    yield rows[at], _shown(rows[at], batch, rows[at] - first, ordered)
                    at += 1
                first += batch.num_rows
        start = end


def _shown(number: int, batch: pa.RecordBatch, at: int, carried: Sequence[str]) -> Shown:
    def value(name: str) -> Any:
        return batch.column(name)[at].as_py()

    counts = [
        f"{text:,} {what}" if isinstance(text, int) else ""
        for what, text in (
            ("tokens in", value("prompt_tokens")),
            ("tokens out", value("completion_tokens")),
        )
    ]
    seconds = value("latency_s")
    status, tries = value("http_status"), value("attempts")
    said = [
        *counts,
        f"{seconds:.3g} s" if seconds is not None else "",
        value("finish_reason") or "",
        f"HTTP {status}" if status is not None and status != 200 else "",
        f"{tries} attempts" if tries and tries > 1 else "",
    ]
    failed = value("status") != "ok"
    response = value("response")
    return Shown(
        number + 1,
        value("custom_id"),
        [(name, _cut(_as_text(value(name)))) for name in carried],
        None if failed and not response else _cut(response or ""),
        _cut(value("error_message") or "failed") if failed else None,
        " · ".join(filter(None, said)),
    )


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    return "" if value is None else str(value)


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARS:
        return text
    return f"{text[:SHOWN_CHARS]}… ({len(text):,} characters)"
