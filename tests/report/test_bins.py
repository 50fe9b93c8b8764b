"""What is counted in bounded memory says what the numbers themselves would say."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pyarrow as pa
import pytest

from batchrun.report.bins import MOST_VALUES, LogBins, Values


def binned(*batches: Sequence[float | None]) -> LogBins:
    bins = LogBins()
    for batch in batches:
        bins.add(pa.array(batch, pa.float64()))
    return bins


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_right_within_a_bin(share: float) -> None:
    chance = random.Random(7)
    numbers = [chance.lognormvariate(0, 2) for _ in range(5_000)]
    bins = binned(numbers[:1], numbers[1:2_500], numbers[2_500:])
    exact = sorted(numbers)[max(0, round(share * len(numbers)) - 1)]
    assert bins.quantile(share) == pytest.approx(exact, rel=0.025)


def test_zeros_and_nulls_are_counted_apart() -> None:
    bins = binned([0.0, None, 0.0, 2.0], [None], [])
    assert (bins.total, bins.zeros, bins.sum) == (3, 2, 2.0)
    assert bins.quantile(0.5) == 0.0
    assert bins.quantile(1.0) == pytest.approx(2.0, rel=0.025)
    assert binned([None]).quantile(0.5) == 0.0


def test_bars_hold_every_number_once() -> None:
    chance = random.Random(8)
    numbers = [chance.uniform(0.01, 300) for _ in range(2_000)]
    bars = binned(numbers).bars(40)
    assert len(bars) <= 40
    assert sum(count for _, _, count in bars) == len(numbers)
    assert bars[0][0] <= min(numbers)
    assert bars[-1][1] >= max(numbers)
    assert binned([]).bars(40) == []


def test_values_beyond_the_first_thousand_are_only_counted() -> None:
    values = Values()
    values.add(pa.array(["a", "b", None, "a"]))
    values.add(pa.array([str(n) for n in range(2 * MOST_VALUES)]))
    values.add(pa.array(["a"]))
    assert values.counts["a"] == 3
    assert values.nulls == 1
    assert len(values.counts) == MOST_VALUES
    assert values.counts.total() + values.others == 2 * MOST_VALUES + 4


def test_truth_values_are_said_as_json_says_them() -> None:
    values = Values()
    values.add(pa.array([True, False, None, True]))
    assert values.counts == {"true": 2, "false": 1}
