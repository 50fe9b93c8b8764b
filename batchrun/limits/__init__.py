"""May it go now? Admission without a clock of its own, a socket or a sleep."""

from batchrun.limits.admission import Limits, LimitSettings

__all__ = [
    "LimitSettings",
    "Limits",
]
