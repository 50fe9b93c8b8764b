"""Strange values, bytes and machines: a documented exit code and words, never a traceback.

The values go to every option, variable and key of the config file that the commands declare, so an
option added later is tried too.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from batchrun.cli.flags import settable
from batchrun.cli.main import cli

DOCUMENTED = {0, 2, 3, 4, 11, 74, 75}
DEEP = "[" * 3_000 + "]" * 3_000

VALUES: Mapping[str, str] = {
    "nothing": "",
    "negative": "-1",
    "a fraction": "0.5",
    "infinity": "inf",
    "no number": "nan",
    "huge": "9" * 400,
    "beyond 64 bits": "99999999999999999999",
    "many digits": "9" * 5_000,
    "too fine": "1e-400",
    "Latin-1": "caf\udce9",
    "controls": "\x1b[2J\n\rdone",
    "an emoji": "\U0001f9ea",
    "a colon": ":",
    "an at": "@",
    "a missing file": "@/nowhere/at-all",
    "a directory": "/",
    "equals": "=",
    "deep": f"x={DEEP}",
    "half a pair": 'x="\\ud800"',
    "not a number": "x=NaN",
    "a percentage": "1e999%",
    "a time": "25:61",
    "ages": "10000000000d",
}


class Place(NamedTuple):
    """One command with a value at one place of it."""

    command: str
    argv: tuple[str, ...]
    environ: Mapping[str, str] = {}
    config: str | None = None


BASE: Mapping[str, tuple[str, ...]] = {
    "submit": ("in.jsonl", "--mock", "--max-wait", "1", "--max-outage", "1", "--timeout", "2"),
    "validate": ("in.jsonl", "--mock"),
    "status": ("nowhere.parquet",),
    "collect": ("nowhere.parquet",),
    "models": ("--mock",),
}


def places(value: str) -> Iterator[Place]:
    """``value`` as every option, variable and key."""
    for name, base in BASE.items():
        yield Place(name, (name, value))
        command = cli.commands[name]
        for param in command.params:
            if isinstance(param, click.Option) and not param.is_flag and param.name != "help":
                flag = max(param.opts, key=len)
                yield Place(name, (name, *base, f"{flag}={value}"))
    # What reads them is the same for every command.
    for key in sorted(settable(cli.commands["validate"])):
        validate = ("validate", *BASE["validate"])
        yield Place("validate", validate, {f"BATCHRUN_{key.upper()}": value})
        if "\udce9" not in value:
            yield Place("validate", validate, config=f"{key} = {json.dumps(value)}\n")


PROGRAM = """
import contextlib, io, json, os, sys, traceback
from batchrun.cli import run_command
for line in sys.stdin:
    argv, environ = json.loads(line)
    os.environ.update(environ)
    err, out = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"), sys.stdout
    sys.stderr = err
    sys.stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    try:
        code = run_command(argv)
    except BaseException:
        code = traceback.format_exc()
    sys.stderr, sys.stdout = sys.__stderr__, out
    for name in environ:
        del os.environ[name]
    err.flush()
    said = err.buffer.getvalue().decode("utf-8", "replace")
    print(json.dumps([code, said]), flush=True)
