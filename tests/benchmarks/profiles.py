"""What is asked of the contenders: an endpoint, how much work, and what the ideal would be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from upstream import Endpoint

LOOP = ("batchrun", "naive", "tuned")
RIVAL_ROWS = 2_000  # rivals are an order slower; rates need no more rows than these


@dataclass(frozen=True)
class Profile:
    name: str
    title: str
    endpoint: Endpoint
    in_flight: int  # what a contender that must be told is told
    rows: int
    contenders: tuple[str, ...] = LOOP

    def scaled(self, factor: float) -> Profile:
        """The same with more or less work; a change in the middle stays in the middle."""
        endpoint = replace(self.endpoint, halved_after_s=self.endpoint.halved_after_s * factor)
        return replace(self, rows=max(1, round(self.rows * factor)), endpoint=endpoint)

    def rows_for(self, *, rival: bool) -> int:
        return min(self.rows, max(RIVAL_ROWS, 2 * self.in_flight)) if rival else self.rows

    def ideal_s(self, rows: int) -> float | None:
        """The least time from the first request to the last answer; None: as fast as one can."""
        e = self.endpoint
        if e.rate_per_s:
            return max(0, rows - e.burst) / e.rate_per_s + e.latency_s
        if e.places:
            return rows / e.places * e.latency_s
        if e.slots:
            return _time_in_slots(e, rows)
        return math.ceil(rows / self.in_flight) * e.latency_s or None


def _time_in_slots(e: Endpoint, rows: int) -> float:
    per_s = e.slots / e.latency_s
    if not e.halved_after_s or rows <= per_s * e.halved_after_s:
        return rows / per_s
    return e.halved_after_s + (rows - per_s * e.halved_after_s) / (per_s / 2)


def _instant(in_flight: int) -> Profile:
    return Profile(
        f"instant-{in_flight}",
        f"instant replies, {in_flight} in flight",
        Endpoint(),
        in_flight,
        rows=20_000,
    )


def _latency(latency_ms: int, in_flight: int) -> Profile:
    # About ten seconds of ideal time, but no more rows than one core sends in five.
    waves = 10_000 // latency_ms
    return Profile(
        f"{latency_ms}ms-{in_flight}",
        f"{latency_ms / 1000:g} s latency, {in_flight:,} in flight",
        Endpoint(latency_s=latency_ms / 1000),
        in_flight,
        rows=in_flight * max(5, min(waves, 40_000 // in_flight)),
    )


def _slots(slots: int, *, halved: bool = False, refusing: bool = False) -> Profile:
    seconds, service_s = 20, 0.25
    suffix = ("-halved" if halved else "") + ("-refusing" if refusing else "")
    capacity = slots / service_s
    return Profile(
        f"slots-{slots}{suffix}",
        f"{slots} slots, 0.25 s of service, "
        + (f"a queue of {slots}, then 429" if refusing else "a queue without end")
        + (", half the slots from the middle on" if halved else ""),
        Endpoint(
            latency_s=service_s,
            slots=slots,
            queue=slots if refusing else 0,
            halved_after_s=seconds / 2 if halved else 0,
        ),
        # Twice the slots keep every slot busy: the best that a fixed number can do.
        in_flight=2 * slots,
        rows=round(capacity * seconds * (0.75 if halved else 1)),
        contenders=("batchrun-auto", "batchrun", "naive") if not refusing else ("batchrun-auto",),
    )


def _places(places: int, suffix: str, title: str, **refusals: int) -> Profile:
    """A gateway that serves so many at a time and refuses the others, whatever it says of it."""
    service_s, seconds = 0.1, 20
    return Profile(
        f"places-{places}-{suffix}",
        f"{places} places, {service_s} s of service, beyond them {title}",
        Endpoint(latency_s=service_s, places=places, **refusals),
        in_flight=places,
        rows=round(places / service_s * seconds),
        contenders=("batchrun-auto", "batchrun"),
    )


PROFILES = {
    p.name: p
    for p in (
        _instant(64),
        _instant(256),
        replace(
            _instant(64),
            name="processes",
            title="instant replies, 64 in flight, by one process and by two",
            rows=60_000,
            contenders=("batchrun", "batchrun-2", "naive"),
        ),
        *(_latency(50, n) for n in (64, 256, 1000, 2000)),
        *(_latency(1000, n) for n in (64, 256, 1000, 2000)),
        Profile(
            "refused-10",
            "50 ms latency, 64 in flight, every tenth request answered 429",
            Endpoint(latency_s=0.05, refused_share=0.1),
            in_flight=64,
            # Half a minute: the last rows refused end after several back-offs, whoever sends them.
            rows=40_000,
        ),
        Profile(
            "scattered-30",
            "50 ms latency, 16 in flight, three requests in ten answered 429 with Retry-After 1",
            Endpoint(latency_s=0.05, refused_share=0.3, retry_after_s=1),
            in_flight=16,
            rows=2_000,
            contenders=("batchrun-auto", "batchrun"),
        ),
        *(_places(n, "429", "429 and Retry-After 1", retry_after_s=1) for n in (2, 4, 32)),
        *(
            _places(n, "503", "503 and Retry-After 1", refusal_status=503, retry_after_s=1)
            for n in (2, 4, 32)
        ),
        *(_places(n, "limit", "429 and a limit of as many", named_limit=n) for n in (2, 4, 32)),
        Profile(
            "bucket-100",
            "a token bucket of 100/s, burst 20, in Mistral's headers; 50 ms latency",
            Endpoint(latency_s=0.05, rate_per_s=100, burst=20),
            in_flight=64,
            rows=2_000,
            contenders=("batchrun-auto", "batchrun-rpm"),
        ),
        *(_slots(n) for n in (4, 32, 256)),
        *(_slots(n, halved=True) for n in (4, 32, 256)),
        *(_slots(n, halved=True, refusing=True) for n in (4, 32, 256)),
    )
}
DEFAULT = ("instant-64", "instant-256")
