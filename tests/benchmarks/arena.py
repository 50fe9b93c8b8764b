"""Where contenders run: an upstream, a core, and a directory on disk."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import measure
from contenders import Contender, Job, environ
from upstream import Endpoint, Upstream

TIMEOUT_S = 1800
SUBJECT = "Describe in three sentences what a harbour town looks like at dawn, seen from"


class Arena:
    def __init__(self, up: Upstream, cpu: int | None, directory: Path) -> None:
        self.up = up
        self._cpu = cpu
        self._directory = directory
        self._start_up_s: dict[str, float] = {}

    def prompts(self, rows: int) -> Path:
        """A file of that many prompts, no two alike; made once."""
        path = self._directory / f"prompts-{rows}.jsonl"
        if not path.exists():
            with open(path, "w") as file:
                for n in range(rows):
                    row = {"id": f"row-{n}", "prompt": f"{SUBJECT} hill number {n}."}
                    file.write(json.dumps(row) + "\n")
        return path

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty directory that is gone afterwards."""
        path = self._directory / name
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def run(
        self, contender: Contender, endpoint: Endpoint, *, in_flight: int, rows: int
    ) -> measure.Spent:
        """One run from nothing; the upstream's books are then those of this run."""
        with self.scratch(contender.name) as scratch:
            job = Job(self.prompts(rows), self.up.base_url, in_flight, scratch / "answers.parquet")
            return self.run_job(contender, job, endpoint)

    def run_job(
        self,
        contender: Contender,
        job: Job,
        endpoint: Endpoint,
        meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> measure.Spent:
        self.up.reset(endpoint)
        return measure.run(
            contender.command(job),
            environ=environ(),
            cpu=self._cpu,
            timeout_s=TIMEOUT_S,
            meanwhile=meanwhile,
        )

    def start_up_s(self, contender: Contender) -> float:
        """CPU seconds of a run of one row: imports, reading, publishing, leaving."""
        if contender.name not in self._start_up_s:
            runs = [self.run(contender, Endpoint(), in_flight=1, rows=1) for _ in range(3)]
            self._start_up_s[contender.name] = statistics.median(r.cpu_s for r in runs)
        return self._start_up_s[contender.name]
