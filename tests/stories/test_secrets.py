"""No secret leaks: a key that every reply quotes back is found nowhere afterwards."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow.parquet as pq
import pytest
from crash_harness import ROOT, write_rows
from mock_faults import FAULTS, dripped, faulty, redirected
from mock_servers import MockServerThread

from batchrun.cli.main import run_command
from batchrun.journal.journal import Journal
from batchrun.journal.state import StateDir
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest, Respond, completion, error_reply

KEY = "sk-canary-0123456789-KEY"
EXTRA = "hdr-canary-9876543210-EXTRA"
SSE = {"Content-Type": "text/event-stream"}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CANARY", KEY)
    (tmp_path / "headers.txt").write_text(f"X-Extra: {EXTRA}\n")
    place = tmp_path / "run"
    place.mkdir()
    monkeypatch.chdir(place)
    write_rows(Path("in.jsonl"), range(3))


def secrets_in(text: str | bytes) -> list[str]:
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    return [secret for secret in (KEY, EXTRA) if secret in text or secret[4:-4] in text]


def everything_written() -> Iterator[tuple[str, str | bytes]]:
    """Every file of the run as it is, and what compression hides in it."""
    for path in Path().rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                yield f"{path} decoded", json.dumps(table.to_pylist(), default=str)
                yield f"{path} footer", str(table.schema.metadata)


def quoting(status: int) -> Respond:
    return lambda request: error_reply(
        status, f"Incorrect key {KEY} with {EXTRA}", code=KEY, type=EXTRA, param=KEY
    )


def with_headers(request: MockRequest) -> MockReply:
    headers = {"Content-Type": "application/json", "X-Request-Id": KEY, "Retry-After": KEY}
    return MockReply(status=400, headers={**headers, "Server": EXTRA}, body=b'{"error": "no"}')


def answered_with_headers(request: MockRequest) -> MockReply:
    """An answer stays as it came; what the endpoint says around it is another matter."""
    reply = completion(request)
    return MockReply(body=reply.body, headers={**reply.headers, "x-request-id": KEY})


def redirecting(request: MockRequest) -> MockReply:
    return MockReply(status=307, headers={"Location": f"http://127.0.0.1:9/login?key={KEY}"})


def streamed(request: MockRequest) -> MockReply:
    """The key in pieces, as tokens come, and no end."""
    pieces = [KEY[at : at + 3] for at in range(0, len(KEY), 3)]
    events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return MockReply(body=body, headers=SSE)


def streamed_error(request: MockRequest) -> MockReply:
    told = json.dumps({"error": {"message": f"bad key {KEY}", "code": EXTRA}}).encode()
    return MockReply(body=b"data: " + told + b"\n\n", headers=SSE)


def scripted(head: str) -> Respond:
    return lambda request: MockReply(raw=head.encode(), ending="close")


SPOILT = {**FAULTS, "drip": dripped(0.1)}
REPLIES: dict[str, Respond] = {
    **{f"quoted {status}": quoting(status) for status in (200, 400, 401, 403, 404, 429, 500, 503)},
    "headers": with_headers,
    "an answer": answered_with_headers,
    "redirect": redirecting,
    "pieces of a stream": streamed,
    "an error in a stream": streamed_error,
    "html": lambda request: MockReply(status=502, body=f"<h1>{KEY} {EXTRA}</h1>".encode()),
    "no JSON": lambda request: MockReply(body=f"{KEY} {EXTRA}".encode()),
    "a bad head": scripted(f"HTP {KEY}\r\n\r\n"),
    "a bad header": scripted(f"HTTP/1.1 200 OK\r\n{KEY}\r\n{EXTRA}\r\n\r\n"),
    "a status line": scripted(f"HTTP/1.1 499 {KEY}\r\nContent-Length: 0\r\n\r\n"),
    "an encoding": lambda request: MockReply(headers={"Content-Encoding": KEY}, body=b"x"),
    **{kind: faulty(SPOILT[kind]) for kind in FAULTS if kind not in ("endless", "gzip_bomb")},
}


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.slow
def test_a_key_that_the_endpoint_quotes_is_found_nowhere(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The verbose, logged, summarised run, and what it leaves in the journal and the output."""
    with MockServerThread(respond=REPLIES[name]) as server:
        code = run_command(
            [
                *("submit", "in.jsonl", "--base-url", server.url, "-m", "m", "-v", "--json"),
                *("--api-key-env", "CANARY", "-H", "@../headers.txt", "-c", "1"),
                *("--timeout", "0.2", "--connect-timeout", "0.2", "--max-retries", "0"),
                *("--max-wait", "0.5", "--max-outage", "0.5", "--log-file", "log.txt"),
            ]
        )
        said = capfd.readouterr()
        assert code in (0, 3, 4, 75), said.err
        assert not secrets_in(said.out)
        assert not secrets_in(said.err)
        for what, text in everything_written():
            assert not secrets_in(text), what
        entries = server.ledger.entries
    # It was really sent, so that there was something to quote.
    assert entries[0].headers["Authorization"] == f"Bearer {KEY}"
    assert entries[0].headers["X-Extra"] == EXTRA


