"""The texts of validate, status and collect."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from batchrun import terminal
from batchrun.config import INPUT_FORMATS, STDOUT
from batchrun.console.after import causes, cost_words, example, token_words
from batchrun.console.blocks import (
    cut,
    labelled,
    local_day,
    nexts,
    place,
    some,
    with_exit_code,
)
from batchrun.console.facts import (
    CollectFacts,
    FileFacts,
    MergeFacts,
    ReportFacts,
    StatusFacts,
    ValidateFacts,
)
from batchrun.console.start import columns, shape
from batchrun.summary import ErrorCount, RowCounts
from batchrun.terminal import LABEL_WIDTH
from batchrun.words import count, duration, rate, size, verb


def validate_block(facts: ValidateFacts) -> str:
    lines = []
    for file in facts.files:
        lines += labelled("file", _file_words(file))
        lines += labelled("shape", shape(file).replace(", column", " (column") + _closing(file))
    lines += columns(facts.files)
    lines += _bad_rows(facts)
    if facts.repeats:
        repeat = verb(facts.repeats, "repeat")
        once = " (not sent: --dedupe)" if facts.dedupe else ""
        words = f"{count(facts.repeats, 'row')} {repeat} an earlier request{once}"
        lines += labelled("repeats", words)
    for old, new in facts.renamed:
        lines += labelled("note", f'input column "{old}" is carried as "{new}"')
    if facts.skipped:
        lines += labelled("note", f"not read: {some(facts.skipped)}")
    for note in facts.notes:
        lines += labelled("note", note)
    if facts.first_body is not None:
        lines += labelled("request", f"POST {facts.url}" if facts.url else "to the mock endpoint")
        lines.append(cut(f"{'':<{LABEL_WIDTH}}{facts.first_body}"))
    lines += labelled("sent", "nothing")
    return "\n".join(with_exit_code(lines, facts.exit_code))


def _file_words(file: FileFacts) -> str:
    kind = INPUT_FORMATS[file.format].label
    packed = f" ({file.compression})" if file.compression else ""
    bytes_ = f", {size(file.size_bytes)}" if file.size_bytes is not None else ""
    return f"{file.name}, {kind}{packed}, {count(file.rows, 'row')}{bytes_}"


def _closing(file: FileFacts) -> str:
    return ")" if file.prompt_column else ""


def _bad_rows(facts: ValidateFacts) -> list[str]:
    if not facts.bad:
        return []
    one_file = len(facts.files) == 1
    places = [place(row.source) if one_file else row.source for row in facts.bad_rows]
    width = max([9, *map(len, places)]) + 2
    lines = labelled("bad", count(facts.bad, "row"))
    for where, row in zip(places, facts.bad_rows, strict=True):
        lines.append(f"{'':<{LABEL_WIDTH}}{where:<{width}}{terminal.one_line(row.reason)}")
    if (more := facts.bad - len(facts.bad_rows)) > 0:
        lines.append(f"{'':<{LABEL_WIDTH}}... and {more:,} more")
    return lines


def status_block(facts: StatusFacts) -> str:
    blocks = {"running": _running, "stopped": _stopped, "finished": _was_finished}
    return "\n".join(blocks[facts.state](facts))


def watched(found: Sequence[StatusFacts]) -> str:
    """One run as ``status`` shows it, several as a line each."""
    if len(found) == 1:
        return status_block(found[0])
    shown = [*found, _together(found)]
    width = max(len(facts.output) for facts in shown)
    lines = []
    for facts in shown:
        speed = ""
        if facts.state == "running" and facts.rows_per_s is not None:
            speed = f"; {_speed_words(facts, facts.rows_per_s)}"
        lines.append(
            f"{facts.output:<{width}}  {facts.state:<8}  {_status_rows(facts.rows)}{speed}"
        )
    return "\n".join(lines)


def _together(found: Sequence[StatusFacts]) -> StatusFacts:
    """All of them as if they were one."""
    rows = RowCounts(total=0)
    for each in found:
        rows.total = (
            None
            if rows.total is None or each.rows.total is None
            else (rows.total + each.rows.total)
        )
        rows.ok += each.rows.ok
        rows.error += each.rows.error
        rows.pending += each.rows.pending
    running = [each for each in found if each.state == "running"]
    speeds = [each.rows_per_s for each in running if each.rows_per_s is not None]
    return StatusFacts(
        state="running" if running else found[0].state if found else "finished",
        output="together",
        rows=rows,
        rows_per_s=sum(speeds) if speeds else None,
        in_flight=sum(each.in_flight or 0 for each in running) if running else None,
    )


def _running(facts: StatusFacts) -> list[str]:
    who = f"pid {facts.pid}" if facts.pid else "another process"
    if facts.host:
        who += f" on {facts.host}"
    if facts.started_at_ms is not None:
        who += f" since {_since(facts.started_at_ms, facts.updated_at_ms)}"
    lines = [*labelled("running", who), *labelled("rows", _status_rows(facts.rows))]
    if facts.rows_per_s is not None:
        lines += labelled("speed", _speed_words(facts, facts.rows_per_s))
    return lines


def _since(started_at_ms: int, updated_at_ms: int | None) -> str:
    started = datetime.fromtimestamp(started_at_ms / 1000).astimezone()
    if updated_at_ms is None:
        return local_day(started_at_ms)
    same_day = datetime.fromtimestamp(updated_at_ms / 1000).astimezone().date() == started.date()
    clock = f"{started:%H:%M}" if same_day else local_day(started_at_ms)
    return f"{clock} ({duration((updated_at_ms - started_at_ms) / 1000)})"


def _speed_words(facts: StatusFacts, rows_per_s: float) -> str:
    words = f"{rate(rows_per_s)} rows/s"
    if facts.in_flight is not None:
        words += f", {facts.in_flight:,} in flight"
    if facts.bound_by:
        words += f", bound by the {facts.bound_by}"
    if rows_per_s > 0 and facts.rows.pending:
        words += f"; ETA {duration(facts.rows.pending / rows_per_s)}"
    return words


def _stopped(facts: StatusFacts) -> list[str]:
    when = f"{local_day(facts.finished_at_ms)}, " if facts.finished_at_ms is not None else ""
    code = f" (exit code {facts.exit_code_of_run})" if facts.exit_code_of_run is not None else ""
    return [
        *labelled("stopped", f"{when}{facts.reason or 'unfinished'}{code}"),
        *labelled("rows", _status_rows(facts.rows)),
        *nexts([facts.command or "the command that made it, again"]),
    ]


def _was_finished(facts: StatusFacts) -> list[str]:
    when = f"{local_day(facts.finished_at_ms)}" if facts.finished_at_ms is not None else "a run"
    model = f", {some(facts.models)}" if facts.models else ""
    hosts = f" at {some(facts.endpoint_hosts)}" if facts.endpoint_hosts else ""
    synthetic = ", synthetic answers" if facts.synthetic else ""
    lines = labelled("finished", f"{when}{model}{hosts}{synthetic}")
    lines += labelled("rows", _finished_rows(facts.rows, facts.errors))
    lines += [cut(f"{'':<{LABEL_WIDTH}}{example(c)}") for c in facts.errors[:1] if c.example]
    if facts.tokens is not None and (words := token_words(facts.tokens)) is not None:
        lines += labelled("tokens", words)
        if (cost := cost_words(facts.tokens)) is not None:
            lines += labelled("cost", cost)
    if facts.unused_answers:
        held = count(facts.unused_answers, "answer")
        lines += labelled("unused", f"{held} of rows gone from the input in {facts.unused_file}")
    return lines


def _status_rows(rows: RowCounts) -> str:
    of = f" of {rows.total:,}" if rows.total is not None else ""
    return f"{rows.ok:,}{of} answered, {rows.error:,} failed, {rows.pending:,} waiting"


def _finished_rows(rows: RowCounts, causes: Sequence[ErrorCount]) -> str:
    copied = f" ({rows.copied:,} of them by an equal row's answer)" if rows.copied else ""
    if not rows.error:
        return f"{rows.ok:,} answered{copied}"
    by_kind: dict[str, int] = {}
    for cause in causes:
        by_kind[cause.kind] = by_kind.get(cause.kind, 0) + cause.rows
    kinds = ", ".join(f"{rows:,} {kind}" for kind, rows in by_kind.items())
    return f"{rows.ok:,} answered, {rows.error:,} failed" + (f" ({kinds})" if kinds else "")


def _written(label: str, facts: CollectFacts | MergeFacts) -> list[str]:
    lines = labelled(label, _status_rows(facts.rows))
    lines += causes(facts.errors, ())
    if facts.tokens is not None and (words := token_words(facts.tokens)) is not None:
        lines += labelled("tokens", words)
        if (cost := cost_words(facts.tokens)) is not None:
            lines += labelled("cost", cost)
    if facts.synthetic:
        lines += labelled("note", "synthetic answers")
    return lines


def merge_block(facts: MergeFacts) -> str:
    lines = _written("merged", facts)
    lines += labelled("from", count(len(facts.parts), "part"))
    lines += labelled("output", f"{facts.output} ({size(facts.size_bytes)})")
    return "\n".join(lines)


def report_block(facts: ReportFacts) -> str:
    made = f"{facts.page} ({size(facts.size_bytes)}), of {count(facts.rows.total or 0, 'row')}"
    return "\n".join(labelled("page", made))


def collect_block(facts: CollectFacts) -> str:
    partial = [] if facts.complete else ["partial"]
    details = [*partial, *([size(facts.size_bytes)] if facts.size_bytes is not None else [])]
    lines = _written("collected", facts)
    if facts.output != STDOUT:
        lines += labelled("output", facts.output + (f" ({', '.join(details)})" if details else ""))
    if facts.running:
        lines += labelled("note", "the run goes on; this is what it held a moment ago")
    elif not facts.complete:
        lines += nexts([facts.command or "the same submit command continues the run"])
    return "\n".join(lines)
