"""The laws of admission, each on a simulated clock: a run of a minute takes a fraction of a second.

``Run`` is a discrete-event simulation of the pool's side (one line for those told to wait, parked
rows that go before new ones) against ``Server``: K slots, a queue, a distribution of service times,
and a token bucket where a law needs one. Nothing sleeps; nothing reads a clock.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, pairwise, repeat

import pytest

from batchrun.durations import duration_s
from batchrun.errors import EXIT_STOPPED
from batchrun.limits.admission import Limits, LimitSettings
from batchrun.limits.headers import quota_named
from batchrun.limits.quota import BURST_S
from batchrun.types import Attempt, Decision, Reply, Request, Usage

HOST = "api.example.org"
MODEL = "m"
EPOCH_MS = 1_700_000_000_000
RTT_S = 0.001

OK = Decision(kind="ok")
REFUSED = Decision(kind="rate_limit", code="429", pushback="rate")
OVERLOADED = Decision(kind="rate_limit", code="3505", pushback="capacity")
REJECTED = Decision(kind="rejected", code="400")
BROKEN = Decision(kind="transient", code="500", reason="500 Internal Server Error")
RESET = Decision(kind="transient", code="reset", in_doubt=True, reason="the connection was reset")
CUT = Decision(kind="transient", code="cut", in_doubt=True, reason="the reply was cut")
REFUSED_CONNECTION = Decision(
    kind="transient", code="connect", reason="could not connect: refused", unreachable=True
)


def named_wait(seconds: float) -> Decision:
    return Decision(kind="rate_limit", code="429", wait_s=seconds, pushback="rate")


def request(row: int = 0, *, model: str = MODEL, size_bytes: int = 100) -> Request:
    return Request(row, b"x" * size_bytes, b"", 0, row, model)


def attempt(
    *,
    now: float = 0.0,
    status: int | None = 200,
    headers: dict[str, str] | None = None,
    tokens: tuple[int, int] | None = None,
) -> Attempt:
    usage = Usage(tokens[0], tokens[1], sum(tokens)) if tokens else Usage()
    reply = Reply(True, choices=1, usage=usage)
    ms = EPOCH_MS + int(now * 1000)
    return Attempt(status, headers or {}, b"", now, now, ms, reply=reply)


ANSWER = attempt()
NO_ANSWER = attempt(status=None)


class Server:
    """K slots and a queue of ``queue`` places (None: without bound) before it says 429."""

    def __init__(
        self,
        slots: int = 1_000_000,
        *,
        service_s: Callable[[], float] | float = 0.25,
        queue: int | None = None,
        rate: float | None = None,
        depth: float = 1.0,
        headers: Callable[[Server], dict[str, str]] | None = None,
        refusal_headers: Callable[[Server], dict[str, str]] | None = None,
        refusal: Decision = REFUSED,
        refuses_at_random: float = 0.0,
        usage: Callable[[Request], tuple[int, int]] | None = None,
        others_per_s: float = 0.0,
    ) -> None:
        self.slots = slots
        self.queue = queue
        self.rate = rate
        self.depth = depth
        self.tokens = depth
        self.refilled_at = 0.0
        self.others_per_s = others_per_s  # spent of the same bucket by somebody else
        self.headers = headers
        self.refusal_headers = refusal_headers or headers
        self.refusal = refusal
        self.refuses_at_random = refuses_at_random
        self.usage = usage
        self.is_up = True
        self.rejects = False
        self.busy = 0
        self.line: deque[Callable[[], None]] = deque()
        self._rng = random.Random(7)
        self._service_s = service_s

    def service_s(self) -> float:
        return self._service_s() if callable(self._service_s) else self._service_s

    def refill(self, now: float) -> None:
        if self.rate is not None:
            gained = (self.rate - self.others_per_s) * (now - self.refilled_at)
            self.tokens = min(self.depth, self.tokens + gained)
            self.refilled_at = now

    def refuses(self, now: float) -> bool:
        if self.refuses_at_random and self._rng.random() < self.refuses_at_random:
            return True
        if self.queue is not None and self.busy + len(self.line) >= self.slots + self.queue:
            return True
        if self.rate is None:
            return False
        self.refill(now)
        if self.tokens < 1.0:
            return True
        self.tokens -= 1.0
        return False


class Run:
    """The pool's side: rows without end, unless ``rows`` bounds them."""

    def __init__(
        self,
        server: Server,
        settings: LimitSettings | None = None,
        *,
        rows: int | None = None,
        late_s: Callable[[], float] | float = 0.0,
        sizes: Iterator[int] | None = None,
    ) -> None:
        self.server = server
        self.now = 0.0
        self.changes: list[tuple[float, str]] = []
        self.limits = Limits(
            settings or LimitSettings(),
            host=HOST,
            on_change=lambda change: self.changes.append((self.now, change)),
        )
        self.sent: list[float] = []
        self.sent_rows: list[tuple[float, Request]] = []
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.windows: list[tuple[float, int]] = []
        self._late_s = late_s  # how late the loop's timers come
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._rows = iter(range(rows)) if rows is not None else count()
        self._sizes = sizes
        self._line: deque[Request] = deque()
        self._due = 0.0
        self._ready: deque[Request] = deque()
        self._tries: dict[int, int] = {}
        self._rng = random.Random(1)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def until(self, end: float) -> Run:
        self.staff()
        while self._events and self._events[0][0] <= end:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = end
        return self

    def staff(self) -> None:
        limits = self.limits
        while limits.in_flight < limits.window and (row := self._next()) is not None:
            self._send(row)

    def rate(self, begin: float, end: float) -> float:
        """Answers a second."""
        answered = self.answered
        return (bisect_left(answered, end) - bisect_left(answered, begin)) / (end - begin)

    def _next(self) -> Request | None:
        if self._line:
            if self._due > self.now or not self._admitted(self._line[0]):
                return None
            return self._line.popleft()
        if self._ready:
            candidate = self._ready.popleft()
        elif (row := next(self._rows, None)) is not None:
            candidate = request(row, size_bytes=next(self._sizes) if self._sizes else 100)
        else:
            return None
        if self._admitted(candidate):
            return candidate
        self._line.append(candidate)
        return None

    def _admitted(self, candidate: Request) -> bool:
        wait_s = self.limits.admit(candidate, self.now)
        if wait_s <= 0.0:
            return True
        self._due = self.now + wait_s
        late_s = self._late_s() if callable(self._late_s) else self._late_s
        self.at(self._due + late_s, self.staff)
        return False

    def _send(self, row: Request) -> None:
        self.sent.append(self.now)
        self.sent_rows.append((self.now, row))
        self.at(self.now + RTT_S / 2, lambda: self._arrive(row))

    def _arrive(self, row: Request) -> None:
        server = self.server
        if not server.is_up:
            self._reply(row, NO_ANSWER, REFUSED_CONNECTION)
        elif server.refuses(self.now):
            headers = server.refusal_headers(server) if server.refusal_headers else {}
            status = None if server.refusal.unreachable else 429
            self._reply(row, attempt(now=self.now, status=status, headers=headers), server.refusal)
        elif server.busy < server.slots:
            self._serve(row)
        else:
            server.line.append(lambda: self._serve(row))

    def _serve(self, row: Request) -> None:
        self.server.busy += 1
        self.at(self.now + self.server.service_s(), lambda: self._served(row))

    def _served(self, row: Request) -> None:
        self.server.busy -= 1
        while self.server.line and self.server.busy < self.server.slots:
            self.server.line.popleft()()
        self._reply(row, None, REJECTED if self.server.rejects else OK)

    def _reply(self, row: Request, brought: Attempt | None, decision: Decision) -> None:
        if brought is None:
            brought = self._attempt(row)
        self.at(self.now + RTT_S / 2, lambda: self._done(row, brought, decision))

    def _attempt(self, row: Request) -> Attempt:
        headers = self.server.headers(self.server) if self.server.headers else {}
        tokens = self.server.usage(row) if self.server.usage else None
        return (
            attempt(now=self.now, headers=headers, tokens=tokens) if headers or tokens else ANSWER
        )

    def _done(self, row: Request, brought: Attempt, decision: Decision) -> None:
        self.limits.done(row, brought, decision, self.now)
        self.windows.append((self.now, self.limits.window))
        if decision.kind in ("ok", "rejected"):
            self.answered.append(self.now)
        else:
            if decision.pushback != "none":
                self.refused.append(self.now)
            tries = self._tries[row.row] = self._tries.get(row.row, 0) + 1
            named = decision.wait_s
            jitter = self._rng.uniform(0, min(30.0, 0.5 * 2.0 ** min(tries, 8)))
            self.at(self.now + (jitter if named is None else named), lambda: self._again(row))
        self.staff()

    def _again(self, row: Request) -> None:
        self._ready.append(row)
        self.staff()


