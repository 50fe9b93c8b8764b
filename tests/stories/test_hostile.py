"""Hostile replies fail their row with a typed reason, cost little memory and hold no worker."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from crash_harness import Launcher, write_rows
from mock_faults import fault_reply
from mock_servers import MockServerThread

from batchrun.mock.replies import MockReply, MockRequest, completion

ROWS = 4
AT_ONCE = 64
ALLOWED_GROWTH_BYTES = 64 * 2**20
SSE = {"Content-Type": "text/event-stream"}


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as starting:
        yield starting


def command(
    server: MockServerThread, *, at_once: int = 1, timeout_s: int = 1
) -> tuple[object, ...]:
    return (
        *("submit", "in.jsonl", "-o", "out.parquet", "--base-url", server.url, "-m", "m"),
        *("-c", at_once, "--timeout", timeout_s, "--connect-timeout", 1, "--max-retries", 0),
        *("--abort-after", 0),
    )


@pytest.fixture(scope="module")
def honest_peak_bytes(
    launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], int]:
    """What a run needs whose so many requests in flight all get an honest answer."""

    def measure(at_once: int) -> int:
        place = tmp_path_factory.mktemp("honest")
        write_rows(place / "in.jsonl", range(max(ROWS, at_once)))
        with MockServerThread() as server:
            process = launcher.start(*command(server, at_once=at_once), cwd=place)
            code, said = process.wait()
        assert code == 0, said
        return process.peak_rss_bytes

    return cache(measure)


def endless_stream(request: MockRequest) -> MockReply:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"a" * 65_000 + b'"}}]}\n\n'
    return MockReply(headers=SSE, parts=itertools.repeat(event), framing="chunked")


def endless_line(request: MockRequest) -> MockReply:
    return MockReply(headers=SSE, parts=itertools.repeat(b"a" * 65_000), framing="chunked")


def endless_head(request: MockRequest) -> MockReply:
    head = b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"a" * 9000) for n in range(100))
    return MockReply(raw=head, ending="close")


def slow(request: MockRequest) -> MockReply:
    """One byte every ten seconds."""
    return MockReply(parts=[b"{", b"}"], framing="chunked", pause_s=10.0)


def of_kind(kind: str, request: MockRequest) -> MockReply:
    scripted = {
        "endless stream": endless_stream,
        "endless line": endless_line,
        "endless head": endless_head,
        "one byte every 10 s": slow,
    }
    return scripted[kind](request) if kind in scripted else fault_reply(kind, request)


@pytest.mark.parametrize(
    ("kind", "error_kind", "error_code"),
    [
        ("gzip_bomb", "invalid_response", "too_large"),
        ("endless", "invalid_response", "too_large"),
        ("endless stream", "invalid_response", "too_large"),
        ("endless line", "invalid_response", "too_large"),
        ("huge_header", "invalid_response", "bad_header"),
        ("endless head", "transient", "disconnected"),
        ("bad_head", "invalid_response", "bad_header"),
        ("one byte every 10 s", "timeout", "timeout"),
        ("deep_json", "invalid_response", "bad_json"),
        ("truncated_json", "invalid_response", "bad_json"),
        ("invalid_utf8", "invalid_response", "not_utf8"),
    ],
)
@pytest.mark.slow
def test_a_hostile_reply_fails_its_row_and_no_other(
    kind: str,
    error_kind: str,
    error_code: str,
    launcher: Launcher,
    honest_peak_bytes: Callable[[int], int],
    tmp_path: Path,
) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        # The last row meets an honest server: no worker is stuck, no connection spoilt.
        return None if request.prompt == f"Question {ROWS - 1}?" else of_kind(kind, request)

    write_rows(tmp_path / "in.jsonl", range(ROWS))
    with MockServerThread(respond=respond) as server:
        process = launcher.start(*command(server), cwd=tmp_path)
        code, said = process.wait()
    assert code == 3, said
    answers = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert answers["error_kind"] == [error_kind] * (ROWS - 1) + [None]
    assert answers["error_code"] == [error_code] * (ROWS - 1) + [None]
    assert answers["response"][-1] == f"[synthetic] Question {ROWS - 1}?"
    assert process.peak_rss_bytes - honest_peak_bytes(1) < ALLOWED_GROWTH_BYTES


@pytest.mark.parametrize(
    "kinds",
    [
        ["endless"],
        ["endless stream"],
        ["gzip_bomb", "endless line", "huge_header", "endless", "deep_json", "endless stream"],
    ],
    ids=["bodies", "streams", "all kinds"],
)
@pytest.mark.slow
def test_hostile_replies_all_at_once_cost_little_memory(
    kinds: list[str],
    launcher: Launcher,
    honest_peak_bytes: Callable[[int], int],
    tmp_path: Path,
) -> None:
    def respond(request: MockRequest) -> MockReply:
        return of_kind(kinds[request.n % len(kinds)], request)

    write_rows(tmp_path / "in.jsonl", range(AT_ONCE))
    with MockServerThread(respond=respond) as server:
        process = launcher.start(*command(server, at_once=AT_ONCE, timeout_s=60), cwd=tmp_path)
        code, said = process.wait()
    assert code == 3, said
    codes = Counter(pq.read_table(tmp_path / "out.parquet").column("error_code").to_pylist())
    typed = {"huge_header": "bad_header", "deep_json": "bad_json"}
    assert set(codes) == {typed.get(kind, "too_large") for kind in kinds}
    assert process.peak_rss_bytes - honest_peak_bytes(AT_ONCE) < ALLOWED_GROWTH_BYTES


def test_large_answers_all_at_once_are_all_answers(launcher: Launcher, tmp_path: Path) -> None:
    """Also beside endless ones: what bounds the memory refuses nobody."""

    def respond(request: MockRequest) -> MockReply:
        if request.n % 8 == 0:
            return of_kind("endless", request)
        reply = completion(request)
        told = reply.body.replace(b"[synthetic]", b"[synthetic]" + b"x" * 2_000_000)
        return MockReply(body=told, headers=reply.headers)

    write_rows(tmp_path / "in.jsonl", range(AT_ONCE))
    with MockServerThread(respond=respond) as server:
        process = launcher.start(*command(server, at_once=AT_ONCE, timeout_s=60), cwd=tmp_path)
        code, said = process.wait()
    assert code == 3, said
    codes = Counter(pq.read_table(tmp_path / "out.parquet").column("error_code").to_pylist())
    assert codes == {None: AT_ONCE - AT_ONCE // 8, "too_large": AT_ONCE // 8}
