"""What a run amounted to, put together from the phases that it went through."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from batchrun import console
from batchrun.config import VERSION
from batchrun.errors import EXIT_OK, EXIT_ROWS_FAILED, BatchrunError
from batchrun.outputs import Footer
from batchrun.runs.delivery import Sent
from batchrun.runs.facts import now_utc, utc
from batchrun.runs.opening import Begun, Opened
from batchrun.runs.plan import Plan
from batchrun.runs.publishing import Published
from batchrun.runs.unused import Kept, counts_of
from batchrun.secret import hidden_in_url
from batchrun.summary import OutputTotals, RowCounts, RunSummary
from batchrun.words import count


class Phases(NamedTuple):
    """What the phases that a run went through have made; an early end has fewer."""

    opened: Opened | None = None
    plan: Plan | None = None
    sent: Sent | None = None
    kept: Kept | None = None
    backup: Path | None = None


def early(cause: BatchrunError, begun: Begun, phases: Phases) -> RunSummary:
    """The end of a run that published nothing."""
    config, plan, sent = begun.config, phases.plan, phases.sent
    keeps_state = config.state_dir is not None or not config.to_stdout
    steps = list(cause.next_steps)
    if not keeps_state:
        steps = ["--state DIR would keep the answers; now they are gone"]
    delivered = sent.delivered if sent else None
    rows = RowCounts()
    if plan is not None and phases.opened is not None:
        rows = plan.counts.rows(delivered, plan.copied(phases.opened.book) if sent else None)
    return _closed(
        replace(
            _summary(begun, phases),
            state=cause.state,
            exit_code=cause.exit_code,
            reason=cause.message,
            state_dir=str(begun.state.path) if keeps_state else None,
            request_models=sorted(filter(None, plan.models)) if plan else [],
            rows=rows,
            errors=delivered.tally.errors if delivered else [],
            next_steps=steps,
        )
    )


def finished(begun: Begun, published: Published, phases: Phases) -> RunSummary:
    """The end of a run that published its output."""
    summary = _summary(begun, phases)
    return _closed(
        replace(
            _of_output(summary, begun, published.footer, published.reused),
            published=True,
            state_dir=published.state_dir,
            prompt_column=published.prompt_column,
            notes=[*summary.notes, *published.notes],
        )
    )


def unchanged(begun: Begun, footer: Footer, kept: Kept | None, notes: Sequence[str]) -> RunSummary:
    """The end of a run that found the output as it would have made it."""
    summary = _summary(begun, Phases(kept=kept))
    summary = replace(summary, notes=[*summary.notes, *notes])
    return _closed(_of_output(summary, begun, footer, footer.rows.ok + footer.rows.error))


def _summary(begun: Begun, phases: Phases) -> RunSummary:
    """What is told alike of every end."""
    config, (opened, plan, sent, kept, backup) = begun.config, phases
    notes = [
        *([config.price_note] if config.price_note else ()),
        *(opened.notes if opened else ()),
        *(plan.warnings if plan else ()),
        *(sent.notes if sent else ()),
        *(kept.notes(config.keep_unused_days) if kept else ()),
    ]
    return RunSummary(
        batchrun_version=VERSION,
        inputs=list(config.inputs),
        output=config.output,
        backup=str(backup) if backup else None,
        unused=counts_of(
            [opened.set_aside if opened else None, kept], plan.taken_back if plan else 0
        ),
        synthetic=config.mock,
        endpoint=hidden_in_url(config.endpoint.url) or None,
        this_run=sent.this_run if sent else None,
        started_at=utc(begun.started_at_ms),
        finished_at=now_utc(),
        wall_s=round(time.monotonic() - begun.started_s, 3),
        notes=notes,
    )


def _of_output(summary: RunSummary, begun: Begun, footer: Footer, reused: int) -> RunSummary:
    """With what is told of an output that is whole, whoever wrote it."""
    rows, allowed = replace(footer.rows, reused=reused), begun.config.allow_failures
    too_many = not allowed.covers(rows.error, rows.total or 0)
    return replace(
        summary,
        state="finished",
        exit_code=EXIT_ROWS_FAILED if too_many else EXIT_OK,
        reason=f"{count(rows.error, 'row')} failed, {allowed} allowed" if too_many else None,
        rows=rows,
        errors=footer.errors,
        request_models=footer.request_models,
        output_totals=OutputTotals(footer.tokens),
    )


def _closed(summary: RunSummary) -> RunSummary:
    return replace(summary, next_steps=summary.next_steps or console.next_steps(summary))
