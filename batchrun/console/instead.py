"""One line instead of a run: what is wrong, where, and what to do."""

from __future__ import annotations

import re
import signal
import textwrap
from collections.abc import Sequence

from batchrun import errors
from batchrun.config import RunConfig
from batchrun.summary import RunSummary
from batchrun.terminal import WIDTH


def error_text(error: BaseException) -> str:
    """``batchrun: what, where, what to do``, then the choices, indented."""
    message = error.message if isinstance(error, errors.BatchrunError) else str(error)
    # Our own lines go on indented; a name with a break in it must not pass for one of them.
    message = re.sub(r"\n(?! )", r"\\n", message or type(error).__name__)
    head, *rest = message.split("\n")
    lines = textwrap.wrap(
        f"batchrun: {head}",
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines += rest
    if isinstance(error, errors.BatchrunError):
        lines += [f"  {step}" for step in error.next_steps]
    return "\n".join(lines)


def error_summary(error: BaseException, version: str, inputs: Sequence[str]) -> RunSummary:
    """What ``--json`` prints for a command that ended in an exception."""
    if isinstance(error, KeyboardInterrupt):
        error = errors.Interrupted(signal.SIGINT)
        error.message = "interrupted before the run began"
    elif not isinstance(error, errors.BatchrunError):
        error = errors.BatchrunError("a bug in batchrun; see stderr")
    return RunSummary(
        batchrun_version=version,
        state=error.state,
        exit_code=error.exit_code,
        reason=error.message,
        inputs=list(inputs),
        next_steps=list(error.next_steps),
    )


def skipped_summary(locked: errors.Locked, version: str, config: RunConfig) -> RunSummary:
    """What ``--if-locked skip`` amounts to: nothing was done, and that is as wished."""
    return RunSummary(
        batchrun_version=version,
        state="stopped",
        exit_code=errors.EXIT_OK,
        reason=f"skipped: {locked.message}",
        inputs=list(config.inputs),
        output=config.output,
        synthetic=config.mock,
    )
