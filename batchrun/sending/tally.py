"""What this run sent and what came of it, counted as it lands."""

from __future__ import annotations

from batchrun.money import Price
from batchrun.outputs import Causes, TokenSums, is_filtered, is_truncated
from batchrun.summary import ErrorCount, ErrorExample, TokenCounts
from batchrun.types import Decision, Outcome, Reply


class RunTally:
    """What this run did so far.

    Every attempt is told once: ``add`` for one that settled its row as ok, ``attempt_failed`` for
    every other, ``withdrawn`` for one cut off in flight. A row that fails for good is told twice,
    its last attempt by ``attempt_failed`` and the row by ``add``.
    """

    __slots__ = (
        "_causes",
        "_tokens",
        "cut_off",
        "empty",
        "failed",
        "filtered",
        "in_doubt",
        "ok",
        "rate_limited",
        "retries",
        "truncated",
        "unsuccessful_attempts",
    )

    def __init__(self, price: Price | None = None) -> None:
        self.ok = 0
        self.failed = 0
        self.truncated = 0
        self.filtered = 0
        self.empty = 0
        self.unsuccessful_attempts = 0
        self.retries = 0
        self.rate_limited = 0
        self.in_doubt = 0
        self.cut_off = 0
        self._tokens = TokenSums(price)
        self._causes = Causes()

    def add(self, outcome: Outcome, reply: Reply | None, row: int) -> None:
        """Count a settled row; ``row`` is 0-based over all inputs."""
        self._tokens.add(outcome.usage)
        if outcome.kind != "ok":
            self.failed += 1
            cause = self._causes.add(outcome.kind, outcome.code, not outcome.final)
            if cause.example is None:
                number = str(row + 1)
                cause.example = ErrorExample(number, f"row {number}", outcome.message)
            return
        self.ok += 1
        if reply is None:
            return
        if is_truncated(reply.finish_reason):
            self.truncated += 1
        if is_filtered(reply.finish_reason, reply.refusal):
            self.filtered += 1
        elif not reply.has_content:
            self.empty += 1

    def attempt_failed(self, decision: Decision, *, again: bool) -> None:
        """Count an attempt that brought no answer; ``again``: its row is to be tried once more."""
        self.unsuccessful_attempts += 1
        self.retries += again
        self.in_doubt += decision.in_doubt
        self.rate_limited += decision.kind == "rate_limit"

    def resent(self, times: int) -> None:
        """Count attempts that went again at once, their connection having been dead already."""
        self.unsuccessful_attempts += times
        self.retries += times
        self.in_doubt += times

    def withdrawn(self) -> None:
        """Count an attempt cut off in flight: it may be billed, and its row stays pending."""
        self.unsuccessful_attempts += 1
        self.in_doubt += 1
        self.cut_off += 1

    @property
    def done(self) -> int:
        return self.ok + self.failed

    @property
    def attempts(self) -> int:
        return self.ok + self.unsuccessful_attempts

    @property
    def tokens_spent(self) -> int:
        return self._tokens.spent

    @property
    def tokens(self) -> TokenCounts:
        return self._tokens.counts()

    @property
    def errors(self) -> list[ErrorCount]:
        """Failures by cause, largest first; an example's source is ``row 214``."""
        return self._causes.largest_first()
