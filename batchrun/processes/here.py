"""Processes of this machine, each at the other end of a socket pair."""

from __future__ import annotations

import asyncio
import pickle
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Final

from batchrun.processes.member import Member, Vacate
from batchrun.processes.wire import Frames, Orders, Terms, encode, reports_decoder

LEAVE_S: Final = 2.0
END_S: Final = 0.2
LOOK_S: Final = 0.01

_START: Final = """\
import sys
fd, *sys.path[:] = sys.argv[1:]
from batchrun.processes.{room} import main
main(int(fd))
"""


class Here:
    """Starts processes beside this one."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms

    async def start(self, vacate: Vacate) -> Member:
        ours, process = started("child")
        child = _Child(vacate, process)
        line = _Line(child)
        child.line = line
        await asyncio.get_running_loop().create_connection(lambda: line, sock=ours)
        line.say(pickle.dumps(self._terms))
        return child


def started(room: str, *, quiet: bool = False) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A process in the ``main`` of one of our rooms; OSError where there is none to be had.

    And our end of the socket through which it learns all, the key among it.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return ours, subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    _START.format(room=room),
                    str(theirs.fileno()),
                    *sys.path,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if quiet else None,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # a Ctrl-C is for the run's process
            )
        except BaseException:
            ours.close()
            raise


class _Child(Member):
    def __init__(self, vacate: Vacate, process: subprocess.Popen[bytes]) -> None:
        super().__init__(vacate)
        self.line: _Line | None = None
        self._process = process

    def tell(self, orders: Orders) -> None:
        assert self.line is not None
        self.line.say(encode(orders))

    def lost(self) -> None:
        """Its end of the socket is closed."""
        if self._is_leaving:
            self.gone("")
            return
        with suppress(subprocess.TimeoutExpired):  # it may hang in its last words
            self._process.wait(END_S)
        self._process.kill()
        self.gone(ending(self._process.wait()))

    def kill(self) -> None:
        self._process.kill()

    async def leave(self) -> None:
        self._is_leaving = True
        assert self.line is not None
        self.line.close_line()
        await ended(self._process, LEAVE_S)


class _Line(Frames):
    def __init__(self, child: _Child) -> None:
        super().__init__()
        self._child = child

    def heard(self, frame: memoryview) -> None:
        self._child.came(reports_decoder.decode(frame))

    def lost(self) -> None:
        self._child.lost()


async def ended(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Wait for its end; it is killed after ``patience_s``."""
    for _ in range(int(patience_s / LOOK_S)):
        if process.poll() is not None:
            return
        await asyncio.sleep(LOOK_S)
    process.kill()
    process.wait()


def ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
