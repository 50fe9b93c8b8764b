"""``batchrun collect``: what is there so far, as a file of its own."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from msgspec.structs import replace

from batchrun import inputs, outputs, process
from batchrun.addresses import is_address
from batchrun.config import STDIN, STDOUT, VERSION, OutputFormat, output_format
from batchrun.console import CollectFacts
from batchrun.errors import UsageError
from batchrun.inputs import Batch
from batchrun.journal import Journal, Saved, StateDir, holder, read_saved, restored
from batchrun.money import Price
from batchrun.outputs import Footer, OutputTally, Schema, Slice, Table, Target
from batchrun.runs import objects, passes
from batchrun.runs.asking import prompt_settings
from batchrun.runs.facts import now_utc
from batchrun.runs.place import state_of
from batchrun.runs.plan import make_plan, with_copies
from batchrun.runs.sources import lay_out, never_stop
from batchrun.runs.status import footer_of


def collect(output: str, state_dir: Path | None = None, target: str | None = None) -> CollectFacts:
    """Write what a run has so far, also beside the running process; or convert what it finished.

    The footer of a collected file says ``complete`` false, so no run takes it for its memory.
    """
    if not Path(output).name:
        raise UsageError(f"{output or 'nothing'}: not the name of an output")
    if is_address(output) and (target is None or is_address(target)):
        raise UsageError("collect writes a local file: name it with -o")
    with objects.at_hand(output) as local:
        return replace(_collect(local, state_dir, target), collected_from=output)


def _collect(output: str, state_dir: Path | None, target: str | None) -> CollectFacts:
    target = target or str(outputs.partial_of(Path(output)))
    state = state_of(output, state_dir)
    book = Journal.peek(state)
    if book is None:
        return _converted(output, target)
    with closing(book):
        saved = read_saved(state)
        if saved is None:
            raise UsageError(f"{state.path}: nothing there says which inputs this run reads")
        return _collected(output, state, target, book, saved)


def _collected(
    output: str, state: StateDir, target: str, book: Journal, saved: Saved
) -> CollectFacts:
    config = restored(saved)
    spool = state.spool() if STDIN in config.inputs else None
    files = objects.named(
        inputs.resolve(config.inputs, config.input_format, spool=spool, output=Path(output))
    )
    sources = lay_out(files.files, prompt_settings(config), config)
    planned = with_copies(make_plan(sources, config, book, never_stop), book, config)
    place = _target_of(target, output, book.header.run_id, [each.path for each in files.files])
    tally = OutputTally(config.price)
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
        collected_from=_origin(output, target),
    )
    outputs.publish(
        place,
        _format_of(target),
        passes.schema_of(planned),
        passes.slices(planned, book, config, never_stop),
        footer,
        tally,
        response_body=config.response_body,
        more=outputs.more_columns(footer),
    )
    return CollectFacts(
        output=target,
        collected_from=output,
        rows=tally.rows,
        size_bytes=_size_bytes(target),
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
    place = _target_of(target, output, footer.run_id, map(Path, footer.inputs))
    footer = replace(footer, collected_from=_origin(output, target))
    tally = OutputTally(Price.remembered(footer.publishing))
    schema, slices = _published_slices(Path(output))
    outputs.publish(
        place,
        _format_of(target),
        schema,
        slices,
        footer,
        tally,
        response_body=bool(footer.publishing.get("response_body", True)),
        more=outputs.more_columns(footer),
    )
    return CollectFacts(
        output=target,
        collected_from=output,
        rows=tally.rows,
        size_bytes=_size_bytes(target),
        complete=footer.complete,
        synthetic=footer.synthetic,
        errors=tuple(tally.errors),
        tokens=tally.tokens,
    )


def read(output: str, columns: Sequence[str] | None = None) -> Table:
    """The published output as one Arrow table; UsageError for what is none of batchrun's."""
    with objects.at_hand(output) as local:
        return _read(local, columns)


def _read(output: str, columns: Sequence[str] | None) -> Table:
    path = Path(output)
    footer = footer_of(output)
    if footer is None:
        raise UsageError(f"{output}: no output of batchrun there")
    if path.suffix == ".parquet":
        return outputs.table_of(path, columns)
    schema, slices = _published_slices(path)
    made = io.BytesIO()
    tally = OutputTally(Price.remembered(footer.publishing))
    more = outputs.more_columns(footer)
    outputs.publish(made, "parquet", schema, slices, footer, tally, response_body=True, more=more)
    made.seek(0)
    return outputs.table_of(made, columns)


def _published_slices(output: Path) -> tuple[Schema, Iterator[Slice]]:
    if output.suffix == ".parquet":
        return outputs.slices_of(output)
    # A JSONL output has values but no types: they are found as for any JSONL input.
    file = objects.named(inputs.resolve([str(output)])).files[0]
    types = inputs.ColumnTypes(None, outputs.NAMES)
    for piece in outputs.untyped_slices(output):
        types.observe(file, Batch(range(len(piece.carried)), [*piece.carried], None))
    carried = types.carried()
    slices = (
        piece.rows._replace(carried=carried.from_rows([*piece.carried]))
        for piece in outputs.untyped_slices(output)
    )
    return carried.schema, slices


def _origin(output: str, target: str) -> str:
    """How a file at ``target`` names the output it was collected from, also after both moved."""
    if target == STDOUT:
        return ""
    return os.path.relpath(os.path.realpath(output), os.path.dirname(os.path.realpath(target)))


def _target_of(target: str, output: str, run_id: str, inputs: Iterable[Path]) -> Target | BinaryIO:
    """Where to write. UsageError when it is the output, an input, or not ours to replace.

    Ours is what was collected of this output before, and what its very run wrote.
    """
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
        there = outputs.recognise(path)
        if there is None:
            raise UsageError(f"-o {target}: exists and was not written by batchrun; name another")
        of_this = there.run_id == run_id or there.collected_from == _origin(output, target)
        older = not there.complete and path == outputs.partial_of(Path(output))
        if not (of_this or older):
            raise UsageError(f"-o {target}: holds the answers of another output; name another file")
    return place


def _format_of(target: str) -> OutputFormat:
    return "csv" if target.endswith(".csv") else output_format(target)


def _size_bytes(target: str) -> int | None:
    return None if target == STDOUT else Path(target).stat().st_size
