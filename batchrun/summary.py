"""What a run amounted to, as ``--json`` prints it: fields may be added, never renamed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from msgspec import Struct, field

from batchrun.errors import State
from batchrun.types import Bound, UnusedCounts

if TYPE_CHECKING:
    import pyarrow as pa


class RowCounts(Struct):
    """Rows by state, of a run or of an output: the summary, the footer and the tally count so."""

    total: int | None = None  # null when the input was not read to its end
    ok: int = 0
    error: int = 0
    passing: int = 0  # of the failed: those that every rerun tries again
    pending: int = 0
    reused: int = 0
    truncated: int = 0
    filtered: int = 0
    empty: int = 0
    duplicate: int = 0
    copied: int = 0  # of these: not sent, given the answer of an equal row (``--dedupe``)


class ErrorExample(Struct):
    custom_id: str
    source: str  # "prompts.jsonl:214"
    message: str


class ErrorCount(Struct):
    kind: str
    code: str
    rows: int
    retried_on_rerun: bool
    example: ErrorExample | None = None


class TokenCounts(Struct):
    prompt: int | None = None
    completion: int | None = None
    total: int | None = None
    cached: int | None = None
    reasoning: int | None = None
    rows_without_usage: int = 0
    cost_usd: float | None = None  # of the rows with usage; None: no price is known
    saved_usd: float | None = None  # what cached prompt tokens cost less than others


class OutputTotals(Struct):
    tokens: TokenCounts


class ThisRun(Struct):
    rows_sent: int = 0
    attempts: int = 0
    retries: int = 0
    rate_limited: int = 0
    in_doubt: int = 0
    cut_off: int = 0  # of these: in flight when the run was stopped
    sending_s: float = 0.0  # from the first request to the last answer
    tokens: TokenCounts = field(default_factory=TokenCounts)
    bound_by: Bound | None = None


class RunSummary(Struct, kw_only=True):
    """What a run amounted to; ``batchrun submit --json`` prints it."""

    schema: int = 1
    batchrun_version: str = ""
    state: State = "error"
    exit_code: int = 0
    reason: str | None = None
    inputs: list[str] = []
    output: str | None = None
    published: bool = False
    backup: str | None = None
    unused: UnusedCounts = field(default_factory=UnusedCounts)
    state_dir: str | None = None
    synthetic: bool = False
    endpoint: str | None = None
    request_models: list[str] = []
    rows: RowCounts = field(default_factory=RowCounts)
    errors: list[ErrorCount] = []
    output_totals: OutputTotals | None = None
    this_run: ThisRun | None = None
    started_at: str | None = None
    finished_at: str | None = None
    wall_s: float = 0.0
    notes: list[str] = []
    next_steps: list[str] = []
    prompt_column: str | None = None  # under the name it has in the output

    def table(self) -> pa.Table:
        """The output as one Arrow table; UsageError where nothing was published."""
        # Not imported above: a summary stands alone, and is printed without pyarrow.
        table: pa.Table = importlib.import_module("batchrun").read(self.output or "")
        return table
