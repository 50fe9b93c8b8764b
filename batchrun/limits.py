"""Admission: may this request go now? As fast as the endpoint allows, and never faster.

Five questions stand between a ready request and the network, each with its own small mechanism.
Nothing here sleeps, reads a clock or touches a socket: every method takes ``now`` (monotonic
seconds), so each law below is a test on a simulated clock.

**Gate: has the endpoint told this model to wait?** A Retry-After closes the model's gate exactly
until then. What is in flight runs on; refusals of attempts admitted before the gate closed are
the same signal. Reopening is paced over about one service time: everybody leaving at once is how
a queue of waiters earns the next refusal.

**Quota: is there room in the rate?** Two GCRA buckets per model, requests and tokens, asked
together and charged together. GCRA keeps one number, the theoretical arrival time ``tat``: the
moment from which the rate alone would allow everything admitted so far. A request may go when
``tat`` is no further ahead than the burst, and pushes it on by its cost. So no window of t seconds
holds more than ``rate * t + burst``. A request that costs more than the burst waits for a full
bucket and leaves a debt: size delays it, but nothing can overtake it for ever. Tokens are not
known before the answer: an estimate that learns from ``usage`` is reserved and settled after.
The rates come from ``--rpm`` and ``--tpm``, else from the endpoint's headers. Mistral's are per
minute and say nothing of a reset, which a steady pace does not need. A refusal under a known
quota means that our bucket is ahead of theirs: the bucket moves, the window stays.

**Window: how many may be in flight?** Where nobody publishes a capacity it has to be found. The
signal is *delivered throughput*. Each answer is a sample: how many answers arrived while its
request was in flight, over how long that took (the delivery rate of BBR). It needs no edges of a
measuring interval, so clumps of answers do not blur it: below capacity a window W at latency L
yields W/L, above it the capacity, however long the server's queue. A *round* lets the first
generation at a new size pass, which still returns at the old pace, and averages the next. Rounds
lead from phase to phase:

    slow start   double while a round delivers a quarter more than the one before; the round that
                 does not has found the plateau, also where nobody ever refuses (vLLM queues
                 without bound): hold just above the knee
    hold         now and then probe, or at once when the rate rises by itself: capacity changes
    probe        a quarter more, or halfway to the size last refused; what paid is kept, and a
                 probe that paid in full starts growth anew
    cut          by CUT after a burst of refusals; when it went below capacity, probe upwards
    undo         below capacity nobody has a reason to refuse. Where refusals go on although the
                 cut cost throughput, undo it; if that brings the throughput back, they are not
                 about the window (some gateways refuse at random) and are not heard for a while

A round in which the window was not really in use (the input or the quota set the pace) says
nothing and changes nothing. Only overload shrinks the window: refusals that no rate explains, a
code that says capacity, or timeouts where answers barely make it. One cut per burst: refusals of
attempts admitted before the cut are the same signal. A refused attempt keeps its place for as
long as an answer would have taken: an instant 429 never turns into a spin.

**Breaker: is anybody there?** Failures across rows without an answer between open it. Then
nothing is sent but one probe at a time, a real row on the real route, at growing intervals. Any
answer closes it, and the window starts small again.

**Stop: is going on any use?** Not if the endpoint names a wait beyond ``--max-wait``, has not
answered for ``--max-outage``, or was never reached at all: then it is a typo or a server that is
not up, and a person should hear of it within seconds.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Literal, NamedTuple

from msgspec import Struct

from batchrun.errors import StoppedEarly
from batchrun.types import Attempt, Bound, Decision, Request

Phase = Literal["slow start", "hold", "probe", "cut", "undo"]

# --- Quota ---------------------------------------------------------------------------------------

# Sending at exactly the published rate, a server's bucket that was ever emptied (by another client,
# by the first burst) never refills, and every jitter of the network becomes a 429.
PACE = 0.995
# Too small, and each late wake-up of the loop (up to 50 ms) is rate lost for good; larger, and the
# burst is the 429 we wanted to avoid.
BURST_S = 0.05
# Looking up a dozen header names costs more than the rest of admission; limits change rarely.
LOOK_EVERY_S = 0.25
# An endpoint whose first answers name no quota rarely begins later, but a gateway may.
FIRST_LOOKS = 8
LOOK_AGAIN_S = 5.0
# After a refusal under a known quota: long enough for a bucket at the other side to gain some room.
# Doubled while refusals go on, else a quota shared with somebody else is a storm of 429s.
MOVE_S = 0.25
MAX_MOVE_S = 8.0
# Before the first usage is known: English text has about four bytes a token, and answers are short.
# Wrong guesses last for the first answers only.
TOKENS_PER_BYTE = 0.25
COMPLETION_TOKENS = 256.0
# The estimate follows the file (rows are often sorted by kind) without dancing after each row.
ESTIMATE_MEMORY = 64

# --- Gate ----------------------------------------------------------------------------------------

# Below this an instant server would see the whole window within a millisecond of the reopening.
MIN_REOPENING_S = 1.0

# --- Window --------------------------------------------------------------------------------------

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
# Smaller steps disappear in the noise; larger ones flood a server with a short queue.
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
MAX_HOLD_S = 20.0
HOLD_LATENCIES = 8.0  # where a completion takes a minute, two seconds say nothing
# A rate that rises this much in a hold, which is sized above the knee, is new capacity; lower,
# and the noise of one round starts a probe.
SURGE = 1.1
# Halving empties the slots of a server whose queue is short; at 0.9 a capacity that halved takes
# seven bursts of refusals to find.
CUT = 0.7
# So few refusals among the answers of a round are no overload: gateways drop a request now and
# then, and a window cut for each of those never grows.
FEW_REFUSALS = 2
FEW_SHARE = 0.02
# A cut that cost throughput went below capacity, where nobody has a reason to refuse. If refusals
# go on all the same, and undoing the cut brings this much back, they are not about the window (some
# gateways refuse at random): heeding them would end at a window of 1.
UNDO_GAIN = 1.15
# For how long refusals are then not heard; doubled each time, as every test costs a cut.
MIN_TOLERANCE_S = 30.0
MAX_TOLERANCE_S = 300.0
# More refusals than this, and than answers, since the last change need no further judgement; fewer
# can be chance.
MIN_FLOOD = 8
# Unless the window was full for half of a round, its throughput says something about the input.
IN_USE = 0.5
# A timeout this close to the usual latency is the server's queue; far beyond it is the row's own.
TIMEOUT_LATENCIES = 3.0
# Until a round is complete: 0 would let the first refusals spin, a minute would stall them.
DEFAULT_LATENCY_S = 0.25

# --- Breaker -------------------------------------------------------------------------------------

# Fewer, and a burst of unlucky rows pauses a healthy run; more, and an outage burns more attempts.
BREAKER_FAILURES = 10
# Sooner, and a server that restarts is hit while it loads; much later, and a blip costs minutes.
FIRST_PROBE_S = 1.0
MAX_PROBE_S = 30.0
# An endpoint never reached: the first try and the probes after 1, 2, 4 and 8 s, then give up.
UNREACHED_PROBES = 4
UNREACHED_S = 15.0
UNREACHED_SLOW_PROBES = 2  # where each connect takes its whole timeout

NEVER = float("inf")


class LimitSettings(Struct, frozen=True):
    """What the user said about speed; ``None`` is "find out"."""

    concurrency: int | None = None
    max_concurrency: int = 512
    rpm: float | None = None
    tpm: float | None = None
    max_wait_s: float = 600.0
    max_outage_s: float = 600.0


class Limits:
    """Admission for one endpoint. Called from one thread; ``now`` never goes backwards.

    The pool asks for the head of each model's line while ``in_flight < window``, and asks again
    after any ``done`` or ``withdrawn``, or when the seconds ``admit`` named have passed. Every
    admitted request comes back exactly once, as the same object, through ``done`` or ``withdrawn``.
    """

    def __init__(self, settings: LimitSettings, *, host: str = "the endpoint") -> None:
        self._settings = settings
        self._host = host
        self.on_change: Callable[[str], None] | None = None
        self._window = _Window(settings, self._say)
        self._breaker = _Breaker(host, settings.max_outage_s)
        self._models: dict[str, _Model] = {}
        self._flights: dict[int, tuple[float, int]] = {}  # id(request) -> admitted at, delivered
        self._places = _Places()
        self._verdict: StoppedEarly | None = None
        self._is_paced = False  # the last request asked for was told to wait by gate or quota

    @property
    def window(self) -> int:
        """How many may be in flight now."""
        return self._window.size

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def admit(self, request: Request, now: float) -> float:
        """Take the request (0.0), or say after how many seconds asking again is worth it."""
        model = self._models.get(request.model) or self._meet(request.model, now)
        # One comparison for the three exceptions: gate closed or reopening, breaker open, refusals
        # that still hold places.
        if now < model.ready_at or self._breaker.is_open or self._places.held:
            wait = self._held_back(model, now)
            if wait > 0.0:
                return wait
        if model.requests is not None or model.tokens is not None:
            wait = model.wait_for_quota(request, now)
            if wait > 0.0:
                self._is_paced = True
                return wait
            model.charge(request, now)
        self._take(request, model, now)
        return 0.0

    def _take(self, request: Request, model: _Model, now: float) -> None:
        window, flights = self._window, self._flights
        flights[id(request)] = (now, window.delivered)
        model.admitted += 1
        self._is_paced = False
        if len(flights) + len(self._places.held) >= window.size:
            window.filled_at = now
        if self._breaker.is_open:
            self._breaker.probing(id(request))
        if model.reopening_until:
            model.pace_reopening(now)

    def done(self, request: Request, attempt: Attempt, decision: Decision, now: float) -> None:
        """Take the attempt's place back and learn from what it brought."""
        window = self._window
        self._count_full(now)
        admitted_at, delivered = self._flights.pop(id(request))
        model = self._models[request.model]
        if decision.kind == "ok":
            if self._breaker.since is not None or not self._breaker.answered:
                self._alive(now)
            window.answered(admitted_at, delivered, now)
            if model.reserved:
                model.settle(request, attempt)
        else:
            # A refusal's own headers may explain it: read them before judging it.
            self._look(model, attempt, now)
            self._learn_from_failure(request, attempt, decision, admitted_at, delivered, now)
        if now >= model.look_at:
            self._look(model, attempt, now)

    def withdrawn(self, request: Request, now: float) -> None:
        """Take back the place of a request cancelled in flight; its tokens count as spent."""
        self._count_full(now)
        del self._flights[id(request)]
        self._models[request.model].reserved.pop(id(request), None)
        self._breaker.withdrawn(id(request), now)

    def waiting(self, now: float) -> tuple[float, str] | None:
        """The longest wait that holds anything back: seconds, and for what. For the bar."""
        host = self._host
        gate = max((model.closed_until for model in self._models.values()), default=0.0)
        if self._breaker.is_open and self._breaker.probe_at > max(now, gate):
            return self._breaker.probe_at - now, f"{host} does not answer"
        return (gate - now, f"Retry-After from {host}") if gate > now else None

    def stop(self, now: float) -> StoppedEarly | None:
        """Why going on is of no use, or None."""
        return self._verdict or self._breaker.verdict(now)

    def bound_by(self) -> Bound:
        """What holds the next request back at this moment; sampled over time, what set the pace.

        A busy loop looks like a slow endpoint from here: whoever measures our CPU tells them apart.
        """
        if self._is_paced:
            return "quota"
        if self._breaker.is_open or len(self._flights) >= self._window.size or self._places.held:
            return "endpoint"
        return "input"

    def _count_full(self, now: float) -> None:
        """Add the time since the last place was taken; called before a place may become free."""
        window = self._window
        if len(self._flights) + len(self._places.held) >= window.size:
            window.full_s += now - window.filled_at
            window.filled_at = now

    def _say(self, change: str) -> None:
        if self.on_change is not None:
            self.on_change(change)

    def _meet(self, name: str, now: float) -> _Model:
        if not self._models:
            self._window.begin(now)
        model = self._models[name] = _Model(self._settings, now)
        return model

    def _held_back(self, model: _Model, now: float) -> float:
        if now < model.ready_at:
            self._is_paced = True
            return model.ready_at - now
        if self._breaker.is_open and (wait := self._breaker.wait(now)) > 0.0:
            return wait
        window = self._window
        self._count_full(now)
        wait = self._places.wait(window.size - len(self._flights), now)
        # An answer frees a place sooner than a refusal's place runs out.
        return min(wait, max(0.001, window.latency_s / window.size))

    def _alive(self, now: float) -> None:
        if self._breaker.alive():
            self._window.restart(f"{self._host} answers again", now)

    def _learn_from_failure(
        self,
        request: Request,
        attempt: Attempt,
        decision: Decision,
        admitted_at: float,
        delivered: int,
        now: float,
    ) -> None:
        model = self._models[request.model]
        if attempt.status is not None:
            self._breaker.answered = True
        if decision.kind in ("transient", "timeout"):
            self._breaker.failed(id(request), request.row, decision, now)
        elif decision.kind == "rate_limit":
            self._breaker.refused(id(request), now)
        else:
            # A row's own error is an answer like any other: the endpoint did its work.
            self._alive(now)
            self._window.answered(admitted_at, delivered, now)
        self._hear_pushback(model, request, attempt, decision, admitted_at, now)

    def _hear_pushback(
        self,
        model: _Model,
        request: Request,
        attempt: Attempt,
        decision: Decision,
        admitted_at: float,
        now: float,
    ) -> None:
        refused = decision.kind == "rate_limit" or decision.pushback != "none"
        if refused:
            model.refund(request)
            self._places.hold(admitted_at + self._window.latency_s, now)
            if decision.wait_s is not None:
                self._close_gate(model, attempt, decision.wait_s, now)
            elif decision.pushback != "capacity" and model.has_quota:
                model.move_buckets(admitted_at, now)
        else:
            model.reserved.pop(id(request), None)
        if self._is_overload(model, decision, refused, now - admitted_at):
            self._window.overloaded(admitted_at, decision.code, now)

    def _is_overload(
        self, model: _Model, decision: Decision, refused: bool, flight_s: float
    ) -> bool:
        if decision.pushback == "capacity":
            return True
        if refused:
            return decision.wait_s is None and not model.has_quota
        return decision.kind == "timeout" and flight_s < TIMEOUT_LATENCIES * self._window.latency_s

    def _close_gate(self, model: _Model, attempt: Attempt, wait_s: float, now: float) -> None:
        # Paced over more than the wait itself, refusals at random that name 50 ms set the pace.
        reopening_s = max(min(MIN_REOPENING_S, wait_s), self._window.latency_s)
        model.close_gate(now + wait_s, reopening_s, self._window.size)
        if wait_s > self._settings.max_wait_s and self._verdict is None:
            resets_at_ms = attempt.finished_at_ms + wait_s * 1000
            self._verdict = StoppedEarly(
                f"{self._host} asks for a wait of {_span(wait_s)}: "
                f"the limit resets at {_local_time(resets_at_ms)}",
                next_steps=(
                    "the same command continues after that",
                    "--max-wait S        waits longer",
                ),
            )

    def _look(self, model: _Model, attempt: Attempt, now: float) -> None:
        quota = quota_named(attempt.headers)
        if model.learn(quota, self._flights_of(model), now):
            self._window.suggest(quota.requests_per_s or 0.0, now)

    def _flights_of(self, model: _Model) -> int:
        # With one model, the usual case, all flights are its own; with several, this bounds them.
        return min(len(self._flights) + 1, model.admitted)


