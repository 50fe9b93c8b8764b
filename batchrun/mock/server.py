"""The stand-in endpoint: an OpenAI-compatible server for dry runs, users' CI and our own tests.

Answers are a pure function of the request and plainly marked ``[synthetic]``. ``Knobs`` makes the
server slow, limited or hostile; which request meets which fault depends on nothing but the seed,
the body and how often that body came before, so a run can be repeated. ``respond`` lets a test
script any single reply, down to its bytes.

The **ledger** is the other side's word on what a client claims. For every request it says what was
billed and whether the whole answer was *delivered*: every byte written, and read by the client. A
write that succeeded does not prove it, so a delivery stays open to doubt until the same connection
carries another request or ends: a reset means that something was left unread and takes it back.
(Only where the server closes first, by a fault or because it was asked to, is writing all there is
to go by.) Therefore, once client and server are quiet, the usage a client recorded must equal
``ledger.delivered``, and each further answer in ``ledger.billed`` must be an attempt the client
counts as in doubt.

Replies are written to the transport as bytes made here, not as ``web.Response``: a hostile reply
(a wrong Content-Length, a cut chunk, a reset) cannot be said in aiohttp's terms, one path for all
replies is simpler than two, and it is the cheapest one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec
from aiohttp import web
from msgspec.structs import replace

from batchrun.errors import LocalIOError
from batchrun.mock.faults import FAULTS, Fault, chance, check_kinds, fault_of
from batchrun.mock.knobs import Knobs
from batchrun.mock.ledger import Entry, Ledger
from batchrun.mock.quota import Quota
from batchrun.mock.replies import (
    CREATED,
    DEFAULT_MODELS,
    JSON_HEADERS,
    Chat,
    MockReply,
    MockRequest,
    Respond,
    completion,
    error_reply,
    in_seconds,
    rate_limited,
    wrong_key,
)
from batchrun.mock.wire import CLOSE, KEEP, Connections, Wire

_CHAT_PATHS = frozenset({"/v1/chat/completions", "/chat/completions"})
_MODELS_PATHS = frozenset({"/v1/models", "/models"})


class MockServer:
    """The server, inside the running loop: ``async with MockServer(knobs) as server``.

    ``url`` is the bare ``http://127.0.0.1:PORT``; the API is there with and without ``/v1``.
    ``respond`` sees every request first and may return any reply; None leaves it to the knobs,
    whose ``faults`` name those of the table given here: UsageError for another.
    """

    def __init__(
        self,
        knobs: Knobs | None = None,
        *,
        respond: Respond | None = None,
        faults: Mapping[str, Fault] = FAULTS,
        keep_entries: bool = False,
        ledger_file: BinaryIO | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.knobs = knobs or Knobs()
        check_kinds(self.knobs, faults)
        self.ledger = Ledger(keep=keep_entries, file=ledger_file)
        self.url = ""
        self._respond = respond
        self._faults = faults
        self._host, self._port, self._tls = host, port, tls
        self._clock = clock
        # Counting costs memory per body, so only where something depends on it.
        self._counts_sendings = bool(
            respond or keep_entries or ledger_file or self.knobs.faults or self.knobs.script
        )
        self._keeps_entries = keep_entries
        self._sendings: Counter[bytes] = Counter()
        self._quotas: dict[str, Quota] = {}
        slots = self.knobs.slots
        self._slots = asyncio.Semaphore(slots) if slots else contextlib.nullcontext()

    async def __aenter__(self) -> Self:
        self._connections = Connections(self._handle, self.ledger)
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(
                self._connections, self._host, self._port, ssl=self._tls, backlog=4096
            )
        except OSError as exc:
            where = f"{self._host}:{self._port}"
            raise LocalIOError(f"cannot listen on {where}: {exc.strerror or exc}") from exc
        port = self._listener.sockets[0].getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{'https' if self._tls else 'http'}://{host}:{port}"
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.close()
        await self._connections.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        self._connections.request_read(connection)
        wire = Wire(request)
        if "Expect" in request.headers:
            await wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        asked = self._asked(request, await request.read())
        entry = self._enter(asked)
        delivered = goes_on = False
        try:
            async with self._slots:
                reply = self._reply(asked)
                delivered = await self._answer(wire, asked, entry, reply)
            goes_on = request.keep_alive and _goes_on(reply)
        finally:
            self.ledger.end(entry, delivered=delivered)
            self._connections.answered(connection, entry)
        return KEEP if goes_on else CLOSE

    def _asked(self, request: web.BaseRequest, body: bytes) -> MockRequest:
        digest = hashlib.blake2b(body, digest_size=8).digest()
        seen = 1
        if self._counts_sendings:
            seen = self._sendings[digest] = self._sendings[digest] + 1
        chat, problem = None, ""
        if request.method == "POST":
            chat, problem = _parse(body)
        return MockRequest(
            n=self.ledger.requests + 1,
            seen=seen,
            method=request.method,
            path=request.path_qs,
            headers=request.headers,
            body=body,
            digest=digest,
            chat=chat,
            problem=problem,
        )

    def _enter(self, asked: MockRequest) -> Entry:
        chat = asked.chat
        entry = Entry(
            n=asked.n,
            seen=asked.seen,
            path=asked.path,
            model=chat.model if chat else "",
            digest=asked.digest.hex(),
            streamed=bool(chat and chat.stream),
            started_s=time.monotonic(),
        )
        if self._keeps_entries:
            entry.prompt, entry.headers, entry.body = asked.prompt, asked.headers, asked.body
        self.ledger.begin(entry)
        return entry

    async def _answer(self, wire: Wire, asked: MockRequest, entry: Entry, reply: MockReply) -> bool:
        """Bill, wait and write; True when a whole answer was written."""
        entry.fault = reply.fault
        # Billed before it is sent, like the real thing: a client that leaves pays all the same.
        if reply.billed is not None:
            self.ledger.bill(entry, reply.billed)
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
        entry.status = None if reply.raw is not None else reply.status
        try:
            await wire.send(reply, f"mock-{asked.n}")
        except ConnectionError:
            return False
        if reply.ending == "hang":
            await asyncio.Event().wait()
        wire.end(reply.ending)
        return reply.whole

    def _reply(self, asked: MockRequest) -> MockReply:
        if self._respond is not None and (scripted := self._respond(asked)) is not None:
            return scripted
        path = asked.path.partition("?")[0]
        if self.knobs.key is not None and not self._has_key(asked):
            return wrong_key(asked)
        if path in _MODELS_PATHS and asked.method == "GET":
            return MockReply(body=self._model_list(), headers=JSON_HEADERS)
        if path not in _CHAT_PATHS | _MODELS_PATHS:
            return error_reply(404, f"no such path: {path}", code="not_found")
        if path in _MODELS_PATHS or asked.method != "POST":
            return error_reply(405, f"{asked.method} is not allowed here")
        if asked.chat is None:
            return error_reply(400, asked.problem, code="invalid_request")
        if self.knobs.models and asked.chat.model not in self.knobs.models:
            return self._no_such_model(asked.chat.model)
        return self._metered(asked, asked.chat)

    def _has_key(self, asked: MockRequest) -> bool:
        return asked.headers.get("Authorization") == f"Bearer {self.knobs.key}"

    def _model_list(self) -> bytes:
        names = self.knobs.models or DEFAULT_MODELS
        data = [
            {"id": n, "object": "model", "created": CREATED, "owned_by": "batchrun"} for n in names
        ]
        return msgspec.json.encode({"object": "list", "data": data})

    def _no_such_model(self, model: str) -> MockReply:
        return error_reply(
            404, f"The model {model!r} does not exist", code="model_not_found", param="model"
        )

    def _metered(self, asked: MockRequest, chat: Chat) -> MockReply:
        answer = completion(asked, knobs=self.knobs)
        knobs = self.knobs
        if not (knobs.rpm or knobs.tpm):
            return self._faulty(asked, answer)
        now = self._clock()
        quota = self._quotas.get(chat.model)
        if quota is None:
            quota = self._quotas[chat.model] = Quota(knobs, now)
        tokens = (answer.billed.total_tokens or 0) if answer.billed else 0
        wait_s = quota.take(tokens, now) if quota.fits(tokens) else None
        if wait_s == 0.0:
            reply = self._faulty(asked, answer)
        elif wait_s is None:
            reply = _too_large_for_quota(knobs, tokens)
        else:
            reply = rate_limited(in_seconds(wait_s))
        told = quota.headers(tokens, now)
        return replace(reply, headers={**reply.headers, **told}) if told else reply

    def _faulty(self, asked: MockRequest, answer: MockReply) -> MockReply:
        knobs = self.knobs
        kind = fault_of(asked, knobs)
        reply = replace(self._faults[kind](asked, answer, knobs), fault=kind) if kind else answer
        if knobs.latency_s or knobs.latency_jitter_s:
            more_s = knobs.latency_jitter_s * chance(asked, knobs, b"latency")
            reply = replace(reply, delay_s=knobs.latency_s + more_s)
        return reply


def _goes_on(reply: MockReply) -> bool:
    return reply.ending == "keep" and reply.framing != "until_close" and reply.raw is None


def _parse(body: bytes) -> tuple[Chat | None, str]:
    try:
        chat = _decode_chat(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        return None, f"not a chat completion request: {exc}"
    return (chat, "") if chat.messages else (None, "messages: at least one is needed")


_decode_chat = msgspec.json.Decoder(Chat).decode


def _too_large_for_quota(knobs: Knobs, tokens: int) -> MockReply:
    return error_reply(
        429,
        f"Request too large on tokens per min (TPM): Limit {knobs.tpm:.0f}, Requested {tokens}.",
        type="tokens",
        code="rate_limit_exceeded",
    )


async def serve(
    host: str,
    port: int,
    knobs: Knobs,
    ledger_file: Path | None = None,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Run until cancelled or terminated.

    The ledger file gets one JSON line per request once nothing about it can change any more,
    without prompts and headers.
    """
    check_kinds(knobs, FAULTS)  # before there is a ledger
    stop = asyncio.Event()
    # Whoever ends a server in a script sends SIGTERM, and wants the ledger whole.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        if ledger_file is not None:
            try:
                file = stack.enter_context(ledger_file.open("ab"))
            except OSError as exc:
                raise LocalIOError(f"{ledger_file}: {exc.strerror or exc}") from exc
        async with MockServer(knobs, ledger_file=file, host=host, port=port) as server:
            on_ready(server.url)
            await stop.wait()
