"""The command behind an unfinished run, kept beside its journal so that ``collect`` can repeat it.

Only what decides what the rows are and how the output looks; no endpoint, no key, no header.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, cast

import msgspec
from msgspec import Struct

from batchrun.config import CURRENT, STDIN, InputFormat, JSONValue, OutputFormat, RunConfig, Shape
from batchrun.files import read_json, write_json
from batchrun.journal.state import StateDir
from batchrun.money import Price
from batchrun.shards import Shard


class Saved(Struct, frozen=True, kw_only=True):
    """The file's members; added to, never renamed."""

    command: str
    hosts: list[str] = []
    inputs: list[str] = []  # absolute, so that any directory will do
    output: str = ""
    output_format: OutputFormat = "parquet"
    input_format: InputFormat | None = None
    model: str | None = None
    model_replaces: bool = False
    system: str | None = None
    params: dict[str, object] = {}
    params_replacing: list[str] = []
    shape: Shape | None = None
    prompt_column: str | None = None
    body_columns: list[str] = []
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    image: list[str] = []
    schema: dict[str, Any] | None = None
    mock: bool = False
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    samples: int = 1
    dedupe: bool = False
    shard: Shard | None = None
    carry: list[str] | None = None
    response_body: bool = True
    price: Price | None = None


def save_config(state: StateDir, config: RunConfig, model: str | None, hosts: list[str]) -> None:
    """Remember ``config``; ``hosts`` are all that gave answers held here. Best effort."""
    saved = Saved(
        command=config.command,
        hosts=hosts,
        inputs=[_anywhere(name) for name in config.inputs],
        output=config.output if config.to_stdout else os.path.abspath(config.output),
        output_format=config.output_format,
        input_format=config.input_format,
        model=model,
        model_replaces=config.model_replaces,
        system=config.system,
        params=dict(config.params),
        params_replacing=sorted(config.params_replacing),
        shape=config.shape,
        prompt_column=config.prompt_column,
        body_columns=list(config.body_columns),
        prompt=config.prompt,
        messages=None if config.messages is None else [dict(each) for each in config.messages],
        image=list(config.image),
        schema=None if config.schema is None else dict(config.schema),
        mock=config.mock,
        limit=config.limit,
        sample=config.sample,
        seed=config.seed,
        samples=config.samples,
        dedupe=config.dedupe,
        shard=config.shard,
        carry=None if config.carry is None else list(config.carry),
        response_body=config.response_body,
        price=config.price,
    )
    with contextlib.suppress(OSError):
        write_json(state.saved_command, saved)


def _anywhere(name: str) -> str:
    """An input's path for any working directory that still tells which part of it was typed."""
    if name == STDIN or os.path.isabs(name):
        return name
    return os.getcwd() + CURRENT + name


def read_saved(state: StateDir) -> Saved | None:
    """What ``save_config`` kept here last, None when there is nothing to read."""
    try:
        return read_json(state.saved_command, Saved)
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError):
        return None


def restored(saved: Saved) -> RunConfig:
    """A config that reads the same rows and publishes them alike; it cannot send."""
    return RunConfig(
        inputs=tuple(saved.inputs),
        output=saved.output,
        output_format=saved.output_format,
        input_format=saved.input_format,
        model=saved.model,
        model_replaces=saved.model_replaces,
        system=saved.system,
        # What this module wrote as JSON is JSON.
        params=cast(dict[str, JSONValue], saved.params),
        params_replacing=frozenset(saved.params_replacing),
        shape=saved.shape,
        prompt_column=saved.prompt_column,
        body_columns=tuple(saved.body_columns),
        prompt=saved.prompt,
        messages=None if saved.messages is None else tuple(saved.messages),
        image=tuple(saved.image),
        schema=saved.schema,
        mock=saved.mock,
        limit=saved.limit,
        sample=saved.sample,
        seed=saved.seed,
        samples=saved.samples,
        dedupe=saved.dedupe,
        shard=saved.shard,
        carry=None if saved.carry is None else tuple(saved.carry),
        response_body=saved.response_body,
        price=saved.price,
        command=saved.command,
    )
