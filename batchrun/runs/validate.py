"""``batchrun validate``: what the input is, and what would be sent."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from batchrun import chat, inputs, process
from batchrun.addresses import is_address
from batchrun.chat import Invalid
from batchrun.config import STDIN, RunConfig
from batchrun.console import BadRowFacts, ValidateFacts
from batchrun.journal import SlotTable, StateDir
from batchrun.runs import objects
from batchrun.runs.asking import prompt_settings
from batchrun.runs.facts import file_facts
from batchrun.runs.plan import notes, taken_names
from batchrun.runs.sources import Source, batches, choose, identified, lay_out, never_stop
from batchrun.secret import hidden_in_url

SHOWN_BAD_ROWS = 1_000


def validate(config: RunConfig, show: int = 0) -> ValidateFacts:
    """Build every row's request and send nothing. ``show`` is how many bodies come back whole."""
    with objects.inputs_at_hand(config) as local:
        return _validate(local, show)


def _validate(config: RunConfig, show: int) -> ValidateFacts:
    with tempfile.TemporaryDirectory(prefix="batchrun-") as directory:
        spool = None
        if STDIN in config.inputs:
            spool = inputs.spool(process.stdin(never_stop), StateDir(Path(directory)))
        files, skipped = objects.named(
            inputs.resolve(config.inputs, config.input_format, spool=spool)
        )
        settings = prompt_settings(config)
        sources = lay_out(files, settings, config)
        taken = taken_names(config)
        types, ids = inputs.ColumnTypes(config.carry, taken), inputs.RepeatedIds()
        table = SlotTable()
        rows_of = Counter[Source]()
        repeats = bad = 0
        bad_rows: list[BadRowFacts] = []
        bodies: list[str] = []
        chosen = choose(sources, config, never_stop)
        for source, batch in batches(sources, chosen, observe=types.observe):
            ids.add(batch.rows[:: chosen.samples])
            rows_of[source] += len(batch)
            for line, row in zip(batch.lines, batch.rows, strict=True):
                built = identified(source.builder, row)
                if isinstance(built, Invalid):
                    bad += 1
                    if len(bad_rows) < SHOWN_BAD_ROWS:
                        place = f"{source.file.name}:{line}"
                        bad_rows.append(BadRowFacts(place, built.reason, built.code))
                    continue
                repeats += table.occurrence(table.claim(built.hash)) >= chosen.samples
                if len(bodies) < max(show, 1):
                    bodies.append(chat.encode(built.body).decode())
        carried = types.carried()
        return ValidateFacts(
            files=tuple(file_facts(source, rows_of[source]) for source in sources),
            rows=rows_of.total(),
            bad=bad,
            bad_rows=tuple(bad_rows),
            repeats=repeats,
            dedupe=config.dedupe,
            url=hidden_in_url(config.endpoint.url) or None,
            renamed=tuple(carried.renamed),
            notes=tuple(notes(sources, carried, ids)),
            skipped=tuple(skipped),
            first_body=bodies[0] if bodies else None,
            bodies=tuple(bodies[:show]),
        )


def look(config: RunConfig) -> None:
    """Find the inputs and what their rows are; UsageError or LocalIOError when that cannot be.

    What comes on stdin is not looked at: it can be read only once.
    """
    if STDIN not in config.inputs and not any(map(is_address, config.inputs)):
        files = objects.named(inputs.resolve(config.inputs, config.input_format))
        lay_out(files.files, prompt_settings(config), config)
