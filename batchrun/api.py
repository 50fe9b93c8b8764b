"""The Python API: a whole run as one call, and answers as they come without any file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, Unpack

from batchrun import runs
from batchrun.config import (
    STDIN,
    STDOUT,
    Allowance,
    Engine,
    EscalateOn,
    IfLocked,
    InputFormat,
    JSONValue,
    RunConfig,
    SchemaDialect,
    Shape,
    default_output,
    output_format,
    with_its_share,
)
from batchrun.console import Progress
from batchrun.errors import NoKey, UsageError
from batchrun.money import Price
from batchrun.providers import resolve
from batchrun.secret import Secret
from batchrun.shards import Shard
from batchrun.summary import RunSummary
from batchrun.types import ArrowStream, Result

if TYPE_CHECKING:
    import pyarrow as pa


T = TypeVar("T")
Rows: TypeAlias = "Sequence[Mapping[str, object]] | ArrowStream"


class Where(TypedDict, total=False):
    """The endpoint and its key, as on the command line."""

    provider: str | None
    base_url: str | None
    api_key_env: str | None
    api_key_file: str | None
    allow_http: bool


class Options(Where, total=False):
    """What ``submit``, ``complete`` and ``make_config`` take by name: the fields of RunConfig that
    are not settled by input, output and ``Where``.
    """

    input_format: InputFormat | None
    state_dir: Path | None
    model: str | None
    model_replaces: bool
    system: str | None
    params: Mapping[str, JSONValue]
    params_replacing: frozenset[str]
    shape: Shape | None
    prompt_column: str | None
    body_columns: tuple[str, ...]
    prompt: str | None
    messages: tuple[Mapping[str, JSONValue], ...] | None
    image: tuple[str, ...]
    schema: Mapping[str, JSONValue] | None
    mock: bool
    headers: tuple[tuple[str, Secret], ...]
    stream: bool
    concurrency: int | None
    processes: int | None
    engine: Engine
    ray_address: str | None
    rpm: float | None
    tpm: float | None
    max_retries: int
    max_in_doubt_retries: int
    max_schema_retries: int
    schema_dialect: SchemaDialect
    escalate: str | None
    escalate_on: tuple[EscalateOn, ...]
    timeout_s: float
    connect_timeout_s: float
    max_wait_s: float
    max_outage_s: float
    deadline_s: float | None
    drain_s: float
    abort_after: int
    max_cost: float | None
    token_budget: int | None
    limit: int | None
    sample: int | None
    seed: int
    samples: int
    dedupe: bool
    shard: Shard | None
    retry_failed: bool
    reuse: tuple[str, ...]
    overwrite: bool
    allow_failures: Allowance
    metrics_file: str | None
    otel: bool
    report: str | None
    if_locked: IfLocked
    keep_unused_days: float | None
    carry: tuple[str, ...] | None
    response_body: bool
    price: Price | None
    price_note: str
    command: str


def submit(
    input: str | os.PathLike[str] | Rows,
    output: str | os.PathLike[str] | None = None,
    *,
    progress: bool = False,
    **options: Unpack[Options],
) -> RunSummary:
    """Do what ``batchrun submit`` does and return its summary; also under a running loop.

    ``input`` is a path, a list of dicts, or any table that speaks Arrow (``__arrow_c_stream__``: of
    pyarrow, pandas, Polars, DuckDB); all but a path need ``output``.
    ``options`` are the fields of RunConfig (``model=``, ``mock=True``, ``concurrency=`` …) and
    ``provider=``, ``base_url=``, ``api_key_env=``, ``api_key_file=``, ``allow_http=`` as on the
    command line. A summary comes back for every end of a run that began: look at ``exit_code``.
    BatchrunError is raised for what ends it before.
    """
    config = make_config(input, output, **options)
    talk = Progress(quiet=not progress)
    rows = None if isinstance(input, str | os.PathLike) else input
    try:
        return _run_anywhere(runs.run(config, talk, rows=rows))
    finally:
        talk.end()
        talk.close()


def answers(batches: ArrowStream | Iterable[object], **options: Unpack[Options]) -> runs.Answers:
    """Answers to the rows of Arrow data, as record batches in the order of the rows.

    ``batches`` is a table or a stream (``__arrow_c_stream__``: of pyarrow, pandas, Polars, DuckDB),
    or an iterable of record batches or tables, all of the same columns. It is read in a thread of
    its own, as far ahead as needed: a pool without barriers sends, memory is bounded whatever flows
    through, and who stops iterating stops the sending. What comes out has the columns of an output
    of ``submit``, known beforehand as ``.schema``, in batches of at most about a thousand rows. A
    row's failure is a row; what ends everything early is raised after the rows that were settled.
    Nothing is kept: leaving the iteration, or ``close()``, gives up what is in flight. ``options``
    are those of ``submit``.
    """
    return runs.Answers(_made([], STDOUT, options), batches)


def answers_schema(columns: pa.Schema, **options: Unpack[Options]) -> pa.Schema:
    """The schema of ``answers`` to batches of ``columns``: for engines that ask before a row is."""
    return runs.answers_schema(_made([], STDOUT, options), columns)


def complete(
    requests: Iterable[str | Mapping[str, JSONValue]], **options: Unpack[Options]
) -> AbstractAsyncContextManager[AsyncIterator[Result]]:
    """Answers as they come, in no order, without a file or a journal.

    ``requests`` are prompts, or rows as in an input file: dicts with ``prompt``, ``messages`` or
    ``custom_id`` and ``body``. They are read as they are needed, and no more than about a thousand
    answers wait to be read. A row's failure is a Result with status ``error``; what ends the run
    early (a refused key) is raised by the iteration. ``options`` are those of ``submit``.
    """
    return runs.complete(_made([], STDOUT, options), requests)


def read(output: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """What a finished run wrote, as one Arrow table: its input's columns and the answers'.

    UsageError for a file that batchrun did not write.
    """
    return runs.read(os.fspath(output), columns)


def make_config(
    input: str | os.PathLike[str] | Rows,
    output: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> RunConfig:
    """What ``run`` takes, from the words of ``submit``; UsageError for one that does not exist.

    A mistake in the input is said before a missing key.
    """
    return _made(input, output, options)


def _made(
    input: str | os.PathLike[str] | Rows, output: str | os.PathLike[str] | None, options: Options
) -> RunConfig:
    known = Options.__annotations__.keys()
    if unknown := sorted(options.keys() - known):
        raise UsageError(f"{unknown[0]}=: no such option; there are: {', '.join(sorted(known))}")
    if output is None and not isinstance(input, str | os.PathLike):
        raise UsageError("rows that are not a file need output=, the path of the answers")
    mock = bool(options.get("mock"))
    inputs = (os.fspath(input),) if isinstance(input, str | os.PathLike) else (STDIN,)
    name = default_output(inputs, mock=mock) if output is None else os.fspath(output)
    if (shard := options.get("shard")) is not None:
        name = shard.output(name)
    options.setdefault("model_replaces", options.get("model") is not None)
    options.setdefault("params_replacing", frozenset(options.get("params", ())))
    # The names that are left are fields: a test compares them.
    chosen: dict[str, Any] = {
        name: value for name, value in options.items() if name not in Where.__annotations__
    }
    config = with_its_share(
        RunConfig(inputs=inputs, output=name, output_format=output_format(name), **chosen)
    )
    if mock:
        return config
    try:
        endpoint = resolve(
            provider=options.get("provider"),
            base_url=options.get("base_url"),
            api_key_env=options.get("api_key_env"),
            api_key_file=options.get("api_key_file"),
            allow_http=bool(options.get("allow_http")),
            environ=os.environ,
            explicit_headers=frozenset(name.lower() for name, _ in config.headers),
        )
    except NoKey:
        runs.look(config)
        raise
    return replace(config, endpoint=endpoint)


def _run_anywhere(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a thread of its own where a loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, "batchrun") as thread:
        result: T = thread.submit(asyncio.run, work).result()
        return result
