"""Kill runs with SIGKILL at random moments until they are done, and check that nothing was lost.

    python tests/support/crash_harness.py --kills 1000

Each story is one input and one output: fresh, or grown, edited or shrunk since an earlier run and
whole again, as Parquet or as lines. Its runs are killed between any two requests, while they open
or import or publish, and while they clean up; then one is left alone. Checked after every death:

* the journal, the published file and that of unused answers together hold every answer they held
  before, each with its own text;
* no run asked for an answer that was held when it began;
* a published file is whole, old or new.

And at the end: exit 0, the file of an undisturbed run, nothing left over, no request sent again
beyond kills x requests in flight, and each of those among the attempts in doubt.

Killing is cheap because the processes are: ``Launcher`` imports batchrun once and forks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pyarrow.parquet as pq
from mock_servers import MockServerThread

from batchrun.chat.identity import request_hash
from batchrun.journal.journal import Journal
from batchrun.journal.state import StateDir
from batchrun.mock.knobs import Knobs
from batchrun.outputs.read_back import read_back, recognise

ROOT = Path(__file__).parents[2]
IN_FLIGHT = 8
WAIT_S = 60.0  # reached only when something is broken
# What tells of the journey and not of the answer.
OWN = ("latency_s", "ttft_s", "finished_at", "request_id", "attempts", "in_doubt_attempts")
Moment = Callable[[], bool]


# --- processes -------------------------------------------------------------------------------


class Launcher:
    """Starts ``batchrun ARGS`` as processes of their own, forked from one that has imported it all.

    A process begun anew spends half a second on imports; a forked one is there in milliseconds.
    """

    def __enter__(self) -> Self:
        # The environment is the children's: without whatever the tester's shell has set.
        environ = {k: v for k, v in os.environ.items() if not k.startswith("BATCHRUN_")}
        environ["PYTHONPATH"] = str(ROOT)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--launcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
        )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def start(
        self,
        *args: object,
        cwd: Path,
        at: float = 0.0,
        stopped: bool = False,
        file_limit_bytes: int | None = None,
    ) -> Launched:
        """``at``: not before this monotonic instant. ``stopped``: not before a SIGCONT."""
        out = Path(tempfile.mkstemp(prefix="launched-")[1])
        order = {"args": [str(a) for a in args], "cwd": str(cwd), "out": str(out), "at": at}
        answer = self.ask({**order, "stopped": stopped, "file_limit": file_limit_bytes})
        assert answer is not None
        return Launched(self, answer[0], out)

    def run(self, *args: object, cwd: Path) -> tuple[int, str]:
        """The exit code and everything that was said."""
        return self.start(*args, cwd=cwd).wait()

    def ask(self, order: dict[str, object]) -> list[int] | None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()
        answer: list[int] | None = json.loads(stdout.readline())
        return answer


class Launched:
    """One process of a Launcher."""

    def __init__(self, launcher: Launcher, pid: int, out: Path) -> None:
        self.pid = pid
        self._launcher = launcher
        self._out = out
        self._code: int | None = None
        self.peak_rss_bytes = 0

    def poll(self) -> int | None:
        """The exit code, minus the signal's number for a death by signal; None while it runs."""
        if self._code is None and (ended := self._launcher.ask({"poll": self.pid})) is not None:
            self._code, self.peak_rss_bytes = ended
        return self._code

    def wait(self) -> tuple[int, str]:
        end = time.monotonic() + WAIT_S
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"still running: {self._out.read_text()}"
            time.sleep(0.001)
        said = self._out.read_text(errors="replace") if self._out.exists() else ""
        self._out.unlink(missing_ok=True)
        return code, said

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)


def launcher_main() -> None:
    """The launcher's own process: one order a line, one answer each. It has one thread."""
    import tqdm  # noqa: F401 - so that no child has to

    from batchrun.cli.main import run_command as cli_run_command

    for line in sys.stdin.buffer:
        order = json.loads(line)
        if "poll" in order:
            pid, status, used = os.wait4(order["poll"], os.WNOHANG)
            unit = 1 if sys.platform == "darwin" else 1024
            ended = [os.waitstatus_to_exitcode(status), used.ru_maxrss * unit]
            answer = ended if pid else None
        elif (pid := os.fork()) == 0:
            _become(order)
            os._exit(_exit_code(cli_run_command, order["args"]))
        else:
            answer = [pid]
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


