"""The README says what is true: its commands run, its tables are those of the code.

``python tests/test_readme.py`` writes the option list anew from ``batchrun submit --help``.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest

from batchrun import errors
from batchrun.cli import cli, settable
from batchrun.outputs import recognise
from batchrun.providers import DEFAULT_BASE_URL, DEFAULT_KEY_ENV, DEFAULT_MODEL, PROVIDERS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")

MOST_LINES = 620
LONGEST_S = 60
HELP_WIDTH = 100  # as wide as the help itself goes
BAR = "% |"
SIGNALS = {129, 130, 143}
# Options of tools other than batchrun that the README types.
FOREIGN_OPTIONS: set[str] = set()


def fenced(language: str, text: str = TEXT) -> list[str]:
    """The contents of all blocks fenced with this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def marked(mark: str) -> str:
    """What stands below a comment, up to the next empty line outside of a fence."""
    after = TEXT.split(f"<!-- {mark} -->\n", 1)[1]
    if after.startswith("```"):
        return re.split(r"^```.*\n", after, maxsplit=2, flags=re.MULTILINE)[1]
    return after.split("\n\n", 1)[0] + "\n"


def table(mark: str) -> list[list[str]]:
    """The body of the table below a comment, cell by cell."""
    lines = marked(mark).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def submit_help() -> str:
    # A process of its own: click keeps a command's help option as the first context made it.
    command = [sys.executable, "-m", "batchrun", "submit", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(HELP_WIDTH)}
    return subprocess.check_output(command, env=environment, text=True)


