"""Admission: may this request go now? As fast as the endpoint allows, and never faster.

Five questions stand between a ready request and the network, each with its own small mechanism.
Nothing here sleeps, reads a clock or touches a socket: every method takes ``now`` (monotonic
seconds), so each law below is a test on a simulated clock.

**Gate: has the endpoint told this model to wait?** A Retry-After closes the model's gate exactly
until then. What is in flight runs on; refusals of attempts admitted before the gate closed are
the same signal. Reopening is paced over about one service time: everybody leaving at once is how
a queue of waiters earns the next refusal. A model begins like that, too. Until its first answer
nobody knows whether there is a quota, so requests leave one by one, 64 a second: a bucket of some
twenty is not overrun, and a first window on a slow endpoint is complete after half a second.
Whoever names a ``--concurrency`` or an ``--rpm`` has answered the question.

A wait binds as long as nothing disproves it. It may be about a number of places and not about a
rate: answers to what had left before the refused request came in during the wait say so, and so do
refusals that go on after a wait was kept. Then one request goes to see, after a service time, a
*question*. Refused, it is obeyed to the letter, and the next reason to ask waits twice as long. An
answer to what left after the refused one says that the wait does not hold for all; then it binds
the refused rows alone, until refusals outweigh answers by a whole window. A limit in headers is
asked likewise where it would have a request wait for seconds: what only refusals spoke of falls
with the first answer that it had no room for, what answers speak of with a whole minute's. A
refusal that names its wait teaches no rate at all.

**Quota: is there room in the rate?** (``quota``) Two GCRA buckets per model, requests and tokens,
asked together and charged together. GCRA keeps one number, the theoretical arrival time ``tat``:
the moment from which the rate alone would allow everything admitted so far. A request may go when
``tat`` is no further ahead than the burst, and pushes it on by its cost. So no window of t seconds
holds more than ``rate * t + burst``. A request that costs more than the burst waits for a full
bucket and leaves a debt: size delays it, but nothing can overtake it for ever. Tokens are not
known before the answer: an estimate that learns from ``usage`` is reserved and settled after.
The rates come from ``--rpm`` and ``--tpm``, else from the endpoint's headers. Mistral's are per
minute and say nothing of a reset, which a steady pace does not need; its query cost repeats what
``usage`` says. Anthropic limits prompts and answers apart: what their usual proportion allows is
the rate. A refusal under a known quota means that our bucket is ahead of theirs: it is emptied,
and the window stays. Either theirs is shallower (some have room for one request and no more), so
the burst shrinks first; or somebody else spends the same quota, so that then the pace does, by as
much as refusals are frequent. Both come back slowly while nothing is refused.

**Window: how many may be in flight?** (``window``) Where nobody publishes a capacity it has to be
found. The signal is *delivered throughput*. Each answer is a sample: how many answers arrived
while its request was in flight, over how long that took (the delivery rate of BBR). It needs no
edges of a measuring interval, so clumps of answers do not blur it: below capacity a window W at
latency L yields W/L, above it the capacity, however long the server's queue. A *round* lets the
first generation at a new size pass, which still returns at the old pace, and averages the next.
Rounds lead from phase to phase:

    slow start   double while a round delivers a quarter more than the one before; the round that
                 does not has found the plateau, also where nobody ever refuses (vLLM queues
                 without bound): hold just above the knee
    hold         now and then probe, or at once when the rate rises by itself: capacity changes
    probe        halfway to the size last refused, else a quarter more; if that paid, a small step
                 leads to a whole one, and a whole one to slow start: capacity may have multiplied
    cut          by CUT after a burst of refusals. When that went below capacity, probe upwards;
                 if they go on even there, where nobody has a reason to refuse, they are not about
                 the window (some gateways refuse at random): undo it, and hear none for a while

Refusals tell more than that there were some: how many were being served beside the refused one. If
that is the same number each time, and far below the window, it is the number of places.

A round in which the window was not really in use (the input or the quota set the pace) says
nothing and changes nothing. Only overload shrinks the window: refusals that no rate explains, a
code that says capacity, or timeouts where answers barely make it. One cut per burst: refusals of
attempts admitted before the cut are the same signal, and a cut is judged before the next one. A
refused attempt keeps its place for as long as an answer would have taken, so that an instant 429
never turns into a spin; but a few for every answer keep none, so that chance costs no throughput.
After a cut departures are spread over a service time: a rate that nobody names and that has no room
for two at once refuses whatever leaves together, however small the window.

**Breaker: is anybody there?** Failures across rows without an answer between open it. Then
nothing is sent but one probe at a time, a real row on the real route, at growing intervals. Any
answer closes it, and the window starts small again.

**Stop: is going on any use?** Not if the endpoint names a wait beyond ``--max-wait``, has not
answered for ``--max-outage``, or was never reached at all: then it is a typo or a server that is
not up, and a person should hear of it within seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct, structs

from batchrun.errors import StoppedEarly
from batchrun.limits.breaker import NOBODY_THERE, Breaker, local_time
from batchrun.limits.budget import Budget
from batchrun.limits.gate import (
    DOUBTED_WAIT_S,
    MIN_LOOK_S,
    MIN_REOPENING_S,
    QUOTA_WAIT_S,
    TIMEOUT_LATENCIES,
    Flight,
    Model,
    Places,
)
from batchrun.limits.quota import Quota
from batchrun.limits.window import NEVER, Window
from batchrun.types import Attempt, Bound, Decision, Request
from batchrun.words import duration

# A connection that fails so soon after an answer was one too many; later, and nobody may be there.
SERVED_LATENCIES = 2.0
# Until asking again whether the budget has room: an answer may have cost less than its worst.
BUDGET_WAIT_S = 0.02


class LimitSettings(Struct, frozen=True):
    """What the user said about speed; ``None`` is "find out"."""

    concurrency: int | None = None
    max_concurrency: int = 512
    rpm: float | None = None
    tpm: float | None = None
    max_wait_s: float = 600.0
    max_outage_s: float = 600.0
    share: float = 1.0  # of a limit that the endpoint names: others of this run have the rest


class Limits:
    """Admission for one endpoint. Called from one thread; ``now`` never goes backwards.

    The pool asks for the head of each model's line while ``in_flight < window``, and asks again
    after any ``done`` or ``withdrawn``, or when the seconds ``admit`` named have passed. Every
    admitted request comes back exactly once, as the same object, through ``done`` or ``withdrawn``.
    """

    def __init__(
        self,
        settings: LimitSettings,
        *,
        host: str = "the endpoint",
        budget: Budget | None = None,
        on_change: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._host = host
        self._budget = budget
        self._window = Window(
            settings.concurrency,
            settings.max_concurrency,
            None if settings.rpm is None else settings.rpm / 60,
            on_change,
        )
        self._breaker = Breaker(host, settings.max_outage_s)
        self._models: dict[str, Model] = {}
        self._flights: dict[int, Flight] = {}  # id(request) ->, in the order of departure
        self._places = Places()
        self._answered_at = -NEVER
        self._verdict: StoppedEarly | None = None
        self._held_by: Bound | None = None  # gate or quota held back the last request asked for

    @property
    def window(self) -> int:
        """How many may be in flight now."""
        return self._window.size

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def is_probing(self) -> bool:
        """Whether the endpoint seems to be away: one request at a time goes to see."""
        return self._breaker.is_open

    def admit(self, request: Request, now: float) -> float:
        """Take the request (0.0), or say after how many seconds asking again is worth it."""
        model = self._models.get(request.model) or self._meet(request.model, now)
        # One comparison for the three exceptions: gate closed or reopening, breaker open, refusals
        # that still hold places.
        if (
            now < model.ready_at
            or now < self._window.next_at
            or self._breaker.is_open
            or self._places.held
        ):
            wait = self._held_back(model, now)
            if wait > 0.0:
                return wait
        quota = model.quota
        if quota.is_known:
            wait = quota.wait(request, now)
            if wait > 0.0 and (wait := self._over_quota(model, wait, now)) > 0.0:
                return wait
        if self._budget is not None and not self._budget.takes(request):
            return BUDGET_WAIT_S
        if quota.is_known:
            quota.charge(request, now)
        self._take(request, model, now)
        return 0.0

    def _take(self, request: Request, model: Model, now: float) -> None:
        window, flights = self._window, self._flights
        flights[id(request)] = Flight(now, window.delivered, len(flights))
        model.quota.admitted += 1
        if model.is_doubtful:
            model.leaves(id(request))
        self._held_by = None
        if len(flights) + len(self._places.held) >= window.size:
            window.filled_at = now
        if self._breaker.is_open:
            self._breaker.probing(id(request))
        if model.reopening_until:
            model.pace_reopening(now)
        if window.is_spread:
            window.spread(now)

    def done(self, request: Request, attempt: Attempt, decision: Decision, now: float) -> None:
        """Take the attempt's place back and learn from what it brought."""
        window = self._window
        self._count_full(now)
        flight = self._flights.pop(id(request))
        if self._budget is not None:
            self._budget.came(request, attempt, decision)
        model = self._models[request.model]
        if decision.kind in ("ok", "invalid_answer"):  # the endpoint did its work
            self._answered_at = now
            if self._breaker.since is not None or not self._breaker.answered:
                self._alive(now)
            window.answered(flight.admitted_at, flight.delivered, flight.ahead, now)
            if model.quota.reserved:
                model.quota.settle(request, attempt)
            if model.is_doubtful:
                model.answered(id(request), flight.admitted_at, window.size, window.latency_s, now)
            if now >= model.quota.look_at:
                self._look(model, attempt, flight.admitted_at, now)
                model.opened()
        else:
            # A refusal's own headers may explain it: read them before judging it. The wait that it
            # names says more than a limit that may be one of anything.
            if decision.wait_s is None:
                self._look(model, attempt, flight.admitted_at, now, refused=True)
            self._learn_from_failure(request, attempt, decision, flight, now)

    def withdrawn(self, request: Request, now: float) -> None:
        """Take back the place of a request cancelled in flight; its tokens count as spent."""
        self._count_full(now)
        del self._flights[id(request)]
        if self._budget is not None:
            self._budget.lost(request)
        model = self._models[request.model]
        model.quota.forget(request)
        model.withdrawn(id(request))
        self._breaker.withdrawn(id(request), now)

    def contradictions(self, model: str) -> int:
        """How often a named wait of this model was found not to hold for all."""
        return self._models[model].contradictions

    def believes_waits(self, model: str, now: float) -> bool:
        """Whether waits named to this model's requests hold for all of them, as far as is known."""
        return self._models[model].closed_until > now

    def longest_s(self, now: float) -> float | None:
        """How long the oldest request in flight has been there; None without any."""
        return next((now - flight.admitted_at for flight in self._flights.values()), None)

    def waiting(self, now: float) -> tuple[float, str] | None:
        """The longest wait that holds anything back: seconds, and for what. For the bar."""
        host = self._host
        gate = max((model.closed_until for model in self._models.values()), default=0.0)
        if self._breaker.is_open and self._breaker.probe_at > max(now, gate):
            return self._breaker.probe_at - now, f"{host} does not answer"
        return (gate - now, f"Retry-After from {host}") if gate > now else None

    def stop(self, now: float) -> StoppedEarly | None:
        """Why going on is of no use, or None."""
        if self._budget is not None and not self._flights:
            self._verdict = self._verdict or self._budget.verdict()
        return self._verdict or self._breaker.verdict(now)

    def bound_by(self) -> Bound:
        """What holds the next request back at this moment; sampled over time, what set the pace.

        A busy loop looks like a slow endpoint from here: whoever measures our CPU tells them apart.
        """
        if self._held_by is not None:
            return self._held_by
        if self._breaker.is_open or len(self._flights) >= self._window.size or self._places.held:
            return "endpoint"
        return "input"

    def _count_full(self, now: float) -> None:
        """Add the time since the last place was taken; called before a place may become free."""
        window = self._window
        if len(self._flights) + len(self._places.held) >= window.size:
            window.full_s += now - window.filled_at
            window.filled_at = now

    def _meet(self, name: str, now: float) -> Model:
        if not self._models:
            self._window.begin(now)
        settings = self._settings
        model = self._models[name] = Model(Quota(settings.rpm, settings.tpm, now, settings.share))
        if settings.concurrency is None and settings.rpm is None:
            model.open_slowly()
        return model

    def _held_back(self, model: Model, now: float) -> float:
        if now < model.ready_at and not model.asks_wait.may_go(now):
            self._held_by = "quota" if model.is_quota else "endpoint"
            wait_s = model.asks_wait.wait(model.ready_at - now, now)
            # What is in flight may yet say that asking is worth it.
            return min(wait_s, max(MIN_LOOK_S, self._window.latency_s)) if self._flights else wait_s
        if self._breaker.is_open and (wait := self._breaker.wait(now)) > 0.0:
            return wait
        window = self._window
        self._count_full(now)
        if now < window.next_at:
            return window.next_at - now
        wait = self._places.wait(window.size - len(self._flights), now)
        # An answer frees a place sooner than a refusal's place runs out.
        return min(wait, max(0.001, window.latency_s / window.size))

    def _over_quota(self, model: Model, wait_s: float, now: float) -> float:
        """Seconds until asking again, where the quota has no room; 0.0 to see whether it is so."""
        quota, question = model.quota, model.asks_rate
        if quota.is_doubted and wait_s >= DOUBTED_WAIT_S:
            if question.may_go(now):
                return 0.0
            wait_s = question.wait(wait_s, now)
        elif quota.is_from_headers:
            self._check_wait(wait_s, model.clock_ms + now * 1000)
        self._held_by = "quota"
        return wait_s

    def _check_wait(self, wait_s: float, now_ms: float) -> None:
        """Whoever is told to wait for longer than the user wants to hears of it now."""
        settings = self._settings
        if wait_s <= min(settings.max_wait_s, settings.max_outage_s) or self._verdict is not None:
            return
        self._verdict = StoppedEarly(
            f"{self._host} asks for a wait of {duration(wait_s)}: "
            f"the limit resets at {local_time(now_ms + wait_s * 1000)}",
            next_steps=(
                "the same command continues after that",
                "--max-wait S        waits longer",
            ),
        )

    def _alive(self, now: float) -> None:
        if self._breaker.alive():
            self._window.restart(f"{self._host} answers again", now)

    def _learn_from_failure(
        self, request: Request, attempt: Attempt, decision: Decision, flight: Flight, now: float
    ) -> None:
        model = self._models[request.model]
        breaker = self._breaker
        if attempt.status is not None and attempt.status not in NOBODY_THERE:
            breaker.answered = True
        if decision.unreachable and self._others_are_served(flight):
            # A server that is full, not one that is away.
            decision = structs.replace(decision, pushback="capacity")
        refused = decision.kind == "rate_limit" or decision.pushback != "none"
        served = self._served_beside(flight) if refused else 0
        if decision.kind == "rate_limit" or served:
            breaker.refused(id(request), now)
        elif decision.kind in ("transient", "timeout"):
            breaker.failed(id(request), request.row, attempt, decision, now)
        else:
            # A row's own error is an answer like any other: the endpoint did its work.
            self._alive(now)
            model.opened()
            self._window.answered(flight.admitted_at, flight.delivered, flight.ahead, now)
        if refused:
            self._hear_refusal(model, request, attempt, decision, flight, served, now)
            return
        model.quota.forget(request)
        model.withdrawn(id(request))
        flight_s = now - flight.admitted_at
        if decision.kind == "timeout" and flight_s < TIMEOUT_LATENCIES * self._window.latency_s:
            self._window.overloaded(flight.admitted_at, decision.code, now)

    def _others_are_served(self, flight: Flight) -> bool:
        return self._answered_at > flight.admitted_at - SERVED_LATENCIES * self._window.latency_s

    def _served_beside(self, refused: Flight) -> int:
        """How many had their place when this one found none."""
        for flight in self._flights.values():
            if flight.admitted_at >= refused.admitted_at and flight.ahead > refused.ahead:
                flight.ahead -= 1
        return refused.ahead

    def _hear_refusal(
        self,
        model: Model,
        request: Request,
        attempt: Attempt,
        decision: Decision,
        flight: Flight,
        served: int,
        now: float,
    ) -> None:
        quota, window, wait_s = model.quota, self._window, decision.wait_s
        quota.refund(request)
        is_news = model.refused(id(request), wait_s, now)
        self._places.refused(flight.admitted_at + window.latency_s, window.delivered, now)
        if wait_s is not None:
            self._check_wait(wait_s, attempt.finished_at_ms)
            if model.believes_wait(now) and is_news:
                self._close_gate(model, wait_s, flight.admitted_at, now)
        elif decision.pushback != "capacity" and quota.is_known and not quota.has_left:
            quota.refused(flight.admitted_at, now)
        explained = quota.is_known and not quota.has_left if wait_s is None else not served
        if decision.pushback == "capacity" or not explained:
            window.overloaded(flight.admitted_at, decision.code, now, served)

    def _close_gate(self, model: Model, wait_s: float, refused_at: float, now: float) -> None:
        # Paced over more than the wait itself, refusals at random that name 50 ms set the pace.
        window = self._window
        reopening_s = max(min(MIN_REOPENING_S, wait_s), window.latency_s)
        model.close(now, wait_s, reopening_s, window.size, window.latency_s)
        model.refused_at = refused_at
        model.is_quota = model.quota.is_known or wait_s >= QUOTA_WAIT_S

    def _look(
        self,
        model: Model,
        attempt: Attempt,
        admitted_at: float,
        now: float,
        *,
        refused: bool = False,
    ) -> None:
        quota = model.quota
        model.clock_ms = attempt.finished_at_ms - now * 1000
        # With one model, the usual case, all flights are its own; with several, this bounds them.
        in_flight = min(len(self._flights) + 1, quota.admitted)
        was_known = quota.is_known
        requests_per_s = quota.learn(attempt.headers, in_flight, admitted_at, now, refused=refused)
        if quota.is_known:
            model.opened()
            if not was_known:
                model.is_doubtful = True
                model.asks_rate.arises(now, self._window.latency_s)
        if requests_per_s is not None:
            self._window.suggest(requests_per_s, now)