def _become(order: dict[str, Any]) -> None:
    # In the background of a shell it would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["cwd"])
    if (limit := order["file_limit"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    out = os.open(order["out"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    if order["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(max(0.0, order["at"] - time.monotonic()))


def _exit_code(run_command: Callable[[list[str]], int], args: list[str]) -> int:
    """As the interpreter would make it of what ``cli.main`` does."""
    try:
        code = run_command(args)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return code


# --- what is held ----------------------------------------------------------------------------


def question(number: int) -> str:
    return f"Question {number}?"


def write_rows(path: Path, numbers: Sequence[int]) -> None:
    lines = (json.dumps({"n": n, "prompt": question(n)}) + "\n" for n in numbers)
    path.write_text("".join(lines))


def hash_of(number: int) -> bytes:
    message = {"role": "user", "content": question(number)}
    return request_hash({"model": "m", "messages": [message]})


def published(path: Path) -> list[dict[str, Any]]:
    """Every row of an output without what tells of its journey; the file must be whole."""
    assert recognise(path) is not None
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return [{name: row[name] for name in row if name not in OWN} for row in rows]
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        row["batchrun"] = {
            name: value for name, value in row["batchrun"].items() if name not in (*OWN, "run")
        }
        row["response"].pop("request_id", None)
        del row["id"]
        rows.append(row)
    return rows


Answered = tuple[bytes, int, str]  # hash, when, request id: one answer and no other


def held(output: Path, numbers: Sequence[int]) -> Counter[int]:
    """For each number, how many answers there are that a rerun will not ask for."""
    hashes = {hash_of(number): number for number in numbers}
    found = {each for each in _answers_held(output) if each[0] in hashes}
    return Counter(hashes[hash] for hash, _, _ in found)


def _answers_held(output: Path) -> Iterator[Answered]:
    """All there are, in the output, among those whose rows are gone, and in the journal."""
    for path in (output, *output.parent.glob(f"{output.stem}.unused*.parquet")):
        for outcome in read_back(path) if path.exists() else ():
            if outcome.kind == "ok":
                assert outcome.hash == hash_of(_number_in(outcome.body))
                yield outcome.hash, outcome.finished_at_ms, outcome.request_id
    book = Journal.peek(StateDir(output.with_name(output.name + ".batchrun")))
    if book is not None:
        with contextlib.closing(book):
            book.begin_pass()
            for slot in book.unclaimed():
                outcome = book.read(slot)
                assert outcome.hash == hash_of(_number_in(outcome.body))
                yield outcome.hash, outcome.finished_at_ms, outcome.request_id


def _number_in(body: bytes) -> int:
    text: str = json.loads(body)["choices"][0]["message"]["content"]
    return int(text.removeprefix("[synthetic] Question ").removesuffix("?"))


# --- stories ---------------------------------------------------------------------------------


class Told(NamedTuple):
    """What a story came to."""

    kills: int
    requests: int
    sent_again: int
    moments: Counter[str]


class Story:
    """One output whose runs are killed up to ``most_kills`` times, and then left alone."""

    def __init__(self, launcher: Launcher, directory: Path, seed: int, most_kills: int) -> None:
        self.chance = random.Random(seed)
        self.launcher = launcher
        self.directory = directory
        self.most_kills = most_kills
        self.output = directory / self.chance.choice(("out.parquet", "out.parquet", "out.jsonl"))
        self.server = MockServerThread(Knobs(latency_s=0.002, latency_jitter_s=0.004, seed=seed))
        self.moments = Counter[str]()
        self.ever = Counter[int]()  # the rows that were ever there

    def tell(self) -> Told:
        with self.server:
            for numbers in self._inputs():
                write_rows(self.directory / "in.jsonl", numbers)
                self._enter(numbers)
                while sum(self.moments.values()) < self.most_kills and self._killed_run():
                    pass
                self._undisturbed_run()
            return self._check_end()

    def _enter(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.ever |= Counter(numbers)
        self.asked_before = self.asked()
        self.held = held(self.output, list(self.ever))

    def _undisturbed_run(self) -> None:
        code, said = self.launcher.run(*self._command(), cwd=self.directory)
        assert code == 0, said
        assert "Traceback" not in said, said
        self._check_run()

    def _command(self) -> list[str]:
        options = ["--base-url", self.server.url, "-m", "m", "-c", str(IN_FLIGHT)]
        return [
            *("submit", "in.jsonl", "-o", self.output.name, *options),
            *("--max-in-doubt-retries", "200", "--quiet"),
        ]

    def _inputs(self) -> list[list[int]]:
        """The inputs one after the other whose runs are killed; perhaps of one that ran before."""
        chance = self.chance
        rows = chance.randrange(10, 90)
        # Some rows ask the same: their answers are told apart by occurrence.
        numbers = [chance.randrange(rows) for _ in range(rows)]
        kind = chance.choice(("fresh", "fresh", "grown", "edited", "shrunk"))
        if kind == "fresh":
            return [numbers]
        earlier = numbers if kind == "shrunk" else numbers[: rows // 2]
        if kind == "edited":
            earlier = [*earlier, 1_000, 1_001]
        write_rows(self.directory / "in.jsonl", earlier)
        self._enter(earlier)
        self._undisturbed_run()
        shuffled = chance.sample(numbers, rows)
        # What is gone for a run or two comes back.
        shrunk = [shuffled[: chance.choice((0, 1, rows // 2))], numbers[: rows // 3]]
        return [*shrunk, shuffled] if kind == "shrunk" else [shuffled]

    def asked(self) -> Counter[int]:
        entries = self.server.ledger.entries
        return Counter(int(entry.prompt.split()[1][:-1]) for entry in entries)

    def _killed_run(self) -> bool:
        """Start a run and kill it at a moment; False when it was done before that."""
        name = self.chance.choice(("request", "request", "time", "publish", "clean up"))
        process = self.launcher.start(*self._command(), cwd=self.directory)
        reached = self._moment(name)
        with _killed_at_the_end(process):
            while not reached() and process.poll() is None:
                time.sleep(0.0002)
        code, said = process.wait()
        self._check_run()
        assert code in (-signal.SIGKILL, 0), said
        if code == 0:
            return False
        self.moments[name] += 1
        return True

    def _moment(self, name: str) -> Moment:
        chance = self.chance
        if name == "request":
            wanted = self.server.ledger.requests + chance.randrange(1, len(self.numbers) + 2)
            return lambda: self.server.ledger.requests >= wanted
        if name == "time":
            return _after(chance.random() ** 2 * 0.25)
        # A moment of its own: anything between two system calls of publishing and cleaning up.
        more_s = chance.choice((0.0, chance.random() * 0.004))
        before = _identity(self.output)

        def begins() -> bool:
            if name == "publish":
                return any(p.name.endswith(".batchrun-tmp") for p in self.directory.iterdir())
            return _identity(self.output) != before

        return _then(begins, more_s)

    def _check_run(self) -> None:
        """What must be true whenever no run is there."""
        asked = self.asked()
        wanted = Counter(self.numbers) - self.held
        too_often = (asked - self.asked_before) - wanted
        assert not too_often, f"asked again though the answers were held: {too_often}"
        now = held(self.output, list(self.ever))
        assert not self.held - now, f"lost: {self.held - now}"
        self.held, self.asked_before = now, asked

    def _check_end(self) -> Told:
        names = {path.name for path in self.directory.iterdir()}
        unused = self.ever - Counter(self.numbers)
        aside = {f"{self.output.stem}.unused.parquet"} if unused else set[str]()
        assert names == {"in.jsonl", self.output.name} | aside, names
        footer = recognise(self.output)
        assert footer is not None
        assert footer.complete
        files = (self.output, *(self.directory / name for name in aside))
        in_doubt = sum(o.in_doubt for path in files for o in read_back(path))
        kills = sum(self.moments.values())
        ledger = self.server.ledger
        sent_again = ledger.requests - self.ever.total()
        assert 0 <= sent_again <= in_doubt <= kills * IN_FLIGHT, (sent_again, in_doubt, kills)
        assert published(self.output) == self._undisturbed()
        return Told(kills, ledger.requests, sent_again, self.moments)

    def _undisturbed(self) -> list[dict[str, Any]]:
        alone = self.directory / "undisturbed"
        alone.mkdir()
        write_rows(alone / "in.jsonl", self.numbers)
        code, said = self.launcher.run(*self._command(), cwd=alone)
        assert code == 0, said
        return published(alone / self.output.name)


def _after(delay_s: float) -> Moment:
    end = time.monotonic() + delay_s
    return lambda: time.monotonic() >= end


def _then(begins: Moment, delay_s: float) -> Moment:
    """``delay_s`` after ``begins`` first holds."""
    since: list[float] = []

    def reached() -> bool:
        if not since and begins():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + delay_s

    return reached


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_ino, stat.st_mtime_ns
    return None


@contextlib.contextmanager
def _killed_at_the_end(process: Launched) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()


def survive(kills: int, seed: int, directory: Path, say: Callable[[str], None]) -> Told:
    """Tell stories until ``kills`` runs were killed; AssertionError names the story's seed."""
    total = Told(0, 0, 0, Counter())
    with Launcher() as launcher:
        story = seed * 1_000_000
        while total.kills < kills:
            place = directory / f"story-{story}"
            place.mkdir()
            most_kills = min(random.Random(story).randrange(1, 12), kills - total.kills)
            try:
                told = Story(launcher, place, story, most_kills).tell()
            except AssertionError as exc:
                exc.add_note(f"story {story}, in {place}")
                raise
            total = Told(
                total.kills + told.kills,
                total.requests + told.requests,
                total.sent_again + told.sent_again,
                total.moments + told.moments,
            )
            story += 1
            say(f"{total.kills:,} kills, {total.requests:,} requests")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill runs until done; check nothing was lost.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--launcher", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.launcher:
        launcher_main()
        return
    began_s = time.monotonic()
    # Not removed after a failure: there lies what went wrong.
    directory = Path(tempfile.mkdtemp(prefix="crash-harness-"))
    print(f"seed {options.seed}, in {directory}", flush=True)
    told = survive(options.kills, options.seed, directory, lambda text: print(text, flush=True))
    moments = ", ".join(f"{count:,} {name}" for name, count in told.moments.most_common())
    print(
        f"{told.kills:,} kills ({moments}), {told.requests:,} requests,"
        f" {told.sent_again:,} of them sent again, {time.monotonic() - began_s:.0f} s:"
        " nothing lost, nothing asked twice"
    )


if __name__ == "__main__":
    main()
