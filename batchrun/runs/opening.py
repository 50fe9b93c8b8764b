"""What a run begins with: the inputs, the output as it is, and the journal."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from batchrun import chat, inputs, outputs, process
from batchrun.config import STDIN, VERSION, JSONValue, RunConfig
from batchrun.console import Progress
from batchrun.errors import SettingsDiffer, UsageError
from batchrun.inputs import Resolved, RowsOrTable
from batchrun.journal import FORMAT, Header, Journal, Lock, Recovery, StateDir, read_saved
from batchrun.outputs import Footer, Target
from batchrun.runs import objects, place
from batchrun.runs.asking import model_of, prompt_settings
from batchrun.runs.metrics_file import MetricsFile
from batchrun.runs.sources import Source, lay_out, shapes
from batchrun.runs.stop import Stop
from batchrun.runs.telemetry import Telemetry
from batchrun.runs.unused import Kept, Unused
from batchrun.words import count

SHOWN_SETTING = 40
IMPORT_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Begun:
    """What there is from a run's first moment, whatever becomes of it."""

    config: RunConfig
    talk: Progress
    stop: Stop
    lock: Lock
    started_s: float
    started_at_ms: int
    metrics: MetricsFile | None = None
    telemetry: Telemetry | None = None

    @classmethod
    def now(
        cls,
        config: RunConfig,
        talk: Progress,
        stop: Stop,
        lock: Lock,
        metrics: MetricsFile | None = None,
        telemetry: Telemetry | None = None,
    ) -> Begun:
        at_ms = int(time.time() * 1000)
        return cls(config, talk, stop, lock, time.monotonic(), at_ms, metrics, telemetry)

    def with_price(self) -> Begun:
        """With the price that is remembered, where none is given."""
        if self.config.price is not None:
            return self
        price = place.remembered_price(self.config, self.state)
        return replace(self, config=replace(self.config, price=price))

    @property
    def state(self) -> StateDir:
        return self.lock.state


class OldOutput(NamedTuple):
    """The output as a run finds it."""

    target: Target | None = None  # None: standard output
    footer: Footer | None = None  # of answers made with the same settings: they are taken over
    is_kept: bool = False  # beside the new one, which says nothing of it
    at_stake: int = 0  # its answers, if they were made with other settings


@dataclass(frozen=True, slots=True)
class Found:
    """The inputs, what binds their answers, and the output before this run."""

    sources: list[Source]
    skipped: Sequence[str]
    settings: Mapping[str, JSONValue]
    old: OldOutput

    def digest(self) -> str:
        """Of the inputs' contents; reads them whole."""
        return inputs.content_digest(source.file for source in self.sources)


@dataclass(frozen=True, slots=True)
class Opened:
    """The journal, and what earlier runs left in it."""

    book: Journal
    continues: bool
    hosts_before: tuple[str, ...] = ()
    inputs_before: tuple[str, ...] = ()
    set_aside: Kept | None = None
    notes: tuple[str, ...] = ()


def find(begun: Begun, rows: RowsOrTable | None) -> Found:
    """Find the inputs and look at the output; ``rows`` stand for stdin.

    UsageError for a file in the output's place that is not ours, and SettingsDiffer for answers
    that other settings made, unless the user said to overwrite them.
    """
    config = begun.config
    files = _resolve(begun, rows)
    sources = lay_out(files.files, prompt_settings(config), config)
    settings = config.request_settings(*shapes(sources)) | {"model": model_of(config)}
    return Found(sources, files.skipped, settings, _old_output(begun, settings))


def _resolve(begun: Begun, rows: RowsOrTable | None) -> Resolved:
    config, state = begun.config, begun.state
    spool = None
    if STDIN in config.inputs:
        source = process.stdin(begun.stop.check) if rows is None else rows
        spool = inputs.spool(source, state)
    output = None if config.to_stdout else Path(config.output)
    found = objects.named(
        inputs.resolve(config.inputs, config.input_format, spool=spool, output=output)
    )
    state.check_apart(each.path for each in found.files if each.path != spool)
    return found