def exponential(mean_s: float, seed: int = 3) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: rng.expovariate(1 / mean_s)


def even(mean_s: float, seed: int = 3) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: rng.uniform(0.8 * mean_s, 1.2 * mean_s)


def most_above(rate: float, events: list[tuple[float, float]]) -> float:
    """How far any window of time exceeds ``rate``: the largest amount over rate * length."""
    spent = lowest = worst = 0.0
    for when, amount in events:
        lowest = min(lowest, spent - rate * when)
        spent += amount
        worst = max(worst, spent - rate * when - lowest)
    return worst


# --- Quota ---------------------------------------------------------------------------------------


def mistral_headers(server: Server) -> dict[str, str]:
    return {
        "x-ratelimit-limit-req-minute": "6000",
        "x-ratelimit-remaining-req-minute": str(int(server.tokens)),
    }


def openai_headers(server: Server) -> dict[str, str]:
    return {
        "x-ratelimit-limit-requests": "6000",
        "x-ratelimit-remaining-requests": str(int(server.tokens)),
        "x-ratelimit-reset-requests": f"{int((6000 - server.tokens) * 10)}ms",
    }


@pytest.mark.parametrize("rpm", [0.5, 60, 6000, 60_000])
def test_no_window_of_time_exceeds_the_rate_by_more_than_the_burst(rpm: float) -> None:
    run = Run(Server(service_s=even(0.3)), LimitSettings(rpm=rpm), late_s=0.003).until(60)
    rate = rpm / 60
    assert most_above(rate, [(when, 1.0) for when in run.sent]) <= 1.0 + rate * BURST_S + 1e-6


def test_tokens_are_paced_by_what_answers_turn_out_to_cost() -> None:
    # Bytes cost four times what is assumed before the first usage, and answers are long.
    server = Server(service_s=0.2, usage=lambda row: (len(row.body), 500))
    run = Run(server, LimitSettings(tpm=600_000)).until(60)
    assert len(run.sent) * 600 == pytest.approx(10_000 * 60, rel=0.05)
    late = [(when, 600.0) for when in run.sent if when > 5]
    assert most_above(10_000, late) <= 10_000 * BURST_S + 2 * 600


def test_the_estimate_learns_from_usage() -> None:
    limits = Limits(LimitSettings(tpm=60_000))
    first = request(0, size_bytes=400)
    limits.admit(first, 0.0)
    limits.done(first, attempt(tokens=(200, 1800)), OK, 1.0)
    assert limits.admit(request(1, size_bytes=800), 10.0) == 0.0
    # Half a token a byte and 1,800 for the answer: 2,200 tokens at 1,000 a second.
    wait_s = limits.admit(request(2, size_bytes=800), 10.0)
    assert wait_s == pytest.approx(2.2, rel=0.02)


def test_tokens_beyond_the_estimate_are_a_debt_and_those_of_a_refusal_are_given_back() -> None:
    limits = Limits(LimitSettings(tpm=60_000))
    long, refused = request(0), request(1)
    limits.admit(long, 0.0)
    limits.done(long, attempt(tokens=(100, 9_900)), OK, 1.0)
    assert limits.admit(refused, 1.0) == pytest.approx(9.0, rel=0.02)
    assert limits.admit(refused, 11.0) == 0.0
    limits.done(refused, attempt(status=429), OVERLOADED, 11.1)
    assert limits.admit(request(2), 11.4) == 0.0


