"""The recipes for engines, run where the engine is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

if TYPE_CHECKING:
    from conftest import StartMock

ROWS = 300
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "recipe"),
    [
        ("dask.dataframe", "dask_answers.py"),
        ("pyspark", "spark_answers.py"),
        ("ray.data", "ray_data_answers.py"),
    ],
)
def test_a_recipe_sends_every_row_once(
    mock: StartMock, tmp_path: Path, engine: str, recipe: str
) -> None:
    if importlib.util.find_spec(engine.partition(".")[0]) is None:
        pytest.skip(f"{engine} is not installed")
    server = mock()
    numbers = range(ROWS)
    rows = pa.table({"n": numbers, "prompt": [f"Question {n}?" for n in numbers]})
    pq.write_table(rows, tmp_path / "in.parquet", row_group_size=100)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "BASE_URL": server.url, "MODEL": "m"}
    script = resources.files("batchrun") / "manual" / "recipes" / recipe
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "in.parquet"), str(tmp_path / "out")],
        env={**environ, "PYSPARK_PYTHON": sys.executable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    made = ds.dataset(tmp_path / "out", format="parquet").to_table(["n", "response", "status"])
    assert sorted(made.to_pylist(), key=lambda row: row["n"]) == [
        {"n": n, "response": f"[synthetic] Question {n}?", "status": "ok"} for n in numbers
    ]
    # No row to learn a type, none twice.
    assert server.ledger.requests == ROWS
