"""Facts into text: what a person reads before, after and instead of a run, and the JSON beside it.

Every text is at most 80 columns where its names allow: a label in column 1, facts from column 11,
and the exit code at the right end of the last line when it is not 0. Nothing here reads a file or a
terminal, and the clock only to say "today".
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Literal

import msgspec
from msgspec import Struct

from batchrun import errors, shell, terminal
from batchrun.config import STDOUT, RunConfig
from batchrun.types import ErrorCount, RowCounts, RunSummary, State, TokenCounts
from batchrun.words import count, duration, rate, size, verb

WIDTH = 80
LABEL_WIDTH = 10
SHOWN_CAUSES = 8
SHOWN_NAMES = 6


# Facts


class FileFacts(Struct, frozen=True, kw_only=True):
    """One input as it was detected."""

    name: str
    format: str  # "jsonl" or "parquet"
    compression: str = ""
    rows: int = 0
    size_bytes: int | None = None
    shape: str
    prompt_column: str | None = None
    sent: tuple[str, ...] = ()
    carried_only: tuple[str, ...] = ()


class StartFacts(Struct, frozen=True, kw_only=True):
    """What is known when the first request is about to leave."""

    files: tuple[FileFacts, ...]
    output: str
    rows: int
    to_send: int  # everything this run asks for, retries of earlier failures included
    to_retry: int = 0  # of those: rows that failed for a passing reason, or --retry-failed
    answered_before: int = 0
    failed_before: int = 0  # settled failures that stay as they are
    invalid: int = 0
    repeats: int = 0
    over_limit: int = 0  # rows of the input that --limit leaves out
    continues_since_ms: int | None = None  # when the unfinished run began; None: none
    base_url: str
    host: str
    model: str | None = None
    key_name: str | None = None
    synthetic: bool = False
    hosts_before: tuple[str, ...] = ()  # other hosts that gave answers held
    renamed: tuple[tuple[str, str], ...] = ()
    models_replaced: tuple[str, ...] = ()  # row models that --model replaces
    rows_model_replaced: int = 0
    rows_params_replaced: tuple[tuple[str, int], ...] = ()
    skipped: tuple[str, ...] = ()  # files of a directory or glob that were not read
    notes: tuple[str, ...] = ()


class BadRowFacts(Struct, frozen=True):
    source: str  # "prompts.jsonl:812"
    reason: str
    code: str = ""


class ValidateFacts(Struct, frozen=True, kw_only=True):
    """What ``validate`` found; ``bodies`` are the first ones, whole, as they would be sent."""

    files: tuple[FileFacts, ...]
    rows: int
    bad: int = 0
    bad_rows: tuple[BadRowFacts, ...] = ()  # may be fewer than ``bad``: the rest is counted
    repeats: int = 0
    url: str | None = None  # None with --mock
    renamed: tuple[tuple[str, str], ...] = ()
    skipped: tuple[str, ...] = ()
    first_body: str | None = None
    bodies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return errors.EXIT_ROWS_FAILED if self.bad else errors.EXIT_OK


RunState = Literal["running", "stopped", "finished"]


class StatusFacts(Struct, frozen=True, kw_only=True):
    """What ``status`` found: a running process, an unfinished state, or a finished output."""

    state: RunState
    output: str
    rows: RowCounts
    pid: int | None = None
    host: str | None = None  # of the process
    started_at_ms: int | None = None
    updated_at_ms: int | None = None
    finished_at_ms: int | None = None  # also: stopped at
    rows_per_s: float | None = None
    in_flight: int | None = None
    bound_by: str | None = None
    exit_code_of_run: int | None = None
    reason: str | None = None  # why it stopped, "deadline reached"
    command: str | None = None  # to paste
    models: tuple[str, ...] = ()
    endpoint_hosts: tuple[str, ...] = ()
    errors: tuple[ErrorCount, ...] = ()
    tokens: TokenCounts | None = None
    synthetic: bool = False
    unused_answers: int = 0  # of rows gone from the input
    unused_file: str | None = None  # keeps them

    @property
    def exit_code(self) -> int:
        return {
            "running": errors.EXIT_LOCKED,
            "stopped": errors.EXIT_STOPPED,
            "finished": errors.EXIT_OK,
        }[self.state]


class CollectFacts(Struct, frozen=True, kw_only=True):
    """What ``collect`` wrote, and from what."""

    output: str  # written
    collected_from: str
    rows: RowCounts
    size_bytes: int | None = None
    complete: bool = False
    running: bool = False  # a process is still at work on it
    synthetic: bool = False
    errors: tuple[ErrorCount, ...] = ()
    tokens: TokenCounts | None = None
    command: str | None = None  # continues the run

    @property
    def exit_code(self) -> int:
        return errors.EXIT_OK


class FinalFacts(Struct, frozen=True, kw_only=True):
    """What the final block says beyond the summary."""

    output_bytes: int | None = None


# The start


def start_block(facts: StartFacts) -> str:
    """The lines of a terminal before anything is sent."""
    first = f"{_names(facts.files)} -> {_output_name(facts.output)}"
    if facts.continues_since_ms is not None:
        since = local_time(facts.continues_since_ms)
        first += f"   (continues the run of {since})"
    lines = [
        first,
        *_row_lines(facts),
        *_columns(facts.files),
        *_labelled("endpoint", _endpoint(facts)),
    ]
    if facts.key_name is not None:
        lines += _labelled("key", facts.key_name)
    for note in _start_notes(facts):
        lines += _labelled("note", note)
    return "\n".join(lines)


def start_lines(facts: StartFacts) -> list[str]:
    """The first lines of a log; the caller puts the time in front."""
    files = (
        f"start {_names(facts.files)} -> {_output_name(facts.output)}, {count(facts.rows, 'row')}"
    )
    where = "mock (synthetic answers)" if facts.synthetic else facts.host
    plan = [f"{facts.answered_before:,} reused", f"{facts.to_send:,} to send"]
    if facts.failed_before:
        plan.append(f"{facts.failed_before:,} failed before")
    if facts.invalid:
        plan.append(f"{facts.invalid:,} invalid")
    return [files, ", ".join([*plan, where]), *(f"note {note}" for note in _start_notes(facts))]


def _row_lines(facts: StartFacts) -> list[str]:
    plan, shape = _row_plan(facts), _shape_words(facts.files)
    if LABEL_WIDTH + len(plan + shape) <= WIDTH:
        return _labelled("rows", plan + shape)
    return [*_labelled("rows", plan), *_labelled("", shape.strip())]


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
    return f"{facts.rows:,}: {', '.join(parts)}"


def _shape_words(files: Sequence[FileFacts]) -> str:
    words = dict.fromkeys(_shape(file) for file in files)
    return f" (shape {'; '.join(words)})" if words else ""


def _shape(file: FileFacts) -> str:
    return file.shape + (f', column "{file.prompt_column}"' if file.prompt_column else "")


def _columns(files: Sequence[FileFacts]) -> list[str]:
    """One line for each distinct set of columns; a file is named only where they differ."""
    distinct = {(file.sent, file.carried_only): file for file in files}
    lines = []
    for (sent, carried), file in distinct.items():
        text = ", ".join(sent) or "nothing"
        if carried:
            text = f"{text:<16}  carried only: {', '.join(carried)}"
        if len(distinct) > 1:
            text += f"  ({file.name})"
        lines += _labelled("sent", text)
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
        replaced = _some(facts.models_replaced) or "the model"
        notes.append(f"--model replaces {replaced} in {count(facts.rows_model_replaced, 'row')}")
    notes += [
        f"--param {name} replaces the row's own in {count(rows, 'row')}"
        for name, rows in facts.rows_params_replaced
    ]
    if facts.over_limit:
        notes.append(f"--limit leaves out {count(facts.over_limit, 'row')}")
    if facts.hosts_before:
        notes.append(f"the answers held came from {_some(facts.hosts_before)}, not {facts.host}")
    if facts.skipped:
        notes.append(f"not read: {_some(facts.skipped)}")
    return [*notes, *facts.notes]


# The end


def final_block(
    summary: RunSummary, config: RunConfig | None, facts: FinalFacts | None = None
) -> str:
    """The last block of a run, however it ended; the exit code stands at its end unless 0."""
    facts = facts or FinalFacts()
    if summary.exit_code in (errors.EXIT_OK, errors.EXIT_ROWS_FAILED):
        lines = _finished(summary, config, facts)
    else:
        lines = _ended_early(summary, config)
    return "\n".join(_with_exit_code(lines, summary.exit_code))


def final_lines(summary: RunSummary) -> list[str]:
    """The last lines of a log; the caller puts the time in front."""
    rows, run = summary.rows, summary.this_run
    code = f"exit code {summary.exit_code}"
    if summary.exit_code not in (errors.EXIT_OK, errors.EXIT_ROWS_FAILED):
        reason = " ".join((summary.reason or "").split()).removeprefix("stopped ")
        return [f"stopped {reason}".rstrip(), f"{_progress_words(rows)}, {code}"]
    done = f"done {run.rows_sent if run else 0:,} sent, {rows.error:,} failed"
    spent = _spent(run.tokens) if run else 0
    if spent:
        done += f", {_tokens(spent)} tokens"
    notes = [f"note {note}" for note in (*_answer_notes(rows), *summary.notes)]
    if summary.backup:
        notes.append(f"note the old output is {summary.backup}")
    return [
        done,
        *notes,
        f"output {_output_name(summary.output)} {count(rows.total or 0, 'row')}, {code}",
    ]


def _finished(summary: RunSummary, config: RunConfig | None, facts: FinalFacts) -> list[str]:
    lines = [_headline(summary)]
    lines += _causes(summary.errors, summary.inputs)
    for note in [*_answer_notes(summary.rows), *summary.notes]:
        lines += _labelled("note", note)
    lines += _token_lines(summary)
    lines += _pace(summary, config)
    if summary.output not in (None, STDOUT):
        lines += _labelled("output", _output_words(summary, facts))
    return [*lines, *_nexts(summary.next_steps)]


def _headline(summary: RunSummary) -> str:
    rows, run = summary.rows, summary.this_run
    sent = run.rows_sent if run else 0
    of = f"{rows.ok:,} of {count(rows.total or 0, 'row')} answered"
    failed = f", {rows.error:,} failed" if rows.error else ""
    label = "done" if summary.exit_code == 0 else "finished"
    sending_s = run.sending_s if run else 0.0
    took = duration(sending_s)
    if not rows.total:
        text = "no rows in the input; the output is empty"
    elif not sent:
        text = f"{of}{failed}; nothing was left to send"
    elif rows.reused:
        text = f"{of}{failed}; {sent:,} in this run, in {took}"
    elif rows.error:
        text = f"{of}{failed}, in {took}"
    else:
        text = f"{of} in {took} ({rate(sent / sending_s if sending_s else 0)} rows/s)"
    return f"{label:<{LABEL_WIDTH}}{text}"


def _causes(causes: Sequence[ErrorCount], inputs: Sequence[str]) -> list[str]:
    """A line for each cause, largest first: rows, kind, and the first example."""
    causes = _by_kind_and_code(causes)
    shown = causes[:SHOWN_CAUSES]
    heads = [f"{cause.rows:,} {cause.kind}" for cause in shown]
    width = max([15, *map(len, heads)]) + 2
    lines = []
    for number, (head, cause) in enumerate(zip(heads, shown, strict=True)):
        label = "" if number else "failed"
        lines.append(_cut(f"{label:<{LABEL_WIDTH}}{head:<{width}}{_example(cause, inputs)}"))
    if hidden := causes[SHOWN_CAUSES:]:
        rows = sum(cause.rows for cause in hidden)
        more = f"{rows:,} more, for {count(len(hidden), 'other reason')}; see error_message"
        lines.append(f"{'':<{LABEL_WIDTH}}{more}")
    return lines


def _by_kind_and_code(causes: Sequence[ErrorCount]) -> list[ErrorCount]:
    """Causes of one kind and code together, whether or not a rerun tries their rows again."""
    merged: dict[tuple[str, str], ErrorCount] = {}
    for cause in causes:
        same = merged.get((cause.kind, cause.code))
        rows = cause.rows + (same.rows if same else 0)
        merged[cause.kind, cause.code] = msgspec.structs.replace(same or cause, rows=rows)
    return sorted(merged.values(), key=lambda cause: -cause.rows)


def _example(cause: ErrorCount, inputs: Sequence[str] = ()) -> str:
    if cause.example is None:
        return cause.code
    message = " ".join(cause.example.message.split())
    code = f"{cause.code}: " if cause.code and not message.startswith(cause.code) else ""
    source = cause.example.source
    name = source.rpartition(":")[0]
    # With one input its name would only repeat the first line.
    where = (
        f"{name} {place(source)}" if name and inputs and list(inputs) != [name] else place(source)
    )
    return f"{where}: {code}{message}"


def _answer_notes(rows: RowCounts) -> list[str]:
    return [
        f"{count(number, 'answer')} {verb(number, 'were')} {what}"
        for number, what in (
            (rows.truncated, 'cut short (finish_reason "length")'),
            (rows.filtered, "refused by the model or its content filter"),
            (rows.empty, "empty"),
        )
        if number
    ]


def _token_lines(summary: RunSummary) -> list[str]:
    if summary.output_totals is None:
        return []
    words = _token_words(summary.output_totals.tokens)
    if words is None:
        return []
    lines = [f"{'tokens':<{LABEL_WIDTH}}{words}"]
    run = summary.this_run
    if summary.rows.reused and run and run.rows_sent:
        own = f"(this run: {run.tokens.prompt or 0:,} + {run.tokens.completion or 0:,})"
        if len(lines[0]) + 1 + len(own) <= WIDTH:
            lines[0] += f" {own}"
        else:
            lines.append(f"{'':<{LABEL_WIDTH}}{own}")
    return lines


def _token_words(tokens: TokenCounts) -> str | None:
    if tokens.prompt is None and tokens.completion is None:
        return None if tokens.total is None else f"{tokens.total:,}"
    cached = f" ({tokens.cached:,} cached)" if tokens.cached else ""
    return f"{tokens.prompt or 0:,} prompt{cached} + {tokens.completion or 0:,} completion"


def _pace(summary: RunSummary, config: RunConfig | None) -> list[str]:
    if summary.this_run is None or summary.this_run.bound_by != "quota":
        return []
    if config is not None and config.rpm is not None:
        return _labelled("limit", f"--rpm {config.rpm:g} set the pace")
    if config is not None and config.tpm is not None:
        return _labelled("limit", f"--tpm {config.tpm:g} set the pace")
    return _labelled("limit", "the endpoint's quota set the pace")


def _output_words(summary: RunSummary, facts: FinalFacts) -> str:
    name = _output_name(summary.output)
    details = []
    if not summary.published:
        details.append("unchanged")
    elif summary.rows.error:
        details.append('failed rows have status "error"')
    elif facts.output_bytes is not None:
        details.append(size(facts.output_bytes))
    if summary.synthetic:
        details.append("synthetic answers")
    kept = f"; the old one is {summary.backup}" if summary.backup else ""
    return name + (f" ({', '.join(details)})" if details else "") + kept


def next_steps(summary: RunSummary) -> list[str]:
    """What to do now, most useful first; a line to paste needs nothing but batchrun and a shell."""
    if summary.exit_code not in (errors.EXIT_OK, errors.EXIT_ROWS_FAILED):
        return _next_after_stop(summary)
    if summary.rows.error:
        return _next_after_failures(summary)
    if summary.output in (None, STDOUT) or not summary.rows.total:
        return []
    return [_look_at(str(summary.output))]


def _look_at(output: str) -> str:
    if output.endswith(".parquet"):
        return f"batchrun collect {shell.file(output)} -o - | head -n 3"
    return f"head -n 3 {shell.file(output)}"


def _next_after_failures(summary: RunSummary) -> list[str]:
    passing = [cause for cause in summary.errors if cause.retried_on_rerun]
    refused = [
        cause
        for cause in summary.errors
        if not cause.retried_on_rerun and cause.kind != "invalid_input"
    ]
    steps = []
    if passing:
        steps.append(f"the same command sends {_the_rows(passing)} again and nothing else")
    if refused:
        also = "also " if passing else "sends "
        again = "" if passing else " again"
        steps += _beside_or_below(
            f"--retry-failed  {also}{_the_rows(refused)}{again}", "edited rows go by themselves"
        )
    if not steps:
        steps.append("edit the failed rows, then run the same command: only they are sent")
    if summary.exit_code == errors.EXIT_ROWS_FAILED and summary.rows.total:
        percent = math.ceil(summary.rows.error * 100 / summary.rows.total)
        steps.append(f"--allow-failures {percent}%  accepts them")
    return steps


def _beside_or_below(first: str, second: str) -> list[str]:
    line = f"{first};  {second}"
    return [line] if LABEL_WIDTH + len(line) <= WIDTH else [first, second]


PLURALS = {
    "timeout": "timeouts",
    "rejected": "rejected",
    "rate_limit": "rate-limited rows",
    "transient": "transient failures",
    "invalid_response": "invalid responses",
}


def _the_rows(causes: Sequence[ErrorCount]) -> str:
    rows = sum(cause.rows for cause in causes)
    kinds = {cause.kind for cause in causes}
    kind = kinds.pop() if len(kinds) == 1 else ""
    if rows == 1:
        return f"the 1 {kind} row" if kind else "the 1 row"
    return f"the {rows:,} {PLURALS.get(kind, 'rows that failed')}"


def _ended_early(summary: RunSummary, config: RunConfig | None) -> list[str]:
    reason = summary.reason or "before the end"
    if summary.exit_code > 128:
        at_once = "at once: " if "at once" in reason else ""
        lines = _labelled("stopped", at_once + _saved_words(summary.rows))
    else:
        lines = _labelled("stopped", reason)
        lines += _key_line(summary, config)
        if summary.rows.total is not None:
            lines += _labelled("rows", _row_words(summary))
    if summary.this_run and (number := summary.this_run.cut_off):
        its = "its" if number == 1 else "their"
        were = f"{count(number, 'request')} {verb(number, 'were')} on {its} way"
        lines += _labelled("", f"{were} and may be billed without an answer")
    for note in summary.notes:
        lines += _labelled("note", note)
    if summary.state_dir is not None and (summary.rows.ok or summary.rows.error):
        lines += _labelled("saved", summary.state_dir)
    return [*lines, *_nexts(summary.next_steps)]


def _saved_words(rows: RowCounts) -> str:
    if rows.total is None:
        return f"{count(rows.ok, 'row')} answered and saved"
    failed = f", {rows.error:,} failed" if rows.error else ""
    return (
        f"{rows.ok:,} of {count(rows.total, 'row')} answered and saved{failed},"
        f" {rows.pending:,} waiting"
    )


def _row_words(summary: RunSummary) -> str:
    rows = summary.rows
    refused = summary.exit_code == errors.EXIT_REFUSED and not rows.error and rows.pending
    return _progress_words(rows) + (" (none counts as failed)" if refused else "")


def _progress_words(rows: RowCounts) -> str:
    failed = f", {rows.error:,} failed" if rows.error else ""
    return f"{rows.ok:,} answered{failed}, {rows.pending:,} waiting"


def _key_line(summary: RunSummary, config: RunConfig | None) -> list[str]:
    endpoint = config.endpoint if config is not None else None
    refused = summary.exit_code == errors.EXIT_REFUSED
    if endpoint is None or not refused or not _is_about_the_key(summary):
        return []
    tried = "" if summary.rows.ok else "; nothing else was tried"
    source = f"from {endpoint.key_name}" if endpoint.key_name else "none was sent"
    return _labelled("key", source + tried)


def _is_about_the_key(summary: RunSummary) -> bool:
    return re.search(r"\bkey\b", summary.reason or "") is not None


def _next_after_stop(summary: RunSummary) -> list[str]:
    if summary.exit_code == errors.EXIT_REFUSED:
        if _is_about_the_key(summary):
            return ["correct the key, then run the same command"]
        return ["correct that, then run the same command"]
    steps = ["the same command continues; nothing is paid twice"]
    if summary.exit_code > 128 and summary.rows.ok and summary.output not in (None, STDOUT):
        steps.append(
            f"batchrun collect {shell.file(str(summary.output))}   to look at what is there"
        )
    return steps


# Instead of a run


def error_text(error: BaseException) -> str:
    """``batchrun: what, where, what to do``, then the choices, indented."""
    message = error.message if isinstance(error, errors.BatchrunError) else str(error)
    # Our own lines go on indented; a name with a break in it must not pass for one of them.
    message = re.sub(r"\n(?! )", r"\\n", message or type(error).__name__)
    head, *rest = message.split("\n")
    lines = textwrap.wrap(
        f"batchrun: {head}",
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines += rest
    if isinstance(error, errors.BatchrunError):
        lines += [f"  {step}" for step in error.next_steps]
    return "\n".join(lines)


def error_summary(error: BaseException, version: str, inputs: Sequence[str]) -> RunSummary:
    """What ``--json`` prints for a command that ended in an exception."""
    if isinstance(error, errors.BatchrunError):
        exit_code, reason = error.exit_code, error.message
        steps = list(error.next_steps)
    elif isinstance(error, KeyboardInterrupt):
        exit_code, reason, steps = 130, "interrupted before the run began", []
    else:
        exit_code, reason, steps = errors.EXIT_BUG, "a bug in batchrun; see stderr", []
    return RunSummary(
        batchrun_version=version,
        state=_state(exit_code),
        exit_code=exit_code,
        reason=reason,
        inputs=list(inputs),
        next_steps=steps,
    )


def _state(exit_code: int) -> State:
    if exit_code == errors.EXIT_REFUSED:
        return "refused"
    return "stopped" if exit_code == errors.EXIT_STOPPED or exit_code > 128 else "error"


def skipped_summary(locked: errors.Locked, version: str, config: RunConfig) -> RunSummary:
    """What ``--if-locked skip`` amounts to: nothing was done, and that is as wished."""
    return RunSummary(
        batchrun_version=version,
        state="stopped",
        exit_code=errors.EXIT_OK,
        reason=f"skipped: {locked.message}",
        inputs=list(config.inputs),
        output=config.output,
        synthetic=config.mock,
    )


# validate, status, collect


def validate_block(facts: ValidateFacts) -> str:
    lines = []
    for file in facts.files:
        lines += _labelled("file", _file_words(file))
        lines += _labelled("shape", _shape(file).replace(", column", " (column") + _closing(file))
    lines += _columns(facts.files)
    lines += _bad_rows(facts)
    if facts.repeats:
        repeat = verb(facts.repeats, "repeat")
        lines += _labelled("repeats", f"{count(facts.repeats, 'row')} {repeat} an earlier request")
    for old, new in facts.renamed:
        lines += _labelled("note", f'input column "{old}" is carried as "{new}"')
    if facts.skipped:
        lines += _labelled("note", f"not read: {_some(facts.skipped)}")
    for note in facts.notes:
        lines += _labelled("note", note)
    if facts.first_body is not None:
        lines += _labelled("request", f"POST {facts.url}" if facts.url else "to the mock endpoint")
        lines.append(_cut(f"{'':<{LABEL_WIDTH}}{facts.first_body}"))
    lines += _labelled("sent", "nothing")
    return "\n".join(_with_exit_code(lines, facts.exit_code))


def _file_words(file: FileFacts) -> str:
    kind = {"jsonl": "JSONL", "parquet": "Parquet"}.get(file.format, file.format)
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
    lines = _labelled("bad", count(facts.bad, "row"))
    for where, row in zip(places, facts.bad_rows, strict=True):
        lines.append(f"{'':<{LABEL_WIDTH}}{where:<{width}}{terminal.one_line(row.reason)}")
    if (more := facts.bad - len(facts.bad_rows)) > 0:
        lines.append(f"{'':<{LABEL_WIDTH}}... and {more:,} more")
    return lines


def status_block(facts: StatusFacts) -> str:
    blocks = {"running": _running, "stopped": _stopped, "finished": _was_finished}
    return "\n".join(blocks[facts.state](facts))


def _running(facts: StatusFacts) -> list[str]:
    who = f"pid {facts.pid}" if facts.pid else "another process"
    if facts.host:
        who += f" on {facts.host}"
    if facts.started_at_ms is not None:
        who += f" since {_since(facts.started_at_ms, facts.updated_at_ms)}"
    lines = [*_labelled("running", who), *_labelled("rows", _status_rows(facts.rows))]
    if facts.rows_per_s is not None:
        lines += _labelled("speed", _speed_words(facts, facts.rows_per_s))
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
        *_labelled("stopped", f"{when}{facts.reason or 'unfinished'}{code}"),
        *_labelled("rows", _status_rows(facts.rows)),
        *_nexts([facts.command or "the command that made it, again"]),
    ]


def _was_finished(facts: StatusFacts) -> list[str]:
    when = f"{local_day(facts.finished_at_ms)}" if facts.finished_at_ms is not None else "a run"
    model = f", {_some(facts.models)}" if facts.models else ""
    hosts = f" at {_some(facts.endpoint_hosts)}" if facts.endpoint_hosts else ""
    synthetic = ", synthetic answers" if facts.synthetic else ""
    lines = _labelled("finished", f"{when}{model}{hosts}{synthetic}")
    lines += _labelled("rows", _finished_rows(facts.rows, facts.errors))
    lines += [_cut(f"{'':<{LABEL_WIDTH}}{_example(c)}") for c in facts.errors[:1] if c.example]
    if facts.tokens is not None and (words := _token_words(facts.tokens)) is not None:
        lines += _labelled("tokens", words)
    if facts.unused_answers:
        held = count(facts.unused_answers, "answer")
        lines += _labelled("unused", f"{held} of rows gone from the input in {facts.unused_file}")
    return lines


def _status_rows(rows: RowCounts) -> str:
    of = f" of {rows.total:,}" if rows.total is not None else ""
    return f"{rows.ok:,}{of} answered, {rows.error:,} failed, {rows.pending:,} waiting"


def _finished_rows(rows: RowCounts, causes: Sequence[ErrorCount]) -> str:
    if not rows.error:
        return f"{rows.ok:,} answered"
    by_kind: dict[str, int] = {}
    for cause in causes:
        by_kind[cause.kind] = by_kind.get(cause.kind, 0) + cause.rows
    kinds = ", ".join(f"{rows:,} {kind}" for kind, rows in by_kind.items())
    return f"{rows.ok:,} answered, {rows.error:,} failed" + (f" ({kinds})" if kinds else "")


def collect_block(facts: CollectFacts) -> str:
    partial = [] if facts.complete else ["partial"]
    details = [*partial, *([size(facts.size_bytes)] if facts.size_bytes is not None else [])]
    lines = _labelled("collected", _status_rows(facts.rows))
    lines += _causes(facts.errors, ())
    if facts.tokens is not None and (words := _token_words(facts.tokens)) is not None:
        lines += _labelled("tokens", words)
    if facts.synthetic:
        lines += _labelled("note", "synthetic answers")
    if facts.output != STDOUT:
        lines += _labelled("output", facts.output + (f" ({', '.join(details)})" if details else ""))
    if facts.running:
        lines += _labelled("note", "the run goes on; this is what it held a moment ago")
    elif not facts.complete:
        lines += _nexts([facts.command or "the same submit command continues the run"])
    return "\n".join(lines)


# JSON


def to_json(value: Struct) -> bytes:
    """One object on one line; what a command found carries its exit code as a member too."""
    members = msgspec.to_builtins(value)
    exit_code = getattr(value, "exit_code", None)
    if isinstance(exit_code, int) and "exit_code" not in members:
        members = {"schema": 1, "exit_code": exit_code, **members}
    return json.dumps(members, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def models_json(names: Sequence[str]) -> bytes:
    return json.dumps({"schema": 1, "exit_code": 0, "models": list(names)}).encode() + b"\n"


# Words


def place(source: str) -> str:
    """``line 214`` for ``prompts.jsonl:214``, ``row 214`` for a table; others as they are."""
    name, colon, number = source.rpartition(":")
    if not colon or not number.isdigit():
        return source
    return f"{'row' if PurePath(name).suffix == '.parquet' else 'line'} {number}"


def local_time(at_ms: int, now: datetime | None = None) -> str:
    """``14:01`` today, else with the day."""
    at = datetime.fromtimestamp(at_ms / 1000).astimezone()
    today = (now or datetime.now().astimezone()).date()
    return f"today {at:%H:%M}" if at.date() == today else f"{at:%Y-%m-%d %H:%M}"


def local_day(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000).astimezone():%Y-%m-%d %H:%M}"


def _labelled(label: str, text: str) -> list[str]:
    """The label and its text, wrapped between words; what has no space stays whole."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{label:<{LABEL_WIDTH}}",
        subsequent_indent=" " * LABEL_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=True,
        drop_whitespace=True,
    ) or [label]


def _nexts(steps: Iterable[str]) -> list[str]:
    """Lines to paste are never wrapped."""
    return [f"{'' if number else 'next':<{LABEL_WIDTH}}{step}" for number, step in enumerate(steps)]


def _with_exit_code(lines: list[str], exit_code: int) -> list[str]:
    if not exit_code:
        return lines
    code = f"exit code {exit_code}"
    room = WIDTH - len(lines[-1])
    if room >= len(code) + 2:
        return [*lines[:-1], lines[-1] + code.rjust(room)]
    return [*lines, code.rjust(WIDTH)]


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3].rstrip() + "..."


def _names(files: Sequence[FileFacts]) -> str:
    if len(files) <= 2:
        return ", ".join(terminal.one_line(file.name) for file in files) or "(no input)"
    return f"{terminal.one_line(files[0].name)} and {len(files) - 1} more"


def _output_name(output: str | None) -> str:
    return "stdout" if output == STDOUT else terminal.one_line(output or "nothing")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_NAMES])
    more = len(names) - SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _spent(tokens: TokenCounts) -> int:
    return max(tokens.total or 0, (tokens.prompt or 0) + (tokens.completion or 0))


def _tokens(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1_000_000 else f"{number:,}"