def test_a_large_request_waits_for_its_share_and_no_longer() -> None:
    # 1,000 tokens a second; the fortieth request alone costs ten seconds of it.
    sizes = chain(repeat(400, 40), [40_000], repeat(400))
    server = Server(service_s=0.1, usage=lambda row: (len(row.body) // 4, 0))
    run = Run(server, LimitSettings(tpm=60_000), sizes=sizes).until(60)
    sent_at = {row.row: when for when, row in run.sent_rows}
    assert list(sent_at) == sorted(sent_at)
    assert sent_at[40] <= 15.0  # what stands before it costs 4 s, and 10 s by the first estimate
    assert sent_at[41] - sent_at[40] >= 9.0  # and its debt is paid before the next


def test_requests_and_tokens_are_taken_together_or_not_at_all() -> None:
    limits = Limits(LimitSettings(rpm=60, tpm=60))
    assert limits.admit(request(0), 0.0) == 0.0
    # 281 tokens by the first estimate, at one a second: the request is the smaller debt.
    assert limits.admit(request(1), 0.0) > 200
    assert limits.admit(request(1), 1.1) > 200
    assert limits.in_flight == 1


@pytest.mark.parametrize("source", ["--rpm", "mistral", "openai"])
@pytest.mark.parametrize("depth", [5, 100, 6000])
@pytest.mark.parametrize("service_s", [0.05, 1.0])
@pytest.mark.slow
def test_a_quota_is_used_whole_and_hardly_ever_refused(
    source: str, depth: int, service_s: float
) -> None:
    headers = {"mistral": mistral_headers, "openai": openai_headers}.get(source)
    settings = LimitSettings(rpm=6000 if source == "--rpm" else None)
    server = Server(service_s=even(service_s), rate=100, depth=depth, headers=headers)
    run = Run(server, settings, late_s=0.002).until(61 + service_s)
    assert run.rate(1 + service_s, 61 + service_s) >= 98.0
    assert len(run.refused) <= 0.005 * len(run.sent)


@pytest.mark.parametrize("headers", [mistral_headers, openai_headers])
def test_of_a_limit_that_headers_name_only_the_own_share_is_used(
    headers: Callable[[Server], dict[str, str]],
) -> None:
    server = Server(rate=100, depth=20, headers=headers, service_s=even(0.05))
    run = Run(server, LimitSettings(share=0.25)).until(62)
    assert 24.0 <= run.rate(2, 62) <= 25.5


def test_what_left_before_the_quota_was_known_counts() -> None:
    server = Server(service_s=0.05, rate=100, depth=6000, headers=mistral_headers)
    run = Run(server, LimitSettings(concurrency=32)).until(10)
    assert most_above(100, [(when, 1.0) for when in run.sent]) <= 32 + 1.0
    assert run.sent[31] == 0.0
    assert run.sent[32] >= 0.25


def test_until_the_first_answer_requests_leave_one_by_one() -> None:
    run = Run(Server(service_s=1.0, rate=100, depth=10, headers=mistral_headers)).until(0.9)
    assert len(run.sent) == 32
    assert min(after - before for before, after in pairwise(run.sent)) > 0.01
    assert not run.refused
    # A small job loses little by it, one that was told how many may be in flight nothing.
    assert Run(Server(service_s=1.0), rows=10).until(1.2).answered[9:]
    assert (
        Run(Server(service_s=1.0), LimitSettings(concurrency=500), rows=500)
        .until(1.1)
        .answered[499:]
    )


def test_the_first_answer_opens_the_way_and_a_refusal_does_not() -> None:
    for decision, sent in ((OK, 31), (REFUSED, 1)):
        limits = Limits(LimitSettings())
        first = request()
        assert limits.admit(first, 0.0) == 0.0
        assert limits.admit(request(1), 0.0) > 0.0
        limits.done(first, ANSWER, decision, 0.01)
        rows = [request(row) for row in range(1, 32)]
        assert sum(limits.admit(row, 0.02) == 0.0 for row in rows) == sent


def test_a_refusal_that_names_its_quota_does_not_cut_the_window() -> None:
    changes: list[str] = []
    limits = opened(Limits(LimitSettings(), on_change=changes.append))
    said = attempt(status=429, headers=mistral_headers(Server(rate=100, depth=0)))
    rows = fill(limits, 0.0)
    for row in rows[:12]:
        limits.done(row, ANSWER, OK, 0.05)  # no word of a quota: by and by nobody looks any more
    for row in rows[12:]:
        limits.done(row, said, REFUSED, 0.1)
    assert changes == ["window 32 -> 200: the quota suggests it"]
    assert limits.admit(request(50), 0.1) > 0.1


def test_a_refusal_under_a_known_quota_moves_the_bucket_and_not_the_window() -> None:
    limits = Limits(LimitSettings(rpm=600))
    rows = [request(row) for row in range(4)]
    for row in rows:
        now = row.row / 9
        assert limits.admit(row, now) == 0.0
    window = limits.window
    for row in rows:
        now = 0.5 + row.row / 1000
        limits.done(row, attempt(now=now, status=429), REFUSED, now)
    assert limits.window == window
    # Four refusals of one burst, one move: by one request, and the rate alone from then on.
    assert limits.admit(request(8), 0.503) == pytest.approx(0.0995, abs=0.003)
    assert limits.admit(request(8), 0.603) == 0.0
    assert limits.admit(request(9), 0.603) == pytest.approx(0.0995, abs=0.007)


@pytest.mark.parametrize("rate", [20, 100])
@pytest.mark.parametrize("source", ["--rpm", "mistral"])
def test_a_bucket_without_room_for_a_burst_is_used_all_the_same(source: str, rate: int) -> None:
    def headers(server: Server) -> dict[str, str]:
        return {
            "x-ratelimit-limit-req-minute": str(rate * 60),
            "x-ratelimit-remaining-req-minute": str(int(server.tokens)),
        }

    server = Server(service_s=even(0.2), rate=rate, headers=headers if source != "--rpm" else None)
    settings = LimitSettings(rpm=rate * 60 if source == "--rpm" else None)
    run = Run(server, settings, late_s=even(0.001)).until(60)
    assert run.rate(5, 60) >= 0.94 * rate
    assert len(run.refused) <= 0.01 * len(run.sent)


@pytest.mark.parametrize(("others", "refused"), [(0.3, 0.04), (0.8, 0.09)])
def test_a_quota_that_others_spend_too_is_shared_without_a_storm(
    others: float, refused: float
) -> None:
    left = 100 * (1 - others)
    server = Server(service_s=0.2, rate=100, depth=20, headers=mistral_headers)
    run = Run(server, late_s=0.002)
    run.at(10.0, lambda: setattr(server, "others_per_s", 100 - left))
    run.until(60)
    assert run.rate(20, 60) >= 0.95 * left
    assert len(run.refused) <= refused * len(run.sent)
    # What they leave again is taken again.
    server.others_per_s = 0.0
    run.until(150)
    assert run.rate(110, 150) >= 0.95 * 100


@pytest.mark.parametrize(("source", "share"), [("--rpm", 0.01), ("mistral", 0.1)])
def test_refusals_for_another_reason_do_not_slow_a_quota(source: str, share: float) -> None:
    # Headers say that something is left; without them, only rarity tells.
    headers = mistral_headers if source == "mistral" else None
    server = Server(service_s=0.2, rate=100, depth=20, headers=headers, refuses_at_random=share)
    settings = LimitSettings(rpm=6000 if source == "--rpm" else None)
    run = Run(server, settings, late_s=0.001).until(120)
    assert run.rate(20, 120) >= 0.95 * 100 * (1 - share)


def test_prompts_and_answers_limited_apart_are_paced_by_their_proportion() -> None:
    headers = QUOTAS["anthropic: prompts and answers apart"][0]
    server = Server(service_s=0.2, headers=lambda _: headers, usage=lambda _: (100, 300))
    run = Run(server).until(60)
    # 10 tokens of answers a millisecond are 300 for each request; prompts would allow more.
    assert run.rate(20, 60) == pytest.approx(10_000 / 300, rel=0.05)


def test_a_refusal_with_quota_left_is_overload() -> None:
    limits = Limits(LimitSettings())
    headers = mistral_headers(Server(rate=100, depth=50))
    row = request()
    limits.admit(row, 0.0)
    limits.done(row, attempt(headers=headers), OK, 0.1)
    assert limits.window == 200
    rows = [request(row) for row in range(1, 5)]
    assert [limits.admit(row, 1.0) for row in rows] == [0.0] * 4
    for row in rows:
        limits.done(row, attempt(status=429, headers=headers), REFUSED, 1.1)
    assert limits.window == 140
    assert limits.admit(request(9), 1.1) <= 0.01


def test_a_quota_of_one_model_leaves_the_others_alone() -> None:
    limits = Limits(LimitSettings(rpm=60))
    assert limits.admit(request(0, model="a"), 0.0) == 0.0
    assert limits.admit(request(1, model="a"), 0.0) > 0.9
    assert limits.admit(request(2, model="b"), 0.0) == 0.0


QUOTAS: dict[str, tuple[dict[str, str], tuple[float | None, float | None]]] = {
    "mistral": (
        {
            "x-ratelimit-limit-req-minute": "60",
            "x-ratelimit-remaining-req-minute": "59",
            "x-ratelimit-limit-tokens-minute": "50000",
            "x-ratelimit-remaining-tokens-minute": "49000",
            "x-ratelimit-limit-tokens-month": "4000000",
        },
        (1.0, 50_000 / 60),
    ),
    "openai": (
        {
            "x-ratelimit-limit-requests": "10000",
            "x-ratelimit-remaining-requests": "9999",
            "x-ratelimit-reset-requests": "6ms",
            "x-ratelimit-limit-tokens": "2000000",
            "x-ratelimit-remaining-tokens": "1999000",
            "x-ratelimit-reset-tokens": "30ms",
        },
        (10_000 / 60, 2_000_000 / 60),
    ),
    "groq: requests a day, tokens a minute": (
        {
            "x-ratelimit-limit-requests": "14400",
            "x-ratelimit-remaining-requests": "14370",
            "x-ratelimit-reset-requests": "2m59.56s",
            "x-ratelimit-limit-tokens": "18000",
            "x-ratelimit-remaining-tokens": "17997",
            "x-ratelimit-reset-tokens": "7.66ms",
        },
        (None, 300.0),
    ),
    "azure: -1 and 0 are not told": (
        {
            "x-ratelimit-limit-requests": "-1",
            "x-ratelimit-remaining-requests": "-1",
            "x-ratelimit-limit-tokens": "0",
        },
        (None, None),
    ),
    "anthropic": (
        {
            "anthropic-ratelimit-requests-limit": "4000",
            "anthropic-ratelimit-requests-remaining": "3999",
            "anthropic-ratelimit-requests-reset": "2026-11-21T12:00:00Z",
            "anthropic-ratelimit-tokens-limit": "480000",
        },
        (4000 / 60, 8000.0),
    ),
    "anthropic: prompts and answers apart": (
        {
            "anthropic-ratelimit-input-tokens-limit": "3000000",
            "anthropic-ratelimit-output-tokens-limit": "600000",
        },
        (None, None),
    ),
    "cerebras": (
        {"x-ratelimit-limit-requests-day": "14400", "x-ratelimit-limit-tokens-minute": "60000"},
        (None, 1000.0),
    ),
    "nonsense": (
        {"x-ratelimit-limit-requests": "lots", "x-ratelimit-limit-tokens": "nan"},
        (None, None),
    ),
    "none": ({}, (None, None)),
}


@pytest.mark.parametrize(("headers", "rates"), QUOTAS.values(), ids=QUOTAS.keys())
def test_a_quota_is_read_from_every_dialect(
    headers: dict[str, str], rates: tuple[float | None, float | None]
) -> None:
    quota = quota_named(headers)
    assert (quota.requests_per_s, quota.tokens_per_s) == pytest.approx(rates)


@pytest.mark.parametrize(
    ("requests", "tokens", "has_left"),
    [("0", None, False), ("1", None, True), ("9", "40000", True), ("9", "900", False)],
)
def test_what_is_left_explains_a_refusal_or_not(
    requests: str, tokens: str | None, has_left: bool
) -> None:
    headers = {
        "x-ratelimit-limit-req-minute": "60",
        "x-ratelimit-remaining-req-minute": requests,
    }
    if tokens is not None:
        headers["x-ratelimit-limit-tokens-minute"] = "50000"
        headers["x-ratelimit-remaining-tokens-minute"] = tokens
    assert quota_named(headers).has_left is has_left


def test_prompts_and_answers_limited_apart_are_read() -> None:
    quota = quota_named(QUOTAS["anthropic: prompts and answers apart"][0])
    assert (quota.input_tokens_per_s, quota.output_tokens_per_s) == (50_000, 10_000)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("6m0s", 360), ("20ms", 0.02), ("1h2m3s", 3723), ("7.66s", 7.66), ("12", 12)],
)
def test_resets_are_go_durations_or_seconds(text: str, seconds: float) -> None:
    assert duration_s(text, unitless=True) == pytest.approx(seconds)


