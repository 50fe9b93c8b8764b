"""``batchrun collect``: what is there so far, as a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from batchrun import inputs, outputs
from batchrun.config import STDIN, VERSION
from batchrun.console import CollectFacts
from batchrun.errors import UsageError
from batchrun.inputs import Batch
from batchrun.journal import Journal, Saved, StateDir, holder, read_saved, restored
from batchrun.outputs import Footer, OutputTally, Schema, Slice
from batchrun.runs import plan
from batchrun.runs.opening import has_journal, now_utc, prompt_settings, state_of
from batchrun.runs.status import footer_of, format_of, place_of, size


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
    place = place_of(target, output, [each.path for each in files.files])
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
        format_of(target),
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
        size_bytes=size(target),
        running=holder(state) is not None,
        synthetic=book.header.synthetic,
        errors=tuple(tally.errors),
        tokens=tally.tokens,
        command=saved.command,
    )


def _converted(output: str, target: str) -> CollectFacts:
    """The finished output in another format."""
    footer = footer_of(output)
    if footer is None:
        raise UsageError(f"{output}: no run and no output of batchrun there")
    place = place_of(target, output, map(Path, footer.inputs))
    tally = OutputTally()
    schema, slices = _published_slices(Path(output))
    outputs.publish(
        place,
        format_of(target),
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
        size_bytes=size(target),
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
    types = inputs.ColumnTypes(None, outputs.NAMES)
    for piece in outputs.untyped_slices(output):
        types.observe(file, Batch(range(len(piece.carried)), [*piece.carried], None))
    carried = types.carried()
    slices = (
        piece.rows._replace(carried=carried.from_rows([*piece.carried]))
        for piece in outputs.untyped_slices(output)
    )
    return carried.schema, slices
