"""The manual is found by name, read without a network, and is plain text on a terminal."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchrun.cli.main import cli, run_command
from batchrun.cli.topics import plain, recipes
from batchrun.cli.topics import topics as topics_topics
from batchrun.errors import EXIT_OK, EXIT_USAGE
from batchrun.terminal import WIDTH

ROOT = Path(__file__).parents[2]
MANUAL = ROOT / "batchrun" / "manual"
NAMES = [topic.name for topic in topics_topics()]


def shown(*args: str) -> str:
    result = CliRunner().invoke(cli, ["help", *args])
    assert result.exception is None
    return result.output


def test_the_topics_are_listed_with_what_they_are_for() -> None:
    text = shown()
    assert {f"{name}.md" for name in NAMES} == {page.name for page in MANUAL.glob("*.md")}
    for name, purpose in topics_topics():
        assert f"\n  {name:<13}{purpose}\n" in text
        assert purpose.endswith(".")
    assert max(map(len, text.splitlines())) <= WIDTH
    for command in cli.commands:
        assert command in text


def test_no_topic_hides_behind_a_command() -> None:
    assert not {*NAMES, *recipes(), "recipes"} & cli.commands.keys()


def test_the_readme_lists_the_same_topics() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([\w-]+)\]\(batchrun/manual/\1\.md\) \| (.+) \|$", text, re.MULTILINE)
    assert rows == topics_topics()


@pytest.mark.parametrize("name", NAMES)
def test_a_topic_is_plain_text(name: str) -> None:
    text = shown(name)
    assert text.startswith((MANUAL / f"{name}.md").read_text("utf-8").split("\n")[0].strip("# "))
    assert not re.search(r"<!--|\]\(|\*\*|^```|^\|", text, re.MULTILINE)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_printed_as_it_is(name: str) -> None:
    assert shown(name) == (MANUAL / "recipes" / name).read_text(encoding="utf-8")
    assert f"batchrun help {name}\n" in shown("recipes")


def test_where_the_recipes_are_is_said() -> None:
    assert str(MANUAL / "recipes") in shown("recipes")


def test_the_help_of_a_command_is_help_too() -> None:
    assert shown("status") == CliRunner().invoke(cli, ["status", "--help"]).output


@pytest.mark.parametrize(
    ("typed", "meant"), [("endpoint", "endpoints"), ("exit", "exit-codes"), ("cron", "crontab")]
)
def test_an_unknown_topic_gets_the_nearest_name(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["help", typed]) == EXIT_USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert f"no topic {typed}; did you mean: batchrun help {meant}\n" in said.err


def test_a_topic_like_no_other_gets_the_way_to_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["help", "zzz"]) == EXIT_USAGE
    assert capsys.readouterr().err == (
        "batchrun: no topic zzz\n  batchrun help   lists what there is\n"
    )
    assert run_command(["help"]) == EXIT_OK


def test_the_package_holds_the_manual() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    globs = project["tool"]["setuptools"]["package-data"]["batchrun"]
    shipped = {file for glob in globs for file in (ROOT / "batchrun").glob(glob)}
    assert {file for file in MANUAL.rglob("*") if file.is_file()} <= shipped


MARKDOWN = """# A title

One line
for *this* [page](other.md) and **bold
text**.

- an item
  that goes on
- `code`

<!-- mark -->
| a | b |
|---|---|
| `x` | 1 |

```sh
as   it is


| # **not** touched
```
"""

PLAIN = """A title
=======

One line for *this* page (batchrun help other) and bold text.

- an item that goes on
- `code`

a  b
-  -
x  1

  as   it is


  | # **not** touched"""


def test_markdown_loses_its_marks_and_nothing_else() -> None:
    assert plain(MARKDOWN) == PLAIN


def test_a_table_too_wide_is_read_row_by_row() -> None:
    wide = "word " * 20
    rows = f"| name | kind | why |\n|---|---|---|\n| `x` | int | {wide}|\n| `y` | | short |\n"
    lines = plain(rows).splitlines()
    assert lines[:3] == ["(name: kind · why)", "", "x"]
    assert lines[-2:] == ["y", "    short"]
    assert max(map(len, lines)) <= WIDTH
