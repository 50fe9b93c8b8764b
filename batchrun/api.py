"""The Python API: a whole run as one call, and answers as they come without any file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from batchrun.console import Progress
from batchrun.runs import Rows, make_config, run
from batchrun.summary import RunSummary

T = TypeVar("T")


def submit(
    input: str | os.PathLike[str] | Rows,
    output: str | os.PathLike[str] | None = None,
    *,
    progress: bool = False,
    **options: Any,
) -> RunSummary:
    """Do what ``batchrun submit`` does and return its summary; also under a running loop.

    ``input`` is a path, a list of dicts or an Arrow table; the last two need ``output``.
    ``options`` are the fields of RunConfig (``model=``, ``mock=True``, ``concurrency=`` …) and
    ``provider=``, ``base_url=``, ``api_key_env=``, ``api_key_file=``, ``allow_http=`` as on the
    command line. A summary comes back for every end of a run that began: look at ``exit_code``.
    BatchrunError is raised for what ends it before.
    """
    config = make_config(input, output, **options)
    talk = Progress(quiet=not progress)
    rows = None if isinstance(input, str | os.PathLike) else input
    try:
        return _run_anywhere(run(config, talk, rows=rows))
    finally:
        talk.end()
        talk.close()


def _run_anywhere(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a thread of its own where a loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, "batchrun") as thread:
        result: T = thread.submit(asyncio.run, work).result()
        return result