# A credential as keys are made today, and what an endpoint may make of it.
TRICKY = "sk/canary+0123456789/tricky+KEY=="
PASSWORD = "canary pässword/42+"
BASIC = base64.b64encode(f"someone:{PASSWORD}".encode()).decode()

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "slashes escaped": lambda text: text.replace("/", "\\/"),
    "plus escaped": lambda text: text.replace("+", "\\u002B").replace("/", "\\u002f"),
    "all escaped": lambda text: "".join(f"\\u{ord(char):04X}" for char in text),
    "for a URL": lambda text: quote(text, safe=""),
    "JSON in JSON": lambda text: json.dumps(json.dumps(text).replace("/", "\\/"))[1:-1],
    "for HTML": lambda text: "".join(f"&#x{ord(char):x};" for char in text),
}
CREDENTIALS = {
    "a key": (("--api-key-env", "TRICKY"), TRICKY),
    "a bearer": (("-H", f"Authorization: Bearer {TRICKY}"), TRICKY),
    "a header": (("-H", f"X-Goog-Api-Key: {TRICKY}"), TRICKY),
    "base64": (("-H", f"Authorization: Basic {BASIC}"), BASIC),
    "a password": (("-H", f"Authorization: Basic {BASIC}"), PASSWORD),
    "an encoded token": (("-H", f"X-Token: {quote(TRICKY, safe='')}"), TRICKY),
    "a query": (("--base-url", f"?api-key={quote(TRICKY, safe='')}"), TRICKY),
}


def read_back(text: str) -> str:
    """``text`` as somebody reads it who undoes every escape."""
    for _ in range(3):
        text = re.sub(r"\\+u([0-9A-Fa-f]{4})", lambda code: chr(int(code[1], 16)), text)
        text = re.sub(r"&#x([0-9A-Fa-f]+);", lambda code: chr(int(code[1], 16)), text)
        text = unquote(re.sub(r"\\+/", "/", text))
    return text


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_a_credential_is_known_in_every_spelling_and_by_its_parts(
    credential: str,
    spelling: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRICKY", TRICKY)
    (flag, value), quoted = CREDENTIALS[credential]
    # Filler puts it where messages are cut: half of it must not stay.
    told = SPELLINGS[spelling](quoted)
    bodies = [
        f'{{"error": {{"message": "{"wrong " * times}{told}", "code": "{told}"}}}}'.encode()
        for times in (1, 48, 331)
    ]

    def respond(request: MockRequest) -> MockReply:
        return MockReply(status=400, body=bodies[request.n % 3])

    with MockServerThread(respond=respond) as server:
        in_query = value if flag == "--base-url" else ""
        code = run_command(
            [
                *("submit", "in.jsonl", "-m", "m", "-v", "--json", "-c", "1", "--abort-after", "0"),
                *("--base-url", f"{server.url}/v1{in_query}", "--log-file", "log.txt"),
                *(() if in_query else (flag, value)),
            ]
        )
    said = capfd.readouterr()
    assert code == 3, said.err
    for what, text in (("stdout", said.out), ("stderr", said.err), *everything_written()):
        plain = read_back(text if isinstance(text, str) else text.decode("utf-8", "replace"))
        assert quoted not in plain, what
        assert quoted[4:-4] not in plain, what


def test_words_that_only_contain_a_short_key_stay(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CANARY", "none")
    said = "nonetheless none of them is allowed"
    with MockServerThread(respond=lambda request: error_reply(400, said)) as server:
        run_command(
            [
                *("submit", "in.jsonl", "-m", "m", "--base-url", server.url),
                *("--api-key-env", "CANARY", "--abort-after", "0"),
            ]
        )
    capfd.readouterr()
    table = pq.read_table("in.results.parquet")
    assert table["error_message"][0].as_py() == "nonetheless [key] of them is allowed"


def test_the_journal_of_a_killed_run_holds_no_key() -> None:
    def respond(request: MockRequest) -> MockReply | None:
        if request.n <= 2:
            return answered_with_headers(request)
        process.kill()
        return MockReply(raw=b"", ending="hang")

    with MockServerThread(respond=respond) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "batchrun", "submit", "in.jsonl", "-c", "1", "-m", "m"),
                *("--base-url", server.url, "--api-key-env", "CANARY"),
                *("-H", "@../headers.txt", "-v", "--log-file", "log.txt"),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=60)
    assert process.returncode == -9, err
    book = Journal.peek(StateDir(Path("in.results.parquet.batchrun")))
    assert book is not None
    assert book.answers == 2
    book.close()
    assert not secrets_in(out + err)
    for what, text in everything_written():
        assert not secrets_in(text), what


