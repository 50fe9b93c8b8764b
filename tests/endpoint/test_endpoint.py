"""One Request in, one Attempt out, on real sockets: what leaves, and what every reply becomes."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from mock_faults import dripped, faulty
from mock_servers import mock_server

from batchrun.chat.identity import encode, request_hash
from batchrun.endpoint import body as body_room
from batchrun.endpoint import client as client_room
from batchrun.endpoint import memory as memory_room
from batchrun.endpoint.client import ChatEndpoint
from batchrun.endpoint.connections import Trip
from batchrun.endpoint.lean import MOST_TOGETHER
from batchrun.endpoint.lean import Departures as _Departures
from batchrun.endpoint.memory import STEP_BYTES
from batchrun.errors import BatchrunError, EndpointRefused, StoppedEarly
from batchrun.mock.knobs import Knobs, StreamUsage
from batchrun.mock.replies import MockReply, MockRequest, Respond, completion
from batchrun.mock.server import MockServer
from batchrun.providers import Endpoint, resolve
from batchrun.secret import Secret
from batchrun.sending.classify import classify
from batchrun.types import Attempt, Request, Usage

KEY = "sk-0123456789-very-secret"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def target(base_url: str, key: str | None = None) -> Endpoint:
    environ = {"KEY": key} if key else {}
    return resolve(
        provider=None,
        base_url=base_url,
        api_key_env="KEY" if key else None,
        api_key_file=None,
        allow_http=True,
        environ=environ,
    )


def request(prompt: str = "Why?", **more: Any) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}
    return Request(0, encode(body), request_hash(body), 0, 0, "m")


def client(
    base_url: str,
    *,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 20.0,
    connect_timeout_s: float = 5.0,
) -> ChatEndpoint:
    return ChatEndpoint(
        target(base_url, key),
        [(name, Secret(value)) for name, value in (headers or {}).items()],
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
    )


def ask(
    knobs: Knobs | None = None,
    *,
    respond: Respond | None = None,
    asked: Request | None = None,
    **options: Any,
) -> tuple[Attempt, MockServer]:
    """One request to a server of its own."""

    async def story() -> tuple[Attempt, MockServer]:
        async with (
            mock_server(knobs, respond=respond, keep_entries=True) as server,
            client(server.url, **options) as endpoint,
        ):
            return await endpoint.send(asked or request()), server

    return asyncio.run(story())


def fault(kind: str, *, stream: bool = False, **options: Any) -> Attempt:
    asked = request(stream=True) if stream else request()
    return ask(Knobs(faults={kind: 1.0}), asked=asked, **options)[0]


def replies(reply: MockReply) -> Respond:
    return lambda request: reply


def meaning(attempt: Attempt) -> tuple[str, str, bool]:
    decision = classify(attempt, request())
    return decision.kind, decision.code, decision.in_doubt


# What leaves


def test_a_request_is_its_body_and_the_headers_it_needs() -> None:
    asked = request("Größe 💡", temperature=0.5)
    _, server = ask(asked=asked, key=KEY)
    (entry,) = server.ledger.entries
    assert entry.body == asked.body
    sent = dict(entry.headers)
    assert sent.pop("User-Agent").startswith("batchrun/")
    assert sent == {
        "Host": server.url.removeprefix("http://"),
        "Accept": "application/json, text/event-stream",
        "Accept-Encoding": "gzip, deflate",
        "Content-Type": "application/json",
        "Content-Length": str(len(asked.body)),
        "Authorization": f"Bearer {KEY}",
    }


def test_without_a_key_no_authorization_is_sent() -> None:
    _, server = ask()
    assert "Authorization" not in server.ledger.entries[0].headers


def test_extra_headers_are_sent_and_replace_our_own() -> None:
    own = {"X-Title": "trial", "authorization": "Basic abc", "user-agent": "mine/1"}
    _, server = ask(key=KEY, headers=own)
    headers = server.ledger.entries[0].headers
    assert {name: headers[name] for name in own} == own
    assert KEY not in str(headers)
    assert [n.lower() for n in headers].count("authorization") == 1


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/openai/v1", "/openai/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1?api-version=3", "/v1/chat/completions?api-version=3"),
        ("/a%2Fb/v1?x=%20y", "/a%2Fb/v1/chat/completions?x=%20y"),
    ],
)
def test_every_way_of_writing_the_base_url(path: str, asked: str) -> None:
    async def story() -> str:
        async with mock_server(keep_entries=True) as server, client(server.url + path) as endpoint:
            await endpoint.send(request())
            return server.ledger.entries[0].path

    assert asyncio.run(story()) == asked


def test_a_body_of_several_megabytes_goes_whole() -> None:
    asked = request("x" * 5_000_000)
    attempt, server = ask(asked=asked)
    assert attempt.status == 200
    assert server.ledger.entries[0].body == asked.body


def test_no_cookie_is_kept() -> None:
    def respond(request: MockRequest) -> MockReply:
        reply = completion(request)
        headers = {**reply.headers, "Set-Cookie": "__cf_bm=1; Path=/"}
        return MockReply(body=reply.body, headers=headers)

    async def story() -> list[Mapping[str, str]]:
        async with (
            mock_server(respond=respond, keep_entries=True) as server,
            client(server.url) as endpoint,
        ):
            await endpoint.send(request("a"))
            await endpoint.send(request("b"))
            return [entry.headers for entry in server.ledger.entries]

    assert all("Cookie" not in headers for headers in asyncio.run(story()))


def test_netrc_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    _, server = ask()
    assert "Authorization" not in server.ledger.entries[0].headers


@asynccontextmanager
async def raw_server(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that is only sockets; ``handle`` gets every connection and it is closed after."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """(head, body) of one request with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = (
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    )
    return head, await reader.readexactly(length)


