"""The endpoint that the clients are measured against: nginx on one core, or a stand-in without it.

nginx answers from upstream.lua, far faster than any client here asks, and keeps the books of a run.
Where nginx is missing, batchrun's own mock server takes its place: good enough to see the suite
work, but as slow as the clients, so that figures from it compare nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULE_DIRS = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
PACKAGES = ("nginx", "libnginx-mod-http-lua")
START_TIMEOUT_S = 20
OPEN_FILES = 16_384

REPLY = json.dumps(
    {
        "id": "chatcmpl-5f0c1f9e7d3b4a2c8e6d1b0a",
        "object": "chat.completion",
        "created": 1795000000,
        "model": "bench",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "The harbour was quiet before dawn, and the first boats came in "
                    "with their lamps still lit. Fishermen called to one another across the water "
                    "while gulls turned over the nets. By the time the market opened the catch "
                    "lay in rows on the ice, and the town smelled of coffee.",
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 31,
            "completion_tokens": 62,
            "total_tokens": 93,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "system_fingerprint": "fp_bench",
    },
    separators=(",", ":"),
).encode()

NGINX_CONF = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
daemon off;
master_process off;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
worker_rlimit_nofile {open_files};
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    default_type application/json;
    keepalive_requests 100000000;
    keepalive_timeout 1h;
    lua_max_running_timers 16;
    lua_package_path "{here}/?.lua;;";
    init_by_lua_block {{ bench = require("upstream"); bench.load("{prefix}/reply.json") }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /v1/chat/completions {{ content_by_lua_block {{ bench.answer() }} }}
        location = /reset {{ content_by_lua_block {{ bench.reset() }} }}
        location = /books {{ content_by_lua_block {{ bench.books() }} }}
    }}
}}
"""


@dataclass(frozen=True)
class Endpoint:
    """How the upstream behaves during one run."""

    latency_s: float = 0.0  # of every answer; with slots the time of service
    refused_share: float = 0.0  # of all requests
    rate_per_s: float = 0.0  # a token bucket, shown in Mistral's headers
    burst: int = 0  # what the bucket holds
    slots: int = 0  # worked on at a time; the others queue
    queue: int = 0  # places in that queue; beyond them 429. 0: any number
    halved_after_s: float = 0.0  # from the first request on only half the slots
    places: int = 0  # in flight; beyond them refused. 0: any number
    refusal_status: int = 429
    retry_after_s: float = 0.0  # named in refusals; 0: not named
    named_limit: int = 0  # of requests, in the headers of refusals; 0: none

    @property
    def is_plain(self) -> bool:
        return not (self.rate_per_s or self.slots or self.places or self.retry_after_s)


@dataclass(frozen=True)
class Books:
    """What one run looked like from the upstream. Instants are Unix seconds, to a millisecond."""

    first: float  # first request received
    last: float  # last answer sent
    requests: int
    answered: int
    refused: int
    peak_in_flight: int
    answered_by_second: list[int]

    @property
    def span_s(self) -> float:
        return max(self.last - self.first, 0.001)


class Upstream:
    """A running endpoint; ``stand_in`` when it is not nginx."""

    def __init__(self, port: int, *, stand_in: bool) -> None:
        self.base_url = f"http://127.0.0.1:{port}"
        self.stand_in = stand_in

    @property
    def description(self) -> str:
        """What answers, for the head of the figures."""
        if self.stand_in:
            return "NOT nginx but batchrun's mock server, as slow as the clients"
        said = subprocess.run([_binary(), "-v"], capture_output=True, text=True, check=True)
        return said.stderr.strip().removeprefix("nginx version: ")

    def reset(self, endpoint: Endpoint) -> None:
        self._get(f"/reset?{urllib.parse.urlencode(asdict(endpoint))}")

    def books(self) -> Books:
        return Books(**json.loads(self._get("/books")))

    def _get(self, path: str) -> bytes:
        # urllib would ask a proxy of the environment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.base_url + path, timeout=START_TIMEOUT_S) as response:
            body: bytes = response.read()
        return body


def missing_packages() -> list[str]:
    """What to install for nginx with Lua, by Debian's names."""
    found = (_binary(), _modules())
    return [package for package, there in zip(PACKAGES, found, strict=True) if not there]


@contextlib.contextmanager
def running(cpu: int | None, *, stand_in: bool) -> Iterator[Upstream]:
    """An upstream on a free port of loopback, pinned to ``cpu``."""
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-") as prefix:
        port = _free_port()
        command = _stand_in(port) if stand_in else _nginx(Path(prefix), port)
        with open(Path(prefix) / "stderr", "w+") as stderr, pinned(cpu):
            process = subprocess.Popen(command, stderr=stderr, env=_environ())
        try:
            upstream = Upstream(port, stand_in=stand_in)
            _await_start(upstream, process, Path(prefix))
            yield upstream
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Processes started inside run on ``cpu`` only; ``None`` leaves it to the system."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _binary() -> str:
    """nginx sits in sbin, which is not on every user's path; empty when it is not there."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    return shutil.which("nginx", path=path) or ""


def _modules() -> str | None:
    for directory in MODULE_DIRS:
        if Path(directory, "ngx_http_lua_module.so").exists():
            return directory
    return None


def _nginx(prefix: Path, port: int) -> list[str]:
    open_files = raise_open_files_limit()
    (prefix / "reply.json").write_bytes(REPLY)
    (prefix / "nginx.conf").write_text(
        NGINX_CONF.format(
            modules=_modules(),
            prefix=prefix,
            port=port,
            here=HERE,
            open_files=open_files,
            connections=open_files - 64,
        )
    )
    return [_binary(), "-p", str(prefix), "-c", "nginx.conf", "-e", "error.log"]


def _environ() -> dict[str, str]:
    # The stand-in imports batchrun from this checkout.
    return {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}


def _stand_in(port: int) -> list[str]:
    return [sys.executable, str(HERE / "stand_in.py"), str(port)]


def raise_open_files_limit() -> int:
    """Let this process and its children open as many sockets as the suite needs; the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(soft, allowed)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _await_start(upstream: Upstream, process: subprocess.Popen[bytes], prefix: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            upstream.reset(Endpoint())
        except (urllib.error.URLError, ConnectionError) as exc:
            if process.poll() is not None or time.monotonic() > deadline:
                said = [
                    p.read_text() for p in (prefix / "stderr", prefix / "error.log") if p.exists()
                ]
                raise SystemExit(f"the upstream did not start: {exc}\n{''.join(said)}") from exc
            time.sleep(0.05)
        else:
            return
