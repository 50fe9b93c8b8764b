"""A whole run, from a RunConfig to a RunSummary. It reads like the README.

Rows that are answered are known before anything is sent; what is sent is journaled as it lands;
what is settled is published as one file; the published file is the memory of the next run. Every
early end takes the same way out: the Stop is set, the pool drains, the journal is made durable.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from batchrun import chat, console, inputs, outputs, process, sending
from batchrun.config import STDIN, VERSION, JSONValue, RunConfig, default_output
from batchrun.console import Progress, Snapshot, StartFacts
from batchrun.endpoint import ChatEndpoint
from batchrun.errors import (
    EXIT_OK,
    EXIT_ROWS_FAILED,
    BatchrunError,
    EndpointRefused,
    LocalIOError,
    Locked,
    SettingsDiffer,
    UsageError,
)
from batchrun.inputs import Resolved
from batchrun.journal import (
    FORMAT,
    Header,
    Held,
    Journal,
    Lock,
    Recovery,
    StateDir,
    Status,
    read_saved,
    save_config,
    write_status,
)
from batchrun.outputs import Footer, OutputTally
from batchrun.runs import plan
from batchrun.runs.opening import (
    chat_endpoint,
    check_output,
    file_facts,
    has_journal,
    locked,
    model_of,
    now_utc,
    prompt_settings,
    state_dir,
    wanted_room,
)
from batchrun.runs.stop import Stop
from batchrun.runs.unused import Kept, Unused
from batchrun.secret import hidden_in_url
from batchrun.sending import Delivered, RunTally, Totals
from batchrun.summary import OutputTotals, RowCounts, RunSummary, State, ThisRun
from batchrun.types import Bound
from batchrun.words import count, size, verb

IMPORT_ROWS = 1_000


# An answer of some 100 words with its usage; once in the journal and once in the output.
USUAL_ANSWER_BYTES = 1_000


OFFER_S = 5.0


SHOWN_MODELS = 5


SHOWN_SETTING = 40


async def run(
    config: RunConfig,
    talk: Progress | None = None,
    *,
    handle_signals: bool = False,
    rows: inputs.RowsOrTable | None = None,
) -> RunSummary:
    """Do the whole job and say what it amounted to.

    Raises BatchrunError for what ends before the run began: usage, settings that differ, the lock,
    an input that cannot be read. Afterwards every end is a RunSummary with its exit code.
    ``handle_signals`` is for a process of our own: SIGINT, SIGTERM and SIGHUP then drain the run.
    ``rows`` are what the input ``-`` stands for, instead of stdin: dicts or an Arrow table.
    """
    talk = talk or Progress(quiet=True)
    stop = Stop(talk)
    with ExitStack() as stack:
        if handle_signals:
            stack.enter_context(process.signals(stop.on_signal, stop.at_once, stop.last_words))
        check_output(config)
        state = stack.enter_context(state_dir(config))
        if config.deadline_s is not None:
            stack.enter_context(stop.at_deadline(config.deadline_s))
        try:
            lock = await locked(config, state, stop, talk, stack)
        except Locked:
            stop.check()
            raise
        this = _Run(config, talk, stop, state, lock, rows)
        try:
            return await this.go()
        except BaseException:
            # What ended before it began leaves nothing behind.
            if this.began_nothing or not has_journal(state):
                lock.remove_state()
            raise


@dataclass
class _Run:
    """What the steps of one run hand to each other."""

    config: RunConfig
    talk: Progress
    stop: Stop
    state: Path
    lock: Lock
    rows: inputs.RowsOrTable | None = None

    def __post_init__(self) -> None:
        self.started_s = self.sending_since_s = time.monotonic()
        self.sending_s = 0.0
        self.started_at_ms = int(time.time() * 1000)
        self.published: Footer | None = None
        self.hosts_before: list[str] = []
        self.inputs_before: list[str] = []
        self.keep_old = self.continues = self.began_nothing = False
        self.at_stake = 0  # answers of an output that was made with other settings
        self.summary = RunSummary(
            batchrun_version=VERSION,
            inputs=list(self.config.inputs),
            output=self.config.output,
            state_dir=str(self.state),
            synthetic=self.config.mock,
            started_at=now_utc(),
        )

    async def go(self) -> RunSummary:
        config = self.config
        files = await asyncio.to_thread(self._resolve)
        settings = prompt_settings(config)
        self.sources = await asyncio.to_thread(plan.lay_out, files.files, settings, config)
        self.settings = config.request_settings(*plan.shapes(self.sources)) | {
            "model": model_of(config)
        }
        self.published = self._recognise()
        if self.published is not None:
            self.hosts_before = self.published.hosts
            self.inputs_before = self.published.inputs
        if (
            self.published is not None
            and not has_journal(self.state)
            and await asyncio.to_thread(self._is_current, self.published)
        ):
            await asyncio.to_thread(self._tend_unused, None)
            return self._nothing_left(self.published)
        self.book = self._open_journal()
        try:
            return await self._with_journal(files)
        except BatchrunError as exc:
            if isinstance(exc, UsageError):
                self.began_nothing = not self.continues
                raise
            return self._ended(exc)
        finally:
            self.book.close()

    async def _with_journal(self, files: Resolved) -> RunSummary:
        if self.published is not None:
            await asyncio.to_thread(self._import, self.published)
        self.plan = await asyncio.to_thread(
            plan.make_plan, self.sources, self.config, self.book, self.stop.check
        )
        await asyncio.to_thread(self._take_back_unused)
        self.book.forget_passes()
        if not self.config.retry_failed:
            plan.give_up_doubtful(self.plan, self.book, self.config.max_in_doubt_retries)
        self._check_limit()
        self._check_model()
        if self.published is not None and await asyncio.to_thread(self._was_published_from_here):
            await asyncio.to_thread(self._tend_unused, self.book)
            return self._nothing_left(self.published)
        self._count_rows(RunTally())
        if (twin := _twin(self.inputs_before, config=self.config)) is not None:
            self._note(
                f"{self.config.output} was made from {twin}, and is now made from"
                f" {self.config.inputs[0]}; name another output with -o to keep both"
            )
        self._warn_of_a_small_disk()
        self._say_start(files)
        if self.plan.counts.to_send:
            delivered = await self._deliver()
            self.summary.this_run = _this_run(delivered, self.sending_s)
            self._count_rows(delivered.tally, delivered.reopened)
            if delivered.cause is not None:
                return self._ended(delivered.cause)
            if delivered.tally.done != self.plan.counts.to_send:
                # A bug, and one that must not become a file with rows missing.
                lost = self.plan.counts.to_send - delivered.tally.done
                raise RuntimeError(
                    f"{count(lost, 'row')} {verb(lost, 'were')} neither answered nor failed"
                )
        self.stop.all_sent()
        footer = await asyncio.to_thread(self._publish)
        return await self._finished(footer)

    # The steps, in order

    def _resolve(self) -> Resolved:
        config = self.config
        spool = None
        if STDIN in config.inputs:
            source = process.stdin(self.stop.check) if self.rows is None else self.rows
            spool = inputs.spool(source, self.state)
        output = None if config.to_stdout else Path(config.output)
        found = inputs.resolve(config.inputs, config.input_format, spool=spool, output=output)
        StateDir(self.state).check_apart(each.path for each in found.files if each.path != spool)
        return found

    def _recognise(self) -> Footer | None:
        """The footer of the output as it is; a file that is not ours needs --overwrite."""
        config = self.config
        path = Path(config.output)
        if config.to_stdout:
            return None
        self.target = outputs.Target.at(path)
        outputs.clean_leftovers(path)
        outputs.clean_leftovers(outputs.partial_of(path))
        if not path.exists():
            return None
        footer = outputs.recognise(path)
        if footer is None:
            if not config.overwrite:
                raise UsageError(
                    f"{path} exists and was not written by batchrun; nothing was sent. Choose:",
                    next_steps=(
                        "-o other.parquet    keep both",
                        f"--overwrite         keep it as {path.name}.bak",
                    ),
                )
            self.keep_old = True
        elif footer.settings != self.settings:
            self.keep_old = bool(footer.rows.ok + footer.rows.error)
            self.at_stake = footer.rows.ok
            if self.at_stake and not config.overwrite and not has_journal(self.state):
                raise _differ(config, footer.settings, self.settings, footer.rows.ok)
            return None
        return footer

    def _is_current(self, footer: Footer) -> bool:
        """Whether the output already is what this run would publish, so that nothing is left."""
        if not footer.complete or footer.rows.passing:
            return False
        if self.config.retry_failed and footer.rows.error:
            return False
        return footer.publishing == self.config.publishing_settings() and (
            footer.inputs_digest == self._digest()
        )

    def _was_published_from_here(self) -> bool:
        """Whether this very journal was published already, and kept for what else it holds."""
        footer = self.published
        assert footer is not None
        counts = self.plan.counts
        holds_all = footer.run_id == self.book.header.run_id and footer.rows.ok == counts.held_ok
        return holds_all and not counts.to_send and self._is_current(footer)

    def _digest(self) -> str:
        return inputs.content_digest(source.file for source in self.sources)

    def _open_journal(self) -> Journal:
        header = Header(
            format=FORMAT,
            hash_version=chat.HASH_VERSION,
            run_id=uuid.uuid4().hex,
            created_at_ms=int(time.time() * 1000),
            batchrun_version=VERSION,
            settings=self.settings,
            synthetic=self.config.mock,
        )
        self.continues = has_journal(self.state)
        book = Journal.open(self.state, header)
        if book.header.settings != self.settings:
            at_stake = max(book.answers, self.at_stake)
            if at_stake and not self.config.overwrite:
                book.close()
                raise _differ(self.config, book.header.settings, self.settings, at_stake)
            if book.answers:
                self._set_aside(book)
            book.reset(header)
            self.continues = False
        if (saved := read_saved(self.state)) is not None:
            self.hosts_before += saved.hosts
            self.inputs_before = saved.inputs
        if book.recovery.cut_bytes or book.recovery.holes:
            self._note(_recovered(book.recovery))
        return book

    def _import(self, footer: Footer) -> None:
        """Take over the answers of the published output: one path for every rerun."""
        book = self.book
        # A run that was killed in its last moments may have published more than the journal that
        # is left of it holds, or less.
        publication = footer.publication or footer.run_id
        if publication in book.imported:
            return
        book.begin_pass()
        for number, outcome in enumerate(outputs.read_back(Path(self.config.output))):
            book.settled(book.claim(outcome.hash), outcome)
            if number % IMPORT_ROWS == 0:
                self.stop.check()
                book.flush()
        book.note_imported(publication)
        book.sync()

    # Answers whose rows are gone

    def _unused(self, *, synthetic: bool) -> Unused:
        beside = self.state if self.config.to_stdout else Path(self.config.output)
        return Unused(beside, synthetic=synthetic, keep_days=self.config.keep_unused_days)

    def _set_aside(self, book: Journal) -> None:
        """Keep the answers of a journal that was begun with other settings."""
        book.begin_pass()
        self._tell_unused(self._unused(synthetic=book.header.synthetic).tend(book))

    def _take_back_unused(self) -> None:
        counts = self.plan.counts
        if not counts.to_send:
            return
        taken = self._unused(synthetic=self.config.mock).take_back(self.book, self.stop.check)
        if taken:
            self.summary.unused.taken_back = taken
            plan.count_held(self.plan, self.book, self.config)

    def _tend_unused(self, book: Journal | None) -> None:
        if not self.config.to_stdout:
            self._tell_unused(self._unused(synthetic=self.config.mock).tend(book))

    def _tell_unused(self, kept: Kept) -> None:
        told = self.summary.unused
        told.answers, told.file = kept.answers, str(kept.file) if kept.file else None
        told.moved += kept.moved
        told.dropped += kept.dropped
        for path in kept.not_ours:
            self._note(f"{path} is not this output's own file of unused answers, and stays")
        keep_days = self.config.keep_unused_days
        if kept.moved:
            self._note(
                f"{_gone(kept.answers)} kept in {kept.file} {_how_long(keep_days)} (--keep-unused)"
            )
        if kept.dropped:
            after = f" after {_days(keep_days)}" if keep_days else ""
            self._note(f"{_gone(kept.dropped)} dropped{after} (--keep-unused)")

    def _check_limit(self) -> None:
        config, book = self.config, self.book
        held = book.answers + book.count(Held.PASSING)
        if config.limit is not None and held > config.limit:
            raise UsageError(
                f"--limit {config.limit} would leave out answers of {config.output},"
                f" which holds {held:,}",
                next_steps=("-o trial.parquet    for a trial beside it",),
            )

    def _check_model(self) -> None:
        if self.plan.models == {""}:
            raise UsageError(
                "no model: neither --model nor any row names one, and this endpoint has no default",
                next_steps=("-m MODEL            `batchrun models` lists what it offers",),
            )

    def _warn_of_a_small_disk(self) -> None:
        carried_bytes = sum(source.file.size_bytes for source in self.sources)
        needed = self.plan.counts.to_send * 2 * USUAL_ANSWER_BYTES + carried_bytes
        with suppress(OSError):
            free = shutil.disk_usage(self.state).free
            if free < needed:
                self._note(
                    f"{self.state.parent.absolute()} has {size(free)} free; journal and"
                    f" output may need about {size(needed)}"
                )

    def _say_start(self, files: Resolved) -> None:
        facts = self._start_facts(files)
        self.talk.print_block(console.start_block(facts), console.start_lines(facts))
        done = self.plan.counts.total - self.plan.counts.to_send
        self.sending_since_s = time.monotonic()
        self.talk.begin(self.plan.counts.total, done, timeout_s=self.config.timeout_s)

    async def _deliver(self) -> Delivered:
        config, counts = self.config, self.plan.counts
        save_config(self.state, config, model_of(config), self._hosts())
        self.before = Totals(counts.total, counts.held_ok, counts.held_failed + counts.invalid)
        # What an earlier run left here must not speak for this one.
        write_status(self.state, self._status(self.before.ok, self.before.failed))
        with process.patient_collector():
            job = sending.Job(
                config,
                plan.requests(self.plan, self.book, config),
                one_model=len(self.plan.models) < 2,
                before=self.before,
            )
            async with chat_endpoint(config) as endpoint:
                self._note_little_room(endpoint.room)
                delivered = await sending.deliver(
                    job, endpoint, self.book, self.stop, self.talk, self._write_status
                )
                self.sending_s = time.monotonic() - self.sending_since_s
                if delivered.wrong_model:
                    delivered = await _with_offer(delivered, endpoint)
                return delivered

    def _note_little_room(self, room: int) -> None:
        if room < wanted_room(self.config):
            self._note(
                f"at most {count(room, 'request')} in flight, for want of open files (ulimit -n)"
            )
            self.talk.note(self.summary.notes[-1])

    def _publish(self) -> Footer:
        """Write the output from the journal, whole or not at all."""
        config = self.config
        # Before the output changes: what leaves it is never nowhere.
        self._tend_unused(self.book)
        if self.keep_old:
            self.summary.backup = str(outputs.backup(Path(config.output)))
        self.tally = OutputTally()
        footer = Footer(
            batchrun_version=VERSION,
            run_id=self.book.header.run_id,
            publication=uuid.uuid4().hex,
            synthetic=config.mock,
            inputs=[source.file.name for source in self.sources],
            inputs_digest=self._digest(),
            settings=self.settings,
            publishing=config.publishing_settings(),
            hosts=self._hosts(),
            started_at=self.summary.started_at or "",
            finished_at=now_utc(),
        )
        footer = outputs.publish(
            process.stdout() if config.to_stdout else self.target,
            config.output_format,
            self.plan.carried.schema,
            plan.slices(self.plan, self.book, config, self.stop.check),
            footer,
            self.tally,
            response_body=config.response_body,
        )
        if surrogates := self.plan.carried.surrogates:
            self._note(f"{count(surrogates, 'lone surrogate')} in carried columns became U+FFFD")
        return footer

    # How it ends

    async def _finished(self, footer: Footer) -> RunSummary:
        if not (self.config.to_stdout and self.config.state_dir):
            self.book.close(remember=False)
            # Unlinking gigabytes of segments takes a while.
            await asyncio.to_thread(self.lock.remove_state)
            self.summary.state_dir = None
        self.summary.published = True
        self.summary.prompt_column = self._shown_prompt()
        await asyncio.to_thread(self._remove_partial, footer)
        return self._told(footer, reused=self.plan.counts.held_ok + self.plan.counts.held_failed)

    def _remove_partial(self, footer: Footer) -> None:
        """What ``collect`` wrote of this run says less than the output, and would only confuse."""
        # The output is published: what becomes of a file beside it changes nothing of that.
        with suppress(OSError, BatchrunError):
            if not self.config.to_stdout and (
                other := outputs.remove_partial(Path(self.config.output), footer.run_id)
            ):
                self._note(f"{other} is older than this output; it may be removed")

    def _continues_answers(self) -> bool:
        counts = self.plan.counts
        return self.continues and bool(counts.held_ok + counts.held_failed + counts.retried)

    def _shown_prompt(self) -> str | None:
        """The output's column that holds the prompts, if it has one."""
        column = self.sources[0].layout.prompt_column
        name = dict(self.plan.carried.renamed).get(column or "", column)
        return name if name in self.plan.carried.schema.names else None

    def _nothing_left(self, footer: Footer) -> RunSummary:
        self.lock.remove_state()
        self.summary.state_dir = None
        return self._told(footer, reused=footer.rows.ok + footer.rows.error)

    def _told(self, footer: Footer, *, reused: int) -> RunSummary:
        """The summary of an output that is whole, whoever wrote it."""
        rows, allowed = footer.rows, self.config.allow_failures
        total = rows.ok + rows.error
        summary = self.summary
        summary.rows = RowCounts(
            total=total,
            ok=rows.ok,
            error=rows.error,
            reused=reused,
            truncated=rows.truncated,
            filtered=rows.filtered,
            empty=rows.empty,
            duplicate=rows.duplicate,
        )
        summary.errors = footer.errors
        summary.request_models = footer.request_models
        summary.output_totals = OutputTotals(footer.tokens)
        if allowed.covers(rows.error, total):
            return self._closed("finished", EXIT_OK, None)
        reason = f"{count(rows.error, 'row')} failed, {allowed} allowed"
        return self._closed("finished", EXIT_ROWS_FAILED, reason)

    def _count_rows(self, tally: RunTally, reopened: int = 0) -> None:
        """What a run that ends before its output says of the rows; the output itself knows more."""
        counts = self.plan.counts
        self.summary.errors = tally.errors
        ok, failed = counts.held_ok + tally.ok, counts.held_failed + counts.invalid + tally.failed
        failed -= reopened
        self.summary.rows = RowCounts(
            total=counts.total,
            ok=ok,
            error=failed,
            pending=counts.total - ok - failed,
            reused=counts.held_ok + counts.held_failed,
            truncated=tally.truncated,
            filtered=tally.filtered,
            empty=tally.empty,
            duplicate=counts.repeats,
        )

    def _ended(self, cause: BatchrunError) -> RunSummary:
        self.summary.next_steps = list(cause.next_steps)
        if self.config.to_stdout and self.config.state_dir is None:
            self.summary.next_steps = ["--state DIR would keep the answers; now they are gone"]
            self.summary.state_dir = None
        if hasattr(self, "plan"):
            self.summary.request_models = sorted(filter(None, self.plan.models))
        summary = self._closed(_state_of(cause), cause.exit_code, cause.message)
        if hasattr(self, "plan"):
            rows, code = summary.rows, cause.exit_code
            self._write_end(rows.ok, rows.error, "stopped", code, cause.message)
        return summary

    def _write_end(self, ok: int, failed: int, state: str, exit_code: int, why: str | None) -> None:
        status = self._status(ok, failed)
        status.state, status.exit_code, status.reason = state, exit_code, why
        write_status(self.state, status)

    def _closed(self, state: State, exit_code: int, reason: str | None) -> RunSummary:
        summary = self.summary
        summary.state = state
        summary.exit_code = exit_code
        summary.reason = reason
        summary.finished_at = now_utc()
        summary.wall_s = round(time.monotonic() - self.started_s, 3)
        summary.endpoint = hidden_in_url(self.config.endpoint.url) or None
        summary.next_steps = summary.next_steps or console.next_steps(summary)
        return summary

    # Facts for people

    def _start_facts(self, files: Resolved) -> StartFacts:
        config, counts = self.config, self.plan.counts
        endpoint = config.endpoint
        return StartFacts(
            files=tuple(file_facts(source) for source in self.sources),
            output=config.output,
            rows=counts.total,
            to_send=counts.to_send,
            to_retry=counts.retried,
            answered_before=counts.held_ok,
            failed_before=counts.held_failed,
            invalid=counts.invalid,
            repeats=counts.repeats,
            continues_since_ms=self.book.header.created_at_ms
            if self._continues_answers()
            else None,
            base_url=endpoint.base_url,
            host=endpoint.host,
            model=model_of(config),
            key_name=endpoint.key_name,
            synthetic=config.mock,
            hosts_before=tuple(host for host in self.hosts_before if host != self._host),
            renamed=tuple(self.plan.carried.renamed),
            models_replaced=tuple(sorted(counts.models_replaced)),
            rows_model_replaced=counts.model_replaced,
            rows_params_replaced=tuple(sorted(counts.params_replaced.items())),
            skipped=tuple(files.skipped),
            notes=(*self.plan.notes, *self.summary.notes),
        )

    @property
    def _host(self) -> str:
        return self.config.endpoint.host

    def _hosts(self) -> list[str]:
        return list(dict.fromkeys([*self.hosts_before, self._host]))

    def _note(self, text: str) -> None:
        self.summary.notes.append(text)

    def _write_status(self, snapshot: Snapshot, bound_by: Bound) -> None:
        """Called about once a second in the thread that syncs; read by ``batchrun status``."""
        status = self._status(snapshot.ok, snapshot.failed)
        elapsed_s = max(time.monotonic() - self.sending_since_s, 1e-3)
        sent = snapshot.ok + snapshot.failed - self.before.ok - self.before.failed
        status.rows_per_s = sent / elapsed_s
        status.in_flight = snapshot.in_flight
        status.bound_by = bound_by
        write_status(self.state, status)

    def _status(self, ok: int, failed: int) -> Status:
        now_ms = int(time.time() * 1000)
        counts = self.plan.counts
        return Status(
            pid=os.getpid(),
            host=socket.gethostname(),
            started_at_ms=self.started_at_ms,
            updated_at_ms=now_ms,
            command=self.config.command,
            inputs=list(self.config.inputs),
            output=self.config.output,
            endpoint=self._host,
            model=model_of(self.config),
            total=counts.total,
            ok=ok,
            failed=failed,
            pending=counts.total - ok - failed,
        )


