"""What a command says: bytes on stdout that have arrived, words on stderr that may be lost."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

import click

from batchrun import terminal
from batchrun.errors import LocalIOError
from batchrun.terminal import FAREWELL_S


class NoStdout(LocalIOError):
    """Standard output takes nothing."""


def print_bytes(text: bytes) -> None:
    """Print UTF-8 on stdout, whatever the locale, and know that it has arrived."""
    if sys.stdout is None:
        raise NoStdout("standard output is closed: nothing can be printed there")
    try:
        click.echo(text, nl=False)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        forget_stdout()
        raise NoStdout(f"standard output cannot be written: {exc.strerror}") from exc


def forget_stdout() -> None:
    # The interpreter flushes once more at its end, and would complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print on stderr; one that takes nothing (a full disk, a paused reader) changes no exit code.

    A write cannot be given up, so it has a thread that can: whoever waits for a run to end does
    not wait for whoever reads what it says.
    """

    def echo() -> None:
        with contextlib.suppress(OSError, ValueError):
            click.echo(terminal.lines(text), err=True)

    speaking = threading.Thread(target=echo, daemon=True)
    try:
        speaking.start()
    except RuntimeError:  # no memory for a thread; what is said may be just that
        echo()
    else:
        speaking.join(FAREWELL_S)
