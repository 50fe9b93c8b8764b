"""Answers whose rows are gone from the input: kept beside the output until the rows come back.

An input shrinks, or is empty for a night. What was paid for its rows then moves from the output to
``<stem>.unused.parquet``, and is taken from there when an equal request is to be sent. What is in
the journal too, for a row that came back or since a run that was killed, leaves the file whenever
it is written anew, so an answer is in it at most once. Files that are not this output's own are
read if they are batchrun's, and never replaced: the next free number is taken instead.
"""

from __future__ import annotations

import os
import re
import stat
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, islice
from pathlib import Path
from typing import NamedTuple

from batchrun import outputs
from batchrun.config import VERSION, RunConfig
from batchrun.files import reporting, sync_directory
from batchrun.journal import Held, Journal, StateDir
from batchrun.outputs import Aside, Footer, Mark, OutputTally, Slice, Target
from batchrun.types import Outcome, UnusedCounts
from batchrun.words import count, verb

DAY_MS = 86_400_000
SLICE_ROWS = 128  # an answer may have megabytes
GONE = -1  # in place of the time since when: the answer leaves the file


class File(NamedTuple):
    """A file of answers set aside."""

    target: Target
    footer: Footer
    is_own: bool  # set aside by this very output, so ours to replace

    @property
    def path(self) -> Path:
        return self.target.shown

    @property
    def answers(self) -> int:
        return self.footer.rows.ok + self.footer.rows.error

    @property
    def oldest_ms(self) -> int:
        return self.footer.aside.oldest_ms if self.footer.aside else 0


class Kept(NamedTuple):
    """What is set aside at the end of a run, and what the run did about it."""

    answers: int = 0
    file: Path | None = None
    moved: int = 0  # came in this run
    dropped: int = 0  # were kept long enough, or not to be kept
    not_ours: tuple[Path, ...] = ()  # had the name before, and keep it

    def notes(self, keep_days: float | None) -> tuple[str, ...]:
        """What the run did about it, in words."""
        said = [
            f"{path} is not this output's own file of unused answers, and stays"
            for path in self.not_ours
        ]
        if self.moved:
            kept = f"{_gone(self.answers)} kept in {self.file} {_how_long(keep_days)}"
            said.append(f"{kept} (--keep-unused)")
        if self.dropped:
            after = f" after {_days(keep_days)}" if keep_days else ""
            said.append(f"{_gone(self.dropped)} dropped{after} (--keep-unused)")
        return tuple(said)


def counts_of(kept: Sequence[Kept | None], taken_back: int) -> UnusedCounts:
    """What became of unused answers in a run that looked after them so often, in this order."""
    every = [each for each in kept if each is not None]
    last = every[-1] if every else Kept()
    return UnusedCounts(
        answers=last.answers,
        file=str(last.file) if last.file else None,
        moved=sum(each.moved for each in every),
        dropped=sum(each.dropped for each in every),
        taken_back=taken_back,
    )


def _gone(answers: int) -> str:
    row = "of a row" if answers == 1 else "of rows"
    return f"{count(answers, 'answer')} {row} gone from the input {verb(answers, 'are')}"


def _how_long(days: float | None) -> str:
    return "for ever" if days is None else f"for {_days(days)}"


def _days(days: float) -> str:
    return "1 day" if days == 1 else f"{days:g} days"


