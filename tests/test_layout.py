"""The house keeps its shape: who imports whom, which library lives where, what the top level holds.

The tables below are the design: a package that is added, or imports another one, changes them here
first, so that the change is a decision and not an accident.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "batchrun"

# The modules at the top of the package: what travels between packages. They build on each other.
VOCABULARY = {
    *("types", "summary", "errors", "config", "providers"),
    *(
        "secret",
        "shell",
        "terminal",
        "words",
        "durations",
        "money",
        "process",
        "files",
        "shards",
        *("series", "addresses", "storage"),
        "prices",
    ),
}
# Which packages a package may import, besides the vocabulary: only through their doors.
MAY_IMPORT: dict[str, set[str]] = {
    "limits": set(),
    "chat": set(),
    "mock": set(),
    "console": set(),
    "journal": set(),
    "endpoint": {"chat"},
    "inputs": {"chat", "journal"},
    "outputs": {"chat"},
    "report": {"outputs"},
    "sending": {"chat", "limits", "journal", "outputs", "console"},
    "processes": {"endpoint"},
    "runs": {
        *("inputs", "chat", "processes", "endpoint", "sending", "journal"),
        *("outputs", "console", "mock", "report"),
    },
    "api": {"runs", "console"},
    "cli": {"runs", "console", "mock"},
    "__init__": {"api", "runs"},
    "__main__": {"cli"},
}
PACKAGES = VOCABULARY | set(MAY_IMPORT)

EVERYWHERE = PACKAGES
LIBRARY_ROOMS = {
    "aiohttp": {"endpoint", "mock"},
    "click": {"cli"},
    "jinja2": {"chat", "report"},
    "jsonschema_rs": {"chat"},
    "msgspec": EVERYWHERE,
    "genai_prices": {"prices"},
    "opentelemetry": {"runs"},
    "ray": {"processes"},
    "pyarrow": {"inputs", "outputs", "report", "storage"},
    "tenacity": {"sending"},
    "tqdm": {"console"},
}
# Not dependencies of ours: they come with aiohttp, whose interface speaks in them.
COMPANIONS = {"yarl": "aiohttp", "multidict": "aiohttp", "markupsafe": "jinja2"}
NOT_LIBRARIES = sys.stdlib_module_names | {"batchrun"}

TOP_LEVEL = {
    *("batchrun", "tests", "sample_inputs", "pyproject.toml", "README.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"),
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

    def reached(self) -> Iterator[tuple[str, bool]]:
        """The packages this reaches, also as ``from batchrun import files``; behind the door?"""
        if self.library != "batchrun":
            return
        if self.module == "batchrun":
            for name in self.names or ("",):
                yield (name if name in PACKAGES else "__init__"), False
        else:
            _, package, *rooms = self.module.split(".")
            # A room may also be taken as a whole: ``from batchrun.journal import records``.
            names = [name for name in self.names if (PACKAGE / package / f"{name}.py").exists()]
            yield package, bool(rooms or (names and not _is_door_of(package, names)))


def _is_door_of(package: str, names: Iterable[str]) -> bool:
    door = (PACKAGE / package / "__init__.py").read_text()
    return all(f'"{name}"' in door for name in names)


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
def imports_of(path: Path) -> tuple[Import, ...]:
    return tuple(imports(path))


def package_of(path: Path) -> str:
    top = path.relative_to(PACKAGE).parts[0]
    return top.removesuffix(".py")


# Recipes of the manual are files to copy, not rooms.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if package_of(path) != "manual")
by_name = pytest.mark.parametrize(
    "path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES]
)


def test_the_packages_are_those_of_the_table() -> None:
    assert {package_of(path) for path in FILES} == PACKAGES


def test_packages_have_no_packages() -> None:
    assert max(len(path.relative_to(PACKAGE).parts) for path in FILES) == 2


def test_no_room_is_a_drawer_for_leftovers() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "core", "base"}
    assert not drawers & {path.stem for path in FILES}


def test_no_arrow_runs_back_up() -> None:
    order: list[str] = []
    for package, below in MAY_IMPORT.items():
        assert below <= set(order), f"{package} stands above what it may import"
        order.append(package)


@by_name
def test_a_package_imports_only_what_it_may(path: Path) -> None:
    package = package_of(path)
    may = MAY_IMPORT.get(package, set()) | VOCABULARY | {package}
    wrong = [
        f"line {found.line} imports {other}"
        for found in imports_of(path)
        for other, _ in found.reached()
        if other not in may
    ]
    assert wrong == []


@by_name
def test_nobody_reaches_behind_the_door_of_another(path: Path) -> None:
    package = package_of(path)
    wrong = [
        f"line {found.line} imports {found.module}"
        for found in imports_of(path)
        for other, is_behind in found.reached()
        if other != package and is_behind
    ]
    assert wrong == []


@by_name
def test_rooms_of_a_package_go_in_one_direction(path: Path) -> None:
    """No room imports one that, over whatever others, imports it."""

    def below(room: Path) -> Iterator[Path]:
        for found in imports_of(room):
            _, package, *rest = [*found.module.split("."), ""]
            if found.library != "batchrun" or package != package_of(path):
                continue
            for name in [rest[0]] if rest[0] else found.names:
                if (other := PACKAGE / package / f"{name}.py").exists():
                    yield other

    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        for room in below(waiting.pop()):
            assert room != path, "imports itself over others"
            if room not in seen:
                seen.add(room)
                waiting.append(room)


@by_name
def test_a_library_stays_in_its_packages(path: Path) -> None:
    wrong = [
        f"line {found.line} imports {found.module}"
        for found in imports_of(path)
        if found.library not in NOT_LIBRARIES
        and not found.only_for_types
        and package_of(path)
        not in LIBRARY_ROOMS.get(COMPANIONS.get(found.library, found.library), set())
    ]
    assert wrong == []


def test_the_libraries_are_the_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    specs = [*project["dependencies"], *(spec for extra in extras for spec in extra)]
    declared = {re.split(r"[^\w-]", spec)[0].replace("-", "_") for spec in specs}
    assert {name.partition("_exporter")[0] for name in declared} == set(LIBRARY_ROOMS)


@by_name
def test_imports_are_absolute_and_name_what_they_take(path: Path) -> None:
    wrong = [f"line {i.line}" for i in imports_of(path) if not i.module or "*" in i.names]
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
