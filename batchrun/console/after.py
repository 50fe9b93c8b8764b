"""The block after a run, however it ended, and what to do next."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec

from batchrun import errors, shell
from batchrun.config import STDOUT, RunConfig
from batchrun.console.blocks import (
    cut,
    labelled,
    nexts,
    output_name,
    place,
    spent_words,
    tokens,
    with_exit_code,
)
from batchrun.console.facts import FinalFacts
from batchrun.summary import ErrorCount, RowCounts, RunSummary, TokenCounts
from batchrun.terminal import LABEL_WIDTH, WIDTH
from batchrun.words import count, dollars, duration, rate, size, verb

SHOWN_CAUSES = 8


def final_block(
    summary: RunSummary, config: RunConfig | None, facts: FinalFacts | None = None
) -> str:
    """The last block of a run, however it ended; the exit code stands at its end unless 0."""
    facts = facts or FinalFacts()
    if _is_finished(summary):
        lines = _finished(summary, config, facts)
    else:
        lines = _ended_early(summary, config)
    return "\n".join(with_exit_code(lines, summary.exit_code))


def final_lines(summary: RunSummary) -> list[str]:
    """The last lines of a log; the caller puts the time in front."""
    rows, run = summary.rows, summary.this_run
    code = f"exit code {summary.exit_code}"
    if not _is_finished(summary):
        reason = " ".join((summary.reason or "").split()).removeprefix("stopped ")
        return [f"stopped {reason}".rstrip(), f"{_progress_words(rows)}, {code}"]
    done = f"done {run.rows_sent if run else 0:,} sent, {rows.error:,} failed"
    spent = spent_words(run.tokens) if run else 0
    if spent:
        done += f", {tokens(spent)} tokens"
    if run and run.tokens.cost_usd is not None:
        done += f", {dollars(run.tokens.cost_usd)}"
    notes = [f"note {note}" for note in (*_answer_notes(rows), *summary.notes)]
    if summary.backup:
        notes.append(f"note the old output is {summary.backup}")
    return [
        done,
        *notes,
        f"output {output_name(summary.output)} {count(rows.total or 0, 'row')}, {code}",
    ]


def _finished(summary: RunSummary, config: RunConfig | None, facts: FinalFacts) -> list[str]:
    lines = [_headline(summary)]
    lines += causes(summary.errors, summary.inputs)
    for note in [*_answer_notes(summary.rows), *summary.notes]:
        lines += labelled("note", note)
    lines += _token_lines(summary)
    lines += _cost_lines(summary)
    lines += _pace(summary, config)
    if summary.output not in (None, STDOUT):
        lines += labelled("output", _output_words(summary, facts))
    return [*lines, *nexts(summary.next_steps)]


def _is_finished(summary: RunSummary) -> bool:
    return summary.exit_code in (errors.EXIT_OK, errors.EXIT_ROWS_FAILED)


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


def causes(causes: Sequence[ErrorCount], inputs: Sequence[str]) -> list[str]:
    """A line for each cause, largest first: rows, kind, and the first example."""
    causes = _by_kind_and_code(causes)
    shown = causes[:SHOWN_CAUSES]
    heads = [f"{cause.rows:,} {cause.kind}" for cause in shown]
    width = max([15, *map(len, heads)]) + 2
    lines = []
    for number, (head, cause) in enumerate(zip(heads, shown, strict=True)):
        label = "" if number else "failed"
        lines.append(cut(f"{label:<{LABEL_WIDTH}}{head:<{width}}{example(cause, inputs)}"))
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


def example(cause: ErrorCount, inputs: Sequence[str] = ()) -> str:
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
    said = [
        f"{count(number, 'answer')} {verb(number, 'were')} {what}"
        for number, what in (
            (rows.truncated, 'cut short (finish_reason "length")'),
            (rows.filtered, "refused by the model or its content filter"),
            (rows.empty, "empty"),
        )
        if number
    ]
    if rows.copied:
        who = f"{count(rows.copied, 'row')} {verb(rows.copied, 'have')}"
        said.append(f"{who} the answer of an equal one, which paid_by names")
    return said


def _token_lines(summary: RunSummary) -> list[str]:
    if summary.output_totals is None:
        return []
    words = token_words(summary.output_totals.tokens)
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


def _cost_lines(summary: RunSummary) -> list[str]:
    if summary.output_totals is None:
        return []
    words = cost_words(summary.output_totals.tokens)
    if words is None:
        return []
    run = summary.this_run
    if summary.rows.reused and run and run.tokens.cost_usd is not None:
        words += f" (this run: {dollars(run.tokens.cost_usd)})"
    return labelled("cost", words)


def cost_words(tokens: TokenCounts) -> str | None:
    """What was paid, and for how many rows nobody knows; None without a price."""
    if tokens.cost_usd is None:
        return None
    words = dollars(tokens.cost_usd)
    if tokens.saved_usd:
        words += f", {dollars(tokens.saved_usd)} saved by cached prompts"
    if unknown := tokens.rows_without_usage:
        words += f"; {count(unknown, 'row')} reported no usage: not in it"
    return words


def token_words(tokens: TokenCounts) -> str | None:
    if tokens.prompt is None and tokens.completion is None:
        return None if tokens.total is None else f"{tokens.total:,}"
    cached = f" ({tokens.cached:,} cached)" if tokens.cached else ""
    return f"{tokens.prompt or 0:,} prompt{cached} + {tokens.completion or 0:,} completion"


def _pace(summary: RunSummary, config: RunConfig | None) -> list[str]:
    if summary.this_run is None or summary.this_run.bound_by != "quota":
        return []
    if config is not None and config.rpm is not None:
        return labelled("limit", f"--rpm {config.rpm:g} set the pace")
    if config is not None and config.tpm is not None:
        return labelled("limit", f"--tpm {config.tpm:g} set the pace")
    return labelled("limit", "the endpoint's quota set the pace")


def _output_words(summary: RunSummary, facts: FinalFacts) -> str:
    name = output_name(summary.output)
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
    if not _is_finished(summary):
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
    "invalid_answer": "invalid answers",
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
        lines = labelled("stopped", at_once + _saved_words(summary.rows))
    else:
        lines = labelled("stopped", reason)
        lines += _key_line(summary, config)
        if summary.rows.total is not None:
            lines += labelled("rows", _row_words(summary))
    if summary.this_run and (number := summary.this_run.cut_off):
        its = "its" if number == 1 else "their"
        were = f"{count(number, 'request')} {verb(number, 'were')} on {its} way"
        lines += labelled("", f"{were} and may be billed without an answer")
    for note in summary.notes:
        lines += labelled("note", note)
    if summary.state_dir is not None and (summary.rows.ok or summary.rows.error):
        lines += labelled("saved", summary.state_dir)
    return [*lines, *nexts(summary.next_steps)]


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
    refused = summary.exit_code == errors.EXIT_REFUSED
    if config is None or not refused or not _is_about_the_key(summary):
        return []
    tried = "" if summary.rows.ok else "; nothing else was tried"
    key_name = config.endpoint.key_name
    source = f"from {key_name}" if key_name else "none was sent"
    return labelled("key", source + tried)


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