class Unused:
    """The answers of one output whose rows are gone. ``tend`` is for who holds the output's lock.

    Synthetic answers and real ones never mix: files of the other kind are left alone. With
    ``keep_days`` None nothing is ever dropped.
    """

    def __init__(self, output: Path, *, synthetic: bool, keep_days: float | None) -> None:
        self._output = output
        self._synthetic = synthetic
        self._keep_days = keep_days
        self._files = [file for path in self._names() if (file := self._recognised(path))]

    @classmethod
    def of(cls, config: RunConfig, state: StateDir, *, synthetic: bool) -> Unused:
        """Those of a run's output; of one to stdout they are inside its state."""
        beside = state.path if config.to_stdout else Path(config.output)
        return cls(beside, synthetic=synthetic, keep_days=config.keep_unused_days)

    @property
    def kept(self) -> Kept:
        """What is set aside now."""
        return _as_they_are([file for file in self._files if file.is_own])

    def take_back(self, book: Journal, check_stop: Callable[[], None]) -> int:
        """Give rows that lack an answer one of an equal request; how many were given."""

        def is_wanted(hash: bytes) -> bool:
            return next(book.lacking(hash), None) is not None

        taken = 0
        for file in self._files:
            for outcomes in outputs.read_wanted(file.path, is_wanted):
                check_stop()
                taken += give(book, outcomes)
        if taken:
            book.sync()
        return taken

    def tend(self, book: Journal | None) -> Kept:
        """Set aside what the journal holds for no row, and drop what was kept for long enough.

        What the journal holds leaves the file, to be published or set aside anew. All of it is
        durable when this returns; the files change in one step each.
        """
        own = [file for file in self._files if file.is_own]
        target, not_ours = self._target(own)
        outputs.clean_leftovers(target.shown)
        now_ms = int(time.time() * 1000)
        oldest_ms = 0 if self._keep_days is None else now_ms - int(self._keep_days * DAY_MS)
        if book is None and all(file.oldest_ms > oldest_ms for file in own):
            return _as_they_are(own)
        left = () if book is None else book.unclaimed()
        stays = [_stays(file, book, oldest_ms) for file in own]
        expired = sum(each.expired for each in stays)
        if self._keep_days == 0:
            left, expired = (), expired + len(left)
        if not left and all(GONE not in each.since_ms for each in stays):
            return _as_they_are(own)
        oldest_kept_ms = min(
            (since for each in stays for since in each.since_ms if since != GONE), default=now_ms
        )
        if not left and all(len(each.since_ms) == each.since_ms.count(GONE) for each in stays):
            _remove(own)
            self._files = [file for file in self._files if not file.is_own]
            return Kept(dropped=expired)
        slices = _slices(own, stays, book, left, now_ms)
        footer = self._write(target, slices, oldest_kept_ms)
        _remove([file for file in own if file.path != target.shown])
        written = File(Target.at(target.shown), footer, is_own=True)
        self._files = [written, *(file for file in self._files if not file.is_own)]
        return Kept(written.answers, target.shown, len(left), expired, not_ours)

    def _write(self, target: Target, slices: Iterator[Slice], oldest_ms: int) -> Footer:
        footer = Footer(
            batchrun_version=VERSION,
            publication=uuid.uuid4().hex,
            complete=False,
            synthetic=self._synthetic,
            aside=Aside(self._output.name, oldest_ms),
        )
        tally = OutputTally()
        schema = outputs.ASIDE_SCHEMA
        return outputs.publish(target, "parquet", schema, slices, footer, tally, response_body=True)

    def _target(self, own: Sequence[File]) -> tuple[Target, tuple[Path, ...]]:
        """The file to write, and those that have a name before it and are not ours."""
        if own:
            return own[0].target, ()
        number = 1
        while os.path.lexists(self._name(number)):
            number += 1
        return Target.at(self._name(number)), tuple(map(self._name, range(1, number)))

    def _name(self, number: int) -> Path:
        counted = f".{number}" if number > 1 else ""
        return self._output.with_name(f"{self._output.stem}.unused{counted}.parquet")

    def _names(self) -> list[Path]:
        """The files there are under such names, by number."""
        pattern = re.compile(re.escape(self._output.stem) + r"\.unused(?:\.(\d+))?\.parquet")
        found: dict[int, Path] = {}
        with reporting(self._output.parent, "read"):
            for path in self._output.parent.iterdir():
                if match := pattern.fullmatch(path.name):
                    found[int(match[1] or 1)] = path
        return [found[number] for number in sorted(found)]

    def _recognised(self, path: Path) -> File | None:
        # Through a link it would be somebody else's file, and reading a pipe never ends.
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        target = Target.at(path)
        footer = outputs.recognise(path)
        if footer is None or footer.aside is None or footer.synthetic is not self._synthetic:
            return None
        return File(target, footer, footer.aside.output == self._output.name)


