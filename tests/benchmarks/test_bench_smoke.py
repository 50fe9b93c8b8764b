"""The benchmark suite itself works: all of it runs, with next to no rows. No figure is judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent / "bench.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), "--pairs", "1", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def table(printed: str) -> dict[str, list[str]]:
    """The cells of each client's line."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {name: figures for name, *figures in cells}


# Without the option it takes nginx where nginx is, and says so where it is not.
@pytest.mark.parametrize("options", [("--stand-in",), ()], ids=["mock-server", "best-upstream"])
@pytest.mark.slow
def test_the_smallest_profile_compares_batchrun_with_the_bare_loops(
    options: tuple[str, ...],
) -> None:
    done = bench("--profile", "instant-64", "--scale", "0.02", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = table(done.stdout)
    assert set(figures) == {"batchrun", "naive", "tuned"}
    assert {answered for *_, answered in figures.values()} == {"100.0"}
    assert "batchrun / naive, median of 1 pairs" in done.stdout
    assert ("NOT nginx" in done.stdout) >= bool(options), "the stand-in is marked as such"


def test_a_client_that_loses_rows_is_shown_to() -> None:
    done = bench("--profile", "refused-10", "--scale", "0.0025", "--only", "naive", "--stand-in")
    assert "naive: 9 of 100 rows not answered" in done.stdout, done.stdout + done.stderr
