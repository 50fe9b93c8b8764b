"""Fixtures shared by the tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import pytest
from mock_servers import MockServerThread

from batchrun.cli.main import run_command
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import Respond


class StartMock(Protocol):
    def __call__(
        self, knobs: Knobs | None = None, *, respond: Respond | None = None
    ) -> MockServerThread: ...


@pytest.fixture
def mock() -> Iterator[StartMock]:
    """Start servers, each in a thread of its own: ``server = mock(Knobs(...), respond=...)``.

    They keep every ledger entry and are stopped at the end of the test.
    """
    servers: list[MockServerThread] = []

    def start(knobs: Knobs | None = None, *, respond: Respond | None = None) -> MockServerThread:
        servers.append(MockServerThread(knobs, respond=respond))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


ROOT = Path(__file__).parent.parent
# What a test's code in a process of its own may import: the project, and tests beside others.
IMPORTABLE = (ROOT, *(ROOT / "tests" / name for name in ("support", "journal", "stories")))
STORIES = ROOT / "tests" / "stories"
WAIT_S = 30.0  # for events of another process; reached only when something is broken


class Spawn(Protocol):
    def __call__(
        self, code: str, *arguments: object
    ) -> contextlib.AbstractContextManager[subprocess.Popen[str]]: ...


@pytest.fixture
def spawn() -> Spawn:
    """Run Python in a process of its own: ``with spawn(code, argument) as process: ...``.

    The code may import the project and its tests. Killed if it is still there at the end.
    """

    @contextlib.contextmanager
    def start(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, IMPORTABLE))},
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    return start


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed


class Submit(Protocol):
    def __call__(self, *args: object) -> Ended: ...


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Submit:
    """``cli("merge", "a.parquet")``: any command, in this process."""

    def run(*args: object) -> Ended:
        return Ended(run_command([*map(str, args)]), *capsys.readouterr())

    return run


@pytest.fixture
def submit(cli: Submit) -> Submit:
    """``submit("a.jsonl", "-c", 4)`` as on the command line, in this process."""

    return partial(cli, "submit")


def _default_signals() -> None:
    # Under nohup, or in the background of a shell, they would be ignored.
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)


class Run(subprocess.Popen[str]):
    """``batchrun submit ARGS`` as a process of its own; killed if it is still there at the end."""

    def __init__(self, *args: object, environ: dict[str, str], **more: Any) -> None:
        super().__init__(
            [sys.executable, "-m", "batchrun", "submit", *map(str, args)],
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
            **{
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "preexec_fn": _default_signals,
                **more,
            },
        )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        super().__exit__(exc_type, exc, traceback)

    def end(self, stdin: str | None = None) -> Ended:
        """Wait for its end; what it said and the exit code."""
        out, err = self.communicate(stdin, timeout=WAIT_S)
        return Ended(self.returncode, out, err)

    def says(self, words: str) -> None:
        """Return when a line of its stderr holds ``words``."""
        assert self.stderr is not None
        said = []
        for line in self.stderr:
            if words in line:
                return
            said.append(line)
        raise AssertionError(f"ended without {words!r}: {''.join(said)}")


class StartRun(Protocol):
    def __call__(self, *args: object, environ: dict[str, str] = ..., **more: Any) -> Run: ...


@pytest.fixture
def running() -> StartRun:
    """Start runs: ``with running("in.jsonl", "-c", 4) as run: ... run.end()``."""

    def start(*args: object, environ: dict[str, str] | None = None, **more: Any) -> Run:
        return Run(*args, environ=environ or {}, **more)

    return start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs take seconds each: the fast loop leaves all of them out."""
    for item in items:
        if item.path.is_relative_to(STORIES):
            item.add_marker(pytest.mark.slow)
