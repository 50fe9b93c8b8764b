"""Where the state of an output is, and holding it against every other run of that output."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from batchrun import outputs, process
from batchrun.config import STATE_SUFFIX, IfLocked, RunConfig
from batchrun.console import Progress
from batchrun.errors import LocalIOError, Locked, UsageError
from batchrun.journal import Lock, StateDir, locate, locked, read_saved
from batchrun.money import Price
from batchrun.runs.stop import Stop


def state_of(output: str, state_dir: Path | None) -> StateDir:
    """Where the state of this output is, or would be. UsageError where none can be kept safely."""
    return locate(state_dir or Path(output + STATE_SUFFIX), output)


@contextmanager
def _state_of_run(config: RunConfig) -> Iterator[StateDir]:
    if config.state_dir is not None or not config.to_stdout:
        yield state_of(config.output, config.state_dir)
    else:
        # Nothing can continue what went to stdout, unless --state says where to remember it.
        with tempfile.TemporaryDirectory(prefix="batchrun-") as directory:
            yield StateDir(Path(directory) / "state")


async def hold(config: RunConfig, stop: Stop, talk: Progress, stack: ExitStack) -> Lock:
    """Hold output and state until ``stack`` ends; with ``--if-locked wait``, say for whom we wait.

    A state elsewhere is no way around another run of the same output: its usual place is held too.
    Locked when another run has either; the cause of ``stop`` where that ended the waiting.
    """
    state = stack.enter_context(_state_of_run(config))

    def take(if_locked: IfLocked = "fail") -> Lock:
        with ExitStack() as holding:
            if not config.to_stdout:
                usual = state_of(os.path.realpath(config.output), None)
                if not _is_same(usual, state):
                    holding.enter_context(_reserved(usual, if_locked, stop))
            held = holding.enter_context(locked(state, if_locked, cancelled=stop.requested))
            stack.push(holding.pop_all())
            return held

    try:
        try:
            return await asyncio.to_thread(take)
        except Locked as exc:
            if config.if_locked != "wait":
                raise
            talk.note(exc.message, label="waiting")
        return await asyncio.to_thread(take, "wait")
    except Locked:
        stop.check()
        raise


def _is_same(one: StateDir, other: StateDir) -> bool:
    return os.path.realpath(one.path) == os.path.realpath(other.path)


@contextmanager
def _reserved(usual: StateDir, if_locked: IfLocked, stop: Stop) -> Iterator[None]:
    with locked(usual, if_locked, cancelled=stop.requested) as held:
        try:
            yield
        finally:
            if not usual.has_journal():
                held.remove_state()


def check_output(config: RunConfig) -> None:
    """Say at once what would make publishing fail at the end."""
    if config.to_stdout:
        process.stdout()
        return
    path = Path(config.output)
    if path.is_dir():
        raise UsageError(f"-o {path}: that is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"-o {path}: that is not a regular file; -o - writes to standard output")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"-o {path}: there is no directory {parent}")
    try:
        # Only trying tells: root may write anywhere, and not in a read-only file system.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as exc:
        raise LocalIOError(f"{path}: cannot write in {parent}: {exc.strerror}") from exc


def remembered_price(config: RunConfig, state: StateDir) -> Price | None:
    """The price that an unfinished run, or else the output, was given."""
    if (saved := read_saved(state)) is not None and saved.price is not None:
        return saved.price
    if config.to_stdout or not os.path.exists(config.output):
        return None
    footer = outputs.recognise(Path(config.output))
    return None if footer is None else Price.remembered(footer.publishing)