def _twin(before: Sequence[str], config: RunConfig) -> str | None:
    """The other input behind this output, when both have it for want of a name with ``-o``."""
    if len(before) != 1 or len(config.inputs) != 1 or config.to_stdout:
        return None
    old, new = Path(before[0]).name, Path(config.inputs[0]).name
    with suppress(UsageError):
        names = {default_output((each,), mock=config.mock) for each in (old, new)}
        if old != new and names == {Path(config.output).name}:
            return old
    return None


def _differ(
    config: RunConfig, held: Mapping[str, object], wanted: Mapping[str, JSONValue], answers: int
) -> SettingsDiffer:
    lines = [f"{config.output} was made with other settings:"]
    for name, value in wanted.items():
        if held.get(name) != value:
            lines.append(f"    {name:<12}{_shown(held.get(name))}  ->  {_shown(value)}")
    lines.append(f"  {count(answers, 'answer')} would be asked for again. Choose:")
    suffix = Path(config.output).suffix
    return SettingsDiffer(
        "\n".join(lines),
        next_steps=(f"-o other{suffix}    keep both          --overwrite    keep the old as .bak",),
    )


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= SHOWN_SETTING else f"{text[: SHOWN_SETTING - 3]}..."


def _gone(answers: int) -> str:
    row = "of a row" if answers == 1 else "of rows"
    return f"{count(answers, 'answer')} {row} gone from the input {verb(answers, 'are')}"


