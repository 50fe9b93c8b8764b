"""One part of a run by hand: which rows it has, where its answers go, and its share of a rate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from batchrun.errors import UsageError

AUTO: Final = "auto"
_MOST_DIGITS: Final = 9
_SHOWN: Final = 40
_NAME: Final = re.compile(
    r"(?P<stem>.+)\.shard-(?P<number>[1-9][0-9]*)-of-(?P<of>[1-9][0-9]*)\.parquet", re.DOTALL
)
# Which variables tell a task its index, the first index, the step and how many tasks there are.
_ARRAYS: Final = (
    tuple(f"SLURM_ARRAY_TASK_{word}" for word in ("ID", "MIN", "STEP", "COUNT")),
    ("CLOUD_RUN_TASK_INDEX", "", "", "CLOUD_RUN_TASK_COUNT"),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "", "", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("JOB_COMPLETION_INDEX", "", "", ""),  # Kubernetes
)


class Shard(NamedTuple):
    """Part ``number`` (from 1) ``of`` so many: a contiguous range of the input's rows."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str]) -> Shard:
        """``2/4``; ``auto`` and ``auto/4`` take the number from the job array's variables."""
        number, _, of = text.partition("/")
        if number == AUTO:
            return _of_array(text, of, environ)
        return cls(_count(text, number), _count(text, of)).checked(text)

    def checked(self, said: str | None = None) -> Shard:
        """This one; UsageError when there is no such part."""
        if 1 <= self.number <= self.of:
            return self
        raise _no_part(said or str(self))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def rows(self, total: int) -> range:
        """The rows of this part, 0-based."""
        return range(total * (self.number - 1) // self.of, total * self.number // self.of)

    def output(self, output: str) -> str:
        """Where the answers of this part go: ``answers.shard-2-of-4.parquet``."""
        if not output.endswith(".parquet"):
            raise UsageError(
                f"--shard {self}: parts are Parquet files",
                next_steps=("-o answers.parquet    what `batchrun merge` makes of them",),
            )
        return f"{output.removesuffix('.parquet')}.shard-{self.number}-of-{self.of}.parquet"


def _count(said: str, text: str) -> int:
    if text.isdecimal() and len(text) <= _MOST_DIGITS:
        return int(text)
    raise _no_part(said)


def _no_part(said: str) -> UsageError:
    return UsageError(f"--shard {said[:_SHOWN]}: I/N with 1 <= I <= N, such as 2/4, or auto")


def parts_of(output: Path) -> dict[Shard, Path]:
    """The parts beside an output, also of other divisions."""
    found = {}
    for path in sorted(output.parent.glob("*.parquet")):
        if (match := _NAME.fullmatch(path.name)) and match["stem"] == output.stem:
            found[Shard(int(match["number"]), int(match["of"]))] = path
    return found


def whole_of(part: Path) -> Path:
    """The output that a part is one of."""
    match = _NAME.fullmatch(part.name)
    assert match is not None
    return part.with_name(f"{match['stem']}.parquet")


def _of_array(text: str, of: str, environ: Mapping[str, str]) -> Shard:
    for index, least, step, tasks in _ARRAYS:
        if not (at := environ.get(index, "")).isdecimal():
            continue
        of = of or environ.get(tasks, "")
        if not of:
            raise UsageError(
                f"--shard {text}: {index} is set, but nothing says how many tasks there are",
                next_steps=("--shard auto/N      with the number of tasks",),
            )
        said = f"{text} ({index}={at})"
        first = _count(said, environ.get(least, "0"))
        each = max(1, _count(said, environ.get(step, "1")))
        return Shard((int(at) - first) // each + 1, _count(said, of)).checked(said)
    raise UsageError(
        f"--shard {text}: no job array here tells which task this is",
        next_steps=("--shard I/N         names it, from 1/N to N/N",),
    )
