"""Inputs and outputs in object storage: fetched once, worked on as local files, put in place.

They are kept in a directory of their own while a run is unfinished, with its state: the copies of
the inputs, the output as it was, and the new one until it has arrived. That directory is the
memory of a run that was killed, also between publishing and the end of the upload.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from batchrun.addresses import beside, is_address, name_of
from batchrun.config import RunConfig
from batchrun.console import Progress
from batchrun.errors import (
    EXIT_IO,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    BatchrunError,
    LocalIOError,
    UsageError,
)
from batchrun.files import Seen, read_json, seen, write_json
from batchrun.inputs import Resolved
from batchrun.summary import RunSummary

if TYPE_CHECKING:
    from batchrun.storage import Found, ObjectSeen

SUFFIX = ".batchrun-objects"
_INDEX = "objects.json"


class _Synced(Struct):
    """A local file, and the object that it was made of or became."""

    address: str
    local: tuple[int, int] | None  # size in bytes, modified in ns; None: there was none
    remote: tuple[int, int] | None


class _Index(Struct):
    """What marks a directory as ours, and says what is in it. By names below the directory."""

    output: str = ""
    files: dict[str, _Synced] = {}


def is_remote(config: RunConfig) -> bool:
    """Whether anything of this run is in object storage."""
    return any(is_address(each) for each in (*config.inputs, config.output))


def named(resolved: Resolved) -> Resolved:
    """Copies of objects are known to people by their addresses."""
    files = []
    for file in resolved.files:
        own = next((each for each in file.path.parents if each.name.endswith(SUFFIX)), None)
        if own is not None:
            index = _index_of(own) or _Index()
            synced = index.files.get(str(file.path.relative_to(own)))
            if synced is not None:
                file = msgspec.structs.replace(file, name=synced.address)
        files.append(file)
    return Resolved(files, resolved.skipped)


def _index_of(directory: Path) -> _Index | None:
    try:
        return read_json(directory / _INDEX, _Index)
    except (OSError, ValueError, msgspec.MsgspecError):
        return None


class Mirror:
    """The local side of one output, or of one input that goes to a local one."""

    def __init__(self, directory: Path, output: str) -> None:
        self.directory = directory
        self._output = output
        self._index = _Index(output)

    @classmethod
    def of(cls, output: str, parent: Path = Path()) -> Mirror:
        """That of an output: in ``parent``, under a name that only this address has."""
        mark = hashlib.sha256(output.encode()).hexdigest()[:8]
        return cls(parent / f"{name_of(output)}.{mark}{SUFFIX}", output)

    @property
    def output(self) -> Path:
        """The local file of the output."""
        return self.directory / "output" / name_of(self._output)

    def exists(self) -> bool:
        return (self.directory / _INDEX).is_file()

    # ── before a run ─────────────────────────────────────────────────────────────────────────────

    def fetched(self, config: RunConfig) -> RunConfig:
        """The same run on local files; UsageError for an input that is nowhere.

        What was fetched before for this unfinished run, and has not changed since, stays.
        """
        self._open()
        inputs = [
            self._input(number, each) if is_address(each) else each
            for number, each in enumerate(config.inputs)
        ]
        output = config.output
        if is_address(output):
            self._fetch_output()
            output = str(self.output)
        self._save()
        return replace(config, inputs=tuple(inputs), output=output)

    def _open(self) -> None:
        if self.exists():
            self._index = _index_of(self.directory) or _Index()
            if self._index.output != self._output:
                raise UsageError(f"{self.directory}: holds the objects of another output")
            return
        try:
            self.directory.mkdir(mode=0o700)
        except FileExistsError:
            raise UsageError(
                f"{self.directory}: exists and was not made by batchrun; move it away"
            ) from None
        except OSError as exc:
            raise LocalIOError(f"{self.directory}: {exc.strerror}") from exc
        self._save()

    def _save(self) -> None:
        write_json(self.directory / _INDEX, self._index)

    def _input(self, number: int, address: str) -> str:
        from batchrun import storage

        found = storage.find(address)
        folder = Path("inputs", str(number))
        for each in found:
            self._fetch(folder / each.below, each.address, each.seen)
        wanted = {str(folder / each.below) for each in found}
        for name in [n for n in self._index.files if n.startswith(f"{folder}/")]:
            if name not in wanted:  # gone from there
                (self.directory / name).unlink(missing_ok=True)
                del self._index.files[name]
        one = len(found) == 1 and found[0].below == name_of(address)
        return str(self.directory / folder / found[0].below if one else self.directory / folder)

    def _fetch_output(self) -> None:
        """The output and what stands beside it for it: earlier versions, unused answers."""

        (self.directory / "output").mkdir(mode=0o700, exist_ok=True)
        there = set()
        for each in [*self._own_object(), *self._beside()]:
            self._fetch(Path("output", each.below), each.address, each.seen)
            there.add(str(Path("output", each.below)))
        for name in [n for n in self._index.files if n.startswith("output/") and n not in there]:
            path = self.directory / name
            if _local(seen(path)) == self._index.files[name].local:  # gone from there
                path.unlink(missing_ok=True)
                del self._index.files[name]

    def _own_object(self) -> list[Found]:
        from batchrun import storage

        found = storage.seen(self._output)
        if found is None:
            storage.check_bucket(self._output)
            return []
        return [storage.Found(self._output, self.output.name, found)]

    def _beside(self) -> list[Found]:
        from batchrun import storage

        own = self.output
        stem = own.name.removesuffix(own.suffix)
        try:
            found = storage.find(beside(self._output, f"{glob.escape(stem)}*"))
        except UsageError:
            return []  # nothing there yet
        kept = (f"{own.name}.bak", f"{stem}.unused")
        return [each for each in found if each.below.startswith(kept)]

    def _fetch(self, name: Path, address: str, remote: ObjectSeen) -> None:
        from batchrun import storage

        path = self.directory / name
        before = self._index.files.get(str(name))
        now = _remote(remote)
        here = _local(seen(path))
        if before is not None and here is not None:
            if here != before.local and name.parts[0] == "output":
                return  # made here, and not yet there: it is put in place after the run
            if before.remote == now and here == before.local:
                return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        storage.fetch(address, temporary)
        temporary.replace(path)
        self._index.files[str(name)] = _Synced(address, _local(seen(path)), now)

    # ── after a run ──────────────────────────────────────────────────────────────────────────────

    def put_in_place(self) -> list[str]:
        """Upload what is new or changed beside the output, the output last; the addresses.

        LocalIOError where somebody else changed an object meanwhile, or it could not be written:
        everything stays here, and the same command tries again.
        """
        from batchrun import storage

        folder = self.directory / "output"
        names = [p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
        put = []
        for name in sorted(names, key=lambda name: name == self.output.name):
            path = folder / name
            key = str(Path("output", name))
            address = beside(self._output, name)
            before = self._index.files.get(key, _Synced(address, None, None))
            here = _local(seen(path))
            if here == before.local:
                continue
            if _remote(storage.seen(address)) != before.remote:
                raise LocalIOError(
                    f"{address}: somebody else wrote it meanwhile; the answers are in {path}"
                )
            storage.put(path, address)
            self._index.files[key] = _Synced(address, here, _remote(storage.seen(address)))
            self._save()
            put.append(address)
        return put

    def settle(self) -> None:
        """Remove what was put here, unless something is left to do or is somebody else's."""
        own = {self.directory / name: each.local for name, each in self._index.files.items()}
        for folder, _, names in os.walk(self.directory):
            for path in (Path(folder, name) for name in names if name != _INDEX):
                if path not in own or _local(seen(path)) != own[path]:
                    return
        for path in own:
            path.unlink(missing_ok=True)
        (self.directory / _INDEX).unlink(missing_ok=True)
        for folder, _, _ in os.walk(self.directory, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _local(found: Seen | None) -> tuple[int, int] | None:
    return None if found is None else (found.size_bytes, found.modified_ns)


def _remote(found: ObjectSeen | None) -> tuple[int, int] | None:
    return None if found is None else (found.size_bytes, found.modified_ns)


async def run(
    config: RunConfig, talk: Progress, work: Callable[[RunConfig], Awaitable[RunSummary]]
) -> RunSummary:
    """Do ``work`` on local files, and put in place what it made.

    What is said, and the BatchrunError that ``work`` raises, names addresses, not copies.
    """
    if config.shard is not None and is_address(config.output):
        raise UsageError("--shard: parts are put together from local files; name a local -o")
    mirror = Mirror.of(config.output)
    try:
        local = await asyncio.to_thread(mirror.fetched, config)
        names = dict(
            zip((local.output, *local.inputs), (config.output, *config.inputs), strict=True)
        )
        talk.names = names
        with _saying(names):
            summary = _named(await work(local), config, names)
        if not is_address(config.output) or summary.exit_code not in (EXIT_OK, EXIT_ROWS_FAILED):
            return summary
        try:
            await asyncio.to_thread(mirror.put_in_place)
        except LocalIOError as exc:
            return msgspec.structs.replace(
                summary,
                state=exc.state,
                exit_code=EXIT_IO,
                reason=exc.message,
                published=False,
                next_steps=["the same command uploads it"],
            )
        return summary
    finally:
        await asyncio.to_thread(mirror.settle)


@contextlib.contextmanager
def _saying(names: Mapping[str, str]) -> Iterator[None]:
    """An error of the block names addresses, not copies."""
    try:
        yield
    except BatchrunError as exc:
        exc.message = _said(exc.message, names)
        exc.next_steps = tuple(_said(step, names) for step in exc.next_steps)
        raise


def _said(text: str, names: Mapping[str, str]) -> str:
    for copy, address in names.items():
        text = text.replace(copy, address)
    return text


def _named(summary: RunSummary, config: RunConfig, names: Mapping[str, str]) -> RunSummary:
    return msgspec.structs.replace(
        summary,
        inputs=list(config.inputs),
        output=config.output,
        backup=summary.backup and _said(summary.backup, names),
        reason=summary.reason and _said(summary.reason, names),
        notes=[_said(note, names) for note in summary.notes],
        next_steps=[_said(step, names) for step in summary.next_steps],
    )


@contextlib.contextmanager
def at_hand(output: str) -> Iterator[str]:
    """A local file for looking at an output: that of an unfinished run, or a copy for the block."""
    if not is_address(output):
        yield output
        return
    from batchrun import storage

    mirror = Mirror.of(output)
    if mirror.exists():
        with _saying({str(mirror.output): output}):
            yield str(mirror.output)
        return
    if storage.seen(output) is None:
        raise UsageError(f"{output}: no run and no output of batchrun there")
    with tempfile.TemporaryDirectory(prefix="batchrun-") as directory:
        path = Path(directory, name_of(output))
        storage.fetch(output, path)
        with _saying({str(path): output}):
            yield str(path)


@contextlib.contextmanager
def inputs_at_hand(config: RunConfig) -> Iterator[RunConfig]:
    """The run with copies of its inputs and its output, for the block: nothing is written."""
    if not is_remote(config):
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="batchrun-") as directory:
        unfinished = Mirror.of(config.output)
        if is_address(config.output) and unfinished.exists():
            shutil.copytree(unfinished.directory, Path(directory, unfinished.directory.name))
        yield Mirror.of(config.output, Path(directory)).fetched(config)