class _Model:
    """Gate and quota of one model: providers count every model apart."""

    __slots__ = (
        "_flag_requests",
        "_flag_tokens",
        "_move_s",
        "_moved_at",
        "_pace_s",
        "admitted",
        "closed_until",
        "estimate",
        "look_at",
        "looks",
        "met_at",
        "ready_at",
        "reopening_until",
        "requests",
        "reserved",
        "tokens",
    )

    def __init__(self, settings: LimitSettings, now: float) -> None:
        self.met_at = now
        self.admitted = 0
        self.ready_at = 0.0  # before it, no admission: gate closed, or reopening step by step
        self.closed_until = 0.0
        self.reopening_until = 0.0
        self._pace_s = 0.0
        self.look_at = 0.0
        self.looks = 0
        self._moved_at = -NEVER
        self._move_s = MOVE_S
        self._flag_requests = settings.rpm is not None
        self._flag_tokens = settings.tpm is not None
        self.requests = _Bucket(settings.rpm / 60, now) if settings.rpm is not None else None
        self.tokens = _Bucket(settings.tpm / 60, now) if settings.tpm is not None else None
        self.estimate = _Estimate()
        self.reserved: dict[int, float] = {}  # id(request) -> tokens

    @property
    def has_quota(self) -> bool:
        return self.requests is not None or self.tokens is not None

    def wait_for_quota(self, request: Request, now: float) -> float:
        wait = 0.0 if self.requests is None else self.requests.wait(1.0, now)
        if self.tokens is not None:
            wait = max(wait, self.tokens.wait(self.estimate.tokens(request), now))
        # What floating point leaves over is not worth a timer.
        return wait if wait > 1e-6 else 0.0

    def charge(self, request: Request, now: float) -> None:
        if self.requests is not None:
            self.requests.take(1.0, now)
        if self.tokens is not None:
            cost = self.reserved[id(request)] = self.estimate.tokens(request)
            self.tokens.take(cost, now)

    def settle(self, request: Request, attempt: Attempt) -> None:
        """Replace the reserved tokens by those the endpoint counted."""
        reserved = self.reserved.pop(id(request), None)
        usage = attempt.reply.usage if attempt.reply is not None else None
        if usage is None or usage.prompt_tokens is None:
            return
        completion = usage.completion_tokens or 0
        self.estimate.learn(len(request.body), usage.prompt_tokens, completion)
        if reserved is not None and self.tokens is not None:
            self.tokens.settle(
                max(usage.total_tokens or 0, usage.prompt_tokens + completion) - reserved
            )

    def refund(self, request: Request) -> None:
        """A refused request was counted as a request, but its tokens were not spent."""
        reserved = self.reserved.pop(id(request), None)
        if reserved is not None and self.tokens is not None:
            self.tokens.settle(-reserved)

    def close_gate(self, until: float, reopening_s: float, window: int) -> None:
        if until <= self.closed_until:
            return
        self.ready_at = self.closed_until = until
        # A known quota paces by itself, from an empty bucket.
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.drain(until)
        if not self.has_quota:
            self.reopening_until = until + reopening_s
            self._pace_s = reopening_s / window

    def pace_reopening(self, now: float) -> None:
        if now < self.reopening_until:
            self.ready_at = max(self.ready_at, now + self._pace_s)
        else:
            self.reopening_until = 0.0

    def move_buckets(self, admitted_at: float, now: float) -> None:
        """A refusal in spite of the pace: their bucket is emptier than ours; once per burst."""
        if admitted_at < self._moved_at:
            return
        recent = now - self._moved_at < 10 * self._move_s
        self._move_s = min(2 * self._move_s, MAX_MOVE_S) if recent else MOVE_S
        self._moved_at = now
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.calm()
                bucket.drain(now + self._move_s)

    def learn(self, quota: Quota, in_flight: int, now: float) -> bool:
        """Take over what an answer's headers say; True when a rate of requests is new."""
        self.looks += 1
        named = quota.requests_per_s is not None or quota.tokens_per_s is not None
        if named:
            self.look_at = now + LOOK_EVERY_S
        elif self.looks >= FIRST_LOOKS:
            self.look_at = now + LOOK_AGAIN_S
        is_new = False
        if quota.requests_per_s is not None and not self._flag_requests:
            is_new = self.requests is None
            self.requests = self._rated(self.requests, quota.requests_per_s, 1.0, in_flight, now)
        if quota.tokens_per_s is not None and not self._flag_tokens:
            cost = self.estimate.typical
            self.tokens = self._rated(self.tokens, quota.tokens_per_s, cost, in_flight, now)
        if self.requests is not None and quota.requests_left == 0:
            self.requests.drain(now)
        if self.tokens is not None and quota.tokens_left == 0:
            self.tokens.drain(now)
        return is_new

    def _rated(
        self, bucket: _Bucket | None, rate: float, cost: float, in_flight: int, now: float
    ) -> _Bucket:
        if bucket is not None:
            bucket.change_rate(rate, now)
            return bucket
        # What left before the quota was known counts, else the run's first second is double; but
        # no more than what is in flight, else a limit named late would cost minutes.
        bucket = _Bucket(rate, now)
        spent_since_met = self.met_at + self.admitted * cost * bucket.unit_s
        bucket.tat = max(now, min(spent_since_met, now + in_flight * cost * bucket.unit_s))
        return bucket