def options() -> dict[str, click.Option]:
    """Every ``--option`` of every command."""
    commands: list[click.Command] = [cli, *cli.commands.values()]
    return {
        name: param
        for command in commands
        for param in command.params
        if isinstance(param, click.Option)
        for name in param.opts
        if name.startswith("--")
    }


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the samples where ``batchrun`` is a command, without anybody's settings."""
    shutil.copytree(
        ROOT / "sample_inputs",
        tmp_path / "sample_inputs",
        ignore=shutil.ignore_patterns("*.mock.parquet", "*.results.parquet", "*.batchrun"),
    )
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    script = commands / "batchrun"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m batchrun "$@"\n')
    script.chmod(0o755)
    for name in os.environ:
        if name.startswith("BATCHRUN_") or name.endswith("_API_KEY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def on_a_terminal(command: str, cwd: Path) -> list[str]:
    """What a command leaves on a terminal of 80 columns, line by line."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(["sh", "-c", command], cwd=cwd, stderr=theirs)
    os.close(theirs)
    pieces = []
    # Linux says by an error that nobody writes to a terminal any more.
    with contextlib.suppress(OSError):
        while select.select([ours], [], [], LONGEST_S)[0] and (piece := os.read(ours, 65_536)):
            pieces.append(piece)
    os.close(ours)
    try:
        assert process.wait(timeout=LONGEST_S) == 0
    finally:
        process.kill()
    # A carriage return writes over the line: what comes last is what is seen.
    lines = b"".join(pieces).decode().replace("\r\n", "\n").splitlines()
    return [line.rsplit("\r", 1)[-1] for line in lines if line.strip("\r")]


def without_figures(line: str) -> str:
    """A line of talk without what time and machine decide."""
    return re.sub(r"in [\d.]+ s \(.*\)|\([\d.]+ kB,", "", line)


# Setting up


def test_setting_up_is_one_line_each() -> None:
    for name, ends in (
        ("run", ".venv/bin/batchrun submit sample_inputs/prompts.jsonl --mock"),
        ("test", ".venv/bin/python -m pytest -q"),
    ):
        # As .ci/run finds them: the comment directly above an sh fence with one line in it.
        assert f"<!-- setup: {name} -->\n```sh\n" in TEXT
        line = marked(f"setup: {name}")
        assert line.count("\n") == 1
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert line.endswith(ends + "\n")


def test_nobody_is_sent_to_the_package_index() -> None:
    assert "belongs to another project" in TEXT
    assert not re.search(r"(pip|pipx|uv|uvx)\b[^\n]* (install|add|run)? ?batchrun\b", TEXT)


def test_the_output_shown_is_what_is_printed(checkout: Path) -> None:
    command = marked("setup: run").strip().split(" && ")[-1]
    printed = on_a_terminal(command, checkout)
    shown = marked("output: run").splitlines()
    assert [without_figures(line) for line in printed if BAR not in line] == [
        without_figures(line) for line in shown if BAR not in line
    ]
    assert sum(BAR in line for line in shown) == 1
    footer = recognise(checkout / "sample_inputs" / "prompts.mock.parquet")
    assert footer is not None
    assert footer.rows.ok == 20


# Commands

OFFLINE = [
    line
    for block in fenced("sh")
    for line in block.splitlines()
    if line.startswith("batchrun ") and ("--mock" in line or line.startswith("batchrun validate"))
]


@pytest.mark.parametrize("line", OFFLINE)
def test_a_command_of_the_readme_runs(line: str, checkout: Path) -> None:
    expected = errors.EXIT_ROWS_FAILED if "mistakes" in line else errors.EXIT_OK
    done = subprocess.run(
        ["sh", "-c", line], cwd=checkout, capture_output=True, text=True, timeout=LONGEST_S
    )
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr


def test_every_sh_block_is_run_here_or_by_the_gate() -> None:
    lines = [line for block in fenced("sh") for line in block.splitlines()]
    assert len(OFFLINE) == len(lines) - 2  # the two set-up lines


def test_the_python_examples_run(checkout: Path) -> None:
    shutil.copy(checkout / "sample_inputs" / "prompts.jsonl", checkout / "prompts.jsonl")
    section = TEXT.split("\n## Python\n", 1)[1].split("\n## ", 1)[0]
    code = "import asyncio\n" + "\n".join(fenced("python", section)) + "\nasyncio.run(answers())\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stderr
    assert "0 20 prompts.mock.parquet" in done.stdout
    assert "[synthetic]" in done.stdout


def test_the_config_file_shown_works(checkout: Path) -> None:
    (checkout / "run.toml").write_text(fenced("toml")[0])
    line = "batchrun submit sample_inputs/prompts.jsonl --mock --quiet --config run.toml"
    done = subprocess.run(["sh", "-c", line], cwd=checkout, capture_output=True, timeout=LONGEST_S)
    assert (done.returncode, done.stderr) == (0, b"")


# Tables


def test_the_option_list_is_that_of_the_help() -> None:
    shown = marked("help: submit")
    assert shown == submit_help(), "write it anew: python tests/test_readme.py"


def test_every_option_named_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert named - options().keys() - {"--help"} == FOREIGN_OPTIONS


def test_every_variable_named_exists() -> None:
    variables = {f"BATCHRUN_{name.upper()}" for c in cli.commands.values() for name in settable(c)}
    named = set(re.findall(r"\bBATCHRUN_[A-Z][A-Z_]*", TEXT))
    assert named <= variables | {DEFAULT_KEY_ENV}
    keys = set(re.findall(r"\b[A-Z]+_API_KEY\b", TEXT)) - {DEFAULT_KEY_ENV}
    assert keys == {preset.key_env for preset in PROVIDERS.values() if preset.key_env}


def test_every_command_is_named() -> None:
    named = set(re.findall(r"(?:^\$ |^|`)batchrun ([a-z-]+)", TEXT, re.MULTILINE))
    assert named == set(cli.commands)


def test_the_provider_table_is_that_of_the_code() -> None:
    told = {tuple(cell.strip("`") for cell in row) for row in table("providers")}
    assert told == {
        (p.name, p.base_url, p.key_env or "", p.model or "") for p in PROVIDERS.values()
    }


def test_the_default_endpoint_is_named_as_it_is() -> None:
    row = f"| the default endpoint | (nothing) | `{DEFAULT_BASE_URL}`, model `{DEFAULT_MODEL}`"
    assert f"{row} | `{DEFAULT_KEY_ENV}` |" in TEXT


def test_the_exit_codes_are_those_of_the_code() -> None:
    told = {int(code) for row in table("exit codes") for code in row[0].split(",")}
    ours = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert told == ours | SIGNALS


def test_the_recipes_know_what_a_person_must_look_at() -> None:
    final = {
        errors.EXIT_BUG,
        errors.EXIT_USAGE,
        errors.EXIT_ROWS_FAILED,
        errors.EXIT_REFUSED,
        errors.EXIT_IO,
    }
    kubernetes = re.search(r"operator: In, values: \[([\d, ]+)\]", TEXT)
    systemd = re.search(r"RestartPreventExitStatus=([\d ]+)", TEXT)
    assert kubernetes is not None
    assert systemd is not None
    assert {int(code) for code in kubernetes[1].split(",")} == final
    assert {int(code) for code in systemd[1].split()} == final | {errors.EXIT_LOCKED}


def test_the_columns_are_those_of_an_output(checkout: Path) -> None:

    line = "batchrun submit sample_inputs/prompts.jsonl --mock --quiet --carry none -o a.parquet"
    subprocess.run(["sh", "-c", line], cwd=checkout, check=True, timeout=LONGEST_S)
    schema = pq.read_schema(checkout / "a.parquet")
    told = [
        (name, row[1].replace("UTC", "tz=UTC"))
        for row in table("columns")
        for name in re.findall(r"`(\w+)`", row[0])
    ]
    assert sorted(told) == sorted((field.name, str(field.type)) for field in schema)


def test_the_python_shown_runs(tmp_path: Path) -> None:
    section = TEXT.partition("\n## Python\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    script = "\n".join(["import asyncio", blocks[0], "asyncio.run(answers())", blocks[1]])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-W", "error", "-c", script]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, timeout=LONGEST_S)
    assert pq.read_table(tmp_path / "out.parquet")["status"].to_pylist() == ["ok"]


# Promises, links, length


def test_every_promise_names_a_test_that_exists() -> None:
    promises = table("promises")
    assert len(promises) > 20
    for promise, where in promises:
        file, _, name = where.strip("`").partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        functions = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, f"{promise}: {where}"


def test_every_link_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_readme_stays_readable() -> None:
    assert TEXT.count("\n") < MOST_LINES


def test_the_changelog_has_this_version() -> None:
    from batchrun.config import VERSION

    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def write_help() -> None:
    """Put the present help into the README."""
    before, after = TEXT.split("<!-- help: submit -->\n```text\n", 1)
    rest = after[after.index("```\n") :]
    text = f"{before}<!-- help: submit -->\n```text\n{submit_help()}{rest}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_help()
