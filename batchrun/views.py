"""Look without sending: check an input, tell how a run stands, collect what it has, list models."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from batchrun import inputs, lock, outputs, plan, process, prompts
from batchrun.accounting import OutputTally
from batchrun.config import STDIN, STDOUT, VERSION, OutputFormat, RunConfig
from batchrun.errors import UsageError
from batchrun.inputs import Batch
from batchrun.journal import Held, Journal
from batchrun.outputs import Footer, FooterRows, PublishedRow, Schema, Slice, Target
from batchrun.prompts import Invalid
from batchrun.report import BadRowFacts, CollectFacts, StatusFacts, ValidateFacts
from batchrun.runner import (
    chat_endpoint,
    file_facts,
    has_journal,
    now_utc,
    prompt_settings,
    state_of,
)
from batchrun.saved import Saved, read_saved, restored
from batchrun.secret import hidden_in_url
from batchrun.slots import SlotTable
from batchrun.state import StateDir
from batchrun.types import RowCounts
from batchrun.unused import Unused

SHOWN_BAD_ROWS = 1_000


def look(config: RunConfig) -> None:
    """Find the inputs and what their rows are; UsageError or LocalIOError when that cannot be."""
    files = inputs.resolve(config.inputs, config.input_format)
    plan.lay_out(files.files, prompt_settings(config), config)


def validate(config: RunConfig, show: int = 0) -> ValidateFacts:
    """Build every row's request and send nothing. ``show`` is how many bodies come back whole."""
    with tempfile.TemporaryDirectory(prefix="batchrun-") as directory:
        spool = None
        if STDIN in config.inputs:
            spool = inputs.spool(process.stdin(plan.never_stop), Path(directory))
        files, skipped = inputs.resolve(config.inputs, config.input_format, spool=spool)
        settings = prompt_settings(config)
        sources = plan.lay_out(files, settings, config)
        types, ids = inputs.ColumnTypes(config.carry), inputs.RepeatedIds()
        table = SlotTable()
        rows = repeats = bad = 0
        bad_rows: list[BadRowFacts] = []
        bodies: list[str] = []
        for source, batch in plan.batches(sources, config.limit, observe=types.observe):
            ids.add(batch.rows)
            for line, row in zip(batch.lines, batch.rows, strict=True):
                rows += 1
                source.rows += 1
                built = plan.identified(source.builder, row)
                if isinstance(built, Invalid):
                    bad += 1
                    if len(bad_rows) < SHOWN_BAD_ROWS:
                        place = f"{source.file.name}:{line}"
                        bad_rows.append(BadRowFacts(place, built.reason, built.code))
                    continue
                repeats += table.occurrence(table.claim(built.hash)) > 0
                if len(bodies) < max(show, 1):
                    bodies.append(prompts.encode(built.body).decode())
        carried = types.carried()
        return ValidateFacts(
            files=tuple(file_facts(source) for source in sources),
            rows=rows,
            bad=bad,
            bad_rows=tuple(bad_rows),
            repeats=repeats,
            url=hidden_in_url(config.endpoint.url) if config.endpoint else None,
            renamed=tuple(carried.renamed),
            notes=tuple(plan.notes(sources, carried, ids)),
            skipped=tuple(skipped),
            first_body=bodies[0] if bodies else None,
            bodies=tuple(bodies[:show]),
        )


def status(output: str, state_dir: Path | None = None) -> StatusFacts:
    """How the run of ``output`` stands: running, stopped or finished. UsageError when none is."""
    state = state_of(output, state_dir)
    holder = lock.holder(state)
    told = lock.read_status(state)
    # A state may outlive the publishing: it keeps answers of rows that are gone from the input.
    is_over = holder is None and told is not None and told.state == "finished"
    if holder is not None or (has_journal(state) and not is_over):
        return _unfinished(output, state, holder)
    footer = _footer(output)
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


def _unfinished(output: str, state: Path, holder: lock.Holder | None) -> StatusFacts:
    told = lock.read_status(state)
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


