"""Run one process and say what it cost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from upstream import pinned

# ru_maxrss is in bytes on macOS, in KB elsewhere. A child begins with the peak of the process that
# starts it, so this suite itself must stay smaller than the smallest client.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Spent:
    """One process from start to end; instants are Unix seconds."""

    started: float
    ended: float
    cpu_s: float  # user and system, of all its threads and children
    peak_mb: float
    exit_code: int  # negative: the signal that ended it
    said: str  # the last line on stderr

    @property
    def problem(self) -> str:
        """What went wrong, or an empty text."""
        return "" if self.exit_code == 0 else f"exit {self.exit_code}: {self.said[:160]}"


def run(
    command: Sequence[str],
    *,
    environ: dict[str, str],
    cpu: int | None,
    timeout_s: float,
    meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Spent:
    """Run ``command`` on ``cpu`` to its end; killed after ``timeout_s``."""
    with tempfile.TemporaryFile("w+b") as stderr:
        started = time.time()
        with pinned(cpu):
            process = subprocess.Popen(
                command, env=environ, stdout=subprocess.DEVNULL, stderr=stderr
            )
        guard = threading.Timer(timeout_s, process.kill)
        guard.start()
        try:
            if meanwhile is not None:
                meanwhile(process)
            # wait4 and not wait: it is the only one that says what this child alone has used.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            guard.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        ended = time.time()
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").strip().splitlines()
    return Spent(
        started=started,
        ended=ended,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_mb=usage.ru_maxrss * _RSS_UNIT / 2**20,
        exit_code=process.returncode,
        said=lines[-1] if lines else "",
    )