ANSWER = (
    b'{"id":"1","model":"m","choices":'
    b'[{"index":0,"message":{"content":"hi"},"finish_reason":"stop"}]}'
)
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(ANSWER),
    ANSWER,
)


@pytest.mark.parametrize(
    ("version", "is_lean"),
    [(aiohttp.__version__, True), ("99.0.0", False)],
    ids=["tried with", "unknown"],
)
def test_requests_are_built_here_for_an_aiohttp_that_was_tried_and_by_aiohttp_for_others(
    version: str, is_lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []

    class Seen(_Departures):
        def add(self, transport: asyncio.Transport, request: bytes, trip: Trip) -> None:
            left.append(request)
            super().add(transport, request, trip)

    monkeypatch.setattr(aiohttp, "__version__", version)
    monkeypatch.setattr(client_room, "Departures", Seen)
    attempt, _ = ask()
    assert attempt.status == 200
    assert bool(left) is is_lean


def test_one_connection_serves_many_requests() -> None:
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await read_request(reader)
            writer.write(REPLY)

    async def story() -> None:
        async with raw_server(handle) as url, client(url) as endpoint:
            for _ in range(50):
                assert (await endpoint.send(request())).body == ANSWER

    asyncio.run(story())
    assert connections == 1


@pytest.mark.parametrize("kind", ["close-after", "reset-after"])
def test_a_stale_connection_costs_one_attempt_and_the_next_is_fine(kind: str) -> None:
    async def story() -> list[Attempt]:
        knobs = Knobs(script=(kind, "ok", "ok"))
        async with mock_server(knobs, keep_entries=True) as server, client(server.url) as endpoint:
            return [await endpoint.send(request()) for _ in range(3)]

    attempts = asyncio.run(story())
    assert attempts[-1].status == 200
    assert {a.failure for a in attempts} <= {None, "disconnected"}


def test_a_connection_whose_reply_was_not_read_is_not_used_again() -> None:
    # The rest of the first reply would be taken for the second one.
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        if b"slow" in body:
            writer.write(REPLY[:-10])
            await asyncio.sleep(1.0)
            writer.write(REPLY[-10:])
        else:
            writer.write(REPLY)
        await read_request(reader)
        writer.write(REPLY.replace(b"hi", b"no"))

    async def story() -> None:
        async with (
            raw_server(handle) as url,
            client(url, timeout_s=0.2, connect_timeout_s=0.2) as endpoint,
        ):
            first = await endpoint.send(request("slow"))
            second = await endpoint.send(request("fast"))
            assert first.failure == "timeout"
            assert second.body == ANSWER

    asyncio.run(story())


# Proxies


def test_a_proxy_gets_plain_requests_whole_and_only_the_origin_gets_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_request(reader)
            heads.append(head)
            writer.write(REPLY)

    async def story() -> Attempt:
        async with raw_server(handle) as url:
            monkeypatch.setenv("http_proxy", url.replace("//", "//user:pass@"))
            async with client("http://upstream.invalid:8000", key=KEY) as endpoint:
                return await endpoint.send(request())

    assert asyncio.run(story()).body == ANSWER
    (head,) = heads
    assert head.startswith(b"POST http://upstream.invalid:8000/v1/chat/completions HTTP/1.1\r\n")
    assert f"Authorization: Bearer {KEY}".encode() in head
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNz" in head


def test_an_https_origin_is_reached_by_connect_and_the_proxy_never_sees_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = b""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen += await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    async def story() -> Attempt:
        async with raw_server(handle) as url:
            monkeypatch.setenv("HTTPS_PROXY", url)
            async with client("https://upstream.invalid", key=KEY) as endpoint:
                return await endpoint.send(request())

    attempt = asyncio.run(story())
    assert seen.startswith(b"CONNECT upstream.invalid:443 HTTP/1.1\r\n")
    assert KEY.encode() not in seen
    assert attempt.failure == "proxy"
    assert not attempt.sent
    assert meaning(attempt)[0] == "fatal"


def through(url: str = "http://upstream.invalid") -> Attempt:
    """One request to a host that only a proxy could reach."""

    async def story() -> Attempt:
        async with client(url, key=KEY) as endpoint:
            return await endpoint.send(request())

    return asyncio.run(story())


@pytest.mark.parametrize("origin", ["http://upstream.invalid", "https://upstream.invalid"])
def test_a_dead_proxy_is_an_outage(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    decision = classify(through(origin), request())
    assert (decision.kind, decision.unreachable) == ("transient", True)
    assert decision.reason == "cannot reach the proxy: Connection refused"


@pytest.mark.parametrize(
    ("status", "kind"), [("407 Who Asks", "fatal"), ("502 Bad Gateway", "transient")]
)
def test_only_a_proxy_that_asks_for_a_password_is_final(
    monkeypatch: pytest.MonkeyPatch, status: str, kind: str
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    async def story() -> Attempt:
        async with raw_server(handle) as url:
            monkeypatch.setenv("HTTPS_PROXY", url)
            async with client("https://upstream.invalid", key=KEY) as endpoint:
                return await endpoint.send(request())

    decision = classify(asyncio.run(story()), request())
    assert (decision.kind, decision.in_doubt) == (kind, False)
    assert f"the proxy answered {status}" in decision.reason


# What comes back


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "raw deflate", "identity"])
def test_a_compressed_reply_is_read(encoding: str) -> None:
    packer = zlib.compressobj(wbits=-15)
    packed = {
        "deflate": zlib.compress(ANSWER),
        "raw deflate": packer.compress(ANSWER) + packer.flush(),
        "identity": ANSWER,
    }.get(encoding, gzip.compress(ANSWER))
    headers = {**JSON, "Content-Encoding": encoding.removeprefix("raw ")}
    attempt, _ = ask(respond=replies(MockReply(body=packed, headers=headers)))
    assert attempt.body == ANSWER
    assert meaning(attempt)[0] == "ok"


@pytest.mark.parametrize(
    ("encoding", "body", "failure"),
    [
        ("gzip", b"not gzip at all", "bad_encoding"),
        ("br", b"\x8b", "bad_encoding"),
        ("gzip", gzip.compress(ANSWER, mtime=0)[:-12], "cut"),
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_a_reply_that_does_not_decompress_is_no_answer(
    encoding: str, body: bytes, failure: str, kind: str
) -> None:
    headers = {"Content-Type": kind, "Content-Encoding": encoding}
    attempt, _ = ask(respond=replies(MockReply(body=body, headers=headers)))
    assert attempt.failure == failure
    assert meaning(attempt)[2]


def test_a_compressed_stream_is_read() -> None:
    event = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
    packed = gzip.compress(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())
    reply = MockReply(
        parts=[packed[:20], packed[20:]],
        framing="chunked",
        headers={"Content-Type": "text/event-stream", "Content-Encoding": "gzip"},
    )
    attempt, _ = ask(respond=replies(reply))
    assert meaning(attempt)[0] == "ok"
    assert json.loads(attempt.body)["choices"][0]["message"]["content"] == "hi"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_a_compressed_reply_of_any_length_is_read_whole(kind: str) -> None:
    # Long runs make zlib keep output back when its input is used up.
    lengths = [*range(STEP_BYTES - 300, STEP_BYTES + 300, 60), 3_000_000]

    async def story() -> None:
        def respond(request: MockRequest) -> MockReply:
            text = "x" * int(request.prompt or 0)
            choice = {"index": 0, part: {"content": text}, "finish_reason": "stop"}
            told = json.dumps({"choices": [choice]}).encode()
            body = gzip.compress(b"data: %b\n\n" % told if part == "delta" else told)
            headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
            return MockReply(body=body, headers=headers)

        part = "delta" if kind == "text/event-stream" else "message"
        async with mock_server(respond=respond) as server, client(server.url) as endpoint:
            for length in lengths:
                attempt = await endpoint.send(request(str(length)))
                assert meaning(attempt)[0] == "ok"
                message = json.loads(attempt.body)["choices"][0]["message"]
                assert message["content"] == "x" * length

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_a_gzip_bomb_stops_at_the_bound(kind: str) -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(b" " * 2**20) for _ in range(64)) + packer.flush()
    headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
    attempt, _ = ask(respond=replies(MockReply(body=bomb, headers=headers)))
    assert attempt.failure == "too_large"
    assert attempt.body == b""


@pytest.mark.parametrize(
    ("kind", "failure", "means"),
    [
        ("endless", "too_large", ("invalid_response", "too_large", True)),
        ("huge_header", "bad_header", ("invalid_response", "bad_header", True)),
        ("bad_head", "bad_header", ("invalid_response", "bad_header", True)),
        ("disconnect", "disconnected", ("transient", "disconnected", True)),
        ("reset", "disconnected", ("transient", "disconnected", True)),
        ("cut", "cut", ("transient", "cut", True)),
        ("cut-chunk", "cut", ("transient", "cut", True)),
        ("cut-silent", None, ("invalid_response", "bad_json", True)),
        ("truncated_json", None, ("invalid_response", "bad_json", True)),
        ("garbage", None, ("invalid_response", "bad_json", True)),
        ("html", None, ("invalid_response", "bad_json", True)),
        ("empty", None, ("invalid_response", "empty_body", True)),
        ("deep_json", None, ("invalid_response", "bad_json", True)),
        ("500-html", None, ("transient", "500", False)),
        ("blank_lines", None, ("ok", "", False)),
        ("invalid_utf8", "not_utf8", ("invalid_response", "not_utf8", True)),
    ],
)
def test_what_the_network_does_becomes_an_attempt(
    kind: str, failure: str | None, means: tuple[str, str, bool]
) -> None:
    attempt = fault(kind)
    assert attempt.failure == failure
    assert meaning(attempt) == means


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"HELLO\r\n\r\n", "cannot be read as HTTP: bad status line"),
        (HEAD + b"no colon\r\n\r\n", "cannot be read as HTTP: invalid header token"),
        (HEAD + b"X-A: " + b"a" * 70_000 + b"\r\n\r\n", "a line in its head of more than 65,536"),
    ],
)
def test_an_unreadable_reply_says_what_is_wrong_and_quotes_nothing(raw: bytes, words: str) -> None:
    attempt, _ = ask(respond=replies(MockReply(raw=raw)))
    assert attempt.failure == "bad_header"
    assert words in attempt.detail
    assert len(attempt.detail) < 100


