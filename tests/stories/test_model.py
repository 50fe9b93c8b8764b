"""A model of everything a user does to one output, over thousands of steps.

Hypothesis submits, stops, kills, edits, reorders, appends, deletes and duplicates rows, changes
settings, limits, retries, overwrites and collects, in any order. The runs are processes of their
own; the server's answers carry a number that no other answer has, so that one that is lost,
replaced or given to another row shows. After every step:

* no answer that was ever held is lost, and none of the current rows' is replaced;
* no run asks for what was held when it began;
* a published or collected file has the input's rows, in order, each with its own answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from crash_harness import Launcher
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mock_servers import MockServerThread

from batchrun.chat.identity import request_hash
from batchrun.journal.journal import Journal
from batchrun.journal.slots import Held
from batchrun.journal.state import StateDir
from batchrun.mock.replies import MockReply, MockRequest, completion, error_reply
from batchrun.outputs.read_back import read_back, recognise
from batchrun.types import Outcome

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "10"))
STEPS = int(os.environ.get("MODEL_STEPS", "25"))
NUMBERS = range(12)
SYSTEMS = (None, "Briefly.")
MOST_ROWS = 10
WAIT_S = 30.0
BROKEN = None  # a row that cannot become a request

Row = int | None
Kind = tuple[str | None, int]  # a question: with which system prompt, and its number
rows_of = st.one_of(st.sampled_from(NUMBERS), st.sampled_from([*NUMBERS, BROKEN]))


def question(number: int) -> str:
    return f"Question {number}?"


def hash_of(kind: Kind) -> bytes:
    system, number = kind
    messages = [{"role": "user", "content": question(number)}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return request_hash({"model": "m", "messages": messages})


KINDS: dict[bytes, Kind] = {
    hash_of((system, number)): (system, number) for system in SYSTEMS for number in NUMBERS
}


class Told(NamedTuple):
    """An answer's text: what was asked, and which answer this is of all that were ever given."""

    number: int
    serial: int

    @classmethod
    def read(cls, text: str) -> Told:
        match = re.fullmatch(r"answer (\d+) #(\d+)", text)
        assert match, text
        return cls(int(match[1]), int(match[2]))


class Memory:
    """What is held somewhere: the answers of every question, and how many of it were refused."""

    def __init__(self) -> None:
        self.ok: dict[Kind, set[int]] = {}
        self.rejected: Counter[Kind] = Counter()

    def add(self, found: Iterator[Outcome]) -> None:
        rejected = Counter[Kind]()
        for outcome in found:
            kind = KINDS[outcome.hash]
            if outcome.kind == "ok":
                told = Told.read(json.loads(outcome.body)["choices"][0]["message"]["content"])
                assert told.number == kind[1], "an answer of another question"
                self.ok.setdefault(kind, set()).add(told.serial)
            elif outcome.kind == "rejected":
                rejected[kind] += 1
        self.rejected |= rejected

    def add_output(self, path: Path) -> None:
        if path.exists():
            self.add(read_back(path))

    def add_state(self, state: Path) -> None:
        book = Journal.peek(StateDir(state))
        if book is not None:
            with contextlib.closing(book):
                self.add(_settled(book))

    def count(self, kind: Kind) -> int:
        return len(self.ok.get(kind, ()))

    @property
    def serials(self) -> set[int]:
        return {serial for serials in self.ok.values() for serial in serials}


def _settled(book: Journal) -> Iterator[Outcome]:
    book.begin_pass()
    for digest in KINDS:
        while book.held(slot := book.claim(digest)) is not Held.NEW:
            yield book.read(slot)


class Hold(NamedTuple):
    """Answer ``after`` requests of a run, then none, and end the process by this signal."""

    after: int
    signum: signal.Signals


