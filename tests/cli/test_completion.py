"""Completion in the shells themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.cli.main import run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with ``batchrun`` on the path, and a file to complete."""
    command = tmp_path / "bin" / "batchrun"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m batchrun "$@"\n')
    command.chmod(0o755)
    (tmp_path / "tickets.csv").touch()
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(shell: str, script: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("batchrun est", "estimate"),
        ("batchrun submit --max-c", "--max-cost"),
        ("batchrun completion z", "zsh"),
        ("batchrun submit --schema-dialect gui", "guided"),
    ],
)
def test_bash_completes(on_path: Path, words: str, found: str) -> None:
    script = f"""
        eval "$(batchrun completion bash)"
        COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _batchrun_completion batchrun; echo "${{COMPREPLY[@]}}"
    """
    assert run("bash", script).split() == [found]


@pytest.mark.parametrize(
    ("words", "found"), [("batchrun est", "estimate"), ("batchrun submit tick", "tickets.csv")]
)
def test_fish_completes(on_path: Path, words: str, found: str) -> None:
    said = run("fish", f"batchrun completion fish | source; complete -C '{words}'")
    assert found in said.split()


def test_zsh_takes_its_script(on_path: Path) -> None:
    script = (
        "autoload -U compinit; compinit -u -D; "
        'eval "$(batchrun completion zsh)"; echo $_comps[batchrun]'
    )
    assert run("zsh", script).split() == ["_batchrun_completion"]


def test_another_shell_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err