def _old_output(begun: Begun, settings: Mapping[str, JSONValue]) -> OldOutput:
    config = begun.config
    if config.to_stdout:
        return OldOutput()
    path = Path(config.output)
    target = Target.at(path)
    outputs.clean_leftovers(path)
    outputs.clean_leftovers(outputs.partial_of(path))
    if not path.exists():
        return OldOutput(target)
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
        return OldOutput(target, is_kept=True)
    if footer.settings == settings:
        return OldOutput(target, footer)
    at_stake = footer.rows.ok
    if at_stake and not config.overwrite and not begun.state.has_journal():
        raise _differ(config, footer.settings, settings, at_stake)
    return OldOutput(target, is_kept=bool(at_stake + footer.rows.error), at_stake=at_stake)


def current_output(config: RunConfig, found: Found) -> Footer | None:
    """The output's footer if it already is what this run would publish: nothing is left to do."""
    footer = found.old.footer
    if footer is None or not footer.complete or footer.rows.passing:
        return None
    if config.retry_failed and footer.rows.error:
        return None
    is_alike = footer.publishing == config.publishing_settings()
    return footer if is_alike and footer.inputs_digest == found.digest() else None


def open_journal(begun: Begun, found: Found) -> Opened:
    """Continue the journal, or begin one; whoever gets it closes it.

    SettingsDiffer when that would give up answers. With ``--overwrite`` those of the journal are
    set aside.
    """
    continues = begun.state.has_journal()
    header = header_of(begun.config, found.settings)
    book = Journal.open(begun.state, header)
    try:
        set_aside = None
        notes: list[str] = []
        if book.header.settings != found.settings:
            set_aside = _begin_anew(begun, found, book, header)
            continues = False
        if set_aside is not None:
            notes += set_aside.notes(begun.config.keep_unused_days)
        if book.recovery.cut_bytes or book.recovery.holes:
            notes.append(_recovered(book.recovery))
        footer, saved = found.old.footer, read_saved(begun.state)
        last = saved or footer
        return Opened(
            book,
            continues,
            hosts_before=(*(footer.hosts if footer else ()), *(saved.hosts if saved else ())),
            inputs_before=tuple(last.inputs) if last else (),
            set_aside=set_aside,
            notes=tuple(notes),
        )
    except BaseException:
        book.close()
        raise


def header_of(config: RunConfig, settings: Mapping[str, JSONValue]) -> Header:
    """Of a journal that begins now."""
    return Header(
        format=FORMAT,
        hash_version=chat.HASH_VERSION,
        run_id=uuid.uuid4().hex,
        created_at_ms=int(time.time() * 1000),
        batchrun_version=VERSION,
        settings=settings,
        synthetic=config.mock,
    )


def _begin_anew(begun: Begun, found: Found, book: Journal, header: Header) -> Kept | None:
    """Empty a journal that was begun with other settings; what was set aside, if anything."""
    config, kept = begun.config, None
    at_stake = max(book.answers, found.old.at_stake)
    if at_stake and not config.overwrite:
        raise _differ(config, book.header.settings, found.settings, at_stake)
    if book.answers:
        book.begin_pass()
        kept = Unused.of(config, begun.state, synthetic=book.header.synthetic).tend(book)
    book.reset(header)
    return kept


def take_over(begun: Begun, found: Found, book: Journal) -> None:
    """Journal the answers of the published output: one path for every rerun.

    A run that was killed in its last moments may have published more than the journal that is left
    of it holds, or less.
    """
    footer = found.old.footer
    if footer is None or (publication := footer.publication or footer.run_id) in book.imported:
        return
    book.begin_pass()
    for number, outcome in enumerate(outputs.read_back(Path(begun.config.output))):
        book.settled(book.claim(outcome.hash), outcome)
        if number % IMPORT_ROWS == 0:
            begun.stop.check()
            book.flush()
    book.note_imported(publication)
    book.sync()


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


def _recovered(recovery: Recovery) -> str:
    text = f"the journal had {count(recovery.cut_bytes, 'byte')} of an unfinished write"
    if recovery.holes:
        text += f" and {count(recovery.holes, 'hole')} of {count(recovery.hole_bytes, 'byte')}"
    return f"{text}; every whole answer was kept"