def _how_long(days: float | None) -> str:
    return "for ever" if days is None else f"for {_days(days)}"


def _days(days: float) -> str:
    return "1 day" if days == 1 else f"{days:g} days"


def _recovered(recovery: Recovery) -> str:
    text = f"the journal had {count(recovery.cut_bytes, 'byte')} of an unfinished write"
    if recovery.holes:
        text += f" and {count(recovery.holes, 'hole')} of {count(recovery.hole_bytes, 'byte')}"
    return f"{text}; every whole answer was kept"


def _this_run(delivered: Delivered, sending_s: float) -> ThisRun:
    tally = delivered.tally
    return ThisRun(
        rows_sent=tally.done,
        attempts=tally.attempts,
        retries=tally.retries,
        rate_limited=tally.rate_limited,
        in_doubt=tally.in_doubt,
        cut_off=tally.cut_off,
        sending_s=round(sending_s, 3),
        tokens=tally.tokens,
        bound_by=delivered.bound_by,
    )


def _state_of(cause: BatchrunError) -> State:
    if isinstance(cause, EndpointRefused):
        return "refused"
    return "error" if isinstance(cause, LocalIOError | UsageError) else "stopped"


async def _with_offer(delivered: Delivered, endpoint: ChatEndpoint) -> Delivered:
    """Add what the endpoint offers to the advice about a model it does not have."""
    cause = delivered.cause
    assert cause is not None
    with suppress(BatchrunError, TimeoutError):
        async with asyncio.timeout(OFFER_S):
            offered = await endpoint.models()
        if offered:
            names = ", ".join(offered[:SHOWN_MODELS])
            more = f" and {len(offered) - SHOWN_MODELS:,} more" if offered[SHOWN_MODELS:] else ""
            cause.next_steps = (f"add --model NAME; it offers: {names}{more}",)
    return delivered
