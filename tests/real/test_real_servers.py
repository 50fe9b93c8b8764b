"""batchrun, as a user runs it, against servers from the registries that nobody here wrote.

Each is found by a variable, ``BASE_URL,MODEL,KEY``; without it its tests are skipped. README.md
beside this file says how to start them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from batchrun.errors import EXIT_OK, EXIT_REFUSED, EXIT_ROWS_FAILED

ROOT = Path(__file__).resolve().parent.parent.parent
PREFIX = "BATCHRUN_REAL_"
LONGEST_S = 240


class Server(NamedTuple):
    base_url: str
    model: str
    key: str


class Ended(NamedTuple):
    code: int
    summary: dict[str, Any]
    rows: list[dict[str, Any]]


def server(kind: str) -> Server:
    told = os.environ.get(PREFIX + kind)
    if not told:
        pytest.skip(f"{PREFIX}{kind} is not set: see tests/real/README.md")
    return Server(*told.split(","))


@pytest.fixture
def llamacpp() -> Server:
    return server("LLAMACPP")


@pytest.fixture
def litellm() -> Server:
    return server("LITELLM")


@pytest.fixture
def vllm_router() -> Server:
    return server("VLLM_ROUTER")


def submit(place: Path, server: Server, prompts: Sequence[str], *more: str) -> Ended:
    """Send the prompts from an empty directory and take what was said and published."""
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (place / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("BATCHRUN_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "batchrun", "submit", "prompts.jsonl", "-o", "answers.parquet"),
            *("--base-url", server.base_url, "-m", server.model, "--api-key-env", "REAL_KEY"),
            *("--json", "--quiet", *more),
        ],
        cwd=place,
        env={**environ, "PYTHONPATH": str(ROOT), "REAL_KEY": server.key},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert server.key not in done.stdout + done.stderr
    assert done.stdout, done.stderr
    output = place / "answers.parquet"
    rows = pq.read_table(output).to_pylist() if output.exists() else []
    return Ended(done.returncode, json.loads(done.stdout), rows)


def prompts(count: int) -> list[str]:
    return [f"Say in one sentence what {number} is." for number in range(count)]


def assert_all_answered(ended: Ended, count: int) -> None:
    causes = [(e["code"], e["rows"], e["example"]) for e in ended.summary["errors"]]
    assert (ended.code, causes) == (EXIT_OK, [])
    assert [row["status"] for row in ended.rows] == ["ok"] * count
    assert [row["prompt"] for row in ended.rows] == prompts(count)


def get(server: Server, path: str) -> str:
    root = server.base_url.removesuffix("/v1")
    request = urllib.request.Request(root + path, headers={"Authorization": f"Bearer {server.key}"})
    with urllib.request.urlopen(request, timeout=LONGEST_S) as reply:
        return str(reply.read(), "utf-8")


# llama.cpp


@pytest.mark.parametrize("concurrency", ["1", "4", "16"])
def test_streams_whose_server_closes_right_after_them_lose_no_row(
    concurrency: str, llamacpp: Server, tmp_path: Path
) -> None:
    more = ("--stream", "-c", concurrency, "--max-tokens", "4")
    ended = submit(tmp_path, llamacpp, prompts(300), *more)
    assert_all_answered(ended, 300)
    assert all(row["ttft_s"] is not None for row in ended.rows)


def counted(server: Server) -> tuple[int, int]:
    """Tokens of prompts and of answers, as the server's own counters have them."""
    counters = dict(re.findall(r"^llamacpp:(\w+) (\d+)$", get(server, "/metrics"), re.MULTILINE))
    of_prompts = int(counters["prompt_tokens_total"]) + int(counters["prompt_tokens_cached_total"])
    return of_prompts, int(counters["tokens_predicted_total"])


def test_tokens_are_those_that_the_server_counted(llamacpp: Server, tmp_path: Path) -> None:
    before = counted(llamacpp)
    ended = submit(tmp_path, llamacpp, prompts(100), "--max-tokens", "8")
    after = counted(llamacpp)
    assert_all_answered(ended, 100)
    tokens = ended.summary["this_run"]["tokens"]
    assert tokens["rows_without_usage"] == 0
    assert (tokens["prompt"], tokens["completion"]) == (
        sum(row["prompt_tokens"] for row in ended.rows),
        sum(row["completion_tokens"] for row in ended.rows),
    )
    assert (tokens["prompt"], tokens["completion"]) == (
        after[0] - before[0],
        after[1] - before[1],
    )


def test_a_wrong_key_ends_the_run_and_blames_no_row(llamacpp: Server, tmp_path: Path) -> None:
    ended = submit(tmp_path, llamacpp._replace(key="sk-of-somebody-else"), prompts(10))
    assert (ended.code, ended.rows) == (EXIT_REFUSED, [])
    assert ended.summary["rows"]["pending"] == 10


def test_a_prompt_too_long_for_the_model_is_one_failed_row(
    llamacpp: Server, tmp_path: Path
) -> None:
    asked = [*prompts(4), "lorem ipsum " * 8_000]
    ended = submit(tmp_path, llamacpp, asked, "--max-tokens", "4")
    assert ended.code == EXIT_ROWS_FAILED
    assert [row["status"] for row in ended.rows] == ["ok"] * 4 + ["error"]
    assert (ended.rows[4]["error_kind"], ended.rows[4]["http_status"]) == ("rejected", 400)
    assert ended.rows[4]["attempts"] == 1


# LiteLLM: its keys carry their limits


def limited(server: Server, limit: str) -> Server:
    return server._replace(key=f"{server.key}-{limit}")


def test_a_key_of_thirty_a_minute_fails_no_row(litellm: Server, tmp_path: Path) -> None:
    assert_all_answered(submit(tmp_path, limited(litellm, "r30"), prompts(40)), 40)


def test_a_key_of_two_in_flight_fails_no_row(litellm: Server, tmp_path: Path) -> None:
    ended = submit(tmp_path, limited(litellm, "p2"), prompts(100))
    assert_all_answered(ended, 100)
    # Who has found two places is refused now and then, not once a row.
    assert ended.summary["this_run"]["rate_limited"] < 100


# vLLM Router: two places, the rest is refused


@pytest.mark.parametrize("more", [(), ("--stream",)], ids=["whole", "stream"])
def test_a_gateway_of_two_places_fails_no_row(
    more: tuple[str, ...], vllm_router: Server, tmp_path: Path
) -> None:
    ended = submit(tmp_path, vllm_router, prompts(100), "--max-tokens", "8", "-c", "auto", *more)
    assert_all_answered(ended, 100)
    assert ended.summary["this_run"]["rate_limited"] < 100
