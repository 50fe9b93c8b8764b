"""``--metrics-file``: the numbers of a run where a collector finds them, rewritten whole."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from batchrun.addresses import is_address
from batchrun.config import RunConfig
from batchrun.console import METRICS_FIRST_LINE, Snapshot, metrics_text
from batchrun.errors import UsageError
from batchrun.files import open_regular, reporting, write_whole
from batchrun.summary import RunSummary, ThisRun

EVERY_S = 5.0


class MetricsFile:
    """Best effort once it is begun: a run does not fail for it. Any thread, one at a time."""

    def __init__(self, path: Path, labels: dict[str, str]) -> None:
        self._path = path
        self._labels = labels
        self._started_s = time.time()
        self._next_s = 0.0

    @classmethod
    def of(cls, config: RunConfig) -> MetricsFile | None:
        """UsageError for a file in its place that another program wrote."""
        if config.metrics_file is None:
            return None
        if is_address(config.metrics_file):
            raise UsageError(f"--metrics-file {config.metrics_file}: a local file is written")
        path = Path(config.metrics_file)
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--metrics-file {path}: there is no directory {path.parent}")
        if os.path.lexists(path) and not _is_ours(path):
            raise UsageError(f"--metrics-file {path}: exists and was not written by batchrun")
        model = config.model or config.endpoint.default_model or ""
        return cls(
            path, {"output": config.output, "endpoint": config.endpoint.host, "model": model}
        )

    def end(self, summary: RunSummary) -> None:
        """Write how the run ended, with the last numbers."""
        rows, run = summary.rows, summary.this_run or ThisRun()
        last = Snapshot(
            total=rows.total or 0,
            done=rows.ok + rows.error,
            ok=rows.ok,
            failed=rows.error,
            attempts=run.attempts,
            retries=run.retries,
            rate_limited=run.rate_limited,
            in_doubt=run.in_doubt,
            spent=run.tokens,
        )
        self.write(last, summary.exit_code)

    def write(self, snapshot: Snapshot, exit_code: int | None = None) -> None:
        """At most every few seconds, and at the end."""
        now_s = time.monotonic()
        if exit_code is None and now_s < self._next_s:
            return
        self._next_s = now_s + EVERY_S
        text = metrics_text(snapshot, self._labels, self._started_s, exit_code)
        # No collector takes a file of this name.
        temporary = self._path.with_name(f".{self._path.name}.new")
        with suppress(OSError):
            write_whole(self._path, temporary, text)
            self._path.chmod(0o644)  # collectors run as somebody else


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with reporting(path, "read"), open(open_regular(path, os.O_RDONLY), "rb") as file:
        return file.read(len(METRICS_FIRST_LINE)) == METRICS_FIRST_LINE