class _Bucket:
    """One GCRA: ``rate`` units a second with a burst of ``depth`` units."""

    __slots__ = ("depth", "rate", "tat", "unit_s")

    def __init__(self, rate: float, now: float) -> None:
        self._set_rate(rate)
        self.tat = now

    def _set_rate(self, rate: float) -> None:
        self.rate = rate
        self.unit_s = 1.0 / (rate * PACE)
        self.depth = max(1.0, rate * BURST_S)

    def wait(self, cost: float, now: float) -> float:
        """Seconds until ``cost`` fits, or until the bucket is full if it never fits; or <= 0."""
        spare = self.depth - cost
        return self.tat - (spare * self.unit_s if spare > 0.0 else 0.0) - now

    def take(self, cost: float, now: float) -> None:
        self.tat = max(self.tat, now) + cost * self.unit_s

    def settle(self, difference: float) -> None:
        self.tat += difference * self.unit_s

    def drain(self, until: float) -> None:
        """Be empty at ``until``: the rate, without a burst, from then on."""
        self.tat = max(self.tat, until + self.depth * self.unit_s)

    def calm(self) -> None:
        """Their bucket is not as deep as we believed."""
        self.depth = max(1.0, self.depth / 2)

    def change_rate(self, rate: float, now: float) -> None:
        if rate == self.rate:
            return
        debt = max(0.0, self.tat - now) / self.unit_s
        self._set_rate(rate)
        self.tat = now + debt * self.unit_s


