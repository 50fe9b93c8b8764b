"""Is anybody there? Failures across rows pause sending; one probe at a time finds out."""

from __future__ import annotations

from datetime import datetime

from batchrun.errors import StoppedEarly
from batchrun.types import Attempt, Decision
from batchrun.words import duration

# What a proxy says of an endpoint that is not there.
NOBODY_THERE = (502,)
# Fewer, and a burst of unlucky rows pauses a healthy run; more, and an outage burns more attempts.
BREAKER_FAILURES = 10
# A row that fails again says something about itself. So many are remembered.
MOST_FAILED_ROWS = 10_000
# Sooner, and a server that restarts is hit while it loads; much later, and a blip costs minutes.
FIRST_PROBE_S = 1.0
MAX_PROBE_S = 30.0
# Where a probe brings the head of an answer, somebody is there, and what fails may be the row: the
# next follows soon. At once, and an endpoint that cuts every answer short is paid for many.
REACHED_PROBE_S = 0.5
# An endpoint never reached: the first try and the probes after 1, 2, 4 and 8 s, then give up.
UNREACHED_PROBES = 4
UNREACHED_S = 15.0
UNREACHED_SLOW_PROBES = 2  # where each connect takes its whole timeout


class Breaker:
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
        self._failed_rows: set[int] = set()  # lately
        self._refused_at = 0.0
        self._reason = ""

    def wait(self, now: float) -> float:
        """Seconds until the next probe; only while it is open. 0.0 or less: now."""
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

    def failed(
        self, flight: int, row: int, attempt: Attempt, decision: Decision, now: float
    ) -> None:
        """Count a failure that may be the endpoint's; open after enough, or without contact."""
        self._reason = decision.reason
        if self.since is None:
            self.since = now
        if self.is_open:
            if flight == self._probe:
                is_away = decision.unreachable or decision.may_be_outage
                has_head = attempt.status is not None and attempt.status not in NOBODY_THERE
                self._probe_failed(now, reached=has_head and not is_away)
            return
        if row not in self._failed_rows or decision.unreachable:
            self._failures += 1
            if len(self._failed_rows) >= MOST_FAILED_ROWS:
                self._failed_rows.clear()
            self._failed_rows.add(row)
        nobody_there = decision.unreachable or attempt.status in NOBODY_THERE
        never_reached = nobody_there and not self.answered
        if self._failures >= BREAKER_FAILURES or never_reached:
            self.is_open = True
            self._interval_s = FIRST_PROBE_S
            self.probe_at = now + self._interval_s

    def withdrawn(self, flight: int, now: float) -> None:
        if flight == self._probe:
            self._probe = None

    def _probe_failed(self, now: float, *, reached: bool) -> None:
        self._probe = None
        self._probes_failed += 1
        self._interval_s = REACHED_PROBE_S if reached else min(MAX_PROBE_S, 2 * self._interval_s)
        self.probe_at = now + self._interval_s

    def verdict(self, now: float) -> StoppedEarly | None:
        """Why nobody need wait any longer, once neither probes nor refusals led anywhere."""
        if self.since is None:
            return None
        host, down_s = self._host, now - self.since
        why = f": {self._reason}" if self._reason else ""
        if not self.answered and self.is_open and self._gives_up(down_s):
            return StoppedEarly(
                f"cannot reach {host}{why}",
                next_steps=("check --base-url and the network; the same command continues",),
            )
        back = ("the same command continues when it is back",)
        if self.is_open and down_s >= self._max_outage_s:
            return StoppedEarly(
                f"{host} has given no answer for {duration(down_s)}{why}", next_steps=back
            )
        refused_s = self._refused_at - self.since
        if refused_s >= self._max_outage_s:
            return StoppedEarly(
                f"{host} has refused every request for {duration(refused_s)}", next_steps=back
            )
        return None

    def _gives_up(self, down_s: float) -> bool:
        return self._probes_failed >= UNREACHED_PROBES or (
            down_s >= UNREACHED_S and self._probes_failed >= UNREACHED_SLOW_PROBES
        )


def local_time(unix_ms: float) -> str:
    return datetime.fromtimestamp(unix_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M %z")