@pytest.mark.parametrize("stream", [False, True])
def test_the_reason_says_that_a_reply_is_not_utf_8(stream: bool) -> None:
    decision = classify(fault("invalid_utf8", stream=stream), request())
    assert decision.reason == "answered 200 with text that is not UTF-8"


def test_bytes_beside_the_text_count_as_well() -> None:
    # The decoder skips over members that nobody asks for.
    spoilt = ANSWER.replace(b'"id":"1"', b'"id":"\xe9"')
    attempt, _ = ask(respond=replies(MockReply(body=spoilt, headers=JSON)))
    assert meaning(attempt) == ("invalid_response", "not_utf8", True)


@pytest.mark.parametrize("text", ["\ufffd", "Größe 💡", "\\ud800"])
def test_what_utf_8_and_json_can_say_is_an_answer(text: str) -> None:
    body = ANSWER.replace(b"hi", text.encode())
    attempt, _ = ask(respond=replies(MockReply(body=body, headers=JSON)))
    assert meaning(attempt)[0] == "ok"
    assert attempt.body == body


def test_an_error_page_in_another_encoding_is_still_that_error() -> None:
    page = MockReply(status=503, body="<h1>Ausfall für heute</h1>".encode("latin-1"))
    attempt, _ = ask(respond=replies(page))
    assert meaning(attempt)[:2] == ("transient", "503")


