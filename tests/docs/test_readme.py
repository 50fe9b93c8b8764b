"""README and manual say what is true: their commands run, their tables are those of the code.

``python tests/test_readme.py`` writes the option list anew from ``batchrun submit --help``.
"""

from __future__ import annotations

import ast
import configparser
import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import click
import msgspec
import pyarrow.parquet as pq
import pytest
from mock_servers import MockServerThread

from batchrun import errors
from batchrun.cli.flags import settable
from batchrun.cli.main import cli
from batchrun.cli.options import Given, build_config
from batchrun.config import RunConfig
from batchrun.console.facts import CollectFacts, MergeFacts, ReportFacts, StatusFacts, ValidateFacts
from batchrun.journal.lock import locked
from batchrun.journal.state import StateDir
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest, error_reply
from batchrun.outputs.read_back import recognise
from batchrun.providers import DEFAULT_BASE_URL, DEFAULT_KEY_ENV, DEFAULT_MODEL, PROVIDERS
from batchrun.secret import Secret
from batchrun.summary import RunSummary, TokenCounts

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MANUAL = ROOT / "batchrun" / "manual"
RECIPES = MANUAL / "recipes"
PAGES = {page: page.read_text(encoding="utf-8") for page in (README, *sorted(MANUAL.glob("*.md")))}
TEXT = PAGES[README]
# Everything a user is told, the recipes included.
TOLD = "\n".join(
    [*PAGES.values(), *(file.read_text("utf-8") for file in sorted(RECIPES.iterdir()))]
)

MOST_WORDS = 1_500
LONGEST_S = 60
HELP_WIDTH = 100  # as wide as the help itself goes
BAR = "% |"
SIGNALS = {129, 130, 143}
# Options of tools other than batchrun that are typed.
FOREIGN_OPTIONS = {"--group", "--now"}
# What ends in these needs a person: the same command would only end so again.
FINAL = {
    errors.EXIT_BUG,
    errors.EXIT_USAGE,
    errors.EXIT_ROWS_FAILED,
    errors.EXIT_REFUSED,
    errors.EXIT_IO,
}
DRAIN_S = RunConfig(inputs=(), output="-", output_format="jsonl").drain_s
PROMPTS = "sample_inputs/prompts.jsonl"
StartMock = Callable[..., MockServerThread]


def fenced(language: str, text: str = TOLD) -> list[str]:
    """The contents of all blocks fenced with this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def marked(mark: str) -> str:
    """What stands below a comment, up to the next empty line outside of a fence."""
    _, after = TOLD.split(f"<!-- {mark} -->\n")
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
        ours = name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL"))
        if ours or name.lower().endswith("_proxy"):
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
    return [line.rsplit("\r", 1)[-1] for line in lines if line.strip()]


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
    assert not re.search(r"(pip|pipx|uv|uvx)\b[^\n]* (install|add|run)? ?batchrun\b", TOLD)


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

SH_LINES = list(dict.fromkeys(line for block in fenced("sh") for line in block.splitlines()))
OFFLINE = [
    line
    for line in SH_LINES
    if line.startswith("batchrun ") and ("--mock" in line or line.startswith("batchrun validate"))
]


@pytest.mark.parametrize("line", OFFLINE)
def test_a_command_shown_runs(line: str, checkout: Path) -> None:
    expected = errors.EXIT_ROWS_FAILED if "mistakes" in line else errors.EXIT_OK
    done = subprocess.run(
        ["sh", "-c", line], cwd=checkout, capture_output=True, text=True, timeout=LONGEST_S
    )
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr


def test_every_sh_block_is_run_here_or_by_the_gate() -> None:
    assert len(OFFLINE) == len(SH_LINES) - 2  # the two set-up lines


def test_the_samples_are_told_by_name(checkout: Path) -> None:
    told = {name for row in table("samples") for name in re.findall(r"`([\w.]+)`", row[0])}
    assert told == {file.name for file in (checkout / "sample_inputs").iterdir()}


@pytest.mark.parametrize("page", ["README.md", "batchrun/manual/python.md"])
def test_the_python_shown_runs(page: str, checkout: Path) -> None:
    shutil.copy(checkout / PROMPTS, checkout / "prompts.jsonl")
    blocks = fenced("python", PAGES[ROOT / page])
    ours = "\n".join(block for block in blocks if "batchrun." in block)
    script = [
        "import asyncio",
        ours,
        *(["asyncio.run(answers())"] if "def answers" in ours else []),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(script)],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stderr
    assert "0 20 prompts.mock.parquet" in done.stdout
    if "def answers" in ours:
        assert "[synthetic]" in done.stdout
        assert set(pq.read_table(checkout / "out.parquet")["status"].to_pylist()) == {"ok"}


def test_the_config_file_shown_works(checkout: Path) -> None:
    (checkout / "run.toml").write_text(fenced("toml")[0])
    line = "batchrun submit sample_inputs/prompts.jsonl --mock --quiet --config run.toml"
    done = subprocess.run(["sh", "-c", line], cwd=checkout, capture_output=True, timeout=LONGEST_S)
    assert (done.returncode, done.stderr) == (0, b"")


# Recipes


def recipe(name: str) -> str:
    return (RECIPES / name).read_text(encoding="utf-8")


def units() -> dict[str, Mapping[str, str]]:
    """The sections of the systemd units, all keys as written."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]  # as its docs say to
    for name in ("batchrun.service", "batchrun.timer"):
        parser.read_string(recipe(name))
    return {name: parser[name] for name in parser.sections()}


