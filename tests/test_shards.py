"""Which part of a run a task has."""

from __future__ import annotations

import pytest

from batchrun.errors import UsageError
from batchrun.shards import Shard


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
@pytest.mark.parametrize("of", [1, 3, 16])
def test_parts_are_the_rows_each_once_and_nearly_even(total: int, of: int) -> None:
    parts = [Shard(number, of).rows(total) for number in range(1, of + 1)]
    assert [row for part in parts for row in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("text", "environ", "shard"),
    [
        ("2/4", {}, (2, 4)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            (3, 4),
        ),
        ("auto", {"CLOUD_RUN_TASK_INDEX": "0", "CLOUD_RUN_TASK_COUNT": "8"}, (1, 8)),
        ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "7", "AWS_BATCH_JOB_ARRAY_SIZE": "8"}, (8, 8)),
        ("auto/5", {"JOB_COMPLETION_INDEX": "4"}, (5, 5)),
    ],
)
def test_a_task_finds_its_part(text: str, environ: dict[str, str], shard: tuple[int, int]) -> None:
    assert Shard.parse(text, environ) == shard


@pytest.mark.parametrize(
    ("text", "environ", "said"),
    [
        ("0/4", {}, "1 <= I <= N"),
        ("5/4", {}, "1 <= I <= N"),
        ("2", {}, "1 <= I <= N"),
        ("a/b", {}, "1 <= I <= N"),
        ("9" * 5_000, {}, "1 <= I <= N"),
        ("1/" + "9" * 5_000, {}, "1 <= I <= N"),
        ("auto", {}, "no job array here"),
        ("auto", {"JOB_COMPLETION_INDEX": "4"}, "nothing says how many"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "4"}, "1 <= I <= N"),
        ("auto/4", {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "x"}, "1 <= I <= N"),
    ],
)
def test_what_is_no_part_is_said(text: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Shard.parse(text, environ)
