"""The lines before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

from batchrun.console.blocks import (
    labelled,
    local_time,
    names,
    output_name,
    some,
)
from batchrun.console.facts import FileFacts, StartFacts
from batchrun.terminal import LABEL_WIDTH, WIDTH
from batchrun.words import count, verb


def start_block(facts: StartFacts) -> str:
    """The lines of a terminal before anything is sent."""
    first = f"{names(facts.files)} -> {output_name(facts.output)}"
    if facts.continues_since_ms is not None:
        since = local_time(facts.continues_since_ms)
        first += f"   (continues the run of {since})"
    lines = [
        first,
        *_row_lines(facts),
        *columns(facts.files),
        *labelled("endpoint", _endpoint(facts)),
    ]
    if facts.key_name is not None:
        lines += labelled("key", facts.key_name)
    for note in _start_notes(facts):
        lines += labelled("note", note)
    return "\n".join(lines)


def start_lines(facts: StartFacts) -> list[str]:
    """The first lines of a log; the caller puts the time in front."""
    files = f"start {names(facts.files)} -> {output_name(facts.output)}, {count(facts.rows, 'row')}"
    where = "mock (synthetic answers)" if facts.synthetic else facts.host
    plan = [f"{facts.answered_before:,} reused", f"{facts.to_send:,} to send"]
    if facts.failed_before:
        plan.append(f"{facts.failed_before:,} failed before")
    if facts.following:
        plan.append(f"{facts.following:,} the same as others")
    if facts.invalid:
        plan.append(f"{facts.invalid:,} invalid")
    return [files, ", ".join([*plan, where]), *(f"note {note}" for note in _start_notes(facts))]


def _row_lines(facts: StartFacts) -> list[str]:
    plan, shape = _row_plan(facts), _shape_words(facts.files)
    if LABEL_WIDTH + len(plan + shape) <= WIDTH:
        return labelled("rows", plan + shape)
    return [*labelled("rows", plan), *labelled("", shape.strip())]


def _row_plan(facts: StartFacts) -> str:
    if not facts.rows:
        return "0"
    if facts.to_send == facts.rows and not facts.to_retry:
        return f"{facts.rows:,}, all to send"
    parts = [f"{facts.answered_before:,} answered before"] if facts.answered_before else []
    if facts.failed_before:
        parts.append(f"{facts.failed_before:,} failed before")
    if facts.invalid:
        parts.append(f"{facts.invalid:,} invalid")
    again = f" ({facts.to_retry:,} of them again)" if facts.to_retry else ""
    parts.append(f"{facts.to_send:,} to send{again}" if facts.to_send else "nothing to send")
    if facts.following:
        parts.append(f"{facts.following:,} the same as others of them")
    return f"{facts.rows:,}: {', '.join(parts)}"


def _shape_words(files: Sequence[FileFacts]) -> str:
    words = dict.fromkeys(shape(file) for file in files)
    return f" (shape {'; '.join(words)})" if words else ""


def shape(file: FileFacts) -> str:
    return file.shape + (f', column "{file.prompt_column}"' if file.prompt_column else "")


def columns(files: Sequence[FileFacts]) -> list[str]:
    """One line for each distinct set of columns; a file is named only where they differ."""
    distinct = {(file.sent, file.carried_only): file for file in files}
    lines = []
    for (sent, carried), file in distinct.items():
        text = ", ".join(sent) or "nothing"
        if carried:
            text = f"{text:<16}  carried only: {', '.join(carried)}"
        if len(distinct) > 1:
            text += f"  ({file.name})"
        lines += labelled("sent", text)
    return lines


def _endpoint(facts: StartFacts) -> str:
    if facts.synthetic:
        return "mock, inside this process: no network, synthetic answers"
    return facts.base_url + (f"   model {facts.model}" if facts.model else "   model from the rows")


def _start_notes(facts: StartFacts) -> list[str]:
    notes = [f'input column "{old}" is carried as "{new}"' for old, new in facts.renamed]
    if facts.repeats:
        notes.append(
            f"{count(facts.repeats, 'row')} {verb(facts.repeats, 'repeat')} an earlier request"
            " (each is sent)"
        )
    if facts.rows_model_replaced:
        replaced = some(facts.models_replaced) or "the model"
        notes.append(f"--model replaces {replaced} in {count(facts.rows_model_replaced, 'row')}")
    notes += [
        f"--param {name} replaces the row's own in {count(rows, 'row')}"
        for name, rows in facts.rows_params_replaced
    ]
    if facts.over_limit:
        notes.append(f"--limit leaves out {count(facts.over_limit, 'row')}")
    if facts.hosts_before:
        notes.append(f"the answers held came from {some(facts.hosts_before)}, not {facts.host}")
    if facts.skipped:
        notes.append(f"not read: {some(facts.skipped)}")
    return [*notes, *facts.notes]