class _Estimate:
    """How many tokens a request will cost, learned from the usage of those before it."""

    __slots__ = ("_completion", "_seen", "_tokens_per_byte", "typical")

    def __init__(self) -> None:
        self._tokens_per_byte = TOKENS_PER_BYTE
        self._completion = COMPLETION_TOKENS
        self._seen = 0
        self.typical = COMPLETION_TOKENS

    def tokens(self, request: Request) -> float:
        return self._tokens_per_byte * len(request.body) + self._completion

    def learn(self, size_bytes: int, prompt: int, completion: int) -> None:
        self._seen = min(self._seen + 1, ESTIMATE_MEMORY)
        weight = 1 / self._seen
        self._tokens_per_byte += weight * (prompt / max(1, size_bytes) - self._tokens_per_byte)
        self._completion += weight * (completion - self._completion)
        self.typical = prompt + completion


class _Window:
    """How many may be in flight: found by what comes back (see the essay)."""

    def __init__(self, settings: LimitSettings, say: Callable[[str], None]) -> None:
        self._say = say
        self._is_fixed = settings.concurrency is not None
        self._cap = settings.concurrency or settings.max_concurrency
        self._start = self._cap if self._is_fixed else min(START_WINDOW, self._cap)
        if not self._is_fixed and settings.rpm is not None:
            self._start = self._suggested(settings.rpm / 60)
        self.size = self._start
        self.delivered = 0
        self.latency_s = DEFAULT_LATENCY_S
        self.full_s = 0.0  # time during which all places were taken
        self.filled_at = 0.0
        self._phase: Phase = "slow start"
        self._before: _Level | None = None  # what this round is compared with
        self._ceiling: int | None = None  # the size last refused, until growth passes it
        self._hold_s = MIN_HOLD_S
        self._probe_at = 0.0
        self._judged = _Level(self.size, 0.0)
        self._tolerance_s = MIN_TOLERANCE_S
        self._tolerant_until = -NEVER
        self._resized_at = -NEVER
        self._begin_round(0.0, self._growth_round())

    def begin(self, now: float) -> None:
        """The first request is about to leave."""
        self._begin_round(now, self._growth_round())

    def answered(self, admitted_at: float, delivered: int, now: float) -> None:
        """Count an answer, and judge the round when it is complete."""
        self.delivered += 1
        if self._unsettled:
            self._unsettled -= 1
        elif admitted_at >= self._round_at:
            self._samples += 1
            self._arrivals += self.delivered - delivered
            self._flight_s += now - admitted_at
            if self._samples >= self._needed:
                self._judge(now)

    def overloaded(self, admitted_at: float, code: str, now: float) -> None:
        """Hear that the endpoint has too much on its hands: one cut per burst."""
        if self._is_fixed or admitted_at <= self._resized_at:
            return
        self._refusals += 1
        answers = self.delivered - self._delivered_before
        if self._refusals <= FEW_REFUSALS + FEW_SHARE * answers:
            return
        # A cut is judged before the next one, unless it plainly was not enough.
        waits = self._phase in ("cut", "undo") or now < self._tolerant_until
        if waits and self._refusals <= max(MIN_FLOOD, answers):
            return
        why = f"refused ({code})" if code else "overloaded"
        self._ceiling = self.size
        if self._phase == "probe" and self._before is not None:
            self._back_off(self._before.size, f"the probe was {why}", now)
            return
        self._before = self._level() if self._samples >= MIN_ROUND else self._judged
        self._phase = "cut"
        self._resize(max(1, int(self.size * CUT)), why, now)
        self._begin_round(now, max(MIN_ROUND, self.size))

    def suggest(self, requests_per_s: float, now: float) -> None:
        """Begin where a quota just learned says that work will be."""
        size = self._suggested(requests_per_s)
        if not self._is_fixed and size > self.size:
            self._phase, self._before, self._ceiling = "slow start", None, None
            self._resize(size, "the quota suggests it", now)
            self._begin_round(now, self._growth_round())

    def restart(self, why: str, now: float) -> None:
        """After an outage: what held before is no guide, and a cold server wants a slow start."""
        if self._is_fixed:
            return
        self._phase, self._before, self._ceiling = "slow start", None, None
        self._hold_s = MIN_HOLD_S
        self._resize(min(self.size, self._start), why, now)
        self._begin_round(now, self._growth_round())

    def _suggested(self, requests_per_s: float) -> int:
        return min(self._cap, max(START_WINDOW, int(requests_per_s * SUGGESTED_S)))

    def _begin_round(self, now: float, needed: int, *, settled: bool = False) -> None:
        # The first generation at a new size still returns at the pace of the old one.
        self._unsettled = 0 if settled else self.size
        self._round_at = now
        self._needed = needed
        self._samples = 0
        self._arrivals = 0
        self._flight_s = 0.0
        self._refusals = 0
        self._delivered_before = self.delivered
        self._full_before_s = self.full_s

    def _growth_round(self) -> int:
        return max(MIN_ROUND, self.size // 2)

    def _careful_round(self) -> int:
        return max(MIN_ROUND, min(MIN_CAREFUL_ROUND, 8 * self.size), 2 * self.size)

    def _level(self) -> _Level:
        return _Level(self.size, self._arrivals / max(self._flight_s, 1e-9))

    def _judge(self, now: float) -> None:
        level = self._judged = self._level()
        self.latency_s = self._flight_s / self._samples
        in_use_s = self.full_s - self._full_before_s
        if self._is_fixed or in_use_s < IN_USE * (now - self._round_at):
            self._begin_round(now, self._needed, settled=True)
        elif self._phase == "slow start":
            self._judge_growth(level, now)
        elif self._phase == "hold":
            self._judge_hold(level, now)
        elif self._phase == "probe":
            self._judge_probe(level, now)
        elif self._phase == "cut":
            self._judge_cut(level, now)
        else:
            self._judge_undo(level, now)

    def _judge_growth(self, level: _Level, now: float) -> None:
        before = self._before
        if before is None or level.rate >= GROWTH_GAIN * before.rate:
            self._grow(level, now)
            return
        knee = before.size * max(1.0, level.rate / before.rate) * HOLD_MARGIN
        self._resize(min(self.size, int(knee)), "no more throughput: plateau", now)
        self._hold(now)

    def _judge_hold(self, level: _Level, now: float) -> None:
        before, self._before = self._before, level
        # A rate that rises by itself is capacity coming back.
        is_time = now >= self._probe_at or (before is not None and level.rate > SURGE * before.rate)
        if is_time and self.size < self._cap:
            self._probe(level, "probing", now)
        else:
            self._begin_round(now, self._careful_round(), settled=True)

    def _judge_probe(self, level: _Level, now: float) -> None:
        before = self._before
        assert before is not None
        gain = level.rate / before.rate
        if gain >= 1 + PROBE_GAIN * (self.size / before.size - 1):
            self._hold_s = MIN_HOLD_S
            if self._ceiling is not None and self.size < self._ceiling:
                self._probe(level, "throughput grew", now)
            else:
                self._ceiling = None
                self._phase = "slow start"
                self._grow(level, now)
            return
        # Keep the part that paid: just below capacity, a whole step never does.
        paid = int(before.size * gain) if gain > NOISE else before.size
        self._back_off(min(self.size, paid), "the probe found no more", now)

    def _judge_cut(self, level: _Level, now: float) -> None:
        before = self._before
        assert before is not None
        if level.rate > before.rate / NOISE:
            self._hold(now)
        elif self._refusals:
            # Below capacity nobody has a reason to refuse: does the throughput come back?
            self._phase = "undo"
            self._before = level
            self._resize(before.size, "fewer in flight are refused all the same", now)
            self._begin_round(now, max(MIN_ROUND, self.size))
        else:
            # The cut went below capacity, which is thus known to lie between the two.
            self._probe(level, "the cut cost throughput", now)

    def _judge_undo(self, level: _Level, now: float) -> None:
        before = self._before
        assert before is not None
        if level.rate < UNDO_GAIN * before.rate:
            self._tolerance_s = MIN_TOLERANCE_S
            self._back_off(before.size, "fewer in flight deliver as much", now)
            return
        pause_s = max(self._tolerance_s, HOLD_LATENCIES * self.latency_s)
        self._tolerance_s = min(MAX_TOLERANCE_S, 2 * self._tolerance_s)
        self._tolerant_until = now + pause_s
        self._ceiling = None
        self._hold(now, pause_s=0.0)

    def _grow(self, level: _Level, now: float) -> None:
        self._before = level
        if self.size >= self._cap:
            self._hold(now)
            return
        self._resize(min(self._cap, 2 * self.size), "throughput grew", now)
        self._begin_round(now, self._growth_round())

    def _probe(self, level: _Level, why: str, now: float) -> None:
        self._before = level
        self._phase = "probe"
        self._resize(self._probe_size(), why, now)
        self._begin_round(now, self._careful_round())

    def _probe_size(self) -> int:
        # Between what works and what was refused, the middle; once they meet, capacity may have
        # grown in the meantime.
        if self._ceiling is not None and self._ceiling - self.size > max(1, self.size // 16):
            return (self.size + self._ceiling) // 2
        self._ceiling = None
        return min(self._cap, max(self.size + 1, int(self.size * PROBE_STEP)))

    def _back_off(self, size: int, why: str, now: float) -> None:
        self._hold_s = min(MAX_HOLD_S, 2 * self._hold_s)
        self._resize(size, why, now)
        self._hold(now)

    def _hold(self, now: float, pause_s: float | None = None) -> None:
        self._phase = "hold"
        self._before = None
        self._probe_at = now + (self._pause_s() if pause_s is None else pause_s)
        self._begin_round(now, self._careful_round())

    def _pause_s(self) -> float:
        return max(self._hold_s, min(MAX_HOLD_S, HOLD_LATENCIES * self.latency_s))

    def _resize(self, size: int, why: str, now: float) -> None:
        self._resized_at = now
        if size != self.size:
            self._say(f"window {self.size} -> {size}: {why}")
            self.size = size


class _Level(NamedTuple):
    """What one round at one size brought."""

    size: int
    rate: float  # answers a second


class _Places:
    """Places of refused attempts, held for as long as an answer would have taken."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: deque[float] = deque()

    def hold(self, until: float, now: float) -> None:
        if until > now:
            self.held.append(until)

    def wait(self, free: int, now: float) -> float:
        while self.held and self.held[0] <= now:
            self.held.popleft()
        return self.held[0] - now if len(self.held) >= free and self.held else 0.0


class _Breaker:
    """Open while the endpoint seems to be down; then one probe at a time."""

    def __init__(self, host: str, max_outage_s: float) -> None:
        self._host = host
        self._max_outage_s = max_outage_s
        self.is_open = False
        self.answered = False  # any HTTP response, ever
        self.since: float | None = None  # of the first failure or refusal after the last answer
        self.probe_at = 0.0
        self._interval_s = FIRST_PROBE_S
        self._probe: int | None = None
        self._probes_failed = 0
        self._failures = 0
        self._last_row = -1
        self._refused_at = 0.0
        self._reason = ""

    def wait(self, now: float) -> float:
        if self._probe is not None:
            return FIRST_PROBE_S
        return self.probe_at - now

    def probing(self, flight: int) -> None:
        self._probe = flight

    def alive(self) -> bool:
        """Note an answer; True when it ended an outage."""
        was_open, self.is_open = self.is_open, False
        self.answered = True
        self.since = None
        self._probe = None
        self._failures = self._probes_failed = 0
        self._interval_s = FIRST_PROBE_S
        return was_open

    def refused(self, flight: int, now: float) -> None:
        """A refusal proves that somebody is there, but is no success either."""
        self._refused_at = now
        if self.since is None:
            self.since = now
        if self.is_open:
            self.is_open = False
            self._probe = None
        self._failures = 0

    def failed(self, flight: int, row: int, decision: Decision, now: float) -> None:
        self._reason = decision.reason
        if self.since is None:
            self.since = now
        if self.is_open:
            if flight == self._probe:
                self._probe_failed(now)
            return
        if row != self._last_row:
            self._failures += 1
            self._last_row = row
        never_reached = decision.unreachable and not self.answered
        if self._failures >= BREAKER_FAILURES or never_reached:
            self.is_open = True
            self._interval_s = FIRST_PROBE_S
            self.probe_at = now + self._interval_s

    def withdrawn(self, flight: int, now: float) -> None:
        if flight == self._probe:
            self._probe = None

    def _probe_failed(self, now: float) -> None:
        self._probe = None
        self._probes_failed += 1
        self._interval_s = min(MAX_PROBE_S, 2 * self._interval_s)
        self.probe_at = now + self._interval_s

    def verdict(self, now: float) -> StoppedEarly | None:
        if self.since is None:
            return None
        host, down_s = self._host, now - self.since
        why = f": {self._reason}" if self._reason else ""
        if not self.answered and self.is_open and self._gives_up(down_s):
            return StoppedEarly(
                f"cannot reach {host}{why}",
                next_steps=("check --base-url and the network; the same command continues",),
            )
        refused_s = self._refused_at - self.since
        if (self.is_open and down_s >= self._max_outage_s) or (refused_s >= self._max_outage_s):
            return StoppedEarly(
                f"{host} has given no answer for {_span(max(down_s, refused_s))}{why}",
                next_steps=("the same command continues when it is back",),
            )
        return None

    def _gives_up(self, down_s: float) -> bool:
        return self._probes_failed >= UNREACHED_PROBES or (
            down_s >= UNREACHED_S and self._probes_failed >= UNREACHED_SLOW_PROBES
        )


class Quota(NamedTuple):
    """What one answer's headers say; None where they are silent."""

    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    requests_left: float | None = None
    tokens_left: float | None = None


class _Names(NamedTuple):
    limit: str
    remaining: str
    reset: str = ""  # only where it tells a day's quota from a minute's


_REQUEST_NAMES = (
    _Names("x-ratelimit-limit-req-minute", "x-ratelimit-remaining-req-minute"),  # Mistral
    _Names(  # OpenAI, Azure: per minute; Groq and small OpenAI tiers: per day
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
    ),
    _Names("anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining"),
)
_TOKEN_NAMES = (
    _Names("x-ratelimit-limit-tokens-minute", "x-ratelimit-remaining-tokens-minute"),
    _Names("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    _Names("anthropic-ratelimit-tokens-limit", "anthropic-ratelimit-tokens-remaining"),
)
MINUTE_S = 60.0
DAY_S = 86_400.0


def quota_named(headers: Mapping[str, str]) -> Quota:
    """Read the quota of §5.1's dialects: Mistral, OpenAI, Azure, Groq, Cerebras, Anthropic.

    A day's quota sets no pace: spread over the day it would idle what the user may spend now. When
    it is used up, the refusal names its wait.
    """
    requests_per_s, requests_left = _rate(headers, _REQUEST_NAMES)
    tokens_per_s, tokens_left = _rate(headers, _TOKEN_NAMES)
    return Quota(requests_per_s, tokens_per_s, requests_left, tokens_left)


def _rate(
    headers: Mapping[str, str], dialects: tuple[_Names, ...]
) -> tuple[float | None, float | None]:
    for names in dialects:
        limit = _number(headers.get(names.limit))
        if limit is None or limit <= 0:  # Azure sends -1 and 0 for "not told"
            continue
        remaining = _number(headers.get(names.remaining))
        if _period_s(limit, remaining, headers.get(names.reset)) > MINUTE_S:
            return None, None
        return limit / MINUTE_S, remaining
    return None, None


def _period_s(limit: float, remaining: float | None, reset: str | None) -> float:
    """Whether a limit is a minute's or a day's: the reset is the time to regain what was used."""
    reset_s = duration_s(reset) if reset else None
    if reset_s is None or remaining is None or remaining >= limit:
        return MINUTE_S
    period_s = reset_s * limit / (limit - remaining)
    # Halfway between the two on a logarithmic scale: rounding of resets is far smaller than that.
    return DAY_S if period_s > (MINUTE_S * DAY_S) ** 0.5 else MINUTE_S


_GO_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|h|m|s)")
_UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def duration_s(text: str) -> float | None:
    """Seconds of a Go duration (``6m0s``, ``20ms``) or of a bare number."""
    parts = _GO_DURATION.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text.strip():
        return sum(float(number) * _UNIT_S[unit] for number, unit in parts)
    return _number(text)


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else None
    except ValueError:
        return None
    return number if number is not None and abs(number) < NEVER else None


def _span(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _local_time(unix_ms: float) -> str:
    return datetime.fromtimestamp(unix_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M %z")
