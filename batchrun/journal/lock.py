"""Who holds an output's state now, and how that run stands: the lock and the status file.

The lock is ``flock`` on a file in the state directory, so the kernel lets go when its holder dies;
the status is what the holder says of itself, for others to show, and nobody decides anything by it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from batchrun.config import STATE_SUFFIX, IfLocked
from batchrun.errors import Locked
from batchrun.files import open_regular, reporting
from batchrun.journal.state import StateDir

_ATTEMPTS = 200
_PAUSE_S = 0.01


class Holder(msgspec.Struct, frozen=True):
    """The process that writes an output now."""

    pid: int
    host: str
    since_ms: int


class Lock:
    """An output's state directory, held by this process until ``release`` or its death."""

    def __init__(self, state: StateDir, fd: int) -> None:
        self.state = state
        self._fd = fd
        me = Holder(os.getpid(), socket.gethostname(), time.time_ns() // 1_000_000)
        with reporting(self.state.lock, "write"):
            # Over the old text first, so that nobody ever reads an empty file.
            text = msgspec.json.encode(me) + b"\n"
            os.pwrite(fd, text, 0)
            os.ftruncate(fd, len(text))

    def remove_state(self) -> None:
        """Delete what is ours in the state directory and let go of it; nothing in it may be
        touched afterwards.
        """
        self.state.remove()
        self.release()

    def release(self) -> None:
        if self._fd >= 0:
            # A name left behind would be blamed for the next one's lock.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            fd, self._fd = self._fd, -1
            # The descriptor is gone whatever close says, and nothing of ours hangs on it.
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def locked(
    state: StateDir,
    if_locked: IfLocked = "fail",
    *,
    poll_s: float = 1.0,
    cancelled: threading.Event | None = None,
) -> Iterator[Lock]:
    """Hold an output's state directory, made if need be; the kernel lets go when we die.

    With ``wait``, looks again every ``poll_s`` until it is free or ``cancelled`` is set. Raises
    Locked when another process has it; what ``skip`` means is the caller's to say.
    """
    wake = cancelled or threading.Event()
    with reporting(state.path, "lock"):
        while (fd := _try_lock(state)) is None:
            if if_locked != "wait" or wake.wait(poll_s):
                raise _locked(state)
    held = Lock(state, fd)
    try:
        yield held
    finally:
        held.release()


def holder(state: StateDir) -> Holder | None:
    """Who holds this state directory now; None when nobody does. Disturbs no one."""
    with reporting(state.path, "read"):
        try:
            fd = open_regular(state.lock, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return None if _flock(fd, fcntl.LOCK_SH) else _holder_named_in(fd)
        finally:
            os.close(fd)


def _try_lock(state: StateDir) -> int | None:
    """The lock file, open and locked; None when another run holds it."""
    made = False
    for _ in range(_ATTEMPTS):
        made = state.make() or made
        try:
            fd = open_regular(state.lock, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # its holder finished and removed the directory just now
        if _flock(fd, fcntl.LOCK_EX):
            if _is_still(fd, state.lock):
                try:
                    state.mark(made=made)
                except BaseException:
                    os.close(fd)
                    raise
                return fd
        elif not _flock(fd, fcntl.LOCK_SH):
            os.close(fd)
            return None
        # The file was replaced, or only readers were looking at it: not taken, so try again.
        os.close(fd)
        time.sleep(_PAUSE_S * random.random())
    return None


def _flock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder_named_in(fd: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except (msgspec.MsgspecError, RecursionError):
        return None


def _locked(state: StateDir) -> Locked:
    name = state.path.name.removesuffix(STATE_SUFFIX)
    # Between taking the lock and writing its name a holder is nameless, or has its dead
    # predecessor's name.
    found = holder(state)
    for _ in range(_ATTEMPTS):
        if found is not None and _may_be_alive(found):
            break
        time.sleep(_PAUSE_S)
        found = holder(state)
    if found is None:
        return Locked(f"{name} was in use by another run just now; run the same command again")
    since = time.localtime(found.since_ms / 1000)
    today = time.localtime()[:3] == since[:3]
    when = time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", since)
    return Locked(f"{name} is in use by pid {found.pid} on {found.host} since {when}")


def _may_be_alive(found: Holder) -> bool:
    if found.host != socket.gethostname():
        return True
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
