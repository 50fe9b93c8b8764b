"""Keep to a rate: one model's buckets for requests and tokens, and what its headers say of them.

Why it is done so stands in the essay of ``limits``. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchrun.limits.headers import MINUTE_S, NEVER, NamedQuota, quota_named
from batchrun.types import Attempt, Request

# Sending at exactly the published rate, a server's bucket that was ever emptied (by another client,
# by the first burst) never refills, and every jitter of the network becomes a 429.
PACE = 0.995
# Too small, and each late wake-up of the loop (up to 50 ms) is rate lost for good; larger, and the
# burst is the 429 we wanted to avoid.
BURST_S = 0.05
# The least that a burst shrinks to: some servers have room for one request and no more.
MIN_BURST_S = 1e-5
SHALLOWER = 8
DEEPER = 1 + 1 / 400  # a request: a refusal in some hundred is what finding the depth costs
# Timers come about a millisecond late, which without a burst is lost: wake before it is time.
EARLY_S = 0.001
# Somebody else may spend the same quota. One refusal among n requests says that we are 1/n too
# fast; twice that leaves room to find out. What was given up comes back within so many requests at
# the full rate.
SLOWER = 2.0
MAX_SLOWER = 0.25
FORGIVEN_AFTER = 2000
# One in fifty is what jitter costs where there is no room for a burst, however slowly we go.
RARE_SHARE = 1 / 50
MIN_SHARE = 1 / 8
# Two refusals in a row may be chance: n is an average, which begins with this.
RARE = 100.0
APART_MEMORY = 4
# Looking up a dozen header names costs more than the rest of admission; limits change rarely.
LOOK_EVERY_S = 0.25
# An endpoint whose first answers name no quota rarely begins later, but a gateway may.
FIRST_LOOKS = 8
LOOK_AGAIN_S = 5.0
# Before the first usage is known: English text has about four bytes a token, and answers are short.
# Wrong guesses last for the first answers only.
TOKENS_PER_BYTE = 0.25
PROMPT_TOKENS = COMPLETION_TOKENS = 256.0
# The estimate follows the file (rows are often sorted by kind) without dancing after each row.
ESTIMATE_MEMORY = 64


class Quota:
    """The rates of one model, from flags or else from headers; unlimited while neither is known."""

    __slots__ = (
        "_estimate",
        "_flag_requests",
        "_flag_tokens",
        "_looks",
        "_met_at",
        "_ours",
        "_refused_after",
        "_refused_at",
        "_requests",
        "_surplus",
        "_taught_by_refusal",
        "_tokens",
        "_untrue",
        "admitted",
        "has_left",
        "is_doubted",
        "is_from_headers",
        "is_known",
        "look_at",
        "reserved",
    )

    def __init__(
        self, rpm: float | None, tpm: float | None, now: float, share: float = 1.0
    ) -> None:
        self._ours = share  # of what the headers say
        self.admitted = 0
        self.look_at = 0.0  # from when on the headers of an answer are worth reading
        self.reserved: dict[int, float] = {}  # id(request) -> tokens
        self.is_known = rpm is not None or tpm is not None
        self.has_left = False  # by the headers read last, so much that it explains no refusal
        self.is_from_headers = False
        self.is_doubted = False  # the rate of requests may be none a minute
        self._taught_by_refusal = False
        self._surplus = 0  # answers where the rate had no room for a request
        self._untrue = 0.0  # a rate that was found not to be one
        self._flag_requests = rpm is not None
        self._flag_tokens = tpm is not None
        self._requests = _Bucket(rpm / MINUTE_S, now) if rpm is not None else None
        self._tokens = _Bucket(tpm / MINUTE_S, now) if tpm is not None else None
        self._estimate = _Estimate()
        self._looks = 0
        self._met_at = now
        self._refused_at = -NEVER
        self._refused_after = 0  # admitted requests

    def wait(self, request: Request, now: float) -> float:
        """Seconds until both buckets have room, and asking again is worth it; 0.0 is now."""
        wait = 0.0 if self._requests is None else self._requests.wait(1.0, now)
        if self._tokens is not None:
            wait = max(wait, self._tokens.wait(self._estimate.tokens(request), now))
        if wait > 2 * EARLY_S:
            return wait - EARLY_S
        # What floating point leaves over is not worth a timer.
        return wait if wait > 1e-6 else 0.0

    def charge(self, request: Request, now: float) -> None:
        if self._requests is not None:
            self._requests.take(1.0, now)
        if self._tokens is not None:
            cost = self.reserved[id(request)] = self._estimate.tokens(request)
            self._tokens.take(cost, now)

    def settle(self, request: Request, attempt: Attempt) -> None:
        """Replace the reserved tokens by those the endpoint counted."""
        reserved = self.reserved.pop(id(request), None)
        usage = attempt.reply.usage if attempt.reply is not None else None
        if usage is None or usage.prompt_tokens is None:
            return
        completion = usage.completion_tokens or 0
        self._estimate.learn(len(request.body), usage.prompt_tokens, completion)
        if reserved is not None and self._tokens is not None:
            spent = max(usage.total_tokens or 0, usage.prompt_tokens + completion)
            self._tokens.settle(spent - reserved)

    def refund(self, request: Request) -> None:
        """A refused request was counted as a request, but its tokens were not spent."""
        reserved = self.reserved.pop(id(request), None)
        if reserved is not None and self._tokens is not None:
            self._tokens.settle(-reserved)

    def forget(self, request: Request) -> None:
        """Nobody will say what it cost; its tokens count as spent."""
        self.reserved.pop(id(request), None)

    def empty(self, until: float) -> None:
        """Let nothing go before ``until``, and the rate without a burst from then on."""
        for bucket in self._buckets():
            bucket.empty(until)

    def refused(self, admitted_at: float, now: float) -> None:
        """A refusal in spite of the pace: their bucket is emptier than ours; once per burst."""
        if admitted_at < self._refused_at:
            return
        apart = self.admitted - self._refused_after
        self._refused_at, self._refused_after = now, self.admitted
        for bucket in self._buckets():
            bucket.refused(apart)
            bucket.empty(now)

    def learn(
        self,
        headers: Mapping[str, str],
        in_flight: int,
        admitted_at: float,
        now: float,
        *,
        refused: bool = False,
    ) -> float | None:
        """Take over what an answer's headers say; the requests a second that are news in them."""
        named = quota_named(headers).shared(self._ours)
        if named.requests_per_s == self._untrue:
            named = named._replace(requests_per_s=None, requests_left=None)
        tokens_per_s = self._tokens_per_s(named)
        self._looks += 1
        if named.requests_per_s is not None or tokens_per_s is not None:
            self.look_at = now + LOOK_EVERY_S
        elif self._looks >= FIRST_LOOKS:
            self.look_at = now + LOOK_AGAIN_S
        news = None
        if named.requests_per_s is not None and not self._flag_requests:
            news = named.requests_per_s if self._requests is None else None
            self.is_doubted = self._requests is None or self.is_doubted
            self._taught_by_refusal = refused and (
                self._requests is None or self._taught_by_refusal
            )
            self._requests = self._rated(self._requests, named.requests_per_s, 1.0, in_flight, now)
        if tokens_per_s is not None and not self._flag_tokens:
            cost = self._estimate.prompt + self._estimate.completion
            self._tokens = self._rated(self._tokens, tokens_per_s, cost, in_flight, now)
        self.has_left = named.has_left
        # What is left was counted when the request arrived there; we have kept the pace since.
        if self._requests is not None and named.requests_left == 0:
            self._requests.empty(admitted_at)
        if self._tokens is not None and named.tokens_left == 0:
            self._tokens.empty(admitted_at)
        return news

    def reopen(self, now: float) -> None:
        """The wait for which the buckets were emptied does not hold."""
        for bucket in self._buckets():
            bucket.reopen(now)

    def contradicted(self) -> None:
        """An answer where the rate of the headers had no room for a request.

        A full bucket has room for a minute's requests, if answers speak of it; what only refusals
        spoke of was said to explain them, and does not.
        """
        bucket = self._requests
        if bucket is None or not self.is_doubted:
            return
        self._surplus += 1
        if self._taught_by_refusal or self._surplus >= bucket.rate * MINUTE_S:
            self._untrue = bucket.rate
            self._requests = None
            self.is_doubted = False
            self.has_left = False
            self.is_known = self._tokens is not None

    def _buckets(self) -> list[_Bucket]:
        return [bucket for bucket in (self._requests, self._tokens) if bucket is not None]

    def _tokens_per_s(self, named: NamedQuota) -> float | None:
        """Where prompts and answers are limited apart, what their usual proportion allows."""
        prompt, completion = self._estimate.prompt, self._estimate.completion
        whole = prompt + completion
        rates = (
            named.tokens_per_s,
            named.input_tokens_per_s and named.input_tokens_per_s * whole / max(1.0, prompt),
            named.output_tokens_per_s and named.output_tokens_per_s * whole / max(1.0, completion),
        )
        return min((rate for rate in rates if rate is not None), default=None)

    def _rated(
        self, bucket: _Bucket | None, rate: float, cost: float, in_flight: int, now: float
    ) -> _Bucket:
        if bucket is not None:
            bucket.change_rate(rate, now)
            return bucket
        # What left before the quota was known counts, else the run's first second is double; but
        # no more than what is in flight, else a limit named late would cost minutes.
        bucket = _Bucket(rate, now)
        spent_since_met = self._met_at + self.admitted * cost * bucket.unit_s
        bucket.tat = max(now, min(spent_since_met, now + in_flight * cost * bucket.unit_s))
        self.is_known = self.is_from_headers = True
        return bucket