def give(book: Journal, outcomes: Sequence[Outcome]) -> int:
    """Settle rows with these; how many: each answer goes to one row, over all runs.

    Only an OK one goes to a rejected row.
    """
    taken = 0
    # A run that was stopped may have taken some of them already.
    held = _held_marks(book, {outcome.hash for outcome in outcomes})
    places: dict[tuple[bytes, bool], Iterator[int]] = {}
    for outcome in outcomes:
        if mark_of(outcome) in held:
            continue
        is_ok = outcome.kind == "ok"
        key = outcome.hash, is_ok
        if key not in places:
            places[key] = _places(book, outcome.hash, is_ok)
        if (slot := next(places[key], None)) is not None:
            book.settled(slot, outcome)
            taken += 1
    book.flush()
    return taken


def _places(book: Journal, hash: bytes, is_ok: bool) -> Iterator[int]:
    lacking = book.lacking(hash)
    return (slot for slot in lacking if is_ok or book.held(slot) is not Held.REJECTED)


class _Stays(NamedTuple):
    """Of each answer of a file since when its row is gone, or that it leaves the file."""

    since_ms: array[int]
    expired: int


def _stays(file: File, book: Journal | None, oldest_ms: int) -> _Stays:
    since_ms, expired = array("q"), 0
    for marks in outputs.read_marks(file.path):
        held = set() if book is None else _held_marks(book, {mark.hash for mark in marks})
        for mark in marks:
            if mark._replace(since_ms=0) in held:
                since_ms.append(GONE)
            elif mark.since_ms <= oldest_ms:
                since_ms.append(GONE)
                expired += 1
            else:
                since_ms.append(mark.since_ms)
    return _Stays(since_ms, expired)


def _held_marks(book: Journal, hashes: set[bytes]) -> set[Mark]:
    """What marks the settled answers to these requests in the journal."""
    slots = [slot for hash in hashes for slot in book.settled_slots(hash)]
    marks = set()
    for at in range(0, len(slots), SLICE_ROWS):
        for outcome in filter(None, book.read_all(slots[at : at + SLICE_ROWS])):
            marks.add(mark_of(outcome))
    return marks


def mark_of(outcome: Outcome) -> Mark:
    return Mark(outcome.hash, outcome.finished_at_ms, outcome.request_id, 0)


def _slices(
    own: Sequence[File],
    stays: Sequence[_Stays],
    book: Journal | None,
    left: Sequence[int],
    now_ms: int,
) -> Iterator[Slice]:
    """What the files keep, and then what leaves the journal."""
    for file, each in zip(own, stays, strict=True):
        since_ms = filter(GONE.__ne__, each.since_ms)
        outcomes = compress(outputs.read_back(file.path), map(GONE.__ne__, each.since_ms))
        while chunk := list(islice(outcomes, SLICE_ROWS)):
            yield outputs.aside_slice(chunk, list(islice(since_ms, len(chunk))))
    for at in range(0, len(left), SLICE_ROWS):
        assert book is not None
        chunk = [each for each in book.read_all(left[at : at + SLICE_ROWS]) if each is not None]
        yield outputs.aside_slice(chunk, [now_ms] * len(chunk))


def _as_they_are(own: Sequence[File]) -> Kept:
    return Kept(sum(file.answers for file in own), own[0].path if own else None)


def _remove(files: Sequence[File]) -> None:
    for file in files:
        with reporting(file.path, "remove"):
            file.path.unlink(missing_ok=True)
            sync_directory(file.path.parent)