def test_a_reply_that_drips_ends_with_the_attempts_time() -> None:
    respond = faulty(dripped(0.02))
    attempt, _ = ask(respond=respond, timeout_s=0.2, connect_timeout_s=0.2)
    assert attempt.failure == "timeout"
    assert attempt.sent


def test_an_endpoint_that_says_nothing_ends_with_the_attempts_time() -> None:
    attempt = fault("hang", timeout_s=0.1, connect_timeout_s=0.1)
    assert meaning(attempt) == ("timeout", "timeout", True)


def test_a_refused_connection_sent_nothing() -> None:
    async def story() -> Attempt:
        async with client("http://127.0.0.1:9") as endpoint:
            return await endpoint.send(request())

    attempt = asyncio.run(story())
    assert attempt.failure == "connect"
    assert not attempt.sent


def test_a_port_that_does_not_speak_tls_is_a_configuration_error() -> None:
    async def story() -> Attempt:
        async with (
            mock_server() as server,
            client(server.url.replace("http:", "https:"), key=KEY) as endpoint,
        ):
            return await endpoint.send(request())

    attempt = asyncio.run(story())
    assert attempt.failure == "tls"
    assert not attempt.sent
    assert meaning(attempt)[:2] == ("fatal", "tls")


def test_a_redirect_is_an_answer_and_not_followed() -> None:
    attempt = fault("redirect")
    assert attempt.status == 307
    assert meaning(attempt)[:2] == ("fatal", "redirect")


