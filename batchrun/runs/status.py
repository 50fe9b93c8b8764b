"""``batchrun status``: how the run of an output stands."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from pathlib import Path

from msgspec.structs import replace

from batchrun import outputs
from batchrun.console import StatusFacts
from batchrun.errors import UsageError
from batchrun.journal import Held, Holder, Journal, StateDir, holder, read_saved, read_status
from batchrun.outputs import Footer
from batchrun.runs import objects
from batchrun.runs.place import state_of
from batchrun.runs.unused import Unused
from batchrun.summary import RowCounts


def status(output: str, state_dir: Path | None = None) -> StatusFacts:
    """How the run of ``output`` stands: running, stopped or finished. UsageError when none is."""
    with objects.at_hand(output) as local:
        return replace(_status(local, state_dir), output=output)


def _status(output: str, state_dir: Path | None) -> StatusFacts:
    state = state_of(output, state_dir)
    held_by = holder(state)
    if held_by is not None or state.has_journal():
        return _unfinished(output, state, held_by)
    footer = footer_of(output)
    if footer is None:
        raise UsageError(f"{output}: no run and no output of batchrun there")
    unused = Unused(Path(output), synthetic=footer.synthetic, keep_days=None).kept
    return StatusFacts(
        state="finished",
        output=output,
        rows=footer.rows,
        finished_at_ms=_unix_ms(footer.finished_at),
        models=tuple(footer.request_models),
        endpoint_hosts=tuple(footer.hosts),
        errors=tuple(footer.errors),
        tokens=footer.tokens,
        synthetic=footer.synthetic,
        unused_answers=unused.answers,
        unused_file=str(unused.file) if unused.file else None,
    )


def _unfinished(output: str, state: StateDir, holder: Holder | None) -> StatusFacts:
    told = read_status(state)
    saved = read_saved(state)
    if told is not None and (holder is not None or told.state == "stopped"):
        # A process says more than its journal: rows of invalid input too, and while it runs,
        # reading that would slow it down. One that was killed said nothing at its end.
        rows = RowCounts(total=told.total, ok=told.ok, error=told.failed, pending=told.pending)
    else:
        rows = _held_rows(state, told.total if told else None)
    return StatusFacts(
        state="running" if holder is not None else "stopped",
        output=output,
        rows=rows,
        pid=holder.pid if holder else None,
        host=holder.host if holder else None,
        started_at_ms=holder.since_ms if holder else told.started_at_ms if told else None,
        updated_at_ms=told.updated_at_ms if told else None,
        finished_at_ms=told.updated_at_ms if told and holder is None else None,
        rows_per_s=told.rows_per_s if told else None,
        in_flight=told.in_flight if told else None,
        bound_by=told.bound_by if told else None,
        exit_code_of_run=told.exit_code if told else None,
        reason=told.reason if told else None,
        command=saved.command if saved else None,
        models=(told.model,) if told and told.model else (),
        endpoint_hosts=tuple(saved.hosts) if saved else (),
        synthetic=bool(saved and saved.mock),
    )


def _held_rows(state: StateDir, total: int | None) -> RowCounts:
    book = Journal.peek(state)
    if book is None:
        return RowCounts(total=total)
    with closing(book):
        ok = book.count(Held.OK)
        passing = book.count(Held.PASSING)
        failed = book.count(Held.REJECTED) + passing
    pending = max(total - ok - failed, 0) if total is not None else 0
    return RowCounts(total=total, ok=ok, error=failed, passing=passing, pending=pending)


def footer_of(output: str) -> Footer | None:
    path = Path(output)
    return outputs.recognise(path) if path.is_file() else None


def _unix_ms(text: str) -> int | None:
    return int(datetime.fromisoformat(text).timestamp() * 1000) if text else None
