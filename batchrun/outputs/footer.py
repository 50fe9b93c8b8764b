"""What an output says of itself: version, settings, hosts, rows by state, tokens."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import pyarrow as pa
from msgspec import Struct

from batchrun.files import from_json, to_json
from batchrun.summary import ErrorCount, RowCounts, TokenCounts

FOOTER_KEY = b"batchrun"
SERIES_KEY = b"batchrun.series"
# For those who pass one on without a need for pyarrow.
Schema: TypeAlias = pa.Schema
Table: TypeAlias = pa.Table
RecordBatch: TypeAlias = pa.RecordBatch


class Aside(Struct, frozen=True):
    """What marks a file of answers whose rows are gone: the output they left, and since when."""

    output: str
    oldest_ms: int


class Footer(Struct, frozen=True, kw_only=True):
    """What a published file says about itself. Members may be added, never renamed.

    The caller fills in all but ``rows``, ``tokens``, ``errors`` and ``request_models``: ``publish``
    takes those from its tally. An empty file stands for ``Footer(complete=False)``.
    """

    schema: int = 1
    batchrun_version: str = ""
    run_id: str = ""
    publication: str = ""  # of this very file: one run may publish more than once
    complete: bool = True
    synthetic: bool = False
    inputs: list[str] = []
    inputs_digest: str = ""
    settings: dict[str, Any] = {}
    publishing: dict[str, Any] = {}
    hosts: list[str] = []
    started_at: str = ""
    finished_at: str = ""
    rows: RowCounts = msgspec.field(default_factory=lambda: RowCounts(total=0))
    tokens: TokenCounts = msgspec.field(default_factory=TokenCounts)
    errors: list[ErrorCount] = []
    request_models: list[str] = []
    aside: Aside | None = None
    collected_from: str = ""  # by ``collect``: the output, seen from this file's directory

    @property
    def dedupes(self) -> bool:
        """Whether rows may be copies of others: the column ``paid_by`` is then ours."""
        return self.publishing.get("dedupe") is True


def footer_json(footer: Footer) -> bytes:
    return to_json(footer, strict=True)


def footer(text: bytes) -> Footer | None:
    try:
        found = from_json(text, Footer)
    except (ValueError, RecursionError):
        return None
    if found.rows.total is None:  # version 0.1 did not say it
        found.rows.total = found.rows.ok + found.rows.error
    return found