def test_no_failure_shows_a_secret() -> None:
    attempt = fault("401", key=KEY, headers={"X-Secret": "another-secret"})
    assert KEY not in classify(attempt, request()).reason
    assert KEY.encode() not in attempt.body
    for kind in ("huge_header", "disconnect", "cut", "bad_head"):
        shown = repr(fault(kind, key=KEY, headers={"X-Secret": "another-secret"}))
        assert KEY not in shown
        assert "another-secret" not in shown


def test_an_answer_is_never_changed_by_what_our_headers_hold() -> None:
    attempt, _ = ask(
        respond=replies(MockReply(body=ANSWER, headers=JSON)),
        key="index",
        headers={"X-Debug": "1", "X-Model": "choices"},
    )
    assert attempt.body == ANSWER


# Streams


@pytest.mark.parametrize(
    "place", ["auto", "final_choice", "extra_chunk", "every_chunk", "x_groq", "none"]
)
def test_usage_is_found_wherever_a_stream_says_it(place: StreamUsage) -> None:
    knobs = Knobs(stream_usage=place, stream_comments=True, stream_split_bytes=7)
    attempt, server = ask(knobs, asked=request("Größe 💡", stream=True))
    assert attempt.reply is not None
    told = server.ledger.billed if place != "none" else Usage()
    assert attempt.reply.usage == told
    content = json.loads(attempt.body)["choices"][0]["message"]["content"]
    assert content == "[synthetic] Größe 💡"
    assert attempt.ttft_s is not None
    assert attempt.ttft_s <= attempt.ended_s - attempt.started_s


