"""List prices, from the extra ``prices`` (genai-prices): imported when one is asked for."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from batchrun.errors import UsageError
from batchrun.money import Price
from batchrun.words import dollars


def listed(url: str, model: str | None, *, binds: bool) -> tuple[Price | None, str]:
    """What ``model`` costs at the provider of ``url`` by the list, and what to say of that.

    Where long prompts cost more, the price is that of the others, unless it ``binds`` a budget.

    No network is used: the list is the one that is installed. UsageError where none is.
    """
    try:
        from importlib.metadata import version

        import genai_prices
    except ImportError:
        raise UsageError(
            "--price auto needs the list of prices, which is not installed: "
            "pip install 'batchrun[prices]'"
        ) from None
    source = f"genai-prices {version('genai-prices')}"
    if model is None:
        return None, f"rows name their models, so {source} gives no price: --price IN,OUT does"
    try:
        found = genai_prices.calc_price(
            genai_prices.Usage(input_tokens=0, output_tokens=0),
            model_ref=model,
            provider_api_url=url,
        )
    except LookupError:
        return None, f"{source} has no price of {model} there: cost is unknown"
    prices = found.model_price
    told = (prices.input_mtok, prices.output_mtok, prices.cache_read_mtok)
    first, last, cached = (_number(price, highest=binds) for price in told)
    if first is None or last is None:
        return None, f"{source} has no price for the tokens of {found.model.id}: cost is unknown"
    said = f"{dollars(first)} in, {dollars(last)} out per million"
    if any(price is not None and not isinstance(price, Decimal) for price in told):
        said += ", as for long prompts" if binds else "; long prompts cost more"
    return Price(first, last, cached), f"price of {found.model.id}: {said} ({source})"


def _number(price: Any, *, highest: bool) -> float | None:
    if price is None:
        return None
    if isinstance(price, Decimal):
        return float(price)
    return float(
        max([price.base, *(tier.price for tier in price.tiers)]) if highest else price.base
    )
