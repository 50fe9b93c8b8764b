"""One generation of answers at one size of the window, and what it tells."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

# A number of places refuses at that number and no other; clocks and wires blur it a little.
ALIKE = 0.75


class Level(NamedTuple):
    """What a round at one size brought."""

    size: int
    rate: float  # answers a second


NOTHING = Level(0, 0.0)


class Round(Struct, gc=False):
    """Answers and refusals since the window changed, or was judged last."""

    began_at: float
    needed: int  # samples
    unsettled: int  # answers still to pass: the first generation returns at the pace of the old one
    delivered_before: int  # answers of all rounds until then
    full_before_s: float
    least_served: int  # beside a refused one; at first the cap
    most_served: int = 0
    samples: int = 0
    arrivals: int = 0
    flight_s: float = 0.0
    refusals: int = 0
    refused_settled: int = 0  # after the first generation
    carried: int = 0  # the most that were in flight together and answered

    # The hot path: once for every answer.
    def answered(self, admitted_at: float, arrivals: int, ahead: int, now: float) -> bool:
        """Count one; whether the round is complete. ``arrivals`` came while it was in flight."""
        if ahead >= self.carried:
            self.carried = ahead + 1
        if self.unsettled:
            self.unsettled -= 1
        elif admitted_at >= self.began_at:
            self.samples += 1
            self.arrivals += arrivals
            self.flight_s += now - admitted_at
            return self.samples >= self.needed
        return False

    def refused(self, served: int) -> None:
        self.most_served = max(self.most_served, served)
        self.least_served = min(self.least_served, served)
        self.refusals += 1
        self.refused_settled += not self.unsettled

    def level(self, size: int) -> Level:
        return Level(size, self.arrivals / max(self.flight_s, 1e-9))

    def places(self) -> int:
        """How many were served whenever one was refused; 0 where that differs, or more were."""
        least, most = self.least_served, self.most_served
        return most if most >= self.carried > 0 and least >= max(1, ALIKE * most - 0.5) else 0
