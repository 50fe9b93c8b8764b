"""What ended a command, as words on stderr and an exit code."""

from __future__ import annotations

import os
import traceback

import click

from batchrun.cli.streams import say
from batchrun.errors import EXIT_BUG, EXIT_USAGE, BatchrunError, LocalIOError

EXIT_INTERRUPTED = 130


class Bug(Exception):
    """An exception nobody expected; its text is the traceback without secrets."""


def of_the_machine(exc: BaseException) -> LocalIOError | None:
    """What the machine did not give, wherever in a run it was asked for it; None for a bug."""
    if isinstance(exc, BaseExceptionGroup):
        return next(filter(None, map(of_the_machine, exc.exceptions)), None)
    if isinstance(exc, MemoryError) or "can't start new thread" in str(exc):
        return LocalIOError(
            "not enough memory, or a limit on it (ulimit -v, a container's); answers are saved:"
            " give it more, or use fewer -c, and run the same command again"
        )
    if isinstance(exc, OSError):
        where = f"{os.fsdecode(exc.filename)}: " if isinstance(exc.filename, (str, bytes)) else ""
        return LocalIOError(f"{where}{exc.strerror or exc}")
    return None


def say_why(exc: BaseException) -> int:
    """Say what ``exc`` means for whoever typed the command; its exit code."""
    if isinstance(exc, click.exceptions.NoArgsIsHelpError):
        say(exc.format_message())
        return EXIT_USAGE
    if isinstance(exc, click.ClickException):
        say(f"batchrun: {exc.format_message()}")
        context = exc.ctx if isinstance(exc, click.UsageError) else None
        say(f"  see: {context.command_path if context else 'batchrun'} --help")
        return EXIT_USAGE
    if isinstance(exc, KeyboardInterrupt | click.Abort):
        say("batchrun: interrupted")
        return EXIT_INTERRUPTED
    if isinstance(exc, Bug):
        return _say_bug(str(exc))
    error = exc if isinstance(exc, BatchrunError) else of_the_machine(exc)
    if error is None:
        return _say_bug("".join(traceback.format_exception(exc)))
    from batchrun.console import error_text

    say(error_text(error))
    return error.exit_code


def _say_bug(text: str) -> int:
    say(text.rstrip())
    say(
        "batchrun: this is a bug in batchrun; answers received so far are in the journal.\n"
        "  Please report it with the lines above, after a look that nothing private is in them."
    )
    return EXIT_BUG
