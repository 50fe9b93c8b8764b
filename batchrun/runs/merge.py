"""``batchrun merge``: the parts that shards made become the output that one run would have made."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from batchrun import outputs
from batchrun.addresses import is_address
from batchrun.config import Allowance
from batchrun.console import MergeFacts
from batchrun.errors import StoppedEarly, UsageError
from batchrun.journal import locked
from batchrun.money import Price
from batchrun.outputs import Footer, OutputTally, Schema, Slice, Target
from batchrun.runs.facts import now_utc
from batchrun.runs.place import state_of
from batchrun.shards import Shard, parts_of
from batchrun.words import count, verb

_SHOWN = 8


class _Part(NamedTuple):
    path: Path
    footer: Footer


def merge(output: str, allowed: Allowance) -> MergeFacts:
    """Write one file of all parts, in order; they stay, and merging again makes the same.

    StoppedEarly names parts that are missing or were made from other inputs. UsageError for what
    is not ours to replace; an output that holds what the parts may lack is kept as ``.bak``.
    """
    path = Path(output)
    if is_address(output):
        raise UsageError(f"{output}: parts are put together from local files")
    if path.suffix != ".parquet" or not path.name.removesuffix(".parquet"):
        raise UsageError(f"{output or 'nothing'}: not the name of an output; it ends in .parquet")
    parts = _parts(path)
    with locked(state_of(output, None), "fail") as held:
        if held.state.has_journal():
            raise UsageError(
                f"{output}: an unfinished run of it holds answers",
                next_steps=(f"batchrun status {output}",),
            )
        try:
            return _merged(path, parts, allowed)
        finally:
            held.remove_state()


def _merged(path: Path, parts: Sequence[_Part], allowed: Allowance) -> MergeFacts:
    first = parts[0].footer
    publishing = {name: value for name, value in first.publishing.items() if name != "shard"}
    footer = replace(
        first,
        run_id=uuid.uuid4().hex,
        publication=uuid.uuid4().hex,
        publishing=publishing,
        hosts=list(dict.fromkeys(host for part in parts for host in part.footer.hosts)),
        started_at=min(part.footer.started_at for part in parts),
        finished_at=now_utc(),
    )
    outputs.clean_leftovers(path)
    target = Target.at(path)
    if path.exists():
        _keep(path, parts)
    schema, _ = outputs.slices_of(parts[0].path)
    tally = OutputTally(Price.remembered(publishing))
    outputs.publish(
        target,
        "parquet",
        schema,
        _slices(parts, schema),
        footer,
        tally,
        response_body=bool(publishing.get("response_body", True)),
        more=outputs.more_columns(footer),
    )
    return MergeFacts(
        output=str(path),
        parts=[str(part.path) for part in parts],
        rows=tally.rows,
        size_bytes=path.stat().st_size,
        synthetic=footer.synthetic,
        errors=tuple(tally.errors),
        tokens=tally.tokens,
        failed_too_many=not allowed.covers(tally.rows.error, tally.rows.total or 0),
    )


def _slices(parts: Sequence[_Part], schema: Schema) -> Iterator[Slice]:
    for part in parts:
        found, slices = outputs.slices_of(part.path)
        if found != schema:
            raise StoppedEarly(f"{part.path}: other columns than {parts[0].path}; nothing was made")
        yield from slices


def _parts(output: Path) -> list[_Part]:
    """All parts of the division that was made last, each finished and of the same inputs."""
    found = {
        shard: _Part(path, footer)
        for shard, path in parts_of(output).items()
        if (footer := outputs.recognise(path)) is not None
        and footer.publishing.get("shard") == str(shard)
    }
    if not found:
        raise UsageError(
            f"{output}: no parts of it are there",
            next_steps=("batchrun submit INPUT --shard I/N -o OUTPUT    makes one",),
        )
    of = max(found, key=lambda shard: os.stat(found[shard].path).st_mtime_ns).of
    here = {shard.number: part for shard, part in found.items() if shard.of == of}
    _check_complete(output, of, here)
    newest = max(here.values(), key=lambda part: part.footer.started_at).footer
    for number, part in sorted(here.items()):
        if part.footer.settings != newest.settings or part.footer.synthetic != newest.synthetic:
            raise _again(part, "was made with other settings", Shard(number, of))
        if part.footer.publishing | {"shard": ""} != newest.publishing | {"shard": ""}:
            raise _again(part, "has other columns or another price", Shard(number, of))
        if part.footer.inputs_digest != newest.inputs_digest:
            raise _again(part, "was made from other inputs", Shard(number, of))
    return [part for _, part in sorted(here.items())]


def _check_complete(output: Path, of: int, here: Mapping[int, _Part]) -> None:
    missing = [str(Shard(number, of)) for number in range(1, of + 1) if number not in here]
    if missing:
        more = f" and {len(missing) - _SHOWN:,} more" if missing[_SHOWN:] else ""
        raise StoppedEarly(
            f"{output}: {count(len(missing), 'part')} {verb(len(missing), 'are')} missing:"
            f" {', '.join(missing[:_SHOWN])}{more}",
            next_steps=(f"the same submit command with --shard {missing[0]}",),
        )


def _again(part: _Part, why: str, shard: Shard) -> StoppedEarly:
    return StoppedEarly(
        f"{part.path}: {why} than the newest part",
        next_steps=(f"the newest submit command with --shard {shard}",),
    )


def _keep(path: Path, parts: Sequence[_Part]) -> None:
    """UsageError for a file of somebody else's; keep one that holds an answer the parts lack.

    Rows in another order count as lacking: so this needs no memory, and errs to the safe side.
    """
    if outputs.recognise(path) is None:
        raise UsageError(f"{path}: exists and was not written by batchrun; move it away")
    merged = (mark for part in parts for mark in outputs.answers_in(part.path))
    if not all(mark in merged for mark in outputs.answers_in(path)):
        outputs.backup(path)
