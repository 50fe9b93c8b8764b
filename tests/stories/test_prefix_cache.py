"""Repeated prefixes, against an endpoint that bills them less once it has answered one."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import StartMock, StartRun, Submit
from msgspec.structs import replace

from batchrun.mock.replies import MockReply, MockRequest, completion
from batchrun.types import Usage

ANSWER_S = 0.1
CONCURRENCY = 16
FIRST_CHARS, STEP_CHARS = 4_096, 512  # 1,024 tokens, then by 128, as OpenAI bills


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Endpoint:
    """Has a prefix cached from when its first answer is made."""

    def __init__(self) -> None:
        self._from: dict[int, float] = {}
        self.cached = self.could_be = 0

    def __call__(self, request: MockRequest) -> MockReply:
        now = time.monotonic()
        text = json.loads(request.body)["messages"][-1]["content"]
        cached = 0
        for length in range(FIRST_CHARS, len(text) + 1, STEP_CHARS):
            prefix = hash(text[:length])
            if prefix not in self._from:
                self._from[prefix] = now + ANSWER_S
                continue
            self.could_be += STEP_CHARS if length > FIRST_CHARS else FIRST_CHARS
            if self._from[prefix] <= now:
                cached = length
        self.cached += cached
        usage = Usage(len(text) // 4, 5, len(text) // 4 + 5, cached_tokens=cached // 4)
        return replace(completion(request, usage=usage), delay_s=ANSWER_S)


def prompts(prefixes: int, each: int, *, shuffled: bool) -> list[str]:
    texts = [
        f"{p:03d} " + (f"Guideline {p}: be brief. " * 300)[:6_000] + f" row {n}"
        for p in range(prefixes)
        for n in range(each)
    ]
    if shuffled:
        random.Random(0).shuffle(texts)
    return texts


@pytest.mark.parametrize(
    ("prefixes", "each", "shuffled"), [(1, 800, False), (20, 40, False), (20, 40, True)]
)
def test_repeated_prefixes_are_cached(
    mock: StartMock, submit: Submit, prefixes: int, each: int, shuffled: bool
) -> None:
    endpoint = Endpoint()
    server = mock(respond=endpoint)
    texts = prompts(prefixes, each, shuffled=shuffled)
    Path("in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet")
    ended = submit(*to, "-c", CONCURRENCY, "--json")
    assert ended.code == 0
    assert endpoint.cached >= 0.95 * endpoint.could_be
    assert ended.summary["output_totals"]["tokens"]["cached"] == endpoint.cached // 4
    assert pq.read_table("out.parquet")["prompt"].to_pylist() == texts
    assert server.ledger.requests == len(texts)


def test_who_stands_aside_when_a_run_is_stopped_is_sent_by_the_next(
    mock: StartMock, submit: Submit, running: StartRun
) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        return None if go_on else MockReply(raw=b"", ending="hang")

    go_on = False
    server = mock(respond=respond)
    texts = prompts(1, 200, shuffled=False)
    Path("in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    to = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "-c", 2)
    with running(*to, "--drain", 0) as run:
        while not server.ledger.requests:
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert run.end().code == 130
    assert server.ledger.requests == 1
    go_on = True
    assert submit(*to).code == 0
    assert server.ledger.requests == 201
