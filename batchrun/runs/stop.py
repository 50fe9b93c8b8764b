"""Whether and why a run ends early; asked by the passes, told to the pool."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from batchrun.config import RunConfig
from batchrun.console import Progress
from batchrun.errors import BatchrunError, Interrupted, StoppedEarly
from batchrun.sending import Pool
from batchrun.words import count, duration, verb


class Stop:
    """Whether and why this run should end early; asked by the passes, told to the pool."""

    def __init__(self, config: RunConfig, talk: Progress) -> None:
        self.cause: BatchrunError | None = None
        self.requested = threading.Event()
        self._config = config
        self._talk = talk
        self._pool: Pool | None = None
        self._deadline: asyncio.TimerHandle | None = None

    @contextmanager
    def at_deadline(self, seconds: float) -> Iterator[None]:
        """Stop after ``seconds``, unless everything is sent by then."""
        reached = StoppedEarly("the deadline was reached")
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.now, reached)
        try:
            yield
        finally:
            self._deadline.cancel()

    def all_sent(self) -> None:
        """Publishing needs no endpoint: a deadline is none for it."""
        if self._deadline is not None:
            self._deadline.cancel()

    def attach(self, pool: Pool) -> None:
        self._pool = pool
        if self.cause is not None:
            pool.stop(self.cause)

    def now(self, cause: BatchrunError) -> None:
        # A signal outranks a deadline, whichever came first.
        if self.cause is None or isinstance(cause, Interrupted):
            self.cause = cause
        self.requested.set()
        if self._pool is not None and (number := self._pool.in_flight):
            its = "its" if number == 1 else "their"
            coming = f"{count(number, 'answer')} {verb(number, 'are')} on {its} way"
            how = " (Ctrl-C: stop now)" if isinstance(cause, Interrupted) else ""
            self._talk.note(
                f"{coming}, waiting up to {duration(self._config.drain_s)}{how}", label="stopping"
            )
        if self._pool is not None:
            self._pool.stop(cause)

    def on_signal(self, signum: int) -> None:
        self.now(Interrupted(signum))

    def at_once(self) -> None:
        """A second signal: what is in flight is cut off, and the run ends as it does anyway."""
        if isinstance(self.cause, Interrupted):
            self.cause.at_once()
        if self._pool is not None and self.cause is not None:
            self._pool.stop(self.cause, drain_s=0.0)

    def last_words(self) -> None:
        """What there is to say where even that takes too long."""
        self._talk.end()
        self._talk.note("at once: every answer that was written down is saved", label="stopped")
        self._talk.note("the same command continues", label="next")
        self._talk.close()

    def check(self) -> None:
        """Raise the cause; called by the passes over the input, once a batch."""
        if self.cause is not None:
            raise self.cause