def running(*python: str, url: str) -> subprocess.Popen[bytes]:
    """``python ARGS submit …`` with the canaries, as talkative as can be."""
    return subprocess.Popen(
        [
            *(sys.executable, *python, "submit", "in.jsonl", "-c", "1", "-m", "m"),
            *("--base-url", url, "--api-key-env", "CANARY", "-H", "@../headers.txt"),
            *("-v", "--json", "--log-file", "log.txt"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A core file is the memory itself; whether there is one is the administrator's choice.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )


def test_the_dump_of_a_process_that_dies_holds_no_key() -> None:
    def respond(request: MockRequest) -> MockReply:
        process.send_signal(signal.SIGABRT)
        return MockReply(raw=b"", ending="hang")

    with MockServerThread(respond=respond) as server:
        process = running("-X", "faulthandler", "-m", "batchrun", url=server.url)
        out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert b"Fatal Python error: Aborted" in err
    assert b"batchrun/cli/main.py" in err
    assert not secrets_in(out + err)
    for what, text in everything_written():
        assert not secrets_in(text), what


# Bugs that know the key: where a reply is read, and where the run is put together.
BUGS = {
    "a request": "client.ChatEndpoint._parsed = broken",
    "a callback": "Limits.stop = broken",
    "the run": "submit._go_on = broken",
    "the end": "console.final_block = broken",
}


@pytest.mark.parametrize("where", BUGS)
def test_the_traceback_of_a_bug_holds_no_key(where: str) -> None:
    program = f"""
from batchrun import console
from batchrun.cli import main
from batchrun.endpoint import client
from batchrun.limits import Limits
from batchrun.runs import submit
def broken(*args, **more):
    key = {KEY!r}
    raise RuntimeError(f"{{key}} and {{{EXTRA!r}}}")
{BUGS[where]}
main()
"""
    with MockServerThread(Knobs(latency_s=0.3)) as server:
        process = running("-c", program, url=server.url)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert b"this is a bug in batchrun" in err
    assert b"RuntimeError: [key] and [key]" in err
    assert json.loads(out)["exit_code"] == 1
    assert not secrets_in(out + err)
    for what, text in everything_written():
        assert not secrets_in(text), what


def test_another_origin_receives_no_byte() -> None:
    """Not the key, not the prompt: not even a connection."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)
        target = f"http://127.0.0.1:{other.getsockname()[1]}/v1/chat/completions"
        with MockServerThread(respond=faulty(redirected(target))) as server:
            command = ["submit", "in.jsonl", "--base-url", server.url, "-m", "m"]
            assert run_command([*command, "--api-key-env", "CANARY"]) == 4
        with pytest.raises(BlockingIOError):
            other.accept()


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and by it good.pem, expired.pem and elsewhere.pem; by itself self.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    place = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=place, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-addext", "keyUsage=critical,keyCertSign", "-subj", "/CN=ca")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", *authority)
    openssl("req", "-new", *new_key, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=leaf")
    for name, address, days in (
        ("good", "127.0.0.1", "2"),
        ("expired", "127.0.0.1", "-1"),
        ("elsewhere", "127.0.0.2", "2"),
    ):
        (place / "san").write_text(f"subjectAltName=IP:{address}\n")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san")
        openssl("x509", "-req", "-in", "leaf.csr", "-days", days, "-out", f"{name}.pem", *signed)
    (place / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    own = ("-signkey", "leaf.key", "-extfile", "san", "-days", "2")
    openssl("x509", "-req", "-in", "leaf.csr", "-out", "self.pem", *own)
    return place


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("good", 0, ""),
        ("expired", 4, "expired"),
        ("self", 4, "self-signed|self signed"),
        ("elsewhere", 4, "127.0.0.1"),
    ],
)
def test_a_certificate_that_is_not_trusted_ends_the_run_after_one_attempt(
    name: str, code: int, said: str, certificates: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / "leaf.key")
    with MockServerThread(tls=context) as server:
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "batchrun", "submit", "in.jsonl", "-c", "1", "--json"),
                *("--base-url", server.url, "-m", "m", "--api-key-env", "CANARY"),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SSL_CERT_FILE": str(certificates / "ca.pem"),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        entries = server.ledger.entries
    assert ended.returncode == code, ended.stderr
    summary = json.loads(ended.stdout)
    if code == 0:
        assert len(entries) == 3
        return
    assert not entries, "a request was sent to whoever it was"
    assert summary["this_run"]["attempts"] == 1
    assert summary["this_run"]["in_doubt"] == 0
    assert summary["rows"]["pending"] == 3
    assert any(part in summary["reason"] for part in said.split("|")), summary["reason"]
    assert not secrets_in(ended.stdout + ended.stderr)