def opened(limits: Limits) -> Limits:
    """One answer long ago: nothing goes slowly any more because the endpoint is unknown."""
    row = request(-1)
    assert limits.admit(row, 0.0) == 0.0
    limits.done(row, ANSWER, OK, 0.0)
    return limits


def waiting(limits: Limits, now: float) -> tuple[float, str]:
    wait = limits.waiting(now)
    assert wait is not None
    return round(wait[0], 6), wait[1]


# --- Gates ---------------------------------------------------------------------------------------


def test_a_named_wait_is_kept_exactly_and_ends_without_a_herd() -> None:
    """Nothing leaves before the wait is over, but for one request.

    Requests that had left before are answered during the wait, so it may be about a number of
    places: whoever never asks stands still for a minute beside a gateway that serves. The endpoint
    here refuses for as long as it says; where it answers the question, the wait was not for all.
    """
    server = Server(service_s=even(0.25))
    run = Run(server)
    # The window has grown to hundreds when everything is refused: the first refusal closes the
    # gate, the others were on their way.
    run.at(10.0, lambda: setattr(server, "refusal", named_wait(5.0)))
    run.at(10.0, lambda: setattr(server, "refuses_at_random", 1.0))
    run.at(15.0, lambda: setattr(server, "refuses_at_random", 0.0))
    run.until(30)
    herd = [when for when in run.refused if when < 10.1]
    assert len(herd) > 1
    reopened = herd[0] + 5.0
    early = [when for when in run.sent if herd[0] < when < reopened]
    assert len(early) <= 1
    first = [when for when in run.sent if reopened <= when < reopened + 0.05]
    assert 1 <= len(first) <= run.limits.window / 10
    assert first[0] == pytest.approx(reopened, abs=0.01)
    # And it is no slower afterwards than before.
    assert run.rate(18, 28) >= 0.95 * run.rate(5, 10)