def test_usage_that_comes_after_the_finish_is_waited_for() -> None:
    knobs = Knobs(stream_usage="extra_chunk", stream_pause_s=0.02)
    attempt, server = ask(knobs, asked=request("Why?", stream=True))
    assert attempt.reply is not None
    assert attempt.reply.usage == server.ledger.billed


def test_a_reply_is_read_by_its_content_type_whatever_was_asked() -> None:
    plain = replies(MockReply(body=ANSWER, headers=JSON))
    assert ask(respond=plain, asked=request(stream=True))[0].body == ANSWER
    event = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n'
    streamed = MockReply(body=event, headers={"Content-Type": "text/event-stream; charset=utf-8"})
    assert meaning(ask(respond=replies(streamed))[0])[0] == "ok"


@pytest.mark.parametrize(
    ("kind", "means"),
    [
        ("stream-error", ("transient", "500", True)),
        ("stream-cut", ("transient", "cut", True)),
        ("stream-no-finish", ("transient", "cut", True)),
        ("stream-eof", ("transient", "cut", True)),
        ("invalid_utf8", ("invalid_response", "not_utf8", True)),
    ],
)
def test_a_stream_that_does_not_finish_is_no_answer(
    kind: str, means: tuple[str, str, bool]
) -> None:
    assert meaning(fault(kind, stream=True)) == means


def test_a_connection_lives_on_after_a_stream() -> None:
    connections = 0
    event = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n'
    body = event + b"data: [DONE]\n\n"
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    reply += b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(body), body)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await read_request(reader)
            writer.write(reply)
            # The end of the body comes in a packet of its own.
            await asyncio.sleep(0.01)
            writer.write(b"0\r\n\r\n")

    async def story() -> None:
        async with raw_server(handle) as url, client(url) as endpoint:
            for _ in range(10):
                assert meaning(await endpoint.send(request(stream=True)))[0] == "ok"

    asyncio.run(story())
    assert connections == 1


def test_a_silent_stream_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_room, "STREAM_SILENCE_S", 0.1)
    reply = MockReply(
        parts=[b": hello\n\n", b": hello again\n\n"],
        pause_s=5.0,
        framing="chunked",
        headers={"Content-Type": "text/event-stream"},
    )
    attempt, _ = ask(respond=replies(reply))
    assert attempt.failure == "timeout"


# Memory


