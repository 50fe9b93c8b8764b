"""A file of prompts in, a Parquet of answers out.

    import batchrun

    summary = batchrun.submit("prompts.jsonl", mock=True)          # also under a running loop
    summary = await batchrun.run(batchrun.make_config("prompts.jsonl", mock=True))
    async with batchrun.complete(prompts, mock=True) as results:   # no file, no journal
        async for result in results:
            print(result.response)
    for batch in batchrun.answers(table, mock=True):                # Arrow in, Arrow out
        ...
    table = batchrun.read("prompts.mock.parquet")                  # or summary.table()

``__all__`` is the promise. Nothing heavy is imported before it is used: the command line imports
this module first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchrun.api import answers, answers_schema, complete, make_config, read, submit
    from batchrun.config import VERSION as __version__
    from batchrun.config import Allowance, RunConfig
    from batchrun.errors import (
        BatchrunError,
        EndpointRefused,
        Interrupted,
        JournalDamaged,
        LocalIOError,
        Locked,
        SettingsDiffer,
        StoppedEarly,
        UsageError,
    )
    from batchrun.runs import run
    from batchrun.shards import Shard
    from batchrun.summary import RunSummary
    from batchrun.types import Result, Usage

__all__ = [
    "Allowance",
    "BatchrunError",
    "EndpointRefused",
    "Interrupted",
    "JournalDamaged",
    "LocalIOError",
    "Locked",
    "Result",
    "RunConfig",
    "RunSummary",
    "SettingsDiffer",
    "Shard",
    "StoppedEarly",
    "Usage",
    "UsageError",
    "__version__",
    "answers",
    "answers_schema",
    "complete",
    "make_config",
    "read",
    "run",
    "submit",
]

_HOMES = {
    "answers": "api",
    "answers_schema": "api",
    "complete": "api",
    "make_config": "api",
    "read": "api",
    "submit": "api",
    "run": "runs",
    "RunConfig": "config",
    "Allowance": "config",
    "Shard": "shards",
    "Result": "types",
    "RunSummary": "summary",
    "Usage": "types",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("batchrun.config").VERSION
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"batchrun.{_HOMES.get(name, 'errors')}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return __all__
