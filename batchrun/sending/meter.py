"""Measures a run for the bar, the status file and the question what bounds it."""

from __future__ import annotations

import time
from collections import Counter
from typing import NamedTuple

from batchrun.console import Snapshot
from batchrun.sending.sender import Sender
from batchrun.sending.tally import RunTally
from batchrun.types import Bound

# The share of wall time this process may compute before it, not the endpoint, is the bottleneck.
BUSY_SHARE = 0.9


class Totals(NamedTuple):
    """The rows of the whole output, for the bar: those settled before count as done."""

    total: int
    ok: int
    failed: int


class Meter:
    """Measures the run for the bar, the status file and the question what bounds it."""

    def __init__(self, sender: Sender, tally: RunTally, before: Totals) -> None:
        self._limits = sender.limits
        self._feed = sender.feed
        self._pool = sender.pool
        self._tally = tally
        self._before = before
        self._votes: Counter[Bound] = Counter()
        self._wall_s = time.monotonic()
        self._cpu_s = time.process_time()

    def snapshot(self) -> Snapshot:
        tally, before, now = self._tally, self._before, time.monotonic()
        return Snapshot(
            total=before.total,
            done=before.ok + before.failed + tally.done,
            ok=before.ok + tally.ok,
            failed=before.failed + tally.failed,
            in_flight=self._limits.in_flight,
            tokens=tally.tokens_spent,
            waiting=self._limits.waiting(now),
            longest_s=self._limits.longest_s(now),
            resting=self._pool.waiting,
            bound_by=self._limits.bound_by(),
            attempts=tally.attempts,
            retries=tally.retries,
            rate_limited=tally.rate_limited,
            in_doubt=tally.in_doubt,
            spent=tally.tokens,
        )

    def sample(self) -> Snapshot:
        """Take one vote on what bounds the run, and its picture."""
        wall_s, cpu_s = time.monotonic(), time.process_time()
        busy = (cpu_s - self._cpu_s) / max(wall_s - self._wall_s, 1e-9)
        self._wall_s, self._cpu_s = wall_s, cpu_s
        if self._feed.starved and not self._pool.waiting:
            self._votes["input"] += 1
        elif busy > BUSY_SHARE:
            self._votes["loop"] += 1
        else:
            self._votes[self._limits.bound_by()] += 1
        return self.snapshot()

    def bound_by(self) -> Bound:
        return self._votes.most_common(1)[0][0] if self._votes else "endpoint"
