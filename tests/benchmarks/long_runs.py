"""Two questions that take minutes: does memory grow, and how fast does a big run resume?"""

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


def resume(arena: Arena, scale: float) -> Iterator[str]:
    """Interrupt a run that holds a million answers, continue it, and publish it in two ways."""
    rows = round(1_000_000 * scale)
    prompts = arena.prompts(rows + REST)
    with arena.scratch("resume") as scratch:
        held = scratch / "held.parquet"
        job = Job(prompts, arena.up.base_url, IN_FLIGHT, held)
        stopped = arena.run_job(BATCHRUN, job, Endpoint(), _stop_after(arena, rows))
        if stopped.exit_code != 128 + signal.SIGTERM:
            raise SystemExit(f"the run was not stopped: {stopped.problem or 'it finished'}")
        yield markdown(
            ("output", "first request after s", "published rows/s", "peak MB"),
            [
                _continued(arena, replace(job, output=scratch / f"{n}.parquet"), held, *way)
                for n, way in enumerate(_WAYS)
            ],
        )


_WAYS = (
    ("with response_body", BATCHRUN),
    (
        "without response_body",
        Contender("batchrun-lean", batchrun("-c", "{in_flight}", "--no-response-body")),
    ),
)


def _stop_after(arena: Arena, answered: int) -> Callable[[subprocess.Popen[bytes]], None]:
    def watch(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            if arena.up.books().answered >= answered:
                process.terminate()
                return
            time.sleep(0.05)

    return watch


def _continued(
    arena: Arena, job: Job, held: Path, name: str, contender: Contender
) -> tuple[str, ...]:
    shutil.copytree(f"{held}.batchrun", f"{job.output}.batchrun")
    run = arena.run_job(contender, job, Endpoint())
    _check(run)
    books = arena.up.books()
    with open(job.prompts, "rb") as lines:
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


PROFILES: dict[str, Callable[[Arena, float], Iterator[str]]] = {"memory": memory, "resume": resume}
