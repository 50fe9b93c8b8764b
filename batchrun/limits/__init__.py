"""May it go now? Admission without a clock of its own, a socket or a sleep."""

from batchrun.limits.admission import Limits, LimitSettings
from batchrun.limits.budget import NO_BOUND, Budget, longest_answer, unbounded

__all__ = [
    "NO_BOUND",
    "Budget",
    "LimitSettings",
    "Limits",
    "longest_answer",
    "unbounded",
]
