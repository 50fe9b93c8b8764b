"""Durations as people, limit headers and error messages write them: one grammar."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_UNITS_S: Final[Mapping[str, float]] = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_UNIT: Final = (
    r"(?:milliseconds?|msecs?|seconds?|secs?|minutes?|mins?|hours?|hrs?|days?"
    r"|ns|us|µs|ms|s|m|h|d)(?![a-zµ])"
)
_NUMBER: Final = r"\d{1,15}(?:\.\d{1,15})?"
_STEP: Final = re.compile(rf"({_NUMBER}) ?({_UNIT})")

# The source of a regular expression, for texts that hold a duration among other words.
DURATION: Final = rf"(?:{_NUMBER} ?{_UNIT}(?:,? (?=\d))?)+"
_BARE: Final = re.compile(_NUMBER)
_WHOLE: Final = re.compile(DURATION)


def duration_s(text: str, *, unitless: bool = False) -> float | None:
    """Seconds of ``1h30m``, ``6m0s``, ``20ms``, ``5 minutes``; None for what is none.

    A number without a unit means seconds where ``unitless``; elsewhere it may mean an instant.
    """
    text = text.strip().lower()
    if unitless and _BARE.fullmatch(text):
        return float(text)
    if not _WHOLE.fullmatch(text):
        return None
    return sum(float(step[1]) * _unit_s(step[2]) for step in _STEP.finditer(text))


def _unit_s(name: str) -> float:
    if name in _UNITS_S:
        return _UNITS_S[name]
    return _UNITS_S["ms"] if name.startswith(("mil", "mse")) else _UNITS_S[name[0]]
