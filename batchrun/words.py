"""How numbers read: durations, sizes, speeds, nouns that agree; and what a value is called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Final


def duration(seconds: float, *, compact: bool = False) -> str:
    """``0.4 s``, ``38 s``, ``1 min 5 s``, ``2 h 4 min``, ``3 d 2 h``; compact ``38s``, ``1m05s``.

    The compact form is for lines that hold a dozen facts.
    """
    if seconds < 9.95 and not compact:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    for large, large_unit, small, small_unit in (
        (days, "d", hour, "h"),
        (hours, "h", minute, "min"),
        (minutes, "min", second, "s"),
    ):
        if large and compact:
            return f"{large}{large_unit[0]}" + (f"{small:02}{small_unit[0]}" if small else "")
        if large:
            return f"{large} {large_unit}" + (f" {small} {small_unit}" if small else "")
    return f"{second}s" if compact else f"{second} s"


def stopwatch(seconds: float | None) -> str:
    """``1:05``, ``2:04:00``; ``?`` where nobody knows."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def size(size_bytes: int) -> str:
    """Decimal units, as disks and object stores count them."""
    number = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return (
                f"{number:.0f} {unit}"
                if unit == "bytes" or number >= 99.95
                else f"{number:.1f} {unit}"
            )
        number /= 1000
    return f"{number:.1f} TB"


def count(number: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``; the noun's plural has an s at its end."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def verb(number: int, plural: str) -> str:
    """``repeats`` for one, ``repeat`` for more; ``was`` and ``were``, ``is`` and ``are``."""
    singular = {"were": "was", "are": "is", "have": "has"}
    return singular.get(plural, f"{plural}s") if number == 1 else plural


def dollars(amount: float) -> str:
    """``$1,204.10``, ``$0.0421``: cents, and two digits of what is less than one."""
    if amount >= 0.1 or amount == 0:
        return f"${amount:,.2f}"
    return f"${amount:.{1 - math.floor(math.log10(amount))}f}"


def rate(per_s: float) -> str:
    return f"{per_s:.1f}" if per_s < 100 else f"{per_s:,.0f}"


_KINDS: Final[Mapping[type, str]] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    bytes: "binary data, not UTF-8",
}


def kind(value: object) -> str:
    """What a value of a row is, as an error says it: ``a number``, ``an object``."""
    return _KINDS.get(type(value), type(value).__name__)
