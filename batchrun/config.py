"""Every choice of one run in one value, validated once, and which of them bind a rerun.

*Request settings* decide what is asked: they bind a rerun. *Delivery settings* decide how it is
asked and change freely. *Publishing settings* decide what the output looks like: a change of them
makes the finished file be written anew, without a request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from batchrun.addresses import is_address, name_of
from batchrun.errors import UsageError
from batchrun.money import Price
from batchrun.providers import MOCK, Endpoint
from batchrun.secret import Secret
from batchrun.shards import Shard

JSONValue: TypeAlias = (
    bool | int | float | str | Sequence["JSONValue"] | Mapping[str, "JSONValue"] | None
)


Shape = Literal["batch", "messages", "prompt", "body", "template"]  # what a row is
SchemaDialect = Literal[
    "auto", "json-schema", "json-schema-loose", "json-object", "guided", "prompt"
]
EscalateOn = Literal["schema", "refusal", "empty", "length"]
InputFormat = Literal["jsonl", "csv", "tsv", "parquet"]
Compression = Literal["", "gz", "zst"]


class FormatNames(NamedTuple):
    """What people call an input format, how its files end, and what they count in one."""

    label: str
    suffixes: tuple[str, ...]
    unit: Literal["line", "row"]


INPUT_FORMATS: Final[Mapping[InputFormat, FormatNames]] = {
    "jsonl": FormatNames("JSONL", (".jsonl", ".ndjson"), "line"),
    "csv": FormatNames("CSV", (".csv",), "line"),
    "tsv": FormatNames("TSV", (".tsv",), "line"),
    "parquet": FormatNames("Parquet", (".parquet",), "row"),
}


INPUT_SUFFIXES: Final[Mapping[str, InputFormat]] = {
    suffix: name for name, names in INPUT_FORMATS.items() for suffix in names.suffixes
}


COMPRESSED_SUFFIXES: Final[Mapping[str, Compression]] = {".gz": "gz", ".zst": "zst"}
OutputFormat = Literal["parquet", "jsonl", "csv"]  # the last one only to collect
Engine = Literal["local", "ray"]
IfLocked = Literal["fail", "wait", "skip"]
VERSION = "0.1.0"
STDIN = "-"
STDOUT = "-"
STATE_SUFFIX = ".batchrun"
CURRENT = "/./"  # in a path: what stands before it is only where the rest lies
MAX_CONCURRENCY = 512  # of one process
MAX_PROCESSES = 64

# More of anything than a machine can count or wait for; clocks and 64-bit integers end there too.
TOO_MUCH = 1e12


@dataclass(frozen=True, slots=True)
class Allowance:
    """``--allow-failures``: a number of rows, or a share of them."""

    rows: int = 0
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Allowance:
        try:
            if text.endswith("%"):
                percent = float(text[:-1])
                if 0 <= percent <= 100:
                    return cls(share=percent / 100)
            elif (rows := int(text)) >= 0:
                return cls(rows=rows)
        except ValueError:
            pass
        raise UsageError(f"--allow-failures {text}: a number of rows, or a share such as 1%")

    def covers(self, failed: int, total: int) -> bool:
        return failed <= (self.rows if self.share is None else self.share * total)

    def __str__(self) -> str:
        return f"{self.rows:,}" if self.share is None else f"{self.share * 100:g}%"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All options of one run; the endpoint is resolved and the output settled."""

    inputs: tuple[str, ...]
    output: str  # a path, or "-" for stdout
    output_format: OutputFormat = "parquet"
    input_format: InputFormat | None = None
    state_dir: Path | None = None  # None: <output>.batchrun; with "-" a temporary one

    # request settings
    model: str | None = None
    model_replaces: bool = False  # given on the command line: replaces the row's own
    system: str | None = None
    params: Mapping[str, JSONValue] = field(default_factory=dict)
    params_replacing: frozenset[str] = frozenset()  # names given on the command line
    shape: Shape | None = None
    prompt_column: str | None = None
    body_columns: tuple[str, ...] = ()
    prompt: str | None = None  # a template over the row's columns
    messages: tuple[Mapping[str, JSONValue], ...] | None = None  # their texts are templates
    image: tuple[str, ...] = ()  # columns
    schema: Mapping[str, JSONValue] | None = None  # of the answers, as JSON Schema has it
    mock: bool = False

    # delivery settings
    endpoint: Endpoint = MOCK
    headers: tuple[tuple[str, Secret], ...] = ()
    stream: bool = False
    concurrency: int | None = None  # over all processes; None: found while running
    processes: int | None = None  # that send; None: one, or one on each node of a cluster
    engine: Engine = "local"  # where they run
    ray_address: str | None = None  # of a cluster; None: one of this machine alone
    rpm: float | None = None
    tpm: float | None = None
    max_retries: int = 5
    max_in_doubt_retries: int = 2
    max_schema_retries: int = 2
    schema_dialect: SchemaDialect = "auto"
    escalate: str | None = None  # a model
    escalate_on: tuple[EscalateOn, ...] = ("schema", "refusal", "empty", "length")
    timeout_s: float = 600.0
    connect_timeout_s: float = 10.0
    max_wait_s: float = 600.0
    max_outage_s: float = 600.0
    deadline_s: float | None = None  # seconds from the start of the run
    drain_s: float = 25.0
    abort_after: int = 20
    max_cost: float | None = None  # US dollars, for this output over all runs
    token_budget: int | None = None  # the same in tokens
    limit: int | None = None
    sample: int | None = None  # so many rows at random
    seed: int = 0  # of that choice
    samples: int = 1  # each row is asked so many times
    dedupe: bool = False  # rows that ask the same are sent once
    shard: Shard | None = None  # only this part; the output is that part's
    retry_failed: bool = False
    reuse: tuple[str, ...] = ()  # other outputs, whose answers count as held
    overwrite: bool = False
    allow_failures: Allowance = Allowance()
    metrics_file: str | None = None
    otel: bool = False  # tell an OpenTelemetry collector
    report: str | None = None  # a page to make of the output
    if_locked: IfLocked = "fail"
    keep_unused_days: float | None = 30.0  # None: for ever

    # publishing settings
    carry: tuple[str, ...] | None = None  # None: all; () none
    response_body: bool = True
    price: Price | None = None  # None: the one remembered with the output, if any
    price_note: str = ""  # where it is from, or why there is none

    # the words for people
    command: str = "batchrun submit"  # what `next` lines repeat, without secrets

    def __post_init__(self) -> None:
        _positive("--concurrency", self.concurrency)
        if self.processes is not None and not 1 <= self.processes <= MAX_PROCESSES:
            raise UsageError(f"--processes has to be 1 to {MAX_PROCESSES}, not {self.processes:,}")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError("--ray-address is of --engine ray, which is not asked for")
        _positive("--rpm", self.rpm)
        _positive("--tpm", self.tpm)
        _positive("--timeout", self.timeout_s)
        _positive("--connect-timeout", self.connect_timeout_s)
        _positive("--max-wait", self.max_wait_s)
        _positive("--max-outage", self.max_outage_s)
        _positive("--limit", self.limit)
        _positive("--sample", self.sample)
        _positive("--samples", self.samples)
        if self.sample is not None and self.limit is not None:
            raise UsageError("--sample and --limit both say which rows; choose one")
        if self.shard is not None:
            self.shard.checked()
        if self.shard is not None and (self.sample is not None or self.limit is not None):
            other = "--limit" if self.sample is None else "--sample"
            raise UsageError(f"--shard and {other} both say which rows; choose one")
        if self.shard is not None and STDIN in self.inputs:
            raise UsageError(f"--shard {self.shard}: every part reads the input; name a file")
        _positive("--deadline", self.deadline_s)
        _positive("--max-cost", self.max_cost)
        _positive("--token-budget", self.token_budget)
        if self.max_cost is not None and self.escalate is not None:
            raise UsageError("--max-cost: with --escalate there are two prices; use --token-budget")
        for flag, value in (
            ("--max-retries", self.max_retries),
            ("--max-in-doubt-retries", self.max_in_doubt_retries),
            ("--max-schema-retries", self.max_schema_retries),
            ("--abort-after", self.abort_after),
            ("--drain", self.drain_s),
        ):
            if not 0 <= value < TOO_MUCH:
                what = "must not be negative" if value < 0 else "is too much"
                raise UsageError(f"{flag} {_shown(value)}: {what}")
        if self.prompt_column is not None and self.shape not in (None, "prompt"):
            raise UsageError(f"--prompt-column goes with --shape prompt, not with {self.shape}")
        if self.makes_messages and (self.shape or self.prompt_column):
            other = "--shape" if self.shape else "--prompt-column"
            raise UsageError(f"{self._template_flag} makes the messages; leave out {other}")
        if self.messages is not None and not self.messages:
            raise UsageError("--messages: an empty list")

    @property
    def makes_messages(self) -> bool:
        """Whether templates make the messages, whatever else a row is."""
        return self.prompt is not None or self.messages is not None

    @property
    def _template_flag(self) -> str:
        return "--prompt" if self.prompt is not None else "--messages"

    @property
    def to_stdout(self) -> bool:
        return self.output == STDOUT

    def request_settings(self, shapes: str, prompt_column: str | None) -> dict[str, JSONValue]:
        """What binds a rerun; the arguments are what the inputs turned out to be."""
        made: dict[str, JSONValue] = {
            "prompt": self.prompt,
            "messages": None if self.messages is None else list(self.messages),
            "image": list(self.image) or None,
            "schema": self.schema,
        }
        return {
            "model": self.model,
            "system": self.system,
            "params": dict(self.params),
            "shape": shapes,
            "prompt_column": prompt_column,
            "body_columns": list(self.body_columns),
            "path": self.endpoint.path,
            "synthetic": self.mock,
            # Outputs of earlier versions know nothing of these.
            **{name: value for name, value in made.items() if value is not None},
        }

    def publishing_settings(self) -> dict[str, JSONValue]:
        more: dict[str, JSONValue] = {}
        if self.price is not None:
            more["price"] = self.price.told()
        if self.sample is not None:
            more |= {"sample": self.sample, "seed": self.seed}
        if self.samples != 1:
            more["samples"] = self.samples
        if self.dedupe:
            more["dedupe"] = True
        if self.shard is not None:
            more["shard"] = str(self.shard)
        return {
            # Outputs of earlier versions know nothing of these.
            **more,
            "carry": None if self.carry is None else list(self.carry),
            "response_body": self.response_body,
            "format": self.output_format,
            "limit": self.limit,
        }


