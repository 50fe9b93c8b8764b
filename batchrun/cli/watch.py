"""``status --watch``: what became of some runs, drawn anew until all have ended."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Final

from batchrun import console, terminal
from batchrun.cli.streams import say
from batchrun.console import StatusFacts
from batchrun.terminal import LABEL_WIDTH

EVERY_S: Final = 1.0
# Off a terminal every line stays: so many looks lie between two.
_LOOKS: Final = 60
# Lines are cut at the edge, not wrapped: going up must come out at the first one.
_NO_WRAP, _WRAP, _REST_OF_LINE, _REST = "\x1b[?7l", "\x1b[?7h", "\x1b[K", "\x1b[J"


def watch(look: Callable[[], list[StatusFacts]], *, every_s: float = EVERY_S) -> list[StatusFacts]:
    """Show what ``look`` finds until nothing runs any more; that is returned, and not shown."""
    drawing = _Drawing() if _is_drawn_on() else None
    for looks in count():
        facts = look()
        lines = terminal.lines(console.watched(facts)).splitlines()
        if all(each.state != "running" for each in facts):
            if drawing is not None:
                drawing.draw([])
            return facts
        if drawing is not None:
            drawing.draw(lines)
        elif looks % _LOOKS == 0:
            say("\n".join(lines))
        time.sleep(every_s)
    raise AssertionError("counting never ends")


def _is_drawn_on() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


def _fitted(line: str, columns: int) -> list[str]:
    """A line in as many as it takes: a number that the edge cuts off is another number."""
    label = " " * LABEL_WIDTH
    more = label if columns > 2 * LABEL_WIDTH else ""
    width = max(columns, 2)
    return textwrap.wrap(line, width, subsequent_indent=more, drop_whitespace=True) or [""]


class _Drawing:
    """Some lines of the terminal that are written over."""

    def __init__(self) -> None:
        self._drawn = 0

    def draw(self, lines: Sequence[str]) -> None:
        try:
            columns, height = os.get_terminal_size(sys.stderr.fileno())
        except OSError:
            columns, height = 80, 24
        lines = [part for line in lines for part in _fitted(line, columns)]
        if len(lines) >= height > 2:
            lines = [*lines[: height - 2], f"... and {len(lines) - height + 2:,} more lines"]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        shown = "".join(f"{line}{_REST_OF_LINE}\n" for line in lines)
        # One write: a terminal that draws between two would flicker.
        with suppress(OSError):
            sys.stderr.write(f"{up}\r{_NO_WRAP}{shown}{_REST}{_WRAP}")
            sys.stderr.flush()
        self._drawn = len(lines)
