"""What ends a whole run early: signals, the deadline, and the words said then."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from batchrun.console import Progress
from batchrun.errors import Interrupted, StoppedEarly
from batchrun.sending import EarlyEnd


class Stop(EarlyEnd):
    """The early end of a run in a process of its own."""

    def __init__(self, talk: Progress) -> None:
        super().__init__()
        self._talk = talk
        self._deadline: asyncio.TimerHandle | None = None

    @contextmanager
    def at_deadline(self, seconds: float) -> Iterator[None]:
        """Stop after ``seconds``, unless everything is sent by then."""
        reached = StoppedEarly("the deadline was reached")
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.tell, reached)
        try:
            yield
        finally:
            self._deadline.cancel()

    def all_sent(self) -> None:
        """Publishing needs no endpoint: a deadline is none for it."""
        if self._deadline is not None:
            self._deadline.cancel()

    def on_signal(self, signum: int) -> None:
        self.tell(Interrupted(signum))

    def at_once(self) -> None:
        """A second signal: what is in flight is cut off, and the run ends as it does anyway."""
        if isinstance(self.cause, Interrupted):
            self.cause.at_once()
            self.tell(self.cause, urgent=True)

    def last_words(self) -> None:
        """What there is to say where even that takes too long."""
        self._talk.end()
        self._talk.note("at once: every answer that was written down is saved", label="stopped")
        self._talk.note("the same command continues", label="next")
        self._talk.close()
