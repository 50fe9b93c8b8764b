"""What takes minutes: does memory grow, what stalls the loop, how fast does a big run resume?"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from arena import Arena
from contenders import CONTENDERS, Contender, Job, batchrun
from measure import Spent
from table import markdown
from upstream import Endpoint

BATCHRUN = CONTENDERS["batchrun"]
IN_FLIGHT = 256
# Left unanswered by an interrupted run, so that the next one has something to send.
REST = 20_000


def memory(arena: Arena, scale: float) -> Iterator[str]:
    """Peak memory of a small and a ten times larger run, and the bytes a row more costs."""
    sizes = [round(rows * scale) for rows in (200_000, 2_000_000)]
    runs = [arena.run(BATCHRUN, Endpoint(), in_flight=IN_FLIGHT, rows=rows) for rows in sizes]
    yield markdown(
        ("rows", "peak MB", "CPU s"),
        [
            (f"{rows:,}", f"{run.peak_mb:,.0f}", f"{run.cpu_s:,.0f}")
            for rows, run in zip(sizes, runs, strict=True)
        ],
    )
    more = (runs[1].peak_mb - runs[0].peak_mb) * 2**20 / (sizes[1] - sizes[0])
    yield f"{more:.0f} bytes more for each further row"
    for run in runs:
        _check(run)


def stalls(arena: Arena, scale: float) -> Iterator[str]:
    """What the event loop and other threads had to wait for while a run was sent and published."""
    run = arena.run(
        CONTENDERS["batchrun-watched"], Endpoint(), in_flight=IN_FLIGHT, rows=round(200_000 * scale)
    )
    _check(run)
    callback_ms, wait_ms = run.said.split()
    yield markdown(
        ("longest callback, ms of CPU", "longest wait for the interpreter, ms"),
        [(callback_ms, wait_ms)],
    )


def resume(arena: Arena, scale: float) -> Iterator[str]:
    """Kill a run that holds a million answers; continue it as it is, and after an orderly stop."""
    rows = round(1_000_000 * scale)
    prompts = arena.prompts(rows + REST)
    with arena.scratch("resume") as scratch:
        killed = Job(prompts, arena.up.base_url, IN_FLIGHT, scratch / "killed.parquet")
        _interrupted(arena, killed, rows, signal.SIGKILL, -signal.SIGKILL)
        table = [_continued(arena, killed, scratch / "0.parquet", "killed", BATCHRUN)]
        stopped = replace(killed, output=scratch / "stopped.parquet")
        shutil.copytree(f"{killed.output}.batchrun", f"{stopped.output}.batchrun")
        _interrupted(arena, stopped, REST // 10, signal.SIGTERM, 128 + signal.SIGTERM)
        for n, (name, contender) in enumerate(_WAYS, 1):
            table.append(_continued(arena, stopped, scratch / f"{n}.parquet", name, contender))
        yield markdown(
            ("interrupted run", "first request after s", "published rows/s", "peak MB"), table
        )


_WAYS = (
    ("stopped", BATCHRUN),
    (
        "stopped, without response_body",
        Contender("batchrun-lean", batchrun("-c", "{in_flight}", "--no-response-body")),
    ),
)


def _interrupted(arena: Arena, job: Job, answered: int, by: signal.Signals, expected: int) -> None:
    """Run the job until the endpoint gave that many answers, and then end it ``by`` a signal."""

    def watch(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            if arena.up.books().answered >= answered:
                process.send_signal(by)
                return
            time.sleep(0.05)

    run = arena.run_job(BATCHRUN, job, Endpoint(), watch)
    if run.exit_code != expected:
        raise SystemExit(f"the run was not interrupted: {run.problem or 'it finished'}")


def _continued(
    arena: Arena, held: Job, output: Path, name: str, contender: Contender
) -> tuple[str, ...]:
    """A row of the table: a copy of the interrupted run, run to its end."""
    shutil.copytree(f"{held.output}.batchrun", f"{output}.batchrun")
    run = arena.run_job(contender, replace(held, output=output), Endpoint())
    _check(run)
    books = arena.up.books()
    with open(held.prompts, "rb") as lines:
        total = sum(1 for _ in lines)
    return (
        f"{name}, {total - books.requests:,} answers held",
        f"{books.first - run.started:.1f}",
        f"{total / (run.ended - books.last):,.0f}",
        f"{run.peak_mb:,.0f}",
    )


def _check(run: Spent) -> None:
    if run.problem:
        raise SystemExit(run.problem)


PROFILES: dict[str, Callable[[Arena, float], Iterator[str]]] = {
    "memory": memory,
    "stalls": stalls,
    "resume": resume,
}