def with_its_share(config: RunConfig) -> RunConfig:
    """Of a shard: with its share of what the user allows all of them together."""
    if (shard := config.shard) is None:
        return config
    rpm, tpm, max_cost, budget = config.rpm, config.tpm, config.max_cost, config.token_budget
    return replace(
        config,
        rpm=None if rpm is None else rpm / shard.of,
        tpm=None if tpm is None else tpm / shard.of,
        max_cost=None if max_cost is None else max_cost / shard.of,
        token_budget=None if budget is None else max(1, budget // shard.of),
    )


def default_output(inputs: Sequence[str], *, mock: bool) -> str:
    """``data/a.jsonl.gz`` -> ``data/a.results.parquet``, with mock ``data/a.mock.parquet``."""
    if len(inputs) != 1 or inputs[0] == STDIN:
        what = "an input from stdin needs" if len(inputs) == 1 else "several inputs need"
        raise UsageError(f"{what} -o OUTPUT", next_steps=("-o answers.parquet",))
    if is_address(inputs[0]):
        raise UsageError(
            f"{inputs[0]}: name the output with -o", next_steps=("-o answers.parquet",)
        )
    path = Path(inputs[0])
    if path.is_dir() or (re.search(r"[*?\[]", inputs[0]) and not path.exists()):
        raise UsageError(
            f"{inputs[0]} can be several files: name the output with -o",
            next_steps=("-o answers.parquet",),
        )
    name = path.name
    for suffixes in (tuple(COMPRESSED_SUFFIXES), tuple(INPUT_SUFFIXES)):
        if name.lower().endswith(suffixes):
            name = name[: name.rindex(".")]
    return str(path.with_name(f"{name or path.name}.{'mock' if mock else 'results'}.parquet"))


def output_format(output: str) -> OutputFormat:
    output = name_of(output) if is_address(output) else output
    if output == STDOUT or output.endswith(".jsonl"):
        return "jsonl"
    if output.endswith(".parquet"):
        return "parquet"
    if output.endswith(".csv"):
        raise UsageError(
            f"-o {output}: a CSV cannot hold what the next run has to know",
            next_steps=(
                f"-o {output.removesuffix('.csv')}.parquet, and then:",
                f"batchrun collect {output.removesuffix('.csv')}.parquet -o {output}",
            ),
        )
    raise UsageError(f"-o {output}: the name must end in .parquet or .jsonl, or be - for stdout")


def _positive(flag: str, value: float | None) -> None:
    if value is not None and not 0 < value < TOO_MUCH:
        what = "must be greater than 0" if value <= 0 else "is no number to count with"
        raise UsageError(f"{flag} {_shown(value)}: {what}")


def _shown(value: float) -> str:
    return f"{value:g}" if abs(value) < TOO_MUCH else f"{value}"[:20]
