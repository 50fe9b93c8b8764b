"""The house keeps its shape: who imports whom, which library lives where, what the top level holds.

The two tables below are those of the design. A room that is added, removed or moved changes them
here first, so that the change is a decision and not an accident.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "batchrun"

# Bottom up. A room imports from lower layers only: those of one layer ignore each other.
LAYERS = (
    {
        "errors",
        "types",
        "config",
        "providers",
        "secret",
        "shell",
        "terminal",
        "words",
    },  # vocabulary
    {"quota", "window"},  # the two halves of limits
    {
        "prompts",
        "foreign",
        "table_notes",
        "answers",
        "retry",
        "limits",
        "sse",
        "accounting",
        "pool",
        "slots",
        "mock_replies",
        "options",
        "proxies",
    },  # pure logic
    {"records", "files", "deadlines"},  # what the files of a state and the endpoint are made of
    {"state", "connections"},  # where those lie, and what the endpoint sends on
    {
        "inputs",
        "outputs",
        "segments",
        "lock",
        "endpoint",
        "mock_server",
        "progress",
        "report",
        "saved",
        "process",
        "topics",
    },
    {"journal"},  # its segments, written and read as one
    # the passes of a run, each over several edges
    {"plan", "delivery", "unused"},
    {"runner"},  # the composition
    {"views", "api", "flags"},  # views of runs, the calls of Python programs, what can be typed
    {"cli", "__init__"},
    {"__main__"},
)
# Vocabulary may build on vocabulary; a cycle there fails at import.
INTERNAL_IMPORTS_ALLOWED = LAYERS[0]
LAYER_OF = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

EVERYWHERE = set(LAYER_OF)
LIBRARY_ROOMS = {
    "aiohttp": {"connections", "endpoint", "mock_server"},
    "click": {"cli", "flags"},
    "msgspec": EVERYWHERE,
    "pyarrow": {"inputs", "outputs", "table_notes"},
    "tenacity": {"retry"},
    "tqdm": {"progress"},
}
# Not dependencies of ours: they come with aiohttp, whose interface speaks in them.
COMPANIONS = {"yarl": "aiohttp", "multidict": "aiohttp"}
NOT_LIBRARIES = sys.stdlib_module_names | {"batchrun"}

TOP_LEVEL = {
    *("batchrun", "tests", "sample_inputs", "pyproject.toml", "README.md"),
    *("CHANGELOG.md", "LICENSE", "Makefile"),
    *(".ci", ".git", ".gitignore", ".pre-commit-config.yaml"),
}
HEAVY = {"aiohttp", "pyarrow", "tenacity", "tqdm"}


class Import(NamedTuple):
    line: int
    module: str  # "batchrun.types", "pyarrow.parquet"; "" when relative
    names: tuple[str, ...]
    only_for_types: bool  # under `if TYPE_CHECKING:`: an annotation names it, nothing uses it

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    def rooms(self) -> set[str]:
        """The rooms this reaches, also as ``from batchrun import journal``."""
        if self.library != "batchrun":
            return set()
        if self.module == "batchrun":
            return {name if name in LAYER_OF else "__init__" for name in self.names or ("",)}
        return {self.module.split(".")[1]}


def imports(path: Path) -> Iterator[Import]:
    """Every import of the file, also those inside functions and for type checkers only."""
    tree = ast.parse(path.read_text())
    for_types = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, (), node in for_types)
        elif isinstance(node, ast.ImportFrom):
            module = "" if node.level else node.module or ""
            names = tuple(alias.name for alias in node.names)
            yield Import(node.lineno, module, names, node in for_types)


@cache
def imports_of(room: str) -> tuple[Import, ...]:
    return tuple(imports(PACKAGE / f"{room}.py"))


def rooms() -> set[str]:
    return {path.stem for path in PACKAGE.glob("*.py")}


KNOWN_ROOMS = sorted(rooms() & LAYER_OF.keys())


def test_the_rooms_are_those_of_the_design() -> None:
    assert rooms() == set(LAYER_OF)


def test_the_package_is_flat() -> None:
    below = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert below == {"manual"}, "whose only .py is a recipe to copy"


def test_no_room_is_a_drawer_for_leftovers() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & rooms()


@pytest.mark.parametrize("room", KNOWN_ROOMS)
def test_a_room_imports_only_from_layers_below_it(room: str) -> None:
    own = LAYER_OF[room]
    wrong = [
        f"{room}.py:{found.line} imports {other}"
        for found in imports_of(room)
        for other in found.rooms()
        if LAYER_OF.get(other, own) >= own and not {room, other} <= INTERNAL_IMPORTS_ALLOWED
    ]
    assert wrong == []


@pytest.mark.parametrize("room", KNOWN_ROOMS)
def test_a_library_stays_in_its_rooms(room: str) -> None:
    wrong = [
        f"{room}.py:{found.line} imports {found.module}"
        for found in imports_of(room)
        if found.library not in NOT_LIBRARIES
        and not found.only_for_types
        and room not in LIBRARY_ROOMS.get(COMPANIONS.get(found.library, found.library), set())
    ]
    assert wrong == []


def test_the_libraries_are_the_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", spec)[0] for spec in project["dependencies"]}
    assert declared == set(LIBRARY_ROOMS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_imports_are_absolute_and_name_what_they_take(path: Path) -> None:
    wrong = [f"line {i.line}" for i in imports(path) if not i.module or "*" in i.names]
    assert wrong == []


def test_the_top_level_holds_the_project_and_the_customary_files() -> None:
    generated = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    found = {
        entry.name
        for entry in ROOT.iterdir()
        if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in generated)
    }
    assert found <= TOP_LEVEL, "unknown"
    assert found >= TOP_LEVEL - {".git"}, "missing"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import batchrun", id="import"),
        pytest.param("sys.argv[1:] = ['--help']; from batchrun.cli import main; main()", id="help"),
        pytest.param(
            "sys.argv[1:] = ['submit', '--help']; from batchrun.cli import main; main()",
            id="submit-help",
        ),
        pytest.param(
            "sys.argv[1:] = ['help', 'columns']; from batchrun.cli import main; main()",
            id="manual",
        ),
    ],
)
def test_help_answers_without_the_heavy_libraries(code: str) -> None:
    script = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", *sorted({HEAVY!r} & sys.modules.keys())))
{code}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