def large(kind: str, size_bytes: int) -> MockReply:
    """An honest answer of about that size."""
    part = "delta" if kind == "text/event-stream" else "message"
    choice = {"index": 0, part: {"content": "x" * size_bytes}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice]}).encode()
    body = b"data: %b\n\n" % body if part == "delta" else body
    return MockReply(body=body, headers={"Content-Type": kind})


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_large_answers_wait_for_one_another_and_none_fails(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_room, "SHARED_BYTES", 300_000)

    async def story() -> list[Attempt]:
        respond = replies(large(kind, 1_000_000))
        async with mock_server(respond=respond) as server, client(server.url) as endpoint:
            return await asyncio.gather(*(endpoint.send(request(str(n))) for n in range(40)))

    for attempt in asyncio.run(story()):
        assert meaning(attempt)[0] == "ok"
        assert len(attempt.body) > 1_000_000


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_who_waits_for_memory_waits_no_longer_than_its_attempt(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_room, "SHARED_BYTES", 0)

    def respond(asked: MockRequest) -> MockReply:
        if asked.prompt == "usual":
            return completion(asked)
        if asked.prompt == "large":
            return large(kind, 1_000_000)
        # Large, and never whole.
        parts = [large(kind, 1_000_000).body[:-200], b" "]
        return MockReply(parts=parts, framing="chunked", pause_s=60.0, headers=JSON)

    async def story() -> list[Attempt]:
        async with (
            mock_server(respond=respond) as server,
            client(server.url, timeout_s=60.0) as slow,
            client(server.url, timeout_s=0.2, connect_timeout_s=0.2) as endpoint,
        ):
            endpoint._space = slow._space
            holding = asyncio.create_task(slow.send(request("held")))
            while slow._space.largest is None:
                await asyncio.sleep(0)
            ended = [await endpoint.send(request(p)) for p in ("large", "usual")]
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)
            # Whoever is cancelled gives back what it held.
            return [*ended, await slow.send(request("large"))]

    waited, usual, after = asyncio.run(story())
    assert meaning(waited) == ("timeout", "timeout", True)
    assert meaning(usual)[0] == "ok"
    assert meaning(after)[0] == "ok"


# Models


def models(knobs: Knobs, path: str = "", key: str | None = None) -> list[str]:
    async def story() -> list[str]:
        async with mock_server(knobs) as server, client(server.url + path, key=key) as endpoint:
            return await endpoint.models()

    return asyncio.run(story())


def test_models_are_listed_as_the_endpoint_does() -> None:
    assert models(Knobs(models=("b", "a"), key=KEY), key=KEY) == ["b", "a"]
    assert models(Knobs(models=("b",)), "/v1/chat/completions") == ["b"]


def test_an_endpoint_that_lists_no_models_is_refused_clearly() -> None:
    with pytest.raises(EndpointRefused, match="404"):
        models(Knobs(), "/elsewhere")
    with pytest.raises(EndpointRefused) as caught:
        models(Knobs(key="right"), key=KEY)
    assert KEY not in str(caught.value)


def test_an_endpoint_that_is_not_there_can_be_asked_later() -> None:
    async def story() -> None:
        async with client("http://127.0.0.1:9") as endpoint:
            await endpoint.models()

    with pytest.raises(BatchrunError) as caught:
        asyncio.run(story())
    assert isinstance(caught.value, StoppedEarly)


# Leaving together


class Wire(asyncio.Transport):
    """A transport that remembers what was written."""

    def __init__(self, log: list[bytes]) -> None:
        super().__init__()
        self._log = log
        self._is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self._is_closed
        self._log.append(bytes(data))

    def is_closing(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        self._is_closed = True


@pytest.mark.asyncio
async def test_requests_of_one_turn_leave_together_in_order_and_not_to_who_is_gone() -> None:
    written: list[bytes] = []
    gone, there = Wire(written), Wire(written)
    lost = Trip()
    departures = _Departures()
    departures.add(gone, b"lost", lost)
    departures.add(there, b"first", Trip())
    departures.add(there, b"second", Trip())
    assert written == [], "not before the turn ends"
    gone.close()
    await asyncio.sleep(0)
    assert written == [b"first", b"second"]
    assert not lost.left


@pytest.mark.asyncio
async def test_no_more_than_so_many_requests_wait_for_the_end_of_a_turn() -> None:
    written: list[bytes] = []
    departures = _Departures()
    for number in range(MOST_TOGETHER + 1):
        departures.add(Wire(written), b"%d" % number, Trip())
    assert len(written) == MOST_TOGETHER
    await asyncio.sleep(0)
    assert len(written) == MOST_TOGETHER + 1