def test_refusals_that_name_a_wait_do_not_cut_the_window() -> None:
    limits = opened(Limits(LimitSettings()))
    rows = [request(row) for row in range(32)]
    for row in rows:
        limits.admit(row, 0.0)
    for number, row in enumerate(rows):
        now = 0.1 + number / 1000
        limits.done(row, attempt(now=now, status=429), named_wait(7.0), now)
    assert limits.window == 32
    assert limits.admit(request(40), 1.0) == pytest.approx(6.131)
    assert limits.admit(request(40), 7.131) == 0.0


def test_a_gate_holds_its_own_model_only() -> None:
    limits = Limits(LimitSettings(), host=HOST)
    row = request(0, model="a")
    limits.admit(row, 0.0)
    limits.done(row, attempt(status=429), named_wait(30.0), 1.0)
    assert limits.admit(request(1, model="a"), 2.0) == pytest.approx(29.0)
    assert limits.admit(request(2, model="b"), 2.0) == 0.0
    assert waiting(limits, 2.0) == (29.0, f"Retry-After from {HOST}")
    assert limits.waiting(32.0) is None


def test_a_shorter_wait_does_not_open_a_closed_gate() -> None:
    limits = opened(Limits(LimitSettings()))
    first, second = request(1), request(2)
    for row in (first, second):
        assert limits.admit(row, 0.0) == 0.0
    limits.done(first, attempt(status=429), named_wait(30.0), 1.0)
    limits.done(second, attempt(status=429), named_wait(2.0), 1.1)
    assert limits.admit(request(3), 2.0) == pytest.approx(29.0)


def test_a_wait_beyond_max_wait_ends_the_run_and_says_when_the_limit_resets() -> None:
    limits = Limits(LimitSettings(max_wait_s=600), host=HOST)
    row = request()
    limits.admit(row, 0.0)
    limits.done(row, attempt(status=429), named_wait(600.0), 0.1)
    assert limits.stop(0.1) is None
    row = request()
    limits.admit(row, 601.0)
    limits.done(row, attempt(status=429), named_wait(86_400.0), 601.1)
    verdict = limits.stop(601.1)
    assert verdict is not None
    assert verdict.exit_code == EXIT_STOPPED
    assert " a wait of 1 d: " in verdict.message
    assert "the limit resets at 2023-11-1" in verdict.message  # a day after the attempt's date


@pytest.mark.parametrize(
    ("rate", "service_s", "share"),
    [(10, 0.05, 0.87), (10, 1.0, 0.63), (100, 0.05, 0.35), (100, 0.2, 0.4), (100, 1.0, 0.4)],
)
def test_a_rate_that_nobody_names_and_without_room_for_two_is_found(
    rate: int, service_s: float, share: float
) -> None:
    run = Run(Server(service_s=service_s, rate=rate, depth=1), late_s=0.001).until(60)
    assert run.rate(10, 60) >= share * rate


# --- Window --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [4, 32, 256])
@pytest.mark.parametrize("queue", [None, 0.25, 1.0], ids=["unbounded", "short", "long"])
@pytest.mark.parametrize("spread", ["constant", "even", "exponential"])
@pytest.mark.slow
def test_unknown_capacity_is_found(slots: int, queue: float | None, spread: str) -> None:
    def server() -> Server:
        service_s = {"even": even(0.25), "exponential": exponential(0.25)}.get(spread, 0.25)
        places = None if queue is None else max(1, int(queue * slots))
        return Server(slots, service_s=service_s, queue=places)

    # No window does better than one that fits the slots and a part of the queue.
    size = slots if queue is not None else 2 * slots
    best = Run(server(), LimitSettings(concurrency=max(size, slots + 1))).until(60).rate(0, 60)
    assert Run(server()).until(60).rate(0, 60) >= 0.95 * best


@pytest.mark.parametrize("slots", [8, 32, 100, 200])
def test_latency_without_throughput_is_a_plateau_though_nobody_refuses(slots: int) -> None:
    run = Run(Server(slots, service_s=even(0.25))).until(60)
    assert not run.refused
    assert run.limits.window <= max(64, 3 * slots)
    assert any("plateau" in change for _, change in run.changes)


