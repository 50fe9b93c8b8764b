"""Numbers counted as they come, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

# A bin is 2.3 % wide: finer than anybody reads a percentile.
PER_DECADE: Final = 100
MOST_VALUES: Final = 1_000


class LogBins:
    """Positive numbers in bins of equal ratio, zeros beside them."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.zeros = 0
        self.sum = 0.0

    @property
    def total(self) -> int:
        return self.zeros + self.counts.total()

    def add(self, column: pa.Array) -> None:
        """Count the values of a column of numbers; nulls are left out."""
        column = column.drop_null()
        if not len(column):
            return
        self.sum += pc.sum(column).as_py()
        positive = column.filter(pc.greater(column, 0))
        self.zeros += len(column) - len(positive)
        if len(positive):
            bins = pc.floor(pc.multiply(pc.log10(pc.cast(positive, pa.float64())), PER_DECADE))
            for entry in pc.value_counts(bins.cast(pa.int32())).to_pylist():
                self.counts[entry["values"]] += entry["counts"]

    def quantile(self, share: float) -> float:
        """The middle of the bin that the ``share`` smallest reach; 0 where there are none."""
        wanted = share * self.total - self.zeros
        if wanted <= 0:
            return 0.0
        seen = 0
        for at in sorted(self.counts):
            seen += self.counts[at]
            if seen >= wanted:
                return _middle(at)
        return 0.0

    def bars(self, most: int) -> list[tuple[float, float, int]]:
        """At most ``most`` bars, as (from, to, how many), of equal ratio between them."""
        if not self.counts:
            return []
        low, high = min(self.counts), max(self.counts) + 1
        width = max(1, math.ceil((high - low) / most))
        bars = []
        for start in range(low, high, width):
            count = sum(self.counts[at] for at in range(start, start + width))
            bars.append((_edge(start), _edge(start + width), count))
        return bars


def _edge(at: int) -> float:
    return math.pow(10, at / PER_DECADE)


def _middle(at: int) -> float:
    return math.pow(10, (at + 0.5) / PER_DECADE)


class Values:
    """The values of a column with few of them; what came after the first thousand is not told."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.nulls = 0
        self.others = 0  # rows whose value is none of these

    def add(self, column: pa.Array) -> None:
        """Count the values of a column, as text."""
        self.nulls += column.null_count
        for entry in pc.value_counts(column.drop_null()).to_pylist():
            value = _text(entry["values"])
            if value in self.counts or len(self.counts) < MOST_VALUES:
                self.counts[value] += entry["counts"]
            else:
                self.others += entry["counts"]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
