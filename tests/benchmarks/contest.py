"""Contenders in turn, round by round, and what their runs amount to."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from arena import Arena
from contenders import RIVALS, Contender
from measure import Spent
from profiles import Profile
from table import Spread, markdown
from upstream import Books, Endpoint

REFERENCE = "naive"
SETTLED_S = 5  # a capacity counts as found when it was used for so long


@dataclass(frozen=True)
class Sample:
    """One contender's run of a profile."""

    spent: Spent
    books: Books
    rows: int
    start_up_s: float
    ideal_s: float | None

    @property
    def requests_per_s(self) -> float:
        return self.books.answered / self.books.span_s

    @property
    def cpu_us(self) -> float:
        """Per request, without what a run of one row costs."""
        return (self.spent.cpu_s - self.start_up_s) / max(1, self.books.requests) * 1e6

    @property
    def whole_cpu_us(self) -> float:
        return self.spent.cpu_s / max(1, self.books.requests) * 1e6

    @property
    def share_of_ideal(self) -> float | None:
        if self.ideal_s is None:
            return None
        # A client that loses rows ends sooner; it gets no credit for them.
        return self.ideal_s / self.books.span_s * self.books.answered / self.rows

    @property
    def problem(self) -> str:
        missing = self.rows - self.books.answered
        lost = f"{missing:,} of {self.rows:,} rows not answered" if missing > 0 else ""
        return "; ".join(filter(None, (self.spent.problem, lost)))


Samples = dict[str, list[Sample]]


def rounds(
    arena: Arena, profile: Profile, contenders: Sequence[Contender], count: int
) -> Iterator[tuple[int, str, Sample]]:
    """Every contender once a round. Rounds rotate the order: what one leaves behind hits all."""
    for n in range(count):
        turn = n % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            yield n, contender.name, _sample(arena, profile, contender)


def _sample(arena: Arena, profile: Profile, contender: Contender) -> Sample:
    rows = profile.rows_for(rival=contender.is_rival)
    start_up_s = arena.start_up_s(contender)
    spent = arena.run(contender, profile.endpoint, in_flight=profile.in_flight, rows=rows)
    return Sample(spent, arena.up.books(), rows, start_up_s, profile.ideal_s(rows))


def report(profile: Profile, samples: Samples) -> str:
    """The table and the lines under it."""
    count = max(map(len, samples.values()))
    title = f"**{profile.name}**: {profile.title}; {profile.rows:,} rows, rounds: {count}"
    notes = (*_ratios(samples), *_recoveries(profile, samples), *_problems(samples))
    return "\n\n".join((title, _summary(samples), *notes))


def _summary(samples: Samples) -> str:
    header = (
        *("client", "requests/s", "CPU µs/request", "with start-up", "peak MB"),
        *("% of ideal", "% refused", "% answered"),
    )
    return markdown(header, [(name, *_figures(runs)) for name, runs in samples.items()])


def _figures(runs: Sequence[Sample]) -> Iterator[str]:
    yield Spread.of([s.requests_per_s for s in runs]).show()
    yield Spread.of([s.cpu_us for s in runs]).show()
    yield Spread.of([s.whole_cpu_us for s in runs]).show()
    yield f"{max(s.spent.peak_mb for s in runs):,.0f}"
    shares = [100 * s.share_of_ideal for s in runs if s.share_of_ideal is not None]
    yield Spread.of(shares).show(1) if shares else ""
    requests = sum(s.books.requests for s in runs)
    yield f"{100 * sum(s.books.refused for s in runs) / max(1, requests):.2f}"
    yield f"{100 * sum(s.books.answered for s in runs) / sum(s.rows for s in runs):.1f}"


def _ratios(samples: Samples) -> Iterator[str]:
    """batchrun against the reference, round by round, and against the best rival."""
    ours = samples.get("batchrun")
    if not ours:
        return
    if REFERENCE in samples:
        pairs = list(zip(ours, samples[REFERENCE], strict=True))
        cpu = Spread.of([a.cpu_us / b.cpu_us for a, b in pairs])
        rate = Spread.of([a.requests_per_s / b.requests_per_s for a, b in pairs])
        yield (
            f"batchrun / {REFERENCE}, median of {len(pairs)} pairs: "
            f"CPU per request {cpu.show(2)}, requests/s {rate.show(2)}"
        )
    if rates := {name: _rate(runs) for name, runs in samples.items() if name in RIVALS}:
        best = max(rates, key=rates.__getitem__)
        cpu_us = [statistics.median(s.cpu_us for s in runs) for runs in (ours, samples[best])]
        yield (
            f"batchrun / best rival ({best}): CPU per request {cpu_us[0] / cpu_us[1]:.3f}, "
            f"requests/s {_rate(ours) / rates[best]:.1f}"
        )


def _rate(runs: Sequence[Sample]) -> float:
    return statistics.median(s.requests_per_s for s in runs)


def _recoveries(profile: Profile, samples: Samples) -> Iterator[str]:
    if not profile.endpoint.halved_after_s:
        return
    for name, runs in samples.items():
        times = [_recovery_s(s.books, profile.endpoint) for s in runs]
        found = [t for t in times if t is not None]
        said = f"after {Spread.of(found).show()} s" if len(found) == len(times) else "not seen"
        yield f"{name}: {SETTLED_S} s in a row at 95 % of the halved capacity: {said}"


def _recovery_s(books: Books, endpoint: Endpoint) -> float | None:
    """From the halving to the end of the first seconds in a row that used what was left."""
    halved = round(endpoint.halved_after_s)
    enough = 0.95 * SETTLED_S * endpoint.slots / 2 / endpoint.latency_s
    for end in range(halved + SETTLED_S, len(books.answered_by_second)):
        if sum(books.answered_by_second[end - SETTLED_S : end]) >= enough:
            return end - halved
    return None


def _problems(samples: Samples) -> Iterator[str]:
    for name, runs in samples.items():
        for problem in sorted({s.problem for s in runs if s.problem}):
            yield f"{name}: {problem}"