class World:
    """The server and the launcher that all examples share."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.failing: dict[int, int] = {}
        self.asked: Counter[Kind] = Counter()  # by the current run
        self.hold: Hold | None = None
        self.holds = threading.Event()
        self.serial = 0
        self.ends = Counter[int]()  # the exit codes of all runs
        self.server = MockServerThread(respond=self._respond)

    def _respond(self, request: MockRequest) -> MockReply:
        body: dict[str, Any] = json.loads(request.body)
        body.pop("stream", None)
        body.pop("stream_options", None)
        kind = KINDS[request_hash(body)]
        self.asked[kind] += 1
        if self.hold is not None and self.asked.total() > self.hold.after:
            self.holds.set()
            return MockReply(raw=b"", ending="hang")
        if (status := self.failing.get(kind[1])) is not None:
            return error_reply(status, "no")
        self.serial += 1
        return completion(request, content=f"answer {kind[1]} #{self.serial}")

    def begin(self, hold: Hold | None) -> None:
        self.asked = Counter()
        self.hold = hold
        self.holds.clear()


_world: list[World] = []


class Model(RuleBasedStateMachine):
    """One output and its input, from nothing to wherever the rules lead."""

    def __init__(self) -> None:
        super().__init__()
        self.world = _world[0]
        self.world.failing = {}
        self.directory = Path(tempfile.mkdtemp(prefix="model-"))
        self.rows: list[Row] = []
        self.system: str | None = None
        self.ever: set[int] = set()  # all answers that were ever held

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    @initialize(
        suffix=st.sampled_from(["parquet", "parquet", "jsonl"]),
        rows=st.lists(rows_of, min_size=1, max_size=MOST_ROWS),
    )
    def begin(self, suffix: str, rows: list[Row]) -> None:
        self.output = self.directory / f"out.{suffix}"
        self.state = self.directory / f"out.{suffix}.batchrun"
        self.write(rows)

    # What a user does to the input

    @precondition(lambda self: len(self.rows) < MOST_ROWS)
    @rule(row=rows_of, at=st.integers(0, MOST_ROWS))
    def insert(self, row: Row, at: int) -> None:
        rows = list(self.rows)
        rows.insert(at, row)
        self.write(rows)

    @precondition(lambda self: len(self.rows) > 1)
    @rule(at=st.integers(0, MOST_ROWS - 1))
    def delete(self, at: int) -> None:
        self.write([row for n, row in enumerate(self.rows) if n != at % len(self.rows)])

    @rule(at=st.integers(0, MOST_ROWS - 1), row=rows_of)
    def edit(self, at: int, row: Row) -> None:
        rows = list(self.rows)
        rows[at % len(rows)] = row
        self.write(rows)

    @precondition(lambda self: len(self.rows) < MOST_ROWS)
    @rule(at=st.integers(0, MOST_ROWS - 1))
    def duplicate(self, at: int) -> None:
        self.write([*self.rows, self.rows[at % len(self.rows)]])

    @rule(chance=st.randoms(use_true_random=False))
    def reorder(self, chance: Any) -> None:
        rows = list(self.rows)
        chance.shuffle(rows)
        self.write(rows)

    @rule(system=st.sampled_from(SYSTEMS))
    def change_request_settings(self, system: str | None) -> None:
        self.system = system

    @rule(number=st.sampled_from(NUMBERS), status=st.sampled_from([400, 500, None]))
    def change_what_fails(self, number: int, status: int | None) -> None:
        self.world.failing.pop(number, None)
        if status is not None:
            self.world.failing[number] = status

    # What a user runs

    @rule(
        options=st.lists(
            st.sampled_from(["--stream", "--no-response-body", "--retry-failed", "--overwrite"]),
            unique=True,
        ),
        concurrency=st.sampled_from([1, 3]),
        limit=st.one_of(st.none(), st.none(), st.none(), st.integers(1, MOST_ROWS)),
    )
    def submit(self, options: list[str], concurrency: int, limit: int | None) -> None:
        self.run(options, concurrency, limit, None)

    @rule(after=st.integers(0, 4), concurrency=st.sampled_from([1, 3]), overwrite=st.booleans())
    def submit_and_kill(self, after: int, concurrency: int, overwrite: bool) -> None:
        options = ["--overwrite"] if overwrite else []
        self.run(options, concurrency, None, Hold(after, signal.SIGKILL))

    @rule(after=st.integers(0, 4), concurrency=st.sampled_from([1, 3]), overwrite=st.booleans())
    def submit_and_interrupt(self, after: int, concurrency: int, overwrite: bool) -> None:
        options = ["--overwrite"] if overwrite else []
        self.run(options, concurrency, None, Hold(after, signal.SIGINT))

    @rule()
    def collect(self) -> None:
        target = self.directory / f"partial{self.output.suffix}"
        args = ("collect", self.output.name, "-o", target.name)
        code, said = self.world.launcher.run(*args, cwd=self.directory)
        assert code in (0, 2), said
        if code == 0:
            held = self.held().serials | self.everywhere().serials
            for told in _answers(target):
                assert told is None or told.serial in held
            target.unlink()

    # What must be true

    @invariant()
    def nothing_is_left_over(self) -> None:
        assert not list(self.directory.glob(".*.batchrun-tmp"))

    def write(self, rows: list[Row]) -> None:
        self.rows = rows
        lines = (
            json.dumps({"n": at, "prompt": None if row is BROKEN else question(row)}) + "\n"
            for at, row in enumerate(rows)
        )
        (self.directory / "in.jsonl").write_text("".join(lines))

    def held(self) -> Memory:
        """What a run may find: the state, the output, and the answers of rows that are gone."""
        memory = Memory()
        memory.add_output(self.output)
        for path in self.directory.glob("out.unused*.parquet"):
            memory.add_output(path)
        memory.add_state(self.state)
        return memory

    def everywhere(self) -> Memory:
        """That, and what was set aside."""
        memory = self.held()
        for path in self.directory.glob(f"{self.output.name}.bak*"):
            memory.add_output(path)
        return memory

    def run(
        self, options: list[str], concurrency: int, limit: int | None, hold: Hold | None
    ) -> None:
        before = self.held()
        code, said = self.run_process(options, concurrency, limit, hold)
        self.world.ends[code] += 1
        assert "Traceback" not in said, said
        after, rows = self.held(), self.rows[:limit]
        asked = self.world.asked
        self.ever |= before.serials
        assert self.ever <= self.everywhere().serials, "an answer was lost"
        if code == 2:
            self.check_refusal(before, after, options, limit, said)
            return
        assert code in (0, 3, 130, -signal.SIGKILL), said
        wanted = Counter((self.system, row) for row in rows if row is not BROKEN)
        for kind, count in wanted.items():
            settled = before.count(kind)
            if "--retry-failed" not in options:
                settled += before.rejected[kind]
            assert asked[kind] <= max(0, count - settled), "asked again"
            kept = before.ok.get(kind, set()) & after.ok.get(kind, set())
            assert len(kept) >= min(count, before.count(kind)), "an answer was replaced"
        assert asked.keys() <= wanted.keys()
        if code in (0, 3):
            self.check_output(rows, after)

    def run_process(
        self, options: list[str], concurrency: int, limit: int | None, hold: Hold | None
    ) -> tuple[int, str]:
        world = self.world
        world.begin(hold)
        args: list[object] = ["submit", "in.jsonl", "-o", self.output.name, *options]
        args += ["--base-url", world.server.url, "-m", "m", "-c", concurrency]
        args += ["--max-retries", 0, "--max-in-doubt-retries", 200, "--abort-after", 0]
        args += ["--drain", 0]
        if self.system is not None:
            args += ["--system", self.system]
        if limit is not None:
            args += ["--limit", limit]
        process = world.launcher.start(*args, cwd=self.directory)
        end = time.monotonic() + WAIT_S
        while hold is not None and process.poll() is None and time.monotonic() < end:
            if world.holds.wait(0.001):
                os.kill(process.pid, hold.signum)
                break
        return process.wait()

    def check_refusal(
        self, before: Memory, after: Memory, options: list[str], limit: int | None, said: str
    ) -> None:
        """Exit 2 asks nothing, changes nothing and has a reason."""
        assert not self.world.asked
        assert before.ok == after.ok
        other = [kind for kind in before.ok if kind[0] != self.system]
        other += [kind for kind in before.rejected if kind[0] != self.system]
        if "other settings" in said:
            assert other
            assert "--overwrite" not in options
        else:
            assert "--limit" in said, said
            assert limit is not None

    def check_output(self, rows: list[Row], held: Memory) -> None:
        footer = recognise(self.output)
        assert footer is not None
        assert footer.complete
        told = _answers(self.output)
        assert len(told) == len(rows)
        assert _carried(self.output) == list(range(len(rows)))
        for row, answer in zip(rows, told, strict=True):
            assert answer is None or answer.number == row
        serials = [answer.serial for answer in told if answer is not None]
        assert len(serials) == len(set(serials)), "one answer for two rows"
        wanted = Counter(row for row in rows if row is not BROKEN)
        given = Counter(answer.number for answer in told if answer is not None)
        for number, count in wanted.items():
            assert given[number] == min(count, held.count((self.system, number)))


def _answers(path: Path) -> list[Told | None]:
    if path.suffix == ".parquet":
        texts = pq.read_table(path, columns=["response"])["response"].to_pylist()
        return [None if text is None else Told.read(text) for text in texts]
    told: list[Told | None] = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        ok = row["batchrun"].get("status") == "ok"
        body = row["response"]["body"] if ok else None
        told.append(Told.read(body["choices"][0]["message"]["content"]) if body else None)
    return told


def _carried(path: Path) -> list[int]:
    if path.suffix == ".parquet":
        numbers: list[int] = pq.read_table(path, columns=["n"])["n"].to_pylist()
        return numbers
    return [json.loads(line)["batchrun"]["input"]["n"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_no_order_of_steps_loses_replaces_or_asks_again() -> None:
    with Launcher() as launcher:
        world = World(launcher)
        _world[:] = [world]
        with world.server:
            run_state_machine_as_test(
                Model,
                settings=settings(
                    max_examples=EXAMPLES,
                    stateful_step_count=STEPS,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    print_blob=True,
                ),
            )
    print(f"runs by exit code: {dict(world.ends)}, {world.serial} answers")
    # A model whose runs all end alike has tried nothing.
    assert {0, 3} <= world.ends.keys()
