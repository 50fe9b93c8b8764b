"""Figures as text: Markdown tables whose columns also line up on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), statistics.median(values), max(values))

    def show(self, digits: int = 0) -> str:
        low, median, high = (f"{value:,.{digits}f}" for value in self)
        return median if low == high else f"{median} ({low}–{high})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        padded = [cell.strip().rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return f"| {' | '.join([first, *padded])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
