"""What tokens cost, and how a price is typed."""

from __future__ import annotations

import pytest

from batchrun.errors import UsageError
from batchrun.money import Price
from batchrun.types import NO_USAGE, Usage
from batchrun.words import dollars


@pytest.mark.parametrize(
    ("price", "usage", "cost"),
    [
        ("1,2", Usage(1_000_000, 500_000, 1_500_000), 2.0),
        ("1,2", Usage(1_000_000, 0, 1_000_000, cached_tokens=600_000), 1.0),
        ("1,2,0.1", Usage(1_000_000, 0, 1_000_000, cached_tokens=600_000), 0.46),
        ("1,2,0", Usage(10, 0, 10, cached_tokens=99), 0.0),
        # Gemini counts reasoning in the total alone; others in the completion.
        ("0,1", Usage(10, 5, 115, reasoning_tokens=100), 105e-6),
        ("0,1", Usage(10, 105, 115, reasoning_tokens=100), 105e-6),
        ("0,1", Usage(10, 5, None), 5e-6),
        ("0,1", Usage(10, 5, 3), 5e-6),
        ("1,1", Usage(10, None, 15), None),
        ("1,1", Usage(None, 5, 15), None),
        ("1,1", NO_USAGE, None),
        ("0,0", Usage(10, 5, 15), 0.0),
    ],
)
def test_usage_has_its_cost(price: str, usage: Usage, cost: float | None) -> None:
    assert Price.parse(price).cost_usd(usage) == (None if cost is None else pytest.approx(cost))


@pytest.mark.parametrize(
    "text", ["", "1", "1,", "1,2,3,4", "a,b", "-1,2", "nan,1", "inf,1", "1e9,1", "1;2"]
)
def test_what_is_no_price_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="IN,OUT"):
        Price.parse(text)


@pytest.mark.parametrize("text", ["1,2", "1,2,0.5"])
def test_a_price_is_remembered_as_it_was(text: str) -> None:
    price = Price.parse(text)
    assert Price.remembered({"price": price.told()}) == price
    assert Price.remembered({}) is None


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0.00"),
        (1204.1, "$1,204.10"),
        (0.25, "$0.25"),
        (0.0421, "$0.042"),
        (0.00012345, "$0.00012"),
        (1e-9, "$0.0000000010"),
    ],
)
def test_dollars_are_read_easily(amount: float, text: str) -> None:
    assert dollars(amount) == text
