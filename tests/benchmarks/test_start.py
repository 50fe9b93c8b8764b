"""What a start costs: CPU side by side in one run, against gross regressions only."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROUNDS = 5


def cpu_s(command: Sequence[str], cwd: Path) -> float:
    """User and system time of one process, with compiled modules as an installed package has."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(cwd / "pyc")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environ, capture_output=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ratio(command: Sequence[str], reference: Sequence[str], cwd: Path) -> float:
    """How often ``command`` needs the CPU of ``reference``; the least of interleaved rounds."""
    for warm_up in (command, reference):
        cpu_s(warm_up, cwd)
    own, other = [], []
    for _ in range(ROUNDS):
        own.append(cpu_s(command, cwd))
        other.append(cpu_s(reference, cwd))
    return min(own) / min(other)


@pytest.mark.slow
def test_help_costs_little_more_than_its_library(tmp_path: Path) -> None:
    for command in ([], ["submit"]):
        help_ = ["-m", "batchrun", *command, "--help"]
        # Measured: 1.9 to 2.3.
        assert ratio(help_, ["-c", "import click"], tmp_path) < 3.0


@pytest.mark.slow
def test_one_mock_row_costs_little_more_than_its_libraries(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": "x"}\n')
    row = ["-m", "batchrun", "submit", "one.jsonl", "--mock", "-o", "-"]
    libraries = ["-c", "import aiohttp.web, click, msgspec, pyarrow.parquet, tenacity"]
    # Measured: 1.4; with the import of pandas 2.2.
    assert ratio(row, libraries, tmp_path) < 2.0