def collect(output: str, state_dir: Path | None = None, target: str | None = None) -> CollectFacts:
    """Write what a run has so far, also beside the running process; or convert what it finished.

    The footer of a collected file says ``complete`` false, so no run takes it for its memory.
    """
    if not Path(output).name:
        raise UsageError(f"{output or 'nothing'}: not the name of an output")
    target = target or str(outputs.partial_of(Path(output)))
    state = state_of(output, state_dir)
    book = Journal.peek(state) if has_journal(state) else None
    if book is None:
        return _converted(output, target)
    with closing(book):
        saved = read_saved(state)
        if saved is None:
            raise UsageError(f"{state}: nothing there says which inputs this run reads")
        return _collected(output, state, target, book, saved)


def _collected(output: str, state: Path, target: str, book: Journal, saved: Saved) -> CollectFacts:
    config = restored(saved)
    spool = StateDir(state).spool() if STDIN in config.inputs else None
    files = inputs.resolve(config.inputs, config.input_format, spool=spool, output=Path(output))
    sources = plan.lay_out(files.files, prompt_settings(config), config)
    planned = plan.make_plan(sources, config, book, plan.never_stop)
    place = _place(target, output, [each.path for each in files.files])
    tally = OutputTally()
    footer = Footer(
        batchrun_version=VERSION,
        run_id=book.header.run_id,
        complete=False,
        synthetic=book.header.synthetic,
        inputs=[source.file.name for source in sources],
        settings=dict(book.header.settings),
        publishing=config.publishing_settings(),
        hosts=saved.hosts,
        finished_at=now_utc(),
    )
    outputs.publish(
        place,
        _format_of(target),
        planned.carried.schema,
        plan.slices(planned, book, config, plan.never_stop),
        footer,
        tally,
        response_body=config.response_body,
    )
    return CollectFacts(
        output=target,
        collected_from=output,
        rows=tally.rows,
        size_bytes=_size(target),
        running=lock.holder(state) is not None,
        synthetic=book.header.synthetic,
        errors=tuple(tally.errors),
        tokens=tally.tokens,
        command=saved.command,
    )


def _converted(output: str, target: str) -> CollectFacts:
    """The finished output in another format."""
    footer = _footer(output)
    if footer is None:
        raise UsageError(f"{output}: no run and no output of batchrun there")
    place = _place(target, output, map(Path, footer.inputs))
    tally = OutputTally()
    schema, slices = _published_slices(Path(output))
    outputs.publish(
        place,
        _format_of(target),
        schema,
        slices,
        footer,
        tally,
        response_body=bool(footer.publishing.get("response_body", True)),
    )
    return CollectFacts(
        output=target,
        collected_from=output,
        rows=tally.rows,
        size_bytes=_size(target),
        complete=footer.complete,
        synthetic=footer.synthetic,
        errors=tuple(tally.errors),
        tokens=tally.tokens,
    )


def _published_slices(output: Path) -> tuple[Schema, Iterator[Slice]]:
    if output.suffix == ".parquet":
        return outputs.slices_of(output)
    # A JSONL output has values but no types: they are found as for any JSONL input.
    file = inputs.resolve([str(output)]).files[0]
    types = inputs.ColumnTypes(None)
    for rows in _batched(outputs.published_rows(output), inputs.BATCH_ROWS):
        types.observe(file, Batch(range(len(rows)), [row.carried for row in rows], None))
    carried = types.carried()
    slices = (
        Slice(
            carried.from_rows([row.carried for row in rows]),
            [row.custom_id for row in rows],
            [row.source for row in rows],
            [row.outcome for row in rows],
        )
        for rows in _batched(outputs.published_rows(output), inputs.BATCH_ROWS)
    )
    return carried.schema, slices


def _batched(rows: Iterator[PublishedRow], size: int) -> Iterator[list[PublishedRow]]:
    while batch := list(islice(rows, size)):
        yield batch


async def models(config: RunConfig) -> list[str]:
    """The model names that the endpoint offers to this key."""
    async with chat_endpoint(config) as (endpoint, _):
        return await endpoint.models()


def _footer(output: str) -> Footer | None:
    path = Path(output)
    return outputs.recognise(path) if path.is_file() else None


def _place(target: str, output: str, inputs: Iterable[Path]) -> Target | BinaryIO:
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


def _format_of(target: str) -> OutputFormat:
    return "parquet" if target.endswith(".parquet") else "jsonl"


def _size(target: str) -> int | None:
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
