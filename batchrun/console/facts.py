"""What the texts are made from, filled by the runs; also as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import Struct

from batchrun import errors
from batchrun.config import InputFormat
from batchrun.summary import ErrorCount, RowCounts, TokenCounts


class FileFacts(Struct, frozen=True, kw_only=True):
    """One input as it was detected."""

    name: str
    format: InputFormat
    compression: str = ""
    rows: int = 0
    size_bytes: int | None = None
    shape: str
    prompt_column: str | None = None
    sent: tuple[str, ...] = ()
    carried_only: tuple[str, ...] = ()


class StartFacts(Struct, frozen=True, kw_only=True):
    """What is known when the first request is about to leave."""

    files: tuple[FileFacts, ...]
    output: str
    rows: int
    to_send: int  # everything this run asks for, retries of earlier failures included
    to_retry: int = 0  # of those: rows that failed for a passing reason, or --retry-failed
    answered_before: int = 0
    failed_before: int = 0  # settled failures that stay as they are
    invalid: int = 0
    repeats: int = 0
    following: int = 0  # rows that take the answer of another one to send
    over_limit: int = 0  # rows of the input that --limit leaves out
    continues_since_ms: int | None = None  # when the unfinished run began; None: none
    base_url: str
    host: str
    model: str | None = None
    key_name: str | None = None
    synthetic: bool = False
    hosts_before: tuple[str, ...] = ()  # other hosts that gave answers held
    renamed: tuple[tuple[str, str], ...] = ()
    models_replaced: tuple[str, ...] = ()  # row models that --model replaces
    rows_model_replaced: int = 0
    rows_params_replaced: tuple[tuple[str, int], ...] = ()
    skipped: tuple[str, ...] = ()  # files of a directory or glob that were not read
    notes: tuple[str, ...] = ()


class BadRowFacts(Struct, frozen=True):
    source: str  # "prompts.jsonl:812"
    reason: str
    code: str = ""


class ValidateFacts(Struct, frozen=True, kw_only=True):
    """What ``validate`` found; ``bodies`` are the first ones, whole, as they would be sent."""

    files: tuple[FileFacts, ...]
    rows: int
    bad: int = 0
    bad_rows: tuple[BadRowFacts, ...] = ()  # may be fewer than ``bad``: the rest is counted
    repeats: int = 0
    dedupe: bool = False  # they are not sent
    url: str | None = None  # None with --mock
    renamed: tuple[tuple[str, str], ...] = ()
    skipped: tuple[str, ...] = ()
    first_body: str | None = None
    bodies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return errors.EXIT_ROWS_FAILED if self.bad else errors.EXIT_OK


class Between(Struct, frozen=True):
    """A sum that is not known yet; ``high`` None: nothing bounds it."""

    about: float
    low: float
    high: float | None

    def at_most(self, bound: float) -> Between:
        high = bound if self.high is None else min(self.high, bound)
        return Between(min(self.about, bound), min(self.low, bound), high)


class EstimateFacts(Struct, frozen=True, kw_only=True):
    """What ``estimate`` found. Tokens and dollars are of the rows still to send."""

    rows: int
    to_send: int
    bad: int = 0
    answered_before: int = 0
    failed_before: int = 0
    copies: int = 0  # rows that take the answer of another one
    measured: int = 0  # answers held that tell their tokens
    prompt_tokens: Between
    completion_tokens: Between
    cost_usd: Between | None = None  # None: no price is known
    price: list[float] | None = None
    seconds: float | None = None  # None: nothing is known of the pace

    @property
    def exit_code(self) -> int:
        return errors.EXIT_OK


RunState = Literal["running", "stopped", "finished"]


class StatusFacts(Struct, frozen=True, kw_only=True):
    """What ``status`` found: a running process, an unfinished state, or a finished output."""

    state: RunState
    output: str
    rows: RowCounts
    pid: int | None = None
    host: str | None = None  # of the process
    started_at_ms: int | None = None
    updated_at_ms: int | None = None
    finished_at_ms: int | None = None  # also: stopped at
    rows_per_s: float | None = None
    in_flight: int | None = None
    bound_by: str | None = None
    exit_code_of_run: int | None = None
    reason: str | None = None  # why it stopped, "deadline reached"
    command: str | None = None  # to paste
    models: tuple[str, ...] = ()
    endpoint_hosts: tuple[str, ...] = ()
    errors: tuple[ErrorCount, ...] = ()
    tokens: TokenCounts | None = None
    synthetic: bool = False
    unused_answers: int = 0  # of rows gone from the input
    unused_file: str | None = None  # keeps them

    @property
    def exit_code(self) -> int:
        return {
            "running": errors.EXIT_LOCKED,
            "stopped": errors.EXIT_STOPPED,
            "finished": errors.EXIT_OK,
        }[self.state]


class CollectFacts(Struct, frozen=True, kw_only=True):
    """What ``collect`` wrote, and from what."""

    output: str  # written
    collected_from: str
    rows: RowCounts
    size_bytes: int | None = None
    complete: bool = False
    running: bool = False  # a process is still at work on it
    synthetic: bool = False
    errors: tuple[ErrorCount, ...] = ()
    tokens: TokenCounts | None = None
    command: str | None = None  # continues the run

    @property
    def exit_code(self) -> int:
        return errors.EXIT_OK


class ReportFacts(Struct, frozen=True, kw_only=True):
    """What ``report`` wrote, and from what."""

    page: str  # written
    output: str
    rows: RowCounts
    size_bytes: int

    @property
    def exit_code(self) -> int:
        return errors.EXIT_OK


class MergeFacts(Struct, frozen=True, kw_only=True):
    """What ``merge`` wrote, and from what."""

    output: str
    parts: list[str]
    rows: RowCounts
    size_bytes: int
    synthetic: bool
    errors: tuple[ErrorCount, ...]
    tokens: TokenCounts
    failed_too_many: bool

    @property
    def exit_code(self) -> int:
        return errors.EXIT_ROWS_FAILED if self.failed_too_many else errors.EXIT_OK


class FinalFacts(Struct, frozen=True, kw_only=True):
    """What the final block says beyond the summary."""

    output_bytes: int | None = None


def to_json(value: Struct) -> bytes:
    """One object on one line; what a command found carries its exit code as a member too."""
    members = msgspec.to_builtins(value)
    exit_code = getattr(value, "exit_code", None)
    if isinstance(exit_code, int) and "exit_code" not in members:
        members = {"schema": 1, "exit_code": exit_code, **members}
    return json.dumps(members, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def models_json(names: Sequence[str]) -> bytes:
    return json.dumps({"schema": 1, "exit_code": 0, "models": list(names)}).encode() + b"\n"
