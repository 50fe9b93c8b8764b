"""What ends a run, drawn as a tree. A row's failure is data; only a run's failure is an exception.

    BatchrunError              exit code  state
    ├── UsageError                 2      error    options, settings or inputs that cannot work
    │   ├── NoKey                  2      error    the endpoint wants a key and none was found
    │   └── SettingsDiffer         2      error    answers made with other settings are at stake
    ├── EndpointRefused            4      refused  key, quota, model, URL, TLS: a person must act
    ├── Locked                    11      error    another run holds this output
    ├── LocalIOError              74      error    disk, file or journal
    │   └── JournalDamaged        74      error    a record that should be whole is not
    ├── StoppedEarly              75      stopped  progress is saved; run the same command again
    └── Interrupted      129/130/143      stopped  SIGHUP, SIGINT, SIGTERM

What ends without one is ``finished``: 0, or 3 for more failed rows than are allowed; 1 is a bug.

The first line of ``str(error)`` says what, where and what to do; further lines are indented advice.
No message ever holds a key: endpoints' texts pass ``secret.Scrubber`` first.
"""

from __future__ import annotations

import signal
from typing import Literal

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_ROWS_FAILED = 3
EXIT_REFUSED = 4
EXIT_LOCKED = 11
EXIT_IO = 74
EXIT_STOPPED = 75
State = Literal["finished", "stopped", "refused", "error"]


class BatchrunError(Exception):
    """A run that cannot go on. ``next_steps`` are lines for the user, most useful first."""

    exit_code = EXIT_BUG
    state: State = "error"

    def __init__(self, message: str, *, next_steps: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.next_steps = next_steps

    def __str__(self) -> str:
        return self.message


class UsageError(BatchrunError):
    exit_code = EXIT_USAGE


class NoKey(UsageError):
    """No key for this endpoint; said only when nothing is wrong with the input."""


class SettingsDiffer(UsageError):
    """Request settings differ from those the held answers were made with."""


class EndpointRefused(BatchrunError):
    exit_code = EXIT_REFUSED
    state = "refused"


class Locked(BatchrunError):
    exit_code = EXIT_LOCKED


class LocalIOError(BatchrunError):
    exit_code = EXIT_IO


class JournalDamaged(LocalIOError):
    """A journal record before the last durable one is broken; ``offset`` is its byte position."""

    def __init__(self, message: str, *, offset: int, next_steps: tuple[str, ...] = ()) -> None:
        super().__init__(message, next_steps=next_steps)
        self.offset = offset


class StoppedEarly(BatchrunError):
    exit_code = EXIT_STOPPED
    state = "stopped"


class Interrupted(BatchrunError):
    """A signal asked the run to stop; ``exit_code`` is 128 + its number."""

    state = "stopped"

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum

    def at_once(self) -> None:
        """Note that a second signal did not let the answers in flight arrive."""
        self.message = f"stopped at once by {signal.Signals(self.signum).name}"