@pytest.mark.parametrize("slots", [4, 32, 256])
@pytest.mark.parametrize("queue", [None, 0.25], ids=["unbounded", "short"])
def test_a_run_finds_its_pace_again_when_capacity_halves(slots: int, queue: float | None) -> None:
    server = Server(slots, service_s=0.25, queue=None if queue is None else max(1, slots // 4))
    run = Run(server)
    run.at(30.0, lambda: setattr(server, "slots", slots // 2))
    run.until(45)
    assert run.rate(35, 40) >= 0.95 * slots / 2 / 0.25


@pytest.mark.parametrize("spread", ["even", "exponential"])
@pytest.mark.parametrize("queue", [None, 0.5, 2.0], ids=["unbounded", "short", "long"])
@pytest.mark.parametrize(("before", "after"), [(16, 64), (16, 256), (32, 256), (64, 80)])
@pytest.mark.slow
def test_capacity_that_grows_is_used(
    before: int, after: int, queue: float | None, spread: str
) -> None:
    service_s = {"even": even, "exponential": exponential}[spread](0.25)
    places = None if queue is None else int(queue * before)
    server = Server(before, service_s=service_s, queue=places)
    run = Run(server)
    run.at(30.0, lambda: setattr(server, "slots", after))
    run.until(55)
    assert run.rate(47, 55) >= 0.9 * after / 0.25
    assert len(run.refused) <= 0.04 * len(run.sent)


def test_a_rate_that_rises_by_itself_is_followed_at_once() -> None:
    server = Server(32, service_s=even(0.25))
    run = Run(server)
    run.at(30.0, lambda: setattr(server, "slots", 64))
    run.until(40)
    followed = [when for when, change in run.changes if when > 30 and "rose by itself" in change]
    assert followed[0] < 33
    assert run.rate(35, 40) >= 0.95 * 64 / 0.25


@pytest.mark.parametrize(("slots", "queue"), [(100, 5), (32, 4)])
def test_a_cut_that_went_too_far_is_made_good_soon(slots: int, queue: int) -> None:
    server = Server(slots, service_s=even(0.25), queue=queue)
    run = Run(server)
    run.at(30.0, lambda: setattr(server, "refuses_at_random", 1.0))
    run.at(30.1, lambda: setattr(server, "refuses_at_random", 0.0))
    run.until(45)
    assert run.rate(31, 34) >= 0.8 * slots / 0.25
    assert len(run.refused) <= 0.05 * len(run.sent)


def test_a_probe_that_brings_back_half_of_what_it_adds_has_paid() -> None:
    class Batching(Server):
        def service_s(self) -> float:
            return 0.25 * math.pow(max(8, self.busy) / 8, 0.4)

    server = Batching()
    run = Run(server, LimitSettings(max_concurrency=128))
    run.at(10.0, lambda: setattr(server, "refuses_at_random", 1.0))
    run.at(10.2, lambda: setattr(server, "refuses_at_random", 0.0))
    run.until(30)
    probed = [change for when, change in run.changes if when > 10.2]
    assert any(change.endswith("the cut cost throughput") for change in probed)
    assert not any(change.endswith("found no more") for change in probed)
    assert run.limits.window == 128


def test_the_size_once_refused_is_tried_again() -> None:
    run = Run(Server(32, service_s=0.25, queue=8)).until(120)
    steps = [change for _, change in run.changes]
    again = [b for a, b in pairwise(steps) if "found no more" in a and b.endswith("probing")]
    assert again
    for step in again:
        before, after = (int(size) for size in step.split(":")[0].split()[1::2])
        assert after == int(before * 1.25)


def fill(limits: Limits, now: float, first_row: int = 0) -> list[Request]:
    rows: list[Request] = []
    while limits.in_flight < limits.window:
        rows.append(request(first_row + len(rows)))
        assert limits.admit(rows[-1], now) == 0.0
    return rows


def fill_in_time(limits: Limits, now: float, first_row: int) -> list[Request]:
    """As ``fill``, where departures are spread: each leaves when it may."""
    rows: list[Request] = []
    while limits.in_flight < limits.window:
        rows.append(request(first_row + len(rows)))
        while (wait_s := limits.admit(rows[-1], now)) > 0.0:
            now += wait_s
    return rows


@pytest.mark.parametrize("refusal", [REFUSED, OVERLOADED], ids=["no wait named", "capacity"])
def test_one_burst_of_refusals_is_one_cut(refusal: Decision) -> None:
    changes: list[str] = []
    limits = opened(Limits(LimitSettings(), on_change=changes.append))
    for number, row in enumerate(fill(limits, 0.0)):
        now = 0.2 + number / 1000
        limits.done(row, attempt(now=now, status=429), refusal, now)
    assert changes == [f"window 32 -> 22: refused ({refusal.code})"]


def test_a_cut_is_judged_before_the_next() -> None:
    limits = opened(Limits(LimitSettings()))
    first = fill(limits, 1.0)
    for row in first[:4]:
        limits.done(row, attempt(status=429), REFUSED, 1.1)
    assert limits.window == 22
    for row in first[4:]:
        limits.done(row, ANSWER, OK, 1.3)
    # Refusals of attempts made after the cut: fewer than answers can be chance, more are a flood.
    refused = 0
    for now in (1.4, 1.8):
        for row in fill_in_time(limits, now, int(100 * now)):
            limits.done(row, attempt(status=429), REFUSED, now + 0.3)
            refused += 1
            assert limits.window == (22 if refused <= 28 else 15)


@pytest.mark.parametrize("service_s", [0.05, 1.0])
def test_the_window_stays_between_one_and_the_cap(service_s: float) -> None:
    server = Server(8, service_s=exponential(service_s), queue=2, refuses_at_random=0.3)
    run = Run(server, LimitSettings(max_concurrency=19))
    run.at(20.0, lambda: setattr(server, "refuses_at_random", 1.0))
    run.at(40.0, lambda: setattr(server, "refuses_at_random", 0.0))
    run.at(40.0, lambda: setattr(server, "slots", 1000))
    run.until(120)
    sizes = {window for _, window in run.windows}
    assert min(sizes) >= 1
    assert max(sizes) == 19
    assert run.rate(110, 120) >= 0.8 * 19 / service_s


def test_a_window_far_too_large_is_found_out_at_once() -> None:
    run = Run(Server(4, service_s=0.25, queue=4)).until(4)
    assert run.limits.window <= 12
    assert len(run.refused) <= 120


@pytest.mark.parametrize("service_s", [0.05, 1.0])
@pytest.mark.slow
def test_refusals_at_random_do_not_starve_the_run(service_s: float) -> None:
    settings = LimitSettings(max_concurrency=256)
    run = Run(Server(service_s=service_s, refuses_at_random=0.1), settings).until(40)
    assert run.rate(25, 40) >= 0.8 * 256 / service_s
    assert run.limits.bound_by() == "endpoint"


def test_refusals_at_random_cost_a_fixed_concurrency_nothing() -> None:
    run = Run(
        Server(service_s=0.05, refuses_at_random=0.1), LimitSettings(concurrency=64), late_s=0.001
    )
    assert run.until(20).rate(1, 20) >= 0.97 * 64 / (0.05 + RTT_S)


@pytest.mark.parametrize(("wait_s", "bound_by"), [(0.2, "endpoint"), (1.0, "quota")])
def test_only_a_wait_of_seconds_is_called_a_quota(wait_s: float, bound_by: str) -> None:
    limits = opened(Limits(LimitSettings()))
    row = request()
    limits.admit(row, 1.0)
    limits.done(row, attempt(status=429), named_wait(wait_s), 1.0)
    assert limits.admit(request(1), 1.1) == pytest.approx(wait_s - 0.1)
    assert limits.bound_by() == bound_by


def test_an_instant_refusal_does_not_spin() -> None:
    run = Run(Server(32, service_s=0.25, queue=0), LimitSettings(concurrency=40)).until(20)
    assert run.rate(1, 20) >= 0.97 * 32 / 0.25
    # Each of the 8 too many once a service time, and one for each fifth answer.
    assert len(run.refused) <= 1.1 * (8 + 32 / 5) * 20 / 0.25


def test_a_fixed_concurrency_is_there_from_the_start_and_stays() -> None:
    run = Run(Server(service_s=1.0), LimitSettings(concurrency=1000))
    assert run.limits.window == 1000
    run.until(60.5)
    assert len(run.sent) - len(run.answered) == 1000
    assert len(run.answered) >= 0.97 * 1000 * 60.5
    assert run.changes == []


def test_the_window_is_full_all_the_time_at_a_latency_of_a_second() -> None:
    run = Run(Server(service_s=even(1.0))).until(60)
    assert run.limits.window == 512
    assert run.rate(15, 60) >= 0.98 * 512
    assert len(run.answered) >= 0.9 * 512 * 59


def test_instant_answers_do_not_shrink_the_window() -> None:
    run = Run(Server(service_s=even(0.0005))).until(0.3)
    assert all(window >= 32 for _, window in run.windows)


def test_a_window_that_is_not_in_use_does_not_grow() -> None:
    limits = Limits(LimitSettings())
    for row in range(5_000):
        sent = request(row)
        limits.admit(sent, row / 100)
        limits.done(sent, ANSWER, OK, row / 100 + 0.005)
    assert limits.window == 32
    assert limits.bound_by() == "input"


def test_errors_of_rows_leave_the_window_alone() -> None:
    server = Server(64, service_s=even(0.25))
    server.rejects = True
    run = Run(server).until(20)
    assert run.rate(5, 20) >= 0.95 * 64 / 0.25


def test_timeouts_are_overload_only_where_answers_barely_make_it() -> None:
    timeout = Decision(kind="timeout", code="timeout", in_doubt=True)
    for latency_s, cut in ((500.0, True), (2.0, False)):
        limits = opened(Limits(LimitSettings()))
        now = 0.0
        for first_row in range(0, 96, 32):
            for row in fill(limits, now, first_row)[:32]:
                limits.done(row, ANSWER, OK, now + latency_s)
            now += latency_s
        window = limits.window
        for row in fill(limits, now, 1000)[:5]:
            limits.done(row, NO_ANSWER, timeout, now + 600.0)
        assert (limits.window < window) is cut


def test_growth_stops_at_the_cap() -> None:
    run = Run(Server(service_s=even(0.1)), LimitSettings(max_concurrency=100)).until(10)
    assert max(window for _, window in run.windows) == 100
    # Nor does a probe from just below it, after a cut, pass it.
    server = Server(service_s=even(0.25), refuses_at_random=1.0)
    run = Run(server, LimitSettings(max_concurrency=26))
    run.at(0.1, lambda: setattr(server, "refuses_at_random", 0.0))
    run.until(30)
    assert any("refused" in change for _, change in run.changes)
    assert max(window for _, window in run.windows) == run.limits.window == 26


def test_a_cancelled_request_gives_its_place_back() -> None:
    limits = Limits(LimitSettings(concurrency=1, tpm=1000))
    row = request()
    assert limits.admit(row, 0.0) == 0.0
    limits.withdrawn(row, 1.0)
    assert limits.in_flight == 0


# --- Gateways: refusals that speak of a rate and mean a number of places --------------------------


def refusal(status: int, wait_s: float | None) -> Decision:
    if status == 429:
        return Decision(kind="rate_limit", code="429", wait_s=wait_s, pushback="rate")
    return Decision(kind="transient", code=str(status), wait_s=wait_s, pushback="capacity")


def limit_of(limit: int) -> Callable[[Server], dict[str, str]]:
    return lambda server: {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(max(0, server.slots - server.busy)),
    }


@pytest.mark.parametrize("places", [2, 4, 32])
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("wait_s", [None, 1.0])
@pytest.mark.parametrize("named", ["no limit", "refusals", "answers", "sixty"])
def test_a_number_of_places_is_found_whatever_refusals_say(
    places: int, status: int, wait_s: float | None, named: str
) -> None:
    headers = None if named == "no limit" else limit_of(60 if named == "sixty" else places)
    server = Server(
        places,
        service_s=even(0.25),
        queue=0,
        refusal=refusal(status, wait_s),
        headers=headers if named == "answers" else None,
        refusal_headers=headers,
    )
    run = Run(server).until(40)
    assert run.rate(10, 40) >= places / 0.25 / 1.5


@pytest.mark.parametrize("places", [2, 4, 32])
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("service_s", [0.05, 0.25, 1.0])
def test_a_long_wait_is_about_places_where_others_are_served_beside(
    places: int, status: int, service_s: float
) -> None:
    server = Server(places, service_s=even(service_s), queue=0, refusal=refusal(status, 60.0))
    run = Run(server).until(50)
    assert run.rate(10, 50) >= places / service_s / 1.5
    # A first window and a few doublings are refused before it is understood.
    assert len([when for when in run.refused if when < 10]) <= 32 + 4 * places


def test_a_long_wait_of_a_rate_is_kept_to_the_letter() -> None:
    """A hundred requests each minute, counted from the first, and the rest of it named."""
    left = [100]

    class Minutes(Server):
        def refuses(self, now: float) -> bool:
            minute = int(now / 60)
            while len(left) <= minute:
                left.append(100)
            left[minute] -= 1
            self.refusal = named_wait(60.0 * (minute + 1) - now)
            return left[minute] < 0

    run = Run(Minutes(service_s=even(0.25))).until(600)
    assert len(run.answered) == 1000
    # Each minute's first refusals were on their way together; then a question, ever more rarely.
    for minute in range(10):
        refused = [when for when in run.refused if minute * 60 <= when < (minute + 1) * 60]
        begun = refused[0]
        assert len([when for when in refused if when > begun + 0.3]) <= 1


@pytest.mark.parametrize("concurrency", [None, 16])
def test_a_wait_named_to_one_in_ten_holds_nobody_else_back(concurrency: int | None) -> None:
    server = Server(service_s=0.05, refuses_at_random=0.1, refusal=named_wait(1.0))
    settings = LimitSettings(concurrency=concurrency, max_concurrency=64)
    run = Run(server, settings, late_s=0.001).until(20)
    assert run.rate(5, 20) >= 0.8 * 16 / (0.05 + RTT_S)


class Scattered(Server):
    """Refuses so many of all attempts, each in one of several ways."""

    def __init__(self, share: float, ways: Sequence[Decision], service_s: float) -> None:
        super().__init__(service_s=service_s, refuses_at_random=share)
        self._ways = ways

    def refuses(self, now: float) -> bool:
        self.refusal = self._rng.choice(self._ways)
        return super().refuses(now)


def answers_to_workers(server: Server, workers: int, rows: int) -> list[float]:
    """The yardstick: each worker tries its row again when the row's wait is over, and no sooner.

    Where none is named it waits as the OpenAI SDK does: half a second, doubled up to eight seconds,
    up to a quarter less at random.
    """
    rng = random.Random(5)
    free = [0.0] * workers
    answered: list[float] = []
    for _ in range(rows):
        now, tries = heapq.heappop(free), 0
        while server.refuses(now):
            named = server.refusal.wait_s
            backoff_s = min(8.0, 0.5 * 2**tries) * rng.uniform(0.75, 1.0)
            now += RTT_S + (backoff_s if named is None else named)
            tries += 1
        now += RTT_S + server.service_s()
        answered.append(now)
        heapq.heappush(free, now)
    return sorted(answered)


SCATTERED = {
    "429 and a second": [named_wait(1.0)],
    "bare 429": [REFUSED],
    "503": [refusal(503, None)],
    "503 and a second": [refusal(503, 1.0)],
    "of all kinds": [named_wait(1.0), REFUSED, refusal(503, None), BROKEN, RESET, CUT],
}


@pytest.mark.parametrize("ways", SCATTERED.values(), ids=SCATTERED.keys())
@pytest.mark.parametrize("service_s", [0.05, 0.25])
def test_scattered_faults_leave_it_as_fast_as_workers_that_try_again(
    ways: Sequence[Decision], service_s: float
) -> None:
    settings = LimitSettings(max_concurrency=64)
    run = Run(Scattered(0.3, ways, service_s), settings, rows=400, late_s=0.001).until(60)
    workers = answers_to_workers(Scattered(0.3, ways, service_s), 16, 400)
    # The last tenth are rows out of luck: how often they are tried is not for admission to say.
    assert run.answered[359] <= workers[359]


def test_a_wait_that_headers_amount_to_obeys_max_wait() -> None:
    limits = Limits(LimitSettings(max_wait_s=100), host=HOST)
    row = request()
    limits.admit(row, 0.0)
    limits.done(row, attempt(headers={"x-ratelimit-limit-tokens-minute": "10"}), OK, 0.1)
    limits.admit(request(1), 0.2)
    verdict = limits.stop(0.2)
    assert verdict is not None
    assert verdict.exit_code == EXIT_STOPPED
    assert "the limit resets at" in verdict.message


def test_a_proxy_without_its_endpoint_is_an_endpoint_never_reached() -> None:
    limits = Limits(LimitSettings(), host=HOST)
    gone = Decision(kind="transient", code="502", reason="502 Bad Gateway")
    now = 0.0
    for number in range(5):
        row = request(number)
        while (wait_s := limits.admit(row, now)) > 0.0:
            now += wait_s
        limits.done(row, attempt(status=502), gone, now)
    verdict = limits.stop(now)
    assert verdict is not None
    assert verdict.message == f"cannot reach {HOST}: 502 Bad Gateway"
    assert now == pytest.approx(15.0, abs=1.0)


# --- Breaker and stop ----------------------------------------------------------------------------


def test_an_outage_is_probed_one_at_a_time_and_the_run_resumes_by_itself() -> None:
    server = Server(64, service_s=even(0.25))
    run = Run(server)
    run.at(10.0, lambda: setattr(server, "is_up", False))
    run.at(40.0, lambda: setattr(server, "is_up", True))
    run.until(100)
    probes = [when for when in run.sent if 12.0 < when < 40.0]
    gaps = [after - before for before, after in pairwise(probes)]
    assert 3 <= len(probes) <= 6
    assert gaps == sorted(gaps)
    assert run.limits.stop(run.now) is None
    resumed = next(when for when in run.sent if when >= 40.0)
    assert resumed <= 40.0 + 30.0
    assert len([when for when in run.sent if resumed <= when < resumed + 0.2]) == 1
    assert next(window for when, window in run.windows if when > resumed) == 32
    assert run.rate(resumed + 5, 100) >= 0.95 * 64 / 0.25


def test_while_a_probe_is_out_nothing_else_leaves() -> None:
    limits = opened(Limits(LimitSettings(), host=HOST))
    for row in fill(limits, 0.0)[:10]:
        limits.done(row, NO_ANSWER, BROKEN, 1.0)
    assert limits.admit(request(50), 1.5) == pytest.approx(0.5)
    assert waiting(limits, 1.5) == (0.5, f"{HOST} does not answer")
    assert limits.bound_by() == "endpoint"
    probe = request(50)
    assert limits.admit(probe, 2.0) == 0.0
    assert limits.admit(request(51), 2.0) > 0.0
    limits.done(probe, ANSWER, OK, 2.5)
    assert limits.admit(request(51), 2.5) == 0.0


def test_connections_refused_beside_answers_are_a_number_of_places() -> None:
    run = Run(Server(4, queue=0, service_s=0.05, refusal=REFUSED_CONNECTION)).until(60)
    assert run.rate(10, 60) >= 0.75 * 4 / 0.05
    assert run.limits.window <= 8
    assert run.limits.stop(60) is None


@pytest.mark.parametrize(
    ("brought", "decision", "wait_s"),
    [
        pytest.param(ANSWER, Decision("transient", code="cut"), 0.5, id="cut"),
        pytest.param(attempt(status=500), BROKEN, 0.5, id="500"),
        pytest.param(attempt(status=503), Decision("transient", may_be_outage=True), 2.0, id="503"),
        pytest.param(NO_ANSWER, REFUSED_CONNECTION, 2.0, id="connect"),
    ],
)
def test_a_probe_that_reached_somebody_is_soon_followed_by_the_next(
    brought: Attempt, decision: Decision, wait_s: float
) -> None:
    limits = opened(Limits(LimitSettings()))
    for row in fill(limits, 0.0)[:10]:
        limits.done(row, brought, decision, 10.0)
    assert limits.is_probing
    for now in (11.0, 11.0 + wait_s):
        probe = request(50)
        assert limits.admit(probe, now) == 0.0
        limits.done(probe, brought, decision, now)
        assert limits.admit(request(51), now) >= wait_s


def test_failures_of_one_row_are_not_an_outage() -> None:
    limits = Limits(LimitSettings())
    for again in range(20):
        row = request(7)
        assert limits.admit(row, float(again)) == 0.0
        limits.done(row, NO_ANSWER, BROKEN, again + 0.5)


def test_a_probe_cancelled_in_flight_makes_room_for_the_next() -> None:
    limits = opened(Limits(LimitSettings()))
    for row in fill(limits, 0.0)[:10]:
        limits.done(row, NO_ANSWER, BROKEN, 1.0)
    probe = request(50)
    limits.admit(probe, 2.0)
    limits.withdrawn(probe, 2.1)
    assert limits.admit(request(51), 2.2) == 0.0


def test_an_endpoint_never_reached_ends_the_run_within_seconds() -> None:
    server = Server()
    server.is_up = False
    run = Run(server, LimitSettings(max_outage_s=600))
    ends = (when / 2 for when in count(1))
    verdict = next(found for end in ends if (found := run.until(end).limits.stop(end)))
    assert verdict.exit_code == EXIT_STOPPED
    assert verdict.message == f"cannot reach {HOST}: could not connect: refused"
    assert run.now == pytest.approx(15.5, abs=1.0)
    assert len(run.sent) == 1 + 4  # the first try, then one probe after 1, 2, 4 and 8 s


def test_an_endpoint_that_once_answered_is_given_max_outage() -> None:
    server = Server(service_s=0.1)
    run = Run(server, LimitSettings(max_outage_s=300))
    run.at(5.0, lambda: setattr(server, "is_up", False))
    assert run.until(300).limits.stop(300) is None
    verdict = run.until(308).limits.stop(308)
    assert verdict is not None
    assert verdict.message.startswith(f"{HOST} has given no answer for 5 min")


def test_refusals_without_end_are_an_outage_too() -> None:
    run = Run(Server(service_s=0.1, refuses_at_random=1.0), LimitSettings(max_outage_s=100))
    assert run.until(90).limits.stop(90) is None
    verdict = run.until(160).limits.stop(160)
    assert verdict is not None
    assert verdict.message.startswith(f"{HOST} has refused every request for 2 min ")


def test_what_holds_the_run_back_is_known() -> None:
    by_quota = Run(Server(service_s=0.1), LimitSettings(rpm=600)).until(5)
    assert by_quota.limits.bound_by() == "quota"
    assert Run(Server(4, service_s=0.1)).until(5).limits.bound_by() == "endpoint"
