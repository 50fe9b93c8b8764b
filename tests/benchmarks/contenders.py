"""Who is measured, and how each is started.

The rivals come from the package registry, each into a virtual environment of its own in the user's
cache directory, made at their first use and kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "batchrun-bench")

# Variables that would change what a client does.
_WITHHELD = (
    "BATCHRUN_",
    "OPENAI_",
    "MISTRAL_",
    "LITELLM_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
)


@dataclass(frozen=True)
class Job:
    """One run's task, the same for every contender of a profile."""

    prompts: Path  # JSONL with id and prompt
    base_url: str
    in_flight: int
    output: Path  # does not exist yet; its directory is the contender's own


Command = Callable[[Job], list[str]]


@dataclass(frozen=True)
class Contender:
    name: str
    command: Command
    requirements: tuple[str, ...] = ()  # of a rival, for its own environment

    @property
    def is_rival(self) -> bool:
        return bool(self.requirements)

    def prepare(self) -> None:
        """Make the rival's environment unless it is there."""
        if not self.is_rival or (_environment(self.name) / "ready").exists():
            return
        print(f"installing {' '.join(self.requirements)}", file=sys.stderr)
        home = _environment(self.name)
        venv.create(home, clear=True, with_pip=True)
        pip = (str(home / "bin" / "python"), "-m", "pip", "install", "--quiet")
        subprocess.run([*pip, *self.requirements], check=True)
        (home / "ready").touch()


def environ() -> dict[str, str]:
    """What every contender sees of the environment: this checkout, no proxies, no keys."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(_WITHHELD)}
    return {**kept, "PYTHONPATH": str(ROOT)}


def batchrun(*options: str, start: tuple[str, ...] = ("-m", "batchrun")) -> Command:
    """The real command line, with everything on."""
    return lambda job: [
        *(sys.executable, *start, "submit", str(job.prompts)),
        *("--base-url", job.base_url, "-m", "bench", "-o", str(job.output), "--quiet"),
        *(option.format(in_flight=job.in_flight) for option in options),
    ]


def _environment(name: str) -> Path:
    return CACHE / name


def _own(script: str) -> Command:
    return lambda job: [sys.executable, *_script(script, job)]


def _rival(name: str, *more: str) -> Command:
    script = f"rival_{name.replace('-', '_')}.py"
    python = _environment(name) / "bin" / "python"
    return lambda job: [
        *(str(python), *_script(script, job)),
        *(option.format(output=job.output) for option in more),
    ]


def _script(script: str, job: Job) -> list[str]:
    return [str(HERE / "clients" / script), str(job.prompts), job.base_url, str(job.in_flight)]


def _batchllm(job: Job) -> list[str]:
    return [
        *(str(_environment("batchllm-ai") / "bin" / "batchllm"), "run", str(job.prompts)),
        *("-o", f"{job.output}.jsonl", "-m", "bench", "-c", str(job.in_flight)),
        *("--base-url", f"{job.base_url}/v1", "--api-key", "none", "--input-column", "prompt"),
    ]


CONTENDERS = {
    c.name: c
    for c in (
        Contender("batchrun", batchrun("-c", "{in_flight}")),
        Contender("batchrun-auto", batchrun()),
        Contender("batchrun-2", batchrun("-c", "{in_flight}", "--processes", "2")),
        Contender("batchrun-rpm", batchrun("--rpm", "6000")),
        Contender(
            "batchrun-watched",
            batchrun("-c", "{in_flight}", start=(str(HERE / "clients" / "stalls.py"),)),
        ),
        Contender("naive", _own("naive.py")),
        Contender("tuned", _own("tuned.py")),
        Contender("openai", _rival("openai"), ("openai", "tqdm")),
        # 1.82.7 and 1.82.8 were malware.
        Contender("litellm", _rival("litellm"), ("litellm!=1.82.7,!=1.82.8",)),
        Contender("saturate", _rival("saturate", "{output}"), ("saturate",)),
        Contender("async-batch-llm", _rival("async-batch-llm"), ("async-batch-llm[openai]",)),
        Contender("batchllm-ai", _batchllm, ("batchllm-ai",)),
    )
}
RIVALS = tuple(name for name, contender in CONTENDERS.items() if contender.is_rival)