def job() -> Any:
    """The ``spec`` of the Kubernetes Job."""
    manifest = msgspec.yaml.decode(recipe("kubernetes-job.yaml"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    return manifest["spec"]


def task() -> dict[str, Any]:
    """The arguments of the Airflow operator that are plain values."""
    tree = ast.parse(recipe("airflow_dag.py"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    (call,) = (c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "BashOperator")
    told = {}
    for keyword in call.keywords:
        with contextlib.suppress(ValueError):
            told[str(keyword.arg)] = ast.literal_eval(keyword.value)
    return told


def cron_command() -> list[str]:
    (line,) = (line for line in recipe("crontab").splitlines() if not line.startswith("#"))
    assert line in TEXT, "the README shows the same"
    # To cron a bare % is the end of the command.
    assert not re.search(r"(?<!\\)%", line)
    return shlex.split(line.split(" && ")[1])


COMMANDS: dict[str, Callable[[], list[str]]] = {
    "crontab": cron_command,
    "systemd": lambda: shlex.split(units()["Service"]["ExecStart"]),
    "Kubernetes": lambda: job()["template"]["spec"]["containers"][0]["command"],
    "Airflow": lambda: shlex.split(task()["bash_command"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_of_a_recipe_finds_its_key(name: str, tmp_path: Path) -> None:
    program, command, *args = COMMANDS[name]()
    assert (program, command) == ("/opt/batchrun/bin/batchrun", "submit")
    environ = {"MISTRAL_API_KEY": "sk-of-the-recipe"}
    if name == "crontab":
        # Cron's environment holds no keys.
        environ = {}
        key_file = tmp_path / "key"
        key_file.write_text("sk-of-the-recipe\n")
        args[args.index("--api-key-file") + 1] = str(key_file)
    context = cli.commands["submit"].make_context("submit", args)
    endpoint = build_config(Given(values=context.params, environ=environ)).endpoint
    assert endpoint is not None
    assert (endpoint.host, endpoint.key) == ("api.mistral.ai", Secret("sk-of-the-recipe"))


def test_systemd_starts_again_what_no_person_must_look_at() -> None:
    service = units()["Service"]
    final = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert final == FINAL | {errors.EXIT_LOCKED}
    assert service["Restart"] == "on-failure"
    # A stop by systemd is no failure, and no kill either.
    assert int(service["SuccessExitStatus"]) == 128 + signal.SIGTERM
    assert int(service["TimeoutStopSec"]) > DRAIN_S


def test_kubernetes_starts_again_what_no_person_must_look_at() -> None:
    drained, failed = job()["podFailurePolicy"]["rules"]
    # The first rule that fits decides: a drained pod ends with a code as well.
    assert drained["action"] == "Ignore"
    assert [on["type"] for on in drained["onPodConditions"]] == ["DisruptionTarget"]
    assert (failed["action"], failed["onExitCodes"]["operator"]) == ("FailJob", "In")
    # The API server wants them in order, each once.
    assert failed["onExitCodes"]["values"] == sorted(FINAL)


def test_a_pod_can_drain_and_the_next_one_finds_its_state() -> None:
    pod = job()["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy allows no other"
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S
    (mount,) = container["volumeMounts"]
    assert container["workingDir"] == mount["mountPath"]
    (volume,) = pod["volumes"]
    assert volume["name"] == mount["name"]
    assert "persistentVolumeClaim" in volume


def test_airflow_gives_the_key_beside_the_workers_own_variables() -> None:
    told = task()
    assert told["env"].keys() == {"MISTRAL_API_KEY"}
    assert told["append_env"] is True
    assert told["retries"] > 0


# Tables


def test_the_option_list_is_that_of_the_help() -> None:
    shown = marked("help: submit")
    assert shown == submit_help(), "write it anew: python tests/test_readme.py"


BENCHMARK = re.compile(r"^\$ python (tests/benchmarks/bench\.py .*)$", re.MULTILINE)


def test_every_option_named_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", BENCHMARK.sub("", TOLD)))
    assert named - options().keys() - {"--help"} == FOREIGN_OPTIONS


def test_every_benchmark_named_exists() -> None:
    lines = BENCHMARK.findall(TOLD)
    assert lines
    for line in lines:
        # With its last word it says what there is, once the words before it are understood.
        command = [sys.executable, *shlex.split(line), "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_variable_named_exists() -> None:
    variables = {f"BATCHRUN_{name.upper()}" for c in cli.commands.values() for name in settable(c)}
    named = set(re.findall(r"\bBATCHRUN_[A-Z][A-Z_]*", TOLD))
    assert named <= variables | {DEFAULT_KEY_ENV}
    keys = set(re.findall(r"\b[A-Z]+_API_KEY\b", TOLD)) - {DEFAULT_KEY_ENV}
    assert keys == {preset.key_env for preset in PROVIDERS.values() if preset.key_env}


def test_every_command_is_named() -> None:
    named = set(re.findall(r"(?:^\$ |^|`)batchrun ([a-z-]+)", TOLD, re.MULTILINE))
    assert named == set(cli.commands)


def test_the_provider_table_is_that_of_the_code() -> None:
    told = {tuple(cell.strip("`") for cell in row) for row in table("providers")}
    assert told == {
        (p.name, p.base_url, p.key_env or "", p.model or "") for p in PROVIDERS.values()
    }


def test_the_default_endpoint_is_named_as_it_is() -> None:
    row = f"| the default endpoint | (nothing) | `{DEFAULT_BASE_URL}`, model `{DEFAULT_MODEL}`"
    assert TOLD.count(f"{row} | `{DEFAULT_KEY_ENV}` |") == TOLD.count("| the default endpoint |")


def test_the_exit_codes_are_those_of_the_code() -> None:
    told = {int(code) for row in table("exit codes") for code in row[0].split(",")}
    ours = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert told == ours | SIGNALS


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


# The JSON summary


def told_fields() -> dict[str, str]:
    """Path to type, as the table has them: ``errors[].kind``, ``rows.total``."""
    return {
        name: kind.strip("`")
        for names, kind, _ in table("json: submit")
        for name in re.findall(r"`([^`]+)`", names)
    }


def fields_of(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and type of everything in a struct, in the words of the table."""
    for name, hint in get_type_hints(struct).items():
        path, optional = prefix + name, ""
        if get_origin(hint) in (Union, types.UnionType):
            hint, optional = get_args(hint)[0], "?"
        if get_origin(hint) is list and issubclass(get_args(hint)[0], msgspec.Struct):
            yield path, "[object]"
            yield from fields_of(get_args(hint)[0], f"{path}[].")
        elif hint is TokenCounts:
            yield path, f"tokens{optional}"
        elif isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            if optional:
                yield path, f"object{optional}"
            yield from fields_of(hint, f"{path}.")
        else:
            yield path, word_for(hint) + optional


def word_for(hint: Any) -> str:
    if get_origin(hint) is list:
        return f"[{word_for(get_args(hint)[0])}]"
    words = {str: "string", int: "int", bool: "bool", float: "number"}
    return words.get(hint, "string")  # a Literal of texts


def test_the_json_summary_is_told_field_by_field() -> None:
    assert told_fields() == dict(fields_of(RunSummary)) | dict(fields_of(TokenCounts, "tokens."))


def test_the_objects_of_the_other_commands_are_told(checkout: Path) -> None:
    told = {
        command.strip("`"): set(re.findall(r"`([a-z_]+)`", re.sub(r"\(.*?\)", "", names)))
        for command, names in table("json: others")
    }
    submit = "batchrun submit sample_inputs/prompts.jsonl --mock -q -o a.parquet"
    subprocess.run(
        ["sh", "-c", " && ".join(f"{submit} {options}" for options in ("", "--shard 1/1"))],
        cwd=checkout,
        check=True,
        timeout=LONGEST_S,
    )
    printed = {}
    with MockServerThread() as server:
        for line in (
            "status a.parquet",
            "collect a.parquet -o b.parquet",
            "merge a.parquet",
            "report a.parquet",
            "validate sample_inputs/mistakes.jsonl",
            f"models --base-url {server.url}",
        ):
            done = subprocess.run(
                ["sh", "-c", f"batchrun {line} --json"],
                cwd=checkout,
                capture_output=True,
                timeout=LONGEST_S,
            )
            printed[line.split()[0]] = json.loads(done.stdout).keys()
    assert told == printed
    structs: dict[str, type[msgspec.Struct]] = {
        "status": StatusFacts,
        "collect": CollectFacts,
        "merge": MergeFacts,
        "report": ReportFacts,
        "validate": ValidateFacts,
    }
    for command, facts in structs.items():
        assert told[command] - {"schema", "exit_code"} == set(facts.__struct_fields__)


JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "number": (int, float),
    "bool": (bool,),
    "object": (dict,),
    "tokens": (dict,),
    "[string]": (list,),
    "[object]": (list,),
}


def check_printed(value: Mapping[str, Any], prefix: str = "") -> None:
    """A printed object has the fields told, all of them, and of the types told."""
    told = told_fields()
    below = {path[len(prefix) :] for path in told if path.startswith(prefix)}
    if not prefix:
        below = {path for path in below if not path.startswith("tokens.")}
    assert value.keys() == {re.split(r"[.\[]", path)[0] for path in below}
    for name, item in value.items():
        path = prefix + name
        kind = told.get(path, "object")
        if item is None:
            assert kind.endswith("?"), f"{path} is null"
            continue
        kind = kind.rstrip("?")
        assert type(item) in JSON_TYPES[kind], f"{path} is {item!r}"
        if kind == "[object]":
            for one in item:
                check_printed(one, f"{path}[].")
        elif isinstance(item, dict):
            check_printed(item, "tokens." if kind == "tokens" else f"{path}.")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def started(place: Path, *args: str, **more: Any) -> subprocess.Popen[str]:
    """``batchrun submit … --quiet --json`` as a process of its own."""
    return subprocess.Popen(
        ["batchrun", "submit", *args, "--quiet", "--json"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def end_of(process: subprocess.Popen[str]) -> Ended:
    with process:
        try:
            out, err = process.communicate(timeout=LONGEST_S)
        finally:
            process.kill()
    return Ended(process.returncode, out, err)


def ends_with_a_bug(place: Path, _mock: StartMock) -> Ended:
    script = "from batchrun import cli, runs; runs.run = None; cli.main()"
    command = [sys.executable, "-c", script, "submit", PROMPTS, "--mock", "--quiet", "--json"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=LONGEST_S)
    return Ended(done.returncode, done.stdout, done.stderr)


def ends_refused(place: Path, mock: StartMock) -> Ended:
    server = mock(Knobs(key="another"))
    return end_of(started(place, PROMPTS, "--base-url", server.url, "-m", "m"))


def ends_locked(place: Path, _mock: StartMock) -> Ended:
    with locked(StateDir(place / "a.parquet.batchrun")):
        return end_of(started(place, PROMPTS, "--mock", "-o", "a.parquet"))


def ends_for_local_io(place: Path, _mock: StartMock) -> Ended:
    (place / "broken.parquet").write_text("PAR1 and no end")
    return end_of(started(place, "broken.parquet", "--mock"))


def ends_early(place: Path, mock: StartMock) -> Ended:
    tomorrow = {"Retry-After": "86400"}
    server = mock(respond=lambda _: error_reply(429, "daily limit", headers=tomorrow))
    return end_of(started(place, PROMPTS, "--base-url", server.url, "-m", "m"))


def ends_by(signum: signal.Signals) -> Callable[[Path, StartMock], Ended]:
    def end(place: Path, mock: StartMock) -> Ended:
        arrived = threading.Event()

        def respond(_: MockRequest) -> MockReply:
            arrived.set()
            return MockReply(raw=b"", ending="hang")

        args = ("--base-url", mock(respond=respond).url, "-m", "m", "--drain", "0")
        # Whoever runs the tests in the background ignores signals, and so would the run.
        process = started(
            place, PROMPTS, *args, preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL)
        )
        assert arrived.wait(LONGEST_S)
        process.send_signal(signum)
        return end_of(process)

    return end


ENDS: dict[int, Callable[[Path, StartMock], Ended]] = {
    errors.EXIT_OK: lambda place, _: end_of(started(place, PROMPTS, "--mock")),
    errors.EXIT_BUG: ends_with_a_bug,
    errors.EXIT_USAGE: lambda place, _: end_of(started(place, "missing.jsonl", "--mock")),
    errors.EXIT_ROWS_FAILED: lambda place, _: end_of(
        started(place, "sample_inputs/mistakes.jsonl", "--mock")
    ),
    errors.EXIT_REFUSED: ends_refused,
    errors.EXIT_LOCKED: ends_locked,
    errors.EXIT_IO: ends_for_local_io,
    errors.EXIT_STOPPED: ends_early,
    **{128 + s: ends_by(s) for s in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)},
}


def states_told() -> dict[int, str]:
    """Exit code to ``state``, as the table has them."""
    (meaning,) = (row[2] for row in table("json: submit") if row[0] == "`state`")
    return {
        int(code): state
        for state, codes in re.findall(r"`(\w+)` \(([\d, ]+)", meaning)
        for code in codes.split(",")
    }


def test_every_exit_code_told_is_tried() -> None:
    told = {int(code) for row in table("exit codes") for code in row[0].split(",")}
    assert told == ENDS.keys() == states_told().keys()


@pytest.mark.parametrize("code", ENDS)
@pytest.mark.slow
def test_every_exit_code_comes_with_the_object_told_here(
    code: int, checkout: Path, mock: StartMock
) -> None:
    ended = ENDS[code](checkout, mock)
    assert ended.code == code, ended.err
    assert (ended.err == "") == (code == 0), ended.err
    assert ended.out.count("\n") == 1
    summary = json.loads(ended.out)
    check_printed(summary)
    assert (summary["exit_code"], summary["state"]) == (code, states_told()[code])
    assert (summary["reason"] is None) == (code == 0)
    rows = summary["rows"]
    if rows["total"] is not None:
        assert rows["ok"] + rows["error"] + rows["pending"] == rows["total"]


def test_a_skipped_run_says_so_in_its_object(checkout: Path) -> None:
    with locked(StateDir(checkout / "a.parquet.batchrun")):
        args = ("--mock", "-o", "a.parquet", "--if-locked", "skip")
        ended = end_of(started(checkout, PROMPTS, *args))
    assert (ended.code, ended.err) == (0, "")
    summary = json.loads(ended.out)
    check_printed(summary)
    assert (summary["state"], summary["published"]) == ("stopped", False)
    assert "in use" in summary["reason"]


# Promises, links, length


@cache
def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_promise_names_a_test_that_exists() -> None:
    promises = table("promises")
    assert len(promises) > 20
    for promise, where in promises:
        file, _, name = where.strip("`").partition("::")
        assert name in functions_of(ROOT / "tests" / file), f"{promise}: {where}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(TEXT.split()) <= MOST_WORDS


def test_the_changelog_has_this_version() -> None:
    from batchrun.config import VERSION

    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def write_help() -> None:
    """Put the present help into the manual."""
    page = MANUAL / "options.md"
    mark = "<!-- help: submit -->\n```text\n"
    before, after = page.read_text(encoding="utf-8").split(mark)
    rest = after[after.index("```\n") :]
    page.write_text(f"{before}{mark}{submit_help()}{rest}", encoding="utf-8")


if __name__ == "__main__":
    write_help()