class _Bucket:
    """One GCRA: ``rate`` units a second with a burst of ``depth`` units."""

    __slots__ = ("_apart", "_burst_s", "_depth", "_share", "rate", "tat", "unit_s")

    def __init__(self, rate: float, now: float) -> None:
        self._burst_s = BURST_S
        self._share = 1.0  # of the rate that is ours, as far as refusals tell
        self._apart = RARE  # requests from one refusal to the next
        self.tat = now
        self.rate = rate
        self._set()

    def _set(self) -> None:
        self.unit_s = 1.0 / (self.rate * PACE * self._share)
        self._depth = 1.0 + self.rate * self._burst_s

    def wait(self, cost: float, now: float) -> float:
        """Seconds until ``cost`` fits, or until the bucket is full if it never fits; or <= 0."""
        spare = self._depth - cost
        return self.tat - (spare * self.unit_s if spare > 0.0 else 0.0) - now

    def take(self, cost: float, now: float) -> None:
        if self._burst_s < BURST_S or self._share < 1.0:
            self._forgive()
        self.tat = max(self.tat, now) + cost * self.unit_s

    def settle(self, difference: float) -> None:
        self.tat += difference * self.unit_s

    def empty(self, until: float) -> None:
        """Have no burst at ``until``: the rate alone from then on."""
        self.tat = max(self.tat, until + self._depth * self.unit_s)

    def reopen(self, now: float) -> None:
        self.tat = min(self.tat, now + self._depth * self.unit_s)

    def refused(self, apart: int) -> None:
        """Their bucket is shallower than we believed; if ours has no burst left, it is shared."""
        if self._burst_s > SHALLOWER * MIN_BURST_S:
            self._burst_s /= SHALLOWER
        else:
            self._burst_s = MIN_BURST_S
            self._apart += (apart - self._apart) / APART_MEMORY
            excess = max(0.0, 1 / max(1.0, self._apart) - RARE_SHARE)
            self._share *= 1.0 - min(MAX_SLOWER, SLOWER * excess)
            self._share = max(MIN_SHARE, self._share)
        self._set()

    def _forgive(self) -> None:
        self._burst_s = min(BURST_S, self._burst_s * DEEPER)
        self._share = min(1.0, self._share + 1 / (FORGIVEN_AFTER * self._share))
        self._set()

    def change_rate(self, rate: float, now: float) -> None:
        if rate == self.rate:
            return
        debt = max(0.0, self.tat - now) / self.unit_s
        self.rate = rate
        self._set()
        self.tat = now + debt * self.unit_s


class _Estimate:
    """How many tokens a request will cost, learned from the usage of those before it."""

    __slots__ = ("_seen", "_tokens_per_byte", "completion", "prompt")

    def __init__(self) -> None:
        self._tokens_per_byte = TOKENS_PER_BYTE
        self._seen = 0
        self.prompt = PROMPT_TOKENS
        self.completion = COMPLETION_TOKENS

    def tokens(self, request: Request) -> float:
        return self._tokens_per_byte * len(request.body) + self.completion

    def learn(self, size_bytes: int, prompt: int, completion: int) -> None:
        self._seen = min(self._seen + 1, ESTIMATE_MEMORY)
        weight = 1 / self._seen
        self._tokens_per_byte += weight * (prompt / max(1, size_bytes) - self._tokens_per_byte)
        self.prompt += weight * (prompt - self.prompt)
        self.completion += weight * (completion - self.completion)
