"""Measure batchrun beside a bare aiohttp loop and its rivals: python tests/benchmarks/bench.py

nginx on one core is the endpoint; every contender is a process of its own on another core. A round
runs each contender once, and ratios are medians over rounds: the speed of a shared machine wobbles
by more than what is to be told apart.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path

import contest
import upstream
from arena import Arena
from contenders import CONTENDERS, RIVALS
from long_runs import PROFILES as LONG_RUNS
from profiles import DEFAULT, PROFILES, Profile


def options() -> argparse.Namespace:
    names = (*PROFILES, *LONG_RUNS)
    parser = argparse.ArgumentParser(
        description="Measure batchrun beside a bare aiohttp loop and its rivals.",
        epilog=f"Profiles: {', '.join(names)}.",
    )
    parser.add_argument(
        "--profile",
        nargs="+",
        choices=(*names, "all"),
        default=DEFAULT,
        metavar="NAME",
        help=f"what to run, or all (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument("--pairs", type=int, default=5, help="rounds a profile (default: 5)")
    parser.add_argument("--rivals", action="store_true", help="run rivals too, installed on demand")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(CONTENDERS), metavar="CLIENT", help="run only these"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of the work; 6 makes 60 waves of 1 s, 3 makes 60 s of slots (default: 1)",
    )
    parser.add_argument(
        "--stand-in", action="store_true", help="use the mock server though nginx is there"
    )
    chosen = parser.parse_args()
    if "all" in chosen.profile:
        chosen.profile = names
    return chosen


def main() -> int:
    chosen = options()
    if missing := upstream.missing_packages():
        log(f"note: no nginx with Lua (apt-get install {' '.join(missing)}): using the mock server")
    if os.getloadavg()[0] > 0.5:
        log(f"note: load average {os.getloadavg()[0]:.1f}: other work here blurs the figures")
    upstream.raise_open_files_limit()
    client_cpu, upstream_cpu = cores()
    with (
        upstream.running(upstream_cpu, stand_in=chosen.stand_in or bool(missing)) as up,
        tempfile.TemporaryDirectory(prefix="batchrun-bench-") as directory,
    ):
        print(machine(up))
        arena = Arena(up, client_cpu, Path(directory))
        good = [run(arena, name, chosen) for name in chosen.profile]
    return 0 if all(good) else 1


def run(arena: Arena, name: str, chosen: argparse.Namespace) -> bool:
    """Run and print one profile; whether batchrun answered every row of it."""
    if name in LONG_RUNS:
        print(f"\n**{name}**", flush=True)
        for part in LONG_RUNS[name](arena, chosen.scale):
            print(f"\n{part}", flush=True)
        return True
    profile = PROFILES[name].scaled(chosen.scale)
    if arena.up.stand_in and not profile.endpoint.is_plain:
        log(f"{name}: needs nginx; left out")
        return True
    samples = compare(arena, profile, chosen)
    print(f"\n{contest.report(profile, samples)}", flush=True)
    ours = [run for name in samples if name.startswith("batchrun") for run in samples[name]]
    return not any(sample.problem for sample in ours)


def compare(arena: Arena, profile: Profile, chosen: argparse.Namespace) -> contest.Samples:
    names = chosen.only or [*profile.contenders, *(RIVALS if chosen.rivals else ())]
    contenders = [CONTENDERS[name] for name in names]
    for contender in contenders:
        contender.prepare()
    samples: contest.Samples = {contender.name: [] for contender in contenders}
    for n, name, sample in contest.rounds(arena, profile, contenders, chosen.pairs):
        samples[name].append(sample)
        log(
            f"{profile.name} {n + 1}/{chosen.pairs} {name}: {sample.requests_per_s:,.0f}/s, "
            f"{sample.cpu_us:,.0f} µs {sample.problem}"
        )
    return samples


def cores() -> tuple[int | None, int | None]:
    """The clients' core and the upstream's; None where processes cannot be pinned apart."""
    if not hasattr(os, "sched_getaffinity"):
        log("note: this system cannot pin processes to cores")
        return None, None
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        log("note: one core only: clients and upstream share it")
        return None, None
    return usable[0], usable[-1]


def machine(up: upstream.Upstream) -> str:
    """What was measured where, in one line."""
    parts = (
        up.description,
        f"Python {platform.python_version()}",
        f"aiohttp {importlib.metadata.version('aiohttp')}",
        f"{os.cpu_count()} × {cpu_model()}",
        platform.system(),
    )
    return ", ".join(parts)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