"""


def run_all(places: Sequence[Place], directory: Path) -> list[tuple[Any, str]]:
    """Every place in one process, as it takes a tenth of the time; what became of each."""
    asked = []
    for number, place in enumerate(places):
        argv = list(place.argv)
        if place.config is not None:
            file = directory / f"config-{number}.toml"
            file.write_text(place.config)
            argv[1:1] = ["--config", str(file)]
        asked.append(json.dumps([argv, dict(place.environ)]))
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(asked),
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(told) == len(places), ended.stderr[-3000:]
    return [(code, said) for code, said in told]


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_strange_value_is_used_or_refused_in_words(value: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt":"a"}\n{"prompt":"b"}\n')
    tried = [
        place
        for place in places(value)
        # The kernel takes no argument or variable with a NUL, and none this long.
        if max(map(len, place.argv)) < 100_000
    ]
    for place, (code, said) in zip(tried, run_all(tried, tmp_path), strict=True):
        what = (place.command, [arg[:80] for arg in place.argv], place.environ, place.config)
        assert code in DOCUMENTED, (what, code, said[-2000:])
        assert "Traceback" not in said, what
        assert "\x1b" not in said, what
        if code:
            assert said.strip(), what


# Files of strange names and contents


def test_names_that_are_not_utf8_work_from_start_to_end(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.jsonl").write_text('{"prompt":"a"}\n')
    made = "caf\udce9.mock.parquet"
    for command in (
        ("submit", "caf\udce9.jsonl", "--mock", "--state", "st\udce9"),
        ("status", made),
        ("validate", made, "--mock", "--shape", "body"),
        ("collect", made, "-o", "c\udce9.jsonl"),
    ):
        ended = run(command, tmp_path)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "c\udce9.jsonl").read_bytes().count(b"\n") == 1


def test_names_do_not_command_the_terminal(tmp_path: Path) -> None:
    evil = "a\x1b[2J\rdone\nstopped"
    (tmp_path / f"{evil}.jsonl").write_text(json.dumps({"prompt": "a", evil: 1}) + "\n")
    for command in ("submit", "validate"):
        ended = run((command, f"{evil}.jsonl", "--mock"), tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert "\x1b" not in ended.stderr
        assert "\r" not in ended.stderr
        assert not any(line.startswith("stopped") for line in ended.stderr.splitlines())
    ended = run(("submit", f"{evil}.missing"), tmp_path)
    assert ended.returncode == 2
    assert "\x1b" not in ended.stderr
    assert not any(line.startswith("stopped") for line in ended.stderr.splitlines())


def test_a_pipe_in_a_directory_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"prompt":"a"}\n')
    for name in ("b.jsonl", "c.parquet", "d.jsonl.gz"):
        os.mkfifo(tmp_path / "data" / name)
    for output, inputs in (("one.parquet", "data"), ("two.parquet", "data/*")):
        ended = run(("submit", inputs, "--mock", "-o", output), tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert "b.jsonl (not a regular file)" in ended.stderr
        assert pq.read_table(tmp_path / output).num_rows == 1


def test_encrypted_parquet_is_called_what_it_is(tmp_path: Path) -> None:
    whole = tmp_path / "in.parquet"
    whole.write_bytes(b"PARE" + bytes(100) + (40).to_bytes(4, "little") + b"PARE")
    ended = run(("submit", "in.parquet", "--mock"), tmp_path)
    assert ended.returncode in (2, 74)
    assert "encrypted Parquet" in ended.stderr


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """A copy with a bit turned, bytes replaced or a piece missing; its ends stay."""
    copy = bytearray(whole)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    at = rng.randrange(rng.choice((4, footer)), len(whole) - 8)
    match rng.randrange(3):
        case 0:
            copy[at] ^= 1 << rng.randrange(8)
        case 1:
            copy[at : at + 4] = rng.randbytes(4)
        case 2:
            del copy[at : at + rng.choice((1, 7, 64))]
    return bytes(copy)


@pytest.mark.slow
def test_damaged_parquet_ends_in_words(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "n": n, "more": {"a": [n]}} for n in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "whole.parquet", row_group_size=100)
    whole = (tmp_path / "whole.parquet").read_bytes()
    rng = random.Random(8)
    copies = [damaged(whole, rng) for _ in range(150)]
    copies += [whole.replace(b"more", b"mo\x90e")]  # a name that is no text
    tried = []
    for number, copy in enumerate(copies):
        (tmp_path / f"{number}.parquet").write_bytes(copy)
        tried.append(Place("validate", ("validate", f"{number}.parquet", "--mock")))
    for place, (code, said) in zip(tried, run_all(tried, tmp_path), strict=True):
        assert code in (0, 2, 3, 74), (place, said)
        assert code != 74 or ".parquet: " in said


# Machines that give less than usual


def run(
    argv: Sequence[str], directory: Path, *, before: str = "", environ: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """``batchrun ARGV`` started by a shell, so that it can close or replace what it is given."""
    return subprocess.run(
        ["bash", "-c", f'{before or ":"}; exec "$@"', "-", sys.executable, "-m", "batchrun", *argv],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=120,
    )


SHELLS = {
    "stdin closed": "exec <&-",
    "stdout closed": "exec >&-",
    "stderr closed": "exec 2>&-",
    "all closed": "exec <&- >&- 2>&-",
    "stderr full": "exec 2>/dev/full",
    "stderr read by nobody": "exec 2> >(:)",
}
LOCALES = {
    "C": {"LC_ALL": "C"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
}
COMMANDS = {
    "submit": ("submit", "in.jsonl", "--mock", "-s", "é\U0001f9ea", "--log-file", "log.txt"),
    "json": ("submit", "in.jsonl", "--mock", "--json"),
    "to stdout": ("submit", "in.jsonl", "--mock", "-o", "-"),
    "validate": ("validate", "in.jsonl", "--mock", "--show", "1"),
    "help": ("--help",),
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_stream_is_no_bug(command: str, shell: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt":"\\u00e9\\ud83e\\uddea"}\n')
    ended = run(COMMANDS[command], tmp_path, before=SHELLS[shell])
    assert ended.returncode in (0, 2, 74), ended.stderr
    assert "Traceback" not in ended.stderr
    if command == "submit":
        assert ended.returncode == 0, ended.stderr
        assert pq.read_table(tmp_path / "in.mock.parquet").num_rows == 1


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_strange_locale_is_no_bug(command: str, locale: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt":"\\u00e9\\ud83e\\uddea"}\n')
    ended = run(COMMANDS[command], tmp_path, environ=LOCALES[locale])
    # Without UTF-8 what was typed is not text any more.
    assert ended.returncode == 0 or (ended.returncode == 2 and "UTF-8" in ended.stderr)
    assert "Traceback" not in ended.stderr


def test_a_full_disk_under_stdout_is_said_and_is_not_success(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt":"a"}\n')
    for command in ("json", "validate", "to stdout", "help"):
        ended = run(COMMANDS[command], tmp_path, before="exec >/dev/full")
        assert ended.returncode == 74, ended.stderr
        assert "Traceback" not in ended.stderr
    # What was paid for is there all the same.
    assert pq.read_table(tmp_path / "in.mock.parquet").num_rows == 1


def test_a_full_disk_under_the_log_is_said_and_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt":"a"}\n')
    ended = run(("submit", "in.jsonl", "--mock", "--log-file", "/dev/full"), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "the log file cannot be written: No space left on device" in ended.stderr


def test_no_place_for_temporary_files_is_a_matter_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt":"a"}\n')
    program = """
import tempfile
tempfile.tempdir = "/nowhere/at/all"
from batchrun.cli import main
main()
"""
    for command in ("to stdout", "validate"):
        ended = subprocess.run(
            [sys.executable, "-c", program, *COMMANDS[command]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 74, ended.stderr
        assert "/nowhere/at/all" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_limit_on_memory_ends_in_words(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt":"a"}\n' * 500)
    ended = run(("submit", "in.jsonl", "--mock"), tmp_path, before="ulimit -v 600000")
    assert ended.returncode in (0, 74), ended.stderr
    assert "Traceback" not in ended.stderr
