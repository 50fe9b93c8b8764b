"""Labels, columns and closing lines of a block of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import PurePath

from batchrun import terminal
from batchrun.config import INPUT_FORMATS, INPUT_SUFFIXES, STDOUT
from batchrun.console.facts import FileFacts
from batchrun.summary import TokenCounts
from batchrun.terminal import LABEL_WIDTH, WIDTH

SHOWN_NAMES = 6


def place(source: str) -> str:
    """``line 214`` for ``prompts.jsonl:214``, ``row 214`` for a table; others as they are."""
    name, colon, number = source.rpartition(":")
    if not colon or not number.isdigit():
        return source
    format_ = INPUT_SUFFIXES.get(PurePath(name).suffix)
    return f"{INPUT_FORMATS[format_].unit if format_ else 'line'} {number}"


def local_time(at_ms: int, now: datetime | None = None) -> str:
    """``14:01`` today, else with the day."""
    at = datetime.fromtimestamp(at_ms / 1000).astimezone()
    today = (now or datetime.now().astimezone()).date()
    return f"today {at:%H:%M}" if at.date() == today else f"{at:%Y-%m-%d %H:%M}"


def local_day(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000).astimezone():%Y-%m-%d %H:%M}"


def labelled(label: str, text: str) -> list[str]:
    """The label and its text, wrapped between words; what has no space stays whole."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{label:<{LABEL_WIDTH}}",
        subsequent_indent=" " * LABEL_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=True,
        drop_whitespace=True,
    ) or [label]


def nexts(steps: Iterable[str]) -> list[str]:
    """Lines to paste are never wrapped."""
    return [f"{'' if number else 'next':<{LABEL_WIDTH}}{step}" for number, step in enumerate(steps)]


def with_exit_code(lines: list[str], exit_code: int) -> list[str]:
    if not exit_code:
        return lines
    code = f"exit code {exit_code}"
    room = WIDTH - len(lines[-1])
    if room >= len(code) + 2:
        return [*lines[:-1], lines[-1] + code.rjust(room)]
    return [*lines, code.rjust(WIDTH)]


def cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3].rstrip() + "..."


def names(files: Sequence[FileFacts]) -> str:
    if len(files) <= 2:
        return ", ".join(terminal.one_line(file.name) for file in files) or "(no input)"
    return f"{terminal.one_line(files[0].name)} and {len(files) - 1} more"


def output_name(output: str | None) -> str:
    return "stdout" if output == STDOUT else terminal.one_line(output or "nothing")


def some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_NAMES])
    more = len(names) - SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def spent_words(tokens: TokenCounts) -> int:
    return max(tokens.total or 0, (tokens.prompt or 0) + (tokens.completion or 0))


def tokens(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1_000_000 else f"{number:,}"
