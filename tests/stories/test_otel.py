"""What a run tells an OpenTelemetry collector: a server of our own that reads its bytes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest, error_reply

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)

if TYPE_CHECKING:
    from conftest import Ended, StartMock, StartRun

KEY = "canary-44aa19bc"
ROWS = 200


class Collector:
    """What came by OTLP over HTTP."""

    def __init__(self, status: int = 200) -> None:
        self.bodies: dict[str, list[bytes]] = {"/v1/traces": [], "/v1/metrics": []}
        self.headers: list[str] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.bodies[self.path].append(body)
                collector.headers.append(self.headers.get("x-team", ""))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def spans(self) -> list[Any]:
        found = []
        for body in self.bodies["/v1/traces"]:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found += scope.spans
        return found

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """The last points of each metric: they are cumulative."""
        found = {}
        for body in self.bodies["/v1/metrics"]:
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        found[metric.name] = list(metric.histogram.data_points)
        return found


def told(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("BATCHRUN_", "OTEL_", "TRACEPARENT")) or name.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"secret question {n}"} for n in range(ROWS)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(running: StartRun, url: str, endpoint: str, **environ: str) -> Ended:
    """A run of its own process: OpenTelemetry has threads and settings of the whole process."""
    with running(
        *("in.jsonl", "--base-url", url, "-m", "tiny", "-o", "out.parquet", "--otel", "--json"),
        *("--allow-http", "--allow-failures", "100%"),
        environ={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "BATCHRUN_API_KEY": KEY, **environ},
    ) as process:
        return process.end()


def half_refused(request: MockRequest) -> MockReply | None:
    number = int(request.prompt.rsplit(" ", 1)[1])
    return error_reply(400, "no secret answer", code="odd") if number % 2 else None


def test_a_run_is_one_span_with_metrics_and_a_hundred_failures(
    mock: StartMock, running: StartRun, collector: Collector
) -> None:
    server = mock(Knobs(), respond=half_refused)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    more = {"OTEL_EXPORTER_OTLP_HEADERS": "x-team=data", "TRACEPARENT": trace}
    ended = run(running, server.url, collector.url, **more)
    assert ended.code == 0, ended.err
    assert ended.summary["notes"] == []
    (span,) = collector.spans
    assert span.name == "chat tiny"
    assert span.trace_id.hex() == trace.split("-")[1]
    assert span.parent_span_id.hex() == trace.split("-")[2]
    said = told(span.attributes)
    assert said["gen_ai.operation.name"] == "chat"
    assert said["server.address"] == "127.0.0.1"
    assert (said["batchrun.rows.ok"], said["batchrun.rows.error"]) == (100, 100)
    assert len(span.events) == 100
    assert told(span.events[0].attributes) == {
        "batchrun.row": 2,
        "batchrun.error.kind": "rejected",
        "error.type": "odd",
        "http.response.status_code": 400,
    }
    seconds = collector.metrics["gen_ai.client.operation.duration"]
    by_error = {told(point.attributes).get("error.type"): point.count for point in seconds}
    assert by_error == {None: 100, "odd": 100}
    tokens = {
        told(point.attributes)["gen_ai.token.type"]: int(point.sum)
        for point in collector.metrics["gen_ai.client.token.usage"]
    }
    usage = ended.summary["this_run"]["tokens"]
    assert tokens == {"input": usage["prompt"], "output": usage["completion"]}
    assert set(collector.headers) == {"data"}
    everything = b"".join(body for bodies in collector.bodies.values() for body in bodies)
    for hidden in (KEY, "secret"):
        assert hidden.encode() not in everything


def test_more_failures_than_a_hundred_are_not_all_told(
    mock: StartMock, running: StartRun, collector: Collector
) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        number = int(request.prompt.rsplit(" ", 1)[1])
        return error_reply(400, "no", code="odd") if number else None

    assert run(running, mock(Knobs(), respond=respond).url, collector.url).code == 0
    (span,) = collector.spans
    assert told(span.attributes)["batchrun.rows.error"] == ROWS - 1
    assert len(span.events) == 100


def test_a_collector_that_is_away_changes_nothing_of_the_run(
    mock: StartMock, running: StartRun
) -> None:
    ended = run(running, mock().url, "http://127.0.0.1:9")
    assert ended.code == 0
    assert ended.summary["rows"]["ok"] == ROWS
    (note,) = ended.summary["notes"]
    assert note.startswith("not everything was told to OpenTelemetry: the collector")
    # Nothing but what a run says: its own ways of complaining are many lines.
    assert {line[:3] for line in ended.err.splitlines()} == {"202"}


def test_an_early_end_is_a_span_too(
    mock: StartMock, running: StartRun, collector: Collector
) -> None:
    ended = run(running, mock(Knobs(key="another")).url, collector.url)
    assert ended.code == 4
    (span,) = collector.spans
    assert told(span.attributes)["batchrun.exit_code"] == 4
    assert span.status.code == 2
