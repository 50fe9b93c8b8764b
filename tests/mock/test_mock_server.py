"""The stand-in endpoint: honest answers, every hostile one, and a ledger that balances."""

from __future__ import annotations

import asyncio
import io
import json
import select
import signal
import socket
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from mock_faults import FAULTS, fault_reply
from mock_servers import MockServerThread, mock_server

from batchrun.chat.stream import Assembler
from batchrun.errors import LocalIOError, UsageError
from batchrun.mock.knobs import Knobs, StreamUsage
from batchrun.mock.quota import go_duration
from batchrun.mock.replies import MockReply, MockRequest, completion, error_reply
from batchrun.mock.server import MockServer, serve
from batchrun.types import Usage

StartMock = Callable[..., MockServerThread]
MB = 2**20


def chat(prompt: str = "Why?", **more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}


async def post(
    server: MockServer,
    body: object = None,
    *,
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
    timeout_s: float = 20.0,
) -> tuple[int, Any, bytes]:
    """Status, headers and body of one request on a connection of its own."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, max_field_size=2 * MB) as session:
        reply = await session.post(
            server.url + path,
            json=chat() if body is None else body,
            headers=headers,
            allow_redirects=False,
        )
        return reply.status, reply.headers, await reply.read()


def raw_request(body: object = None, *, head: str = "") -> bytes:
    payload = json.dumps(chat() if body is None else body).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: mock\r\n{head}"
        f"Content-Length: {len(payload)}\r\n\r\n"
    ).encode() + payload


def connect(server: MockServerThread | MockServer) -> socket.socket:
    parts = urlsplit(server.url)
    assert parts.hostname
    assert parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def wait_for_bytes(client: socket.socket) -> None:
    assert select.select([client], [], [], 20)[0]


# Answers.


@pytest.mark.asyncio
async def test_equal_requests_get_equal_answers_that_show_they_are_synthetic() -> None:
    bodies = []
    for _ in range(2):
        async with mock_server() as server:
            status, headers, body = await post(server)
            assert (status, headers["Content-Type"]) == (200, "application/json")
            bodies.append(body)
    assert bodies[0] == bodies[1]
    answer = json.loads(bodies[0])
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "[synthetic] Why?"}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


@pytest.mark.asyncio
async def test_max_tokens_cuts_the_answer_and_says_so() -> None:
    async with mock_server() as server:
        _, _, body = await post(server, chat("x" * 100, max_tokens=5))
    answer = json.loads(body)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"].startswith("[synthetic]")
    assert answer["usage"]["completion_tokens"] == 5


@pytest.mark.asyncio
async def test_answers_have_the_length_asked_for_and_n_choices() -> None:
    async with mock_server(Knobs(completion_tokens=50)) as server:
        _, _, body = await post(server, chat(n=3))
    answer = json.loads(body)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 150


@pytest.mark.asyncio
async def test_messages_of_parts_and_unknown_members_are_accepted() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts, "x": 1}], "x": {"y": []}}
    async with mock_server() as server:
        status, _, answer = await post(server, body)
    assert status == 200
    assert json.loads(answer)["choices"][0]["message"]["content"] == "[synthetic] a"


@pytest.mark.asyncio
@pytest.mark.parametrize("place", ["auto", "final_choice", "extra_chunk", "every_chunk", "x_groq"])
@pytest.mark.parametrize("split", [None, 1, 7])
@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
async def test_a_stream_says_the_same_as_a_plain_answer(
    place: StreamUsage, split: int | None, options: dict[str, object]
) -> None:
    knobs = Knobs(stream_usage=place, stream_split_bytes=split, stream_comments=True)
    async with mock_server(knobs) as server:
        _, _, plain = await post(server, chat("Où est l’été 🙂?", n=2))
        _, headers, stream = await post(
            server, chat("Où est l’été 🙂?", n=2, stream=True, **options)
        )
    assert headers["Content-Type"] == "text/event-stream"
    assembler = Assembler(limit_bytes=MB)
    assembler.feed(stream)
    assembler.close()
    assert assembler.problem is None
    answer, streamed = json.loads(plain), json.loads(assembler.body())
    assert (streamed["choices"], streamed["usage"]) == (answer["choices"], answer["usage"])


@pytest.mark.asyncio
async def test_usage_of_a_stream_is_where_the_request_asked_for_it() -> None:
    async with mock_server() as server:
        _, _, mistral = await post(server, chat(stream=True))
        _, _, openai = await post(server, chat(stream=True, stream_options={"include_usage": True}))

    def chunk_with_usage(stream: bytes) -> Any:
        chunks = [json.loads(e[6:]) for e in stream.split(b"\n\n")[:-2]]
        [chunk] = [c for c in chunks if c["usage"]]
        return chunk

    assert chunk_with_usage(mistral)["choices"][0]["finish_reason"] == "stop"
    assert chunk_with_usage(openai)["choices"] == []


# Paths, keys, models.


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions?api-version=3"])
async def test_the_api_is_there_with_and_without_v1(path: str) -> None:
    async with mock_server() as server:
        assert (await post(server, path=path))[0] == 200


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/v1/chat/completions", chat(), 404),
        ("/", chat(), 404),
        ("/v1/models", chat(), 405),
        ("/v1/chat/completions", {"model": "m"}, 400),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/chat/completions", {"messages": "hello"}, 400),
        ("/v1/chat/completions", [1], 400),
    ],
)
async def test_everything_else_is_an_error_in_json(path: str, body: object, status: int) -> None:
    async with mock_server() as server:
        got, _, answer = await post(server, body, path=path)
    assert got == status
    assert json.loads(answer)["error"]["message"]


@pytest.mark.asyncio
async def test_models_are_listed_and_unknown_ones_refused() -> None:
    async with (
        mock_server(Knobs(models=("a", "b"))) as server,
        aiohttp.ClientSession() as session,
    ):
        listed = await (await session.get(server.url + "/v1/models")).json()
        assert [m["id"] for m in listed["data"]] == ["a", "b"]
        status, _, body = await post(server)
        assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")


@pytest.mark.asyncio
async def test_the_key_is_demanded_and_a_wrong_one_echoed() -> None:
    async with mock_server(Knobs(key="sk-right")) as server:
        assert (await post(server))[0] == 401
        status, _, body = await post(server, headers={"Authorization": "Bearer sk-wrong"})
        assert (status, b"sk-wrong" in body) == (401, True)
        assert (await post(server, headers={"Authorization": "Bearer sk-right"}))[0] == 200


# Faults.

ERRORS_WITH_A_STATUS = {
    **{kind: int(kind[:3]) for kind in FAULTS if kind[:3].isdigit()},
    "context_length": 400,
    "content_filter": 400,
    "redirect": 307,
}
NO_ANSWER = (aiohttp.ClientError, TimeoutError)
BILLED_ERRORS = {"408", "504", "504-html", "524", "524-html"}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ERRORS_WITH_A_STATUS)
async def test_a_fault_with_a_status(kind: str) -> None:
    async with mock_server(Knobs(faults={kind: 1})) as server:
        status, headers, body = await post(server, headers={"Authorization": "Bearer sk-canary"})
        assert status == ERRORS_WITH_A_STATUS[kind]
        assert server.ledger.faults == {kind: 1}
        assert server.ledger.delivered_answers == 0
        # A gateway that gave up waiting cannot know what was billed behind it.
        assert server.ledger.billed_answers == (1 if kind in BILLED_ERRORS else 0)
    assert ("text/html" in headers["Content-Type"]) == (kind.endswith("-html") or status == 307)
    assert (b"sk-canary" in body) == (status == 401)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "header"),
    [("429-retry-after", "Retry-After"), ("429-date", "Retry-After"), ("429-ms", "retry-after-ms")],
)
async def test_refusals_name_their_wait_in_every_form(kind: str, header: str) -> None:
    async with mock_server(Knobs(script=(kind, "429"), retry_after_s=1.5)) as server:
        told = (await post(server))[1][header]
        assert told in ("2", "1500") or told.endswith(" GMT")
        assert header not in (await post(server))[1]


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    "kind", ["disconnect", "reset", "cut", "cut-chunk", "bad_head", "hang", "drip", "endless"]
)
async def test_faults_that_bring_no_whole_body(kind: str, stream: bool) -> None:
    async with mock_server(Knobs(faults={kind: 1})) as server:
        with pytest.raises(NO_ANSWER):
            await post(server, chat(stream=stream), timeout_s=0.5)
        await settled(server)
        assert (server.ledger.billed_answers, server.ledger.delivered_answers) == (1, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "kind",
    [
        "cut-silent",
        "truncated_json",
        "garbage",
        "html",
        "empty",
        "no_choices",
        "error-200",
        "invalid_utf8",
        "deep_json",
    ],
)
async def test_faults_at_200_are_no_completion(kind: str) -> None:
    async with mock_server(Knobs(faults={kind: 1})) as server:
        status, _, body = await post(server)
        assert status == 200
        assert recorded_usage(body) is None
        await settled(server)
        assert server.ledger.delivered_answers == 0
        assert server.ledger.billed_answers == (0 if kind == "error-200" else 1)


@pytest.mark.asyncio
async def test_a_gzip_bomb_is_small_on_the_wire_and_large_behind_it() -> None:
    async with (
        mock_server(Knobs(faults={"gzip_bomb": 1})) as server,
        aiohttp.ClientSession(auto_decompress=False) as session,
    ):
        reply = await session.post(server.url + "/v1/chat/completions", json=chat())
        assert reply.headers["Content-Encoding"] == "gzip"
        packed = await reply.read()
    assert len(packed) < 400_000
    unpacker, size = zlib.decompressobj(31), 0
    while block := unpacker.decompress(packed, 2**20):
        size, packed = size + len(block), unpacker.unconsumed_tail
    assert size > 300_000_000


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["stream-error", "stream-cut", "stream-no-finish", "stream-eof"])
async def test_faults_inside_a_stream(kind: str) -> None:
    async with mock_server(Knobs(faults={kind: 1})) as server:
        _, _, stream = await post(server, chat(stream=True))
        assembler = Assembler(limit_bytes=MB)
        assembler.feed(stream)
        assembler.close()
        assert (assembler.problem == "cut") == (kind != "stream-error")
        assert ("error" in json.loads(assembler.body())) == (kind == "stream-error")
        assert (b"[DONE]" in stream) == (kind in ("stream-error", "stream-no-finish"))
        assert (server.ledger.billed_answers, server.ledger.delivered_answers) == (1, 0)
        # A request that does not stream cannot meet them.
        assert recorded_usage((await post(server, chat()))[2]) is not None
        assert server.ledger.delivered_answers == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("kind", ["close-after", "reset-after", "blank_lines"])
async def test_faults_around_a_whole_answer(kind: str, stream: bool) -> None:
    async with mock_server(Knobs(faults={kind: 1})) as server:
        _, _, body = await post(server, chat(stream=stream))
        assert recorded_usage(body, stream=stream) is not None
        await settled(server)
        assert server.ledger.delivered_answers == 1


@pytest.mark.asyncio
async def test_a_header_of_a_megabyte() -> None:
    async with mock_server(Knobs(faults={"huge_header": 1})) as server:
        _, headers, _ = await post(server)
    assert len(headers["X-Padding"]) == 1_000_000


def test_every_fault_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    missing = [k for k in FAULTS if k not in ERRORS_WITH_A_STATUS and f'"{k}"' not in source]
    assert missing == []


@pytest.mark.asyncio
async def test_a_script_goes_by_the_sendings_of_each_body() -> None:
    async with mock_server(Knobs(script=("429", "500"))) as server:
        for prompt in ("a", "b"):
            got = [(await post(server, chat(prompt)))[0] for _ in range(3)]
            assert got == [429, 500, 200]


@pytest.mark.asyncio
async def test_faults_depend_on_seed_and_body_and_keep_their_share() -> None:
    async def statuses(seed: int) -> list[int]:
        knobs = Knobs(seed=seed, faults={"429": 0.3, "500": 0.2})
        async with mock_server(knobs) as server, aiohttp.ClientSession() as session:
            url = server.url + "/v1/chat/completions"
            return [(await session.post(url, json=chat(str(n)))).status for n in range(400)]

    first = await statuses(1)
    assert first == await statuses(1)
    assert first != await statuses(2)
    counts = Counter(first)
    assert 90 < counts[429] < 150
    assert 50 < counts[500] < 110


@pytest.mark.parametrize(
    "knobs",
    [{"faults": {"nope": 0.1}}, {"script": ("nope",)}, {"faults": {"429": 0.6, "500": 0.6}}],
)
def test_knobs_that_cannot_work_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="fault"):
        mock_server(Knobs(**knobs))


# Quotas.


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.asyncio
async def test_the_request_quota_is_a_bucket_told_in_openais_headers() -> None:
    clock = Clock()
    async with mock_server(Knobs(rpm=2, limit_headers="openai"), clock=clock) as server:

        async def ask() -> tuple[int, Any]:
            status, headers, _ = await post(server)
            return status, headers

        remaining = [(await ask())[1]["x-ratelimit-remaining-requests"] for _ in range(2)]
        assert remaining == ["1", "0"]
        status, headers = await ask()
        assert (status, headers["Retry-After"]) == (429, "30")
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-reset-requests"] == "1m0s"
        clock.now += 29
        assert (await ask())[0] == 429
        clock.now += 1
        assert (await ask())[0] == 200
        assert (await ask())[0] == 429


@pytest.mark.asyncio
async def test_the_token_quota_is_told_in_mistrals_headers() -> None:
    clock = Clock()
    knobs = Knobs(tpm=20, limit_headers="mistral")
    async with mock_server(knobs, clock=clock) as server:
        seen = []
        for _ in range(3):
            status, headers, body = await post(server)
            seen.append((status, headers["x-ratelimit-remaining-tokens-minute"]))
        assert seen == [(200, "12"), (200, "4"), (429, "4")]
        assert headers["x-ratelimit-limit-tokens-minute"] == "20"
        assert headers["x-ratelimit-tokens-query-cost"] == "8"
        assert headers["Retry-After"] == "12"
        assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
        clock.now += 12
        assert (await post(server))[0] == 200


@pytest.mark.asyncio
async def test_a_request_above_the_whole_quota_never_fits() -> None:
    async with mock_server(Knobs(tpm=20)) as server:
        status, _, body = await post(server, chat("x" * 400))
    assert status == 429
    assert "Request too large" in json.loads(body)["error"]["message"]


@pytest.mark.asyncio
async def test_quotas_are_kept_per_model() -> None:
    async with mock_server(Knobs(rpm=1)) as server:
        got = [(await post(server, {**chat(), "model": m}))[0] for m in ("a", "b", "a")]
    assert got == [200, 200, 429]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0201, "21ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (360, "6m0s"),
        (3723, "1h2m3s"),
        (3600, "1h0m0s"),
    ],
)
def test_go_durations(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


@pytest.mark.asyncio
async def test_slots_work_at_a_time_and_the_rest_waits() -> None:
    started: asyncio.Queue[str] = asyncio.Queue()

    def respond(request: MockRequest) -> MockReply | None:
        started.put_nowait(request.prompt)
        return fault_reply("hang", request) if request.prompt == "stuck" else None

    async with mock_server(Knobs(slots=1), respond=respond) as server:
        stuck = asyncio.create_task(post(server, chat("stuck")))
        assert await started.get() == "stuck"
        waits = asyncio.create_task(post(server, chat("waits")))
        while server.ledger.in_flight < 2:
            await asyncio.sleep(0)
        assert started.empty()
        stuck.cancel()
        assert (await waits)[0] == 200
        assert server.ledger.peak_in_flight == 2


# The ledger.


def recorded_usage(body: bytes, *, stream: bool = False) -> Usage | None:
    """What a client would record for ``body``; None when it is no completion."""
    if stream:
        assembler = Assembler(limit_bytes=MB)
        assembler.feed(body)
        assembler.close()
        body = b"" if assembler.problem else assembler.body()
    try:
        answer = json.loads(body)
        if "error" in answer or answer["choices"][0]["finish_reason"] is None:
            return None
        usage = answer["usage"]
        return Usage(usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None


async def settled(server: MockServer) -> None:
    """Wait until the server has seen the end of every request whose client has left."""
    while server.ledger.in_flight:
        await asyncio.sleep(0)


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_the_ledger_balances_with_a_clients_books(seed: int, stream: bool) -> None:
    slow = {"drip", "endless", "gzip_bomb"}
    kinds = [k for k in FAULTS if k not in slow]
    knobs = Knobs(seed=seed, faults=dict.fromkeys(kinds, 0.7 / len(kinds)))
    recorded, unanswered, ok = Usage(), 0, 0

    async def ask(session: aiohttp.ClientSession, n: int) -> None:
        nonlocal recorded, unanswered, ok
        try:
            reply = await session.post(
                server.url + "/v1/chat/completions",
                json=chat(str(n), stream=stream),
                allow_redirects=False,
            )
            body = await reply.read()
        except NO_ANSWER:
            unanswered += 1
            return
        streamed = reply.headers["Content-Type"] == "text/event-stream"
        usage = recorded_usage(body, stream=streamed) if reply.status == 200 else None
        if usage is None:
            unanswered += 1
        else:
            ok += 1
            recorded += usage

    timeout = aiohttp.ClientTimeout(total=2.0)
    async with mock_server(knobs, keep_entries=True) as server:
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            for n in range(120):
                group.create_task(ask(session, n))
        await settled(server)
        ledger = server.ledger
        assert ok > 20
        assert (ledger.delivered_answers, ledger.delivered) == (ok, recorded)
        assert 0 < ledger.billed_answers - ok <= unanswered
        assert ledger.requests == len(ledger.entries)
        entries = [e for e in ledger.entries if e.delivered and e.billed]
        assert sum((e.billed for e in entries if e.billed), Usage()) == recorded


def test_an_answer_that_was_read_stays_delivered(mock: StartMock) -> None:
    server = mock()
    with connect(server) as client:
        for _ in range(2):
            client.sendall(raw_request())
            assert client.recv(65_536).startswith(b"HTTP/1.1 200 OK\r\n")
    assert server.ledger.delivered_answers == 2


def test_an_answer_left_unread_is_taken_back(mock: StartMock) -> None:
    server = mock()
    with connect(server) as client:
        client.sendall(raw_request())
        wait_for_bytes(client)
        assert server.ledger.delivered_answers == 1
    assert server.ledger.delivered_answers == 0
    assert server.ledger.delivered.total_tokens == 0
    assert server.ledger.billed_answers == 1


def test_an_answer_to_a_client_that_has_just_left_is_not_delivered(mock: StartMock) -> None:
    clients: list[socket.socket] = []

    def leave(request: MockRequest) -> None:
        clients[0].close()

    server = mock(respond=leave)
    clients.append(connect(server))
    clients[0].sendall(raw_request())
    while not (ledger := server.ledger).statuses:
        pass
    assert (ledger.billed_answers, ledger.delivered_answers) == (1, 0)


def test_a_client_that_leaves_while_it_waits_has_been_billed(mock: StartMock) -> None:
    server = mock(Knobs(latency_s=1000))
    with connect(server) as client:
        client.sendall(raw_request())
        while not server.ledger.billed_answers:
            pass
    assert server.ledger.in_flight == 0
    assert server.ledger.delivered_answers == 0


def test_half_a_large_answer_is_not_delivered(mock: StartMock) -> None:
    server = mock(Knobs(completion_tokens=5_000_000))
    with connect(server) as client:
        client.sendall(raw_request())
        assert client.recv(1000)
    assert (server.ledger.billed_answers, server.ledger.delivered_answers) == (1, 0)


@pytest.mark.asyncio
async def test_the_ledger_file_has_numbers_but_no_prompts_and_no_keys() -> None:
    file = io.BytesIO()
    async with mock_server(Knobs(script=("500",)), ledger_file=file) as server:
        for _ in range(2):
            await post(server, chat("private prompt"), headers={"Authorization": "Bearer canary"})
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [(e["n"], e["seen"], e["status"], e["fault"]) for e in lines] == [
        (1, 1, 500, "500"),
        (2, 2, 200, ""),
    ]
    assert [e["delivered"] for e in lines] == [False, True]
    assert lines[1]["billed"]["total_tokens"] > 0
    assert b"private" not in file.getvalue()
    assert b"canary" not in file.getvalue()


@pytest.mark.asyncio
async def test_entries_keep_what_a_test_wants_to_see() -> None:
    async with mock_server(keep_entries=True) as server:
        await post(server, headers={"X-Mine": "1"})
    [entry] = server.ledger.entries
    assert (entry.prompt, entry.headers["x-mine"], entry.status) == ("Why?", "1", 200)
    assert json.loads(entry.body) == chat()
    assert entry.ended_s is not None
    assert entry.ended_s >= entry.started_s


# Scripted replies and the wire.


def test_a_hook_may_reply_anything(mock: StartMock) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        return {
            "raw": MockReply(raw=b"HTTP/1.1 200 OK\r\n\r\nraw", ending="close"),
            "error": error_reply(418, "teapot"),
            "own": completion(request, content="mine", finish_reason="length"),
        }.get(request.prompt)

    server = mock(respond=respond)

    def ask(prompt: str) -> bytes:
        with connect(server) as client:
            client.sendall(raw_request(chat(prompt), head="Connection: close\r\n"))
            return b"".join(iter(lambda: client.recv(65_536), b""))

    assert ask("raw") == b"HTTP/1.1 200 OK\r\n\r\nraw"
    assert ask("error").startswith(b"HTTP/1.1 418 ")
    assert b'"content":"mine"},"finish_reason":"length"' in ask("own")
    assert b"[synthetic] other" in ask("other")


def test_a_client_that_expects_100_continue_gets_it(mock: StartMock) -> None:
    with connect(mock()) as client:
        client.sendall(raw_request(head="Expect: 100-continue\r\n"))
        got = b""
        while b"[synthetic]" not in got:
            got += client.recv(65_536)
    assert got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_a_prompt_may_be_ten_megabytes(mock: StartMock) -> None:
    server = mock()
    with connect(server) as client:
        client.sendall(raw_request(chat("x" * 10_000_000)))
        assert client.recv(65_536).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_stopped_server_leaves_no_thread_and_no_port() -> None:
    with MockServerThread(Knobs(latency_s=1000)) as server, connect(server) as client:
        client.sendall(raw_request())
        while not server.ledger.in_flight:
            pass
        server.close()
        assert client.recv(1) == b""
        with pytest.raises(ConnectionError):
            connect(server)
    assert server.ledger.in_flight == 0


@pytest.mark.asyncio
async def test_a_port_in_use_is_said() -> None:
    async with mock_server() as server:
        port = urlsplit(server.url).port
        assert port
        with pytest.raises(LocalIOError, match=f"cannot listen on 127.0.0.1:{port}"):
            await serve("127.0.0.1", port, Knobs())


def test_a_terminated_server_writes_its_ledger(tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from batchrun.mock import Knobs, serve\n"
        "asyncio.run(serve('127.0.0.1', 0, Knobs(), pathlib.Path(sys.argv[1]),"
        " on_ready=lambda url: print(url, flush=True)))\n"
    )
    ledger = tmp_path / "ledger.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(ledger)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        parts = urlsplit(process.stdout.readline().strip())
        with socket.create_connection(("127.0.0.1", parts.port or 0), timeout=20) as client:
            client.sendall(raw_request())
            assert client.recv(65_536)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    [line] = ledger.read_text().splitlines()
    assert json.loads(line)["delivered"] is True
