"""What a run begins with: its state, its settings, its endpoint."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from batchrun import process
from batchrun.chat import PromptSettings
from batchrun.config import MAX_CONCURRENCY, STATE_SUFFIX, IfLocked, RunConfig
from batchrun.console import FileFacts, Progress
from batchrun.endpoint import ChatEndpoint
from batchrun.errors import LocalIOError, Locked, UsageError
from batchrun.journal import Lock, StateDir, locate
from batchrun.journal import locked as lock_state
from batchrun.mock import Knobs, MockServer
from batchrun.providers import DEFAULT_MODEL, MOCK, Endpoint, full_url, provider_of
from batchrun.runs import plan
from batchrun.runs.plan import Source
from batchrun.runs.stop import Stop
from batchrun.secret import Secret


def prompt_settings(config: RunConfig) -> PromptSettings:
    """What the user asks of every row, with this endpoint's habits."""
    return plan.settings_of(config, model=model_of(config), stream_usage=_asks_usage(config))


def model_of(config: RunConfig) -> str | None:
    return config.endpoint.default_model if config.model is None else config.model


def _asks_usage(config: RunConfig) -> bool:
    """Whether a stream of this endpoint tells its usage only when asked."""
    provider = provider_of(config.endpoint.url)
    is_default = config.endpoint.default_model == DEFAULT_MODEL
    return not is_default and (provider is None or provider.name != "mistral")


async def locked(
    config: RunConfig, state: Path, stop: Stop, talk: Progress, stack: ExitStack
) -> Lock:
    """Hold output and state until ``stack`` ends; with ``--if-locked wait``, say for whom we wait.

    A state elsewhere is no way around another run of the same output: its usual place is held too.
    """

    def hold(if_locked: IfLocked = "fail") -> Lock:
        with ExitStack() as holding:
            usual = _usual_state(config)
            if usual is not None and not _is_same(usual, state):
                holding.enter_context(_reserved(usual, if_locked, stop))
            held = holding.enter_context(lock_state(state, if_locked, cancelled=stop.requested))
            stack.push(holding.pop_all())
            return held

    try:
        return await asyncio.to_thread(hold)
    except Locked as exc:
        if config.if_locked != "wait":
            raise
        talk.note(exc.message, label="waiting")
    return await asyncio.to_thread(hold, "wait")


def _usual_state(config: RunConfig) -> Path | None:
    """Where the state of this output is unless another place is asked for."""
    if config.to_stdout:
        return None
    real = os.path.realpath(config.output)
    return locate(Path(real + STATE_SUFFIX), real).path


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def _reserved(usual: Path, if_locked: IfLocked, stop: Stop) -> Iterator[None]:
    with lock_state(usual, if_locked, cancelled=stop.requested) as held:
        try:
            yield
        finally:
            if not has_journal(usual):
                held.remove_state()


def check_output(config: RunConfig) -> None:
    """Say at once what would make publishing fail at the end."""
    if config.to_stdout:
        process.stdout()
        return
    path = Path(config.output)
    if path.is_dir():
        raise UsageError(f"-o {path}: that is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"-o {path}: that is not a regular file; -o - writes to standard output")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"-o {path}: there is no directory {parent}")
    try:
        # Only trying tells: root may write anywhere, and not in a read-only file system.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as exc:
        raise LocalIOError(f"{path}: cannot write in {parent}: {exc.strerror}") from exc


@contextmanager
def state_dir(config: RunConfig) -> Iterator[Path]:
    if config.state_dir is not None or not config.to_stdout:
        yield state_of(config.output, config.state_dir)
    else:
        # Nothing can continue what went to stdout, unless --state says where to remember it.
        with tempfile.TemporaryDirectory(prefix="batchrun-") as directory:
            yield Path(directory) / "state"


@asynccontextmanager
async def chat_endpoint(config: RunConfig) -> AsyncIterator[ChatEndpoint]:
    """The endpoint to send to, open until the end of the block."""
    if config.endpoint == MOCK:
        async with MockServer(Knobs()) as server:
            inside = replace(MOCK, url=full_url(server.url, MOCK.path))
            # The other ends of its connections are in this process too.
            async with _client(config, inside, sockets_each=2) as endpoint:
                yield endpoint
    else:
        async with _client(config, config.endpoint, config.headers, proxied=True) as endpoint:
            yield endpoint


def _client(
    config: RunConfig,
    endpoint: Endpoint,
    headers: Sequence[tuple[str, Secret]] = (),
    *,
    proxied: bool = False,
    sockets_each: int = 1,
) -> ChatEndpoint:
    return ChatEndpoint(
        endpoint,
        headers,
        timeout_s=config.timeout_s,
        connect_timeout_s=config.connect_timeout_s,
        proxied=proxied,
        room=process.room_for_sockets(wanted_room(config) * sockets_each) // sockets_each,
    )


def wanted_room(config: RunConfig) -> int:
    """How many requests may be in flight, if this process may open as many connections."""
    return config.concurrency or MAX_CONCURRENCY


def state_of(output: str, state_dir: Path | None) -> Path:
    """Where the state of this output is, or would be. UsageError where none can be kept safely."""
    return locate(state_dir or Path(output + STATE_SUFFIX), output).path


def has_journal(state: Path) -> bool:
    return StateDir(state).has_journal()


def file_facts(source: Source) -> FileFacts:
    """One input as the start block and ``validate`` show it."""
    return FileFacts(
        name=source.file.name,
        format=source.file.format,
        compression=source.file.compression,
        rows=source.rows,
        size_bytes=source.file.size_bytes,
        shape=source.layout.shape,
        prompt_column=source.layout.prompt_column,
        sent=source.layout.sent,
        carried_only=source.layout.carried_only,
    )


def now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
