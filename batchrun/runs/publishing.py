"""The journal becomes the output: whole or not at all, and nothing that leaves it is lost."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from batchrun import outputs, process
from batchrun.config import VERSION
from batchrun.errors import BatchrunError
from batchrun.journal import Journal
from batchrun.outputs import Footer, OutputTally
from batchrun.runs import passes
from batchrun.runs.delivery import hosts_of
from batchrun.runs.facts import now_utc, utc
from batchrun.runs.opening import Begun, Found, Opened
from batchrun.runs.plan import Plan
from batchrun.runs.unused import Kept, Unused
from batchrun.series import Series
from batchrun.words import count


class Published(NamedTuple):
    """What the new output says of itself, and where its state still is, if it is."""

    footer: Footer
    reused: int  # of its rows: those settled before this run
    prompt_column: str | None  # under the name it has in the output
    state_dir: str | None
    notes: tuple[str, ...]


def set_aside(begun: Begun, book: Journal | None) -> Kept | None:
    """Keep answers whose rows are gone, before the output changes: they are never nowhere."""
    if begun.config.to_stdout:
        return None
    return Unused.of(begun.config, begun.state, synthetic=begun.config.mock).tend(book)


def back_up(begun: Begun, found: Found) -> Path | None:
    """Where the output now is also, if the new one is to say nothing of it."""
    return outputs.backup(Path(begun.config.output)) if found.old.is_kept else None


def publish(begun: Begun, found: Found, opened: Opened, plan: Plan, series: Series) -> Footer:
    """Write the output from the journal, whole or not at all."""
    config, book = begun.config, opened.book
    footer = Footer(
        batchrun_version=VERSION,
        run_id=book.header.run_id,
        publication=uuid.uuid4().hex,
        synthetic=config.mock,
        inputs=[source.file.name for source in found.sources],
        inputs_digest=found.digest(),
        settings=dict(found.settings),
        publishing=config.publishing_settings(),
        hosts=hosts_of(config, opened),
        started_at=utc(begun.started_at_ms),
        finished_at=now_utc(),
    )
    return outputs.publish(
        found.old.target or process.stdout(),
        config.output_format,
        passes.schema_of(plan),
        passes.slices(plan, book, config, begun.stop.check),
        footer,
        OutputTally(config.price),
        response_body=config.response_body,
        more=outputs.more_columns(footer),
        series=series,
    )


def clear_up(begun: Begun, found: Found, opened: Opened, plan: Plan, footer: Footer) -> Published:
    """Take away what the output has made needless: the state, and what ``collect`` wrote of it."""
    config, state_dir, notes = begun.config, str(begun.state.path), []
    if surrogates := plan.carried.surrogates:
        notes.append(f"{count(surrogates, 'lone surrogate')} in carried columns became U+FFFD")
    # Only there is remembered what went to stdout.
    keeps_state = config.to_stdout and config.state_dir is not None
    if not keeps_state:
        opened.book.close(remember=False)
        begun.lock.remove_state()
    # The output is published: what becomes of a file beside it changes nothing of that.
    with suppress(OSError, BatchrunError):
        if not config.to_stdout and (
            other := outputs.remove_partial(Path(config.output), footer.run_id)
        ):
            notes.append(f"{other} is older than this output; it may be removed")
    return Published(
        footer,
        reused=plan.counts.settled,
        prompt_column=_shown_prompt(found, plan),
        state_dir=state_dir if keeps_state else None,
        notes=tuple(notes),
    )


def _shown_prompt(found: Found, plan: Plan) -> str | None:
    """The output's column that holds the prompts, if it has one."""
    column = found.sources[0].layout.prompt_column
    name = dict(plan.carried.renamed).get(column or "", column)
    return name if name in plan.carried.schema.names else None
