"""Find how many requests an endpoint takes at once, by what comes back.

Why it is done so stands in the essay of ``limits``. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from batchrun.limits.rounds import NOTHING, Level, Round

# Less wastes the first seconds on every healthy endpoint; more floods a laptop's Ollama.
START_WINDOW = 32
# A known quota paces by itself, and needs a window of its rate times the latency of an answer. Less
# than a usual completion's, and the window, not the quota, sets the pace until growth gets there.
SUGGESTED_S = 2.0
# A doubled window that finds free capacity doubles the rate; one at the plateau changes nothing.
# Below this the noise of uneven answers reads as growth; above, a server that batches (whose
# throughput grows less than its load) is left at half of what it can do.
GROWTH_GAIN = 1.25
# A hold exactly at the knee idles slots whenever answers and refills are out of step.
HOLD_MARGIN = 1.2
# Smaller steps disappear in the noise; a larger one, untested, floods a server with a short queue.
PROBE_STEP = 1.25
# What share of a probe's added window must come back as throughput. Less would let noise ratchet
# the window up; more would end growth on servers that gain less than they are given.
PROBE_GAIN = 0.4
# Judging by fewer answers is judging by chance: latencies of completions vary by their own size. A
# doubling is told from a plateau by few; a quarter more needs many.
MIN_ROUND = 16
MIN_CAREFUL_ROUND = 128
# A gain below this share is what chance brings.
NOISE = 1.03
# Probing all the time keeps a server with a short queue at its refusals; too rarely, and capacity
# that came back stays unused. The interval doubles while probes find nothing.
MIN_HOLD_S = 2.0
MAX_HOLD_S = 8.0
HOLD_LATENCIES = 8.0  # where a completion takes a minute, two seconds say nothing
# A rate that rises this much in a hold, which is sized above the knee, is new capacity; lower,
# and the noise of one round starts a probe.
SURGE = 1.1
# Halving empties the slots of a server whose queue is short; at 0.9 a capacity that halved takes
# seven bursts of refusals to find.
CUT = 0.7
# Where fewer than this share had a place, they are counted, not guessed. Nearer to the window, some
# are gone before the refusal is heard, and the count is too low.
FAR = 0.5
# So few refusals among the answers of a round are no overload: gateways drop a request now and
# then, and a window cut for each of those never grows.
FEW_REFUSALS = 2
FEW_SHARE = 0.02
# Refusals that came before a probe as well are not about the probe.
USUAL = 1.5
# For how long refusals that are not about the window are not heard; doubled each time, as every
# test costs a cut.
MIN_TOLERANCE_S = 30.0
MAX_TOLERANCE_S = 300.0
# More refusals than this, and than answers, since the last change need no further judgement; fewer
# can be chance.
MIN_FLOOD = 8
# Unless the window was full for half of a round, its throughput says something about the input.
IN_USE = 0.5
# Departures are spread over a service time once some were refused: a rate with no room for a burst
# refuses the second of two that leave together, however few are in flight. No faster than this
# share more than the window's own pace; without it, a late timer is throughput lost.
SPREAD = 1.2
# How late a departure may be and the next one still on time.
LATE_S = 0.002
# Until a round is complete: 0 would let the first refusals spin, a minute would stall them.
DEFAULT_LATENCY_S = 0.25
NEVER = float("inf")


class _Phase(NamedTuple):
    name: Literal["slow start", "hold", "probe", "cut"]
    before: Level  # what the round is compared with


class Window:
    """The window and how it moves; a fixed ``concurrency`` never does."""

    def __init__(
        self,
        concurrency: int | None,
        cap: int,
        requests_per_s: float | None,
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._is_fixed = concurrency is not None
        self._cap = concurrency or cap
        self._start = self._cap if self._is_fixed else min(START_WINDOW, self._cap)
        if not self._is_fixed and requests_per_s is not None:
            self._start = self._suggested(requests_per_s)
        self.size = self._start
        self.delivered = 0
        self.latency_s = DEFAULT_LATENCY_S
        self.full_s = 0.0  # time during which all places were taken
        self.filled_at = 0.0
        self.next_at = 0.0  # before it, nothing leaves
        self.is_spread = False
        self._phase = _Phase("slow start", NOTHING)
        self._ceiling: int | None = None  # the size last refused, until growth passes it
        self._hold_s = MIN_HOLD_S
        self._probe_at = 0.0
        self._judged = Level(self.size, 0.0)
        self._tolerance_s = MIN_TOLERANCE_S
        self._tolerant_until = -NEVER
        self._resized_at = -NEVER
        self._usual_share = 0.0  # of refusals while the window was held
        self._round = self._new_round(0.0, self._growth_round())

    def begin(self, now: float) -> None:
        """The first request is about to leave."""
        self._begin_round(now, self._growth_round())

    def spread(self, now: float) -> None:
        """One left; say when the next may."""
        self.next_at = max(self.next_at, now - LATE_S) + self.latency_s / (SPREAD * self.size)

    def answered(self, admitted_at: float, delivered: int, ahead: int, now: float) -> None:
        """Count an answer, and judge the round when it is complete."""
        self.delivered += 1
        if self._round.answered(admitted_at, self.delivered - delivered, ahead, now):
            self._judge(now)

    def overloaded(self, admitted_at: float, code: str, now: float, served: int = 0) -> None:
        """Hear that the endpoint has too much on its hands: one cut per burst.

        ``served`` is how many had their place when this one found none: so many there are.
        """
        if self._is_fixed or admitted_at <= self._resized_at:
            return
        this = self._round
        this.refused(served)
        answers = self.delivered - this.delivered_before
        usual = USUAL * self._usual_share * (answers + this.refusals + self.size)
        if this.refusals <= FEW_REFUSALS + max(FEW_SHARE * answers, usual):
            return
        # A cut is judged before the next one, unless it plainly was not enough.
        waits = self._phase.name == "cut" or now < self._tolerant_until
        if waits and this.refusals <= max(MIN_FLOOD, answers):
            return
        why = f"refused ({code})" if code else "overloaded"
        self._ceiling = self.size
        if self._phase.name == "probe":
            self._back_off(self._phase.before, f"the probe was {why}", now)
        else:
            self._cut(why, now)

    def _cut(self, why: str, now: float) -> None:
        this, was_cut = self._round, self._phase.name == "cut"
        before = this.level(self.size) if this.samples >= MIN_ROUND else self._judged
        self._phase = _Phase("cut", before)
        # Far too many is seen at once, and told how many would do: that needs no search.
        places = this.places()
        fits = 0 < places < self.size * FAR
        if fits:
            self._ceiling = None
        # Where a cut helps, nothing is gained by it, and answers vary by more than a pace can know.
        self.is_spread |= was_cut or (self._judged.rate == 0.0 and not fits)
        self._resize(max(1, places if fits else int(self.size * CUT)), why, now)
        self._begin_round(now, max(MIN_ROUND, self.size))

    def suggest(self, requests_per_s: float, now: float) -> None:
        """Begin where a quota just learned says that work will be."""
        size = self._suggested(requests_per_s)
        if not self._is_fixed and size > self.size:
            self._phase, self._ceiling = _Phase("slow start", NOTHING), None
            self._resize(size, "the quota suggests it", now)
            self._begin_round(now, self._growth_round())

    def restart(self, why: str, now: float) -> None:
        """After an outage: what held before is no guide, and a cold server wants a slow start."""
        if self._is_fixed:
            return
        self._phase, self._ceiling = _Phase("slow start", NOTHING), None
        self._hold_s = MIN_HOLD_S
        self.is_spread = False
        self._resize(min(self.size, self._start), why, now)
        self._begin_round(now, self._growth_round())

    def _suggested(self, requests_per_s: float) -> int:
        return min(self._cap, max(START_WINDOW, int(requests_per_s * SUGGESTED_S)))

    def _begin_round(self, now: float, needed: int, *, settled: bool = False) -> None:
        this = self._round
        if this.samples >= MIN_ROUND or (this.samples and self._judged.rate == 0.0):
            self.latency_s = this.flight_s / this.samples
        self._round = self._new_round(now, needed, settled=settled)

    def _new_round(self, now: float, needed: int, *, settled: bool = False) -> Round:
        unsettled = 0 if settled else self.size
        return Round(now, needed, unsettled, self.delivered, self.full_s, least_served=self._cap)

    def _growth_round(self) -> int:
        return max(MIN_ROUND, self.size // 2)

    def _careful_round(self) -> int:
        return max(MIN_ROUND, min(MIN_CAREFUL_ROUND, 8 * self.size), 2 * self.size)

    def _judge(self, now: float) -> None:
        level = self._judged = self._round.level(self.size)
        if not self._is_full(now):
            self._begin_round(now, self._round.needed, settled=True)
        elif self._phase.name == "slow start":
            self._judge_growth(level, now)
        elif self._phase.name == "hold":
            self._judge_hold(level, now)
        elif self._phase.name == "probe":
            self._judge_probe(level, now)
        else:
            self._judge_cut(level, now)

    def _is_full(self, now: float) -> bool:
        """Whether the window, and not the input or a quota, set the pace of this round."""
        # A place that waits for its turn in the spread is in use.
        full_s = self.full_s - self._round.full_before_s
        return not self._is_fixed and (
            self.is_spread or full_s >= IN_USE * (now - self._round.began_at)
        )

    def _judge_growth(self, level: Level, now: float) -> None:
        before = self._phase.before
        if level.rate >= GROWTH_GAIN * before.rate:
            self._grow(level, now)
            return
        knee = before.size * max(1.0, level.rate / before.rate) * HOLD_MARGIN
        self._resize(min(self.size, int(knee)), "no more throughput: plateau", now)
        self._hold(level, now)

    def _judge_hold(self, level: Level, now: float) -> None:
        before, this = self._phase.before, self._round
        self._phase = _Phase("hold", level)
        answers = self.delivered - this.delivered_before
        self._usual_share = this.refusals / max(1, answers + this.refusals)
        # A rate that rises by itself is capacity coming back.
        surges = 0.0 < before.rate * SURGE < level.rate
        if (surges or now >= self._probe_at) and self.size < self._cap:
            self._probe(level, "throughput rose by itself" if surges else "probing", now)
        else:
            self._begin_round(now, self._careful_round(), settled=True)

    def _judge_probe(self, level: Level, now: float) -> None:
        before = self._phase.before
        gain = level.rate / before.rate
        if gain >= 1 + PROBE_GAIN * (self.size / before.size - 1):
            self._hold_s = MIN_HOLD_S
            self._ceiling = None
            if self.size < _whole_step(before.size):
                self._probe(level, "throughput grew", now)
            else:
                self._grow(level, now)
            return
        # What was refused once says nothing for ever. The next probe is a whole step.
        self._ceiling = None
        # Keep the part that paid: just below capacity, a whole step never does.
        paid = int(before.size * gain) if gain > NOISE else before.size
        self._back_off(before._replace(size=min(self.size, paid)), "the probe found no more", now)

    def _judge_cut(self, level: Level, now: float) -> None:
        before = self._phase.before
        kept = level.rate / max(before.rate, 1e-9)
        goes_on = self._round.refused_settled > 0
        if goes_on and kept < (1 + CUT) / 2:
            self._tolerate(level, before.size, now)
        elif goes_on or kept > 1 / NOISE:
            self.is_spread |= goes_on
            self._hold(level, now)
        else:
            # The cut went below capacity, which is thus known to lie between the two.
            self._probe(level, "the cut cost throughput", now)

    def _tolerate(self, level: Level, size: int, now: float) -> None:
        """Below capacity nobody has a reason to refuse: these refusals are not about the window."""
        pause_s = max(self._tolerance_s, HOLD_LATENCIES * self.latency_s)
        self._tolerance_s = min(MAX_TOLERANCE_S, 2 * self._tolerance_s)
        self._tolerant_until = now + pause_s
        self._phase, self._ceiling = _Phase("slow start", level), None
        self.is_spread = False
        self._resize(size, "fewer in flight are refused all the same", now)
        self._begin_round(now, self._growth_round())

    def _grow(self, level: Level, now: float) -> None:
        if self.size >= self._cap:
            self._hold(level, now)
            return
        self._phase = _Phase("slow start", level)
        self._resize(min(self._cap, 2 * self.size), "throughput grew", now)
        self._begin_round(now, self._growth_round())

    def _probe(self, level: Level, why: str, now: float) -> None:
        self._phase = _Phase("probe", level)
        self._resize(self._probe_size(), why, now)
        self._begin_round(now, self._careful_round())

    def _probe_size(self) -> int:
        # Between what works and what was refused, the middle; once they meet, capacity may have
        # grown in the meantime.
        if self._ceiling is not None and self._ceiling - self.size > max(1, self.size // 16):
            return min(self._cap, (self.size + self._ceiling) // 2)
        self._ceiling = None
        return min(self._cap, _whole_step(self.size))

    def _back_off(self, level: Level, why: str, now: float) -> None:
        self._hold_s = min(MAX_HOLD_S, 2 * self._hold_s)
        self._resize(level.size, why, now)
        self._hold(level, now)

    def _hold(self, level: Level, now: float) -> None:
        self._phase = _Phase("hold", level)
        self._probe_at = now + self._pause_s()
        self._begin_round(now, self._careful_round())

    def _pause_s(self) -> float:
        return max(self._hold_s, min(MAX_HOLD_S, HOLD_LATENCIES * self.latency_s))

    def _resize(self, size: int, why: str, now: float) -> None:
        self._resized_at = now
        if size != self.size:
            self._say(f"window {self.size} -> {size}: {why}")
            self.size = size


def _whole_step(size: int) -> int:
    return max(size + 1, int(size * PROBE_STEP))
