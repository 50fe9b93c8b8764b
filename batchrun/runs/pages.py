"""``--report`` and ``batchrun report``: a page of a published table, made from the file alone."""

from __future__ import annotations

import os
from pathlib import Path

from batchrun import outputs
from batchrun.addresses import is_address, name_of
from batchrun.config import STDOUT, RunConfig
from batchrun.console import ReportFacts
from batchrun.errors import BatchrunError, UsageError
from batchrun.files import open_regular, reporting
from batchrun.journal import StateDir, read_series
from batchrun.outputs import Footer, Target
from batchrun.runs import objects
from batchrun.runs.status import footer_of
from batchrun.series import Series

_LOOK_BYTES = 100


def series_before(state: StateDir, old: Path | None) -> Series:
    """How the runs so far went: that of the unfinished one, else of those behind the output."""
    if (unfinished := read_series(state)) is not None:
        return unfinished
    if old is not None and old.suffix == ".parquet" and old.is_file():
        try:
            return outputs.parquet_series(old) or Series()
        except BatchrunError:
            return Series()
    return Series()


def check_page(config: RunConfig) -> None:
    """UsageError for a page that could not be made, or would take another file's place."""
    if config.report is None:
        return
    if config.output_format != "parquet" or config.to_stdout:
        raise UsageError("--report wants a Parquet output: the page is made from its columns")
    if config.shard is not None:
        raise UsageError(
            "--report is of a whole table, not of a part",
            next_steps=("after batchrun merge OUTPUT:", "batchrun report OUTPUT"),
        )
    if is_address(config.report):
        raise UsageError(f"--report {config.report}: the page is a local file")
    _check_place(Path(config.report), f"--report {config.report}")


def _check_place(path: Path, said: str) -> None:
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{said}: there is no directory {path.parent}")
    if os.path.lexists(path) and not _is_ours(path):
        raise UsageError(f"{said}: exists and is no page of batchrun's; name another file")


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with reporting(path, "read"), open(open_regular(path, os.O_RDONLY), "rb") as file:
        from batchrun.report import is_page

        return is_page(file.read(_LOOK_BYTES))


def write_page(config: RunConfig, footer: Footer) -> str:
    """Make the page that was asked for; what to say of it. The answers are published by now."""
    assert config.report is not None
    try:
        _write(Path(config.output), footer, Path(config.report), f"--report {config.report}")
    except BatchrunError as exc:
        return f"no page was made: {exc.message}"
    return f"a page to look at is {config.report}"


def make_page(output: str, target: str | None) -> ReportFacts:
    """Make a page of a published output, beside it unless ``target`` names a place.

    UsageError where there is no such output, or another file in the page's place.
    """
    if target == STDOUT:
        raise UsageError("-o -: the page is a file; name it")
    with objects.at_hand(output) as local:
        place = Path(target) if target is not None else Path(name_of(output)).with_suffix(".html")
        if not is_address(output) and target is None:
            place = Path(output).with_suffix(".html")
        return _make_page(output, Path(local), place)


def _make_page(output: str, local: Path, place: Path) -> ReportFacts:
    footer = footer_of(str(local))
    if footer is None:
        raise UsageError(f"{output}: no output of batchrun there")
    if local.suffix != ".parquet":
        raise UsageError(
            f"{output}: a page is made from a Parquet output",
            next_steps=("submit with -o answers.parquet",),
        )
    _write(local, footer, place, f"-o {place}")
    size_bytes = place.stat().st_size
    return ReportFacts(page=str(place), output=output, rows=footer.rows, size_bytes=size_bytes)


def _write(output: Path, footer: Footer, place: Path, said: str) -> None:
    _check_place(place, said)
    target = Target.at(place)
    # Not above: runs without a page do not pay for its libraries.
    from batchrun.report import gather, page

    made = page(gather(output, footer, outputs.parquet_series(output)))
    with outputs.replacing(target) as sink:
        sink.write(made)
