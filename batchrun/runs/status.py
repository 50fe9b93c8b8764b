"""``batchrun status``: how the run of an output stands."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from batchrun import inputs, outputs, process
from batchrun.config import STDIN, STDOUT, OutputFormat, RunConfig
from batchrun.console import StatusFacts
from batchrun.errors import UsageError
from batchrun.journal import Held, Holder, Journal, holder, read_saved, read_status
from batchrun.outputs import Footer, FooterRows, Target
from batchrun.runs import plan
from batchrun.runs.opening import has_journal, prompt_settings, state_of
from batchrun.runs.unused import Unused
from batchrun.summary import RowCounts


def look(config: RunConfig) -> None:
    """Find the inputs and what their rows are; UsageError or LocalIOError when that cannot be.

    What comes on stdin is not looked at: it can be read only once.
    """
    if STDIN in config.inputs:
        return
    files = inputs.resolve(config.inputs, config.input_format)
    plan.lay_out(files.files, prompt_settings(config), config)


def status(output: str, state_dir: Path | None = None) -> StatusFacts:
    """How the run of ``output`` stands: running, stopped or finished. UsageError when none is."""
    state = state_of(output, state_dir)
    held_by = holder(state)
    told = read_status(state)
    # A state may outlive the publishing: it keeps answers of rows that are gone from the input.
    is_over = held_by is None and told is not None and told.state == "finished"
    if held_by is not None or (has_journal(state) and not is_over):
        return _unfinished(output, state, held_by)
    footer = footer_of(output)
    if footer is None:
        raise UsageError(f"{output}: no run and no output of batchrun there")
    unused = Unused(Path(output), synthetic=footer.synthetic, keep_days=None).kept
    return StatusFacts(
        state="finished",
        output=output,
        rows=_row_counts(footer.rows),
        finished_at_ms=_unix_ms(footer.finished_at),
        models=tuple(footer.request_models),
        endpoint_hosts=tuple(footer.hosts),
        errors=tuple(footer.errors),
        tokens=footer.tokens,
        synthetic=footer.synthetic,
        unused_answers=unused.answers,
        unused_file=str(unused.file) if unused.file else None,
    )


def _unfinished(output: str, state: Path, holder: Holder | None) -> StatusFacts:
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


def _held_rows(state: Path, total: int | None) -> RowCounts:
    book = Journal.peek(state)
    if book is None:
        return RowCounts(total=total)
    with closing(book):
        ok = book.count(Held.OK)
        failed = book.count(Held.REJECTED) + book.count(Held.PASSING)
    pending = max(total - ok - failed, 0) if total is not None else 0
    return RowCounts(total=total, ok=ok, error=failed, pending=pending)


def footer_of(output: str) -> Footer | None:
    path = Path(output)
    return outputs.recognise(path) if path.is_file() else None


def place_of(target: str, output: str, inputs: Iterable[Path]) -> Target | BinaryIO:
    """Where to write. UsageError when it is the output, an input, or not batchrun's to replace."""
    if target == STDOUT:
        return process.stdout()
    path = Path(target)
    if os.path.realpath(target) == os.path.realpath(output):
        raise UsageError(f"-o {target}: that is the output itself; name another file")
    if path.exists() and not path.is_file():
        raise UsageError(f"-o {target}: that is not a regular file; name another")
    outputs.clean_leftovers(path)
    place = Target.at(path)
    if place.found is not None:
        if any(each.exists() and each.samefile(path) for each in inputs):
            raise UsageError(f"-o {target}: that is an input of this run; name another file")
        if outputs.recognise(path) is None:
            raise UsageError(f"-o {target}: exists and was not written by batchrun; name another")
    return place


def format_of(target: str) -> OutputFormat:
    return "parquet" if target.endswith(".parquet") else "jsonl"


def size(target: str) -> int | None:
    return None if target == STDOUT else Path(target).stat().st_size


def _row_counts(rows: FooterRows) -> RowCounts:
    return RowCounts(
        total=rows.ok + rows.error,
        ok=rows.ok,
        error=rows.error,
        truncated=rows.truncated,
        filtered=rows.filtered,
        empty=rows.empty,
        duplicate=rows.duplicate,
    )


def _unix_ms(text: str) -> int | None:
    return int(datetime.fromisoformat(text).timestamp() * 1000) if text else None
