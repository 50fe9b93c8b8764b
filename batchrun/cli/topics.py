"""The manual that comes with the package: topics found by name, read as plain text.

A topic is one Markdown file: a heading, then one line that says what it is for. A recipe is a file
to copy, shown as it is.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import groupby
from typing import NamedTuple

from batchrun.errors import UsageError
from batchrun.terminal import WIDTH

TABLE_WIDTH = 100  # as wide as the help goes
FENCE = "```"


# The order of a first week; what is not named here follows by name.
_ORDER = (
    *(
        "endpoints",
        "input",
        "templates",
        "schema",
        "columns",
        "page",
        "money",
        "reruns",
        "exit-codes",
        "pipelines",
        "json",
    ),
    *("options", "python", "stand-in", "speed", "promises"),
)


_MANUAL = resources.files("batchrun") / "manual"
_RECIPES = _MANUAL / "recipes"


class Topic(NamedTuple):
    name: str
    purpose: str


def topics() -> list[Topic]:
    """Every topic with its purpose."""
    names = {file.name.removesuffix(".md") for file in _files(_MANUAL)}
    order = {name: place for place, name in enumerate(_ORDER)}
    inorder = sorted(names, key=lambda name: (order.get(name, len(order)), name))
    return [Topic(name, _text(_MANUAL, f"{name}.md").split("\n")[2]) for name in inorder]


def recipes() -> list[str]:
    """The names of the files to copy."""
    return sorted(file.name for file in _files(_RECIPES))


def contents(commands: Sequence[str]) -> str:
    """The topics, one on each line, and what else can be asked for."""
    lines = ["Topics (batchrun help TOPIC):", ""]
    lines += [f"  {name:<13}{purpose}" for name, purpose in topics()]
    lines += [f"  {'recipes':<13}Files to copy for cron, systemd, Kubernetes and Airflow.", ""]
    lines += _wrap(f"Commands (batchrun help COMMAND): {', '.join(commands)}.")
    return "\n".join(lines)


def read(topic: str) -> str:
    """The text of a topic, of the list of recipes, or of one recipe.

    Raises:
        UsageError: There is none of that name.
    """
    if topic in recipes():
        return _text(_RECIPES, topic).rstrip("\n")
    if topic == "recipes":
        return _list_of_recipes()
    names = [name for name, _ in topics()]
    if topic not in names:
        near = difflib.get_close_matches(topic, [*names, *recipes(), "recipes"], n=1, cutoff=0.4)
        meant = f"; did you mean: batchrun help {near[0]}" if near else ""
        raise UsageError(
            f"no topic {topic}{meant}", next_steps=("batchrun help   lists what there is",)
        )
    return plain(_text(_MANUAL, f"{topic}.md"))


def _list_of_recipes() -> str:
    lines = [f"Files to copy, in {_RECIPES}:", ""]
    lines += [f"  batchrun help {name}" for name in recipes()]
    return "\n".join([*lines, "", "What each is for: batchrun help pipelines"])


def _files(directory: Traversable) -> Iterator[Traversable]:
    return (entry for entry in directory.iterdir() if entry.is_file())


def _text(directory: Traversable, name: str) -> str:
    return directory.joinpath(name).read_text(encoding="utf-8")


def plain(markdown: str) -> str:
    """Markdown without its marks, wrapped for a terminal; what is fenced stays as it is."""
    lines: list[str] = []
    for place, part in enumerate(re.split(rf"^{FENCE}.*\n", markdown, flags=re.MULTILINE)):
        lines += _fenced(part) if place % 2 else _prose(part)
    return "\n".join(lines).strip("\n")


def _fenced(part: str) -> list[str]:
    return [f"  {line}".rstrip() for line in part.splitlines()]


def _prose(part: str) -> Iterator[str]:
    part = re.sub(r"^<!-- .* -->\n", "", part, flags=re.MULTILINE)
    for kind, lines in groupby(_spoken(part).splitlines(), _kind_of):
        if kind == "table":
            yield from _table([_cells(line) for line in lines])
        elif kind == "heading":
            for line in lines:
                marks, _, title = line.partition(" ")
                yield from (title, ("=" if marks == "#" else "-") * len(title))
        elif kind == "text":
            for paragraph in re.split(r"\n(?=- )", "\n".join(lines)):
                hanging = "  " if paragraph.startswith("- ") else ""
                yield from _wrap(paragraph, later=hanging)
        else:
            yield from lines


def _kind_of(line: str) -> str:
    if not line:
        return "gap"
    return {"|": "table", "#": "heading"}.get(line[0], "text")


def _spoken(text: str) -> str:
    """Links as the command that shows what they lead to; no marks for bold."""
    text = re.sub(r"\[([^]]+)\]\(recipes/[^)]+\)", r"\1", text)
    text = re.sub(r"\[([^]]+)\]\(([a-z-]+)\.md\)", r"\1 (batchrun help \2)", text)
    return re.sub(r"\*\*(.+?)\*\*", r"\1", text, flags=re.DOTALL)


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


def _table(rows: list[list[str]]) -> Iterator[str]:
    """Columns where they fit; else each row as its first cell with the others below it."""
    head, _, *body = rows
    widths = [max(len(row[place]) for row in [head, *body]) for place in range(len(head))]
    if sum(widths) + 2 * len(widths) <= TABLE_WIDTH:
        for row in [head, ["-" * width for width in widths], *body]:
            padded = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            yield "  ".join(padded).rstrip()
        return
    yield from (f"({head[0]}: {_in_a_row(head[1:])})", "")
    for first, *others in body:
        yield from _wrap(first)
        yield from _wrap(_in_a_row(others), first="    ", later="    ")


def _in_a_row(cells: Sequence[str]) -> str:
    return " · ".join(filter(None, cells))


def _wrap(text: str, first: str = "", later: str = "") -> list[str]:
    return textwrap.wrap(
        re.sub(r"\s+", " ", text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
