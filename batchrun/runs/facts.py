"""What a run tells others of itself: before its first request, and while it sends."""

from __future__ import annotations

import os
import socket
import time
from datetime import UTC, datetime

from batchrun.console import FileFacts, StartFacts
from batchrun.journal import Status
from batchrun.runs.asking import model_of
from batchrun.runs.opening import Begun, Found, Opened
from batchrun.runs.plan import Plan
from batchrun.runs.sources import Source


def file_facts(source: Source, rows: int) -> FileFacts:
    """One input as the start block and ``validate`` show it."""
    return FileFacts(
        name=source.file.name,
        format=source.file.format,
        compression=source.file.compression,
        rows=rows,
        size_bytes=source.file.size_bytes,
        shape=source.layout.shape,
        prompt_column=source.layout.prompt_column,
        sent=source.layout.sent,
        carried_only=source.layout.carried_only,
    )


def start_facts(begun: Begun, found: Found, opened: Opened, plan: Plan) -> StartFacts:
    config, counts, endpoint = begun.config, plan.counts, begun.config.endpoint
    held = counts.settled + counts.retried
    return StartFacts(
        files=tuple(file_facts(source, counts.rows_of[source]) for source in found.sources),
        output=config.output,
        rows=counts.total,
        to_send=counts.to_send,
        to_retry=counts.retried,
        answered_before=counts.held_ok + counts.copied.ok,
        failed_before=counts.held_failed + counts.copied.failed,
        invalid=counts.invalid,
        repeats=counts.repeats if config.samples == 1 and not config.dedupe else 0,
        following=counts.following,
        continues_since_ms=(
            opened.book.header.created_at_ms if opened.continues and held else None
        ),
        base_url=endpoint.base_url,
        host=endpoint.host,
        model=model_of(config),
        key_name=endpoint.key_name,
        synthetic=config.mock,
        hosts_before=tuple(host for host in opened.hosts_before if host != endpoint.host),
        renamed=tuple(plan.carried.renamed),
        models_replaced=tuple(sorted(counts.models_replaced)),
        rows_model_replaced=counts.model_replaced,
        rows_params_replaced=tuple(sorted(counts.params_replaced.items())),
        skipped=tuple(found.skipped),
        notes=(*plan.notes, *opened.notes, *plan.warnings),
    )


def status_of(begun: Begun, total: int, ok: int, failed: int) -> Status:
    """What ``batchrun status`` shows of this run now."""
    return Status(
        pid=os.getpid(),
        host=socket.gethostname(),
        started_at_ms=begun.started_at_ms,
        updated_at_ms=int(time.time() * 1000),
        command=begun.config.command,
        inputs=list(begun.config.inputs),
        output=begun.config.output,
        endpoint=begun.config.endpoint.host,
        model=model_of(begun.config),
        total=total,
        ok=ok,
        failed=failed,
        pending=total - ok - failed,
    )


def utc(unix_ms: int) -> str:
    """``2026-11-25T23:30:00Z``"""
    at = datetime.fromtimestamp(unix_ms / 1000, UTC)
    return at.isoformat(timespec="seconds").replace("+00:00", "Z")


def now_utc() -> str:
    return utc(time.time_ns() // 1_000_000)
