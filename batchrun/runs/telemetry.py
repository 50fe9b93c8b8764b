"""``--otel``: a run told to an OpenTelemetry collector: one span, metrics of its answers.

Names are those of OpenTelemetry's conventions for generative AI. No prompt, answer or key is told.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Final

from batchrun.config import VERSION, RunConfig
from batchrun.errors import UsageError
from batchrun.providers import provider_of
from batchrun.summary import RunSummary
from batchrun.types import Outcome

# What a collector that hangs may cost at the end of a run.
LEAVE_S: Final = 5.0
MOST_EVENTS: Final = 100
# As the conventions ask for.
_TOKEN_BOUNDS: Final = [4.0**n for n in range(14)]
_SECONDS_BOUNDS: Final = [0.01 * 2**n for n in range(14)]


class Telemetry:
    """Made before a run begins; ``told`` on the loop's thread, ``end`` from any, once."""

    def __init__(self, config: RunConfig) -> None:
        try:
            from opentelemetry import propagate
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise UsageError(
                "--otel needs OpenTelemetry, which is not installed: pip install 'batchrun[otel]'"
            ) from None
        # Its ways of saying that a collector is away are many lines; ours is one, at the end.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._problem = ""
        spans, metrics = OTLPSpanExporter(), OTLPMetricExporter()
        for exporter in (spans, metrics):
            vars(exporter)["export"] = self._noting(exporter.export)
        named = os.environ.get("OTEL_SERVICE_NAME") or "batchrun"
        resource = Resource.create({"service.name": named, "service.version": VERSION})
        self._traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._traces.add_span_processor(BatchSpanProcessor(spans))
        reader = PeriodicExportingMetricReader(metrics)
        self._metrics = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._common = _common(config)
        model = config.model or config.endpoint.default_model
        self._span = self._traces.get_tracer("batchrun", VERSION).start_span(
            f"chat {model}" if model else "chat",
            # A pipeline that has a trace of its own finds this run in it.
            context=propagate.extract({"traceparent": os.environ.get("TRACEPARENT", "")}),
            attributes={**self._common, **({"gen_ai.request.model": model} if model else {})},
        )
        meter = self._metrics.get_meter("batchrun", VERSION)
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=_TOKEN_BOUNDS,
        )
        self._seconds = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=_SECONDS_BOUNDS,
        )
        self._events = 0

    @classmethod
    def of(cls, config: RunConfig) -> Telemetry | None:
        """UsageError where OpenTelemetry is not installed."""
        return cls(config) if config.otel else None

    def _noting(self, export: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **more: Any) -> Any:
            result = export(*args, **more)
            if result.name != "SUCCESS":
                self._problem = "the collector did not take everything"
            return result

        return noting

    def told(self, outcome: Outcome, row: int) -> None:
        """A row is settled; ``row`` counts from 0 over all inputs."""
        ok = outcome.kind == "ok"
        error = {} if ok else {"error.type": outcome.code or outcome.kind}
        attributes = {**self._common, "gen_ai.request.model": outcome.model, **error}
        if outcome.latency_s is not None:
            self._seconds.record(outcome.latency_s, attributes)
        usage = outcome.usage
        for kind, tokens in (("input", usage.prompt_tokens), ("output", usage.completion_tokens)):
            if tokens is not None:
                self._tokens.record(tokens, {**attributes, "gen_ai.token.type": kind})
        if not ok and self._events < MOST_EVENTS:
            self._events += 1
            more = (
                {}
                if outcome.http_status is None
                else {"http.response.status_code": outcome.http_status}
            )
            self._span.add_event(
                "batchrun.row.failed",
                {"batchrun.row": row + 1, "batchrun.error.kind": outcome.kind, **error, **more},
            )

    def end(self, summary: RunSummary) -> list[str]:
        """Tell how the run ended; what the user should know of it, a line each."""
        from opentelemetry.trace import Status, StatusCode

        rows, run = summary.rows, summary.this_run
        self._span.set_attributes(
            {
                "batchrun.exit_code": summary.exit_code,
                "batchrun.rows.total": rows.total or 0,
                "batchrun.rows.ok": rows.ok,
                "batchrun.rows.error": rows.error,
            }
        )
        if run is not None:
            self._span.set_attributes(
                {
                    "batchrun.attempts": run.attempts,
                    "batchrun.rate_limited": run.rate_limited,
                    "gen_ai.usage.input_tokens": run.tokens.prompt or 0,
                    "gen_ai.usage.output_tokens": run.tokens.completion or 0,
                }
            )
        if summary.exit_code:
            self._span.set_attribute("error.type", str(summary.exit_code))
            self._span.set_status(Status(StatusCode.ERROR, summary.state))
        self._span.end()
        # A daemon: what hangs is left behind.
        leaving = threading.Thread(target=self._leave, name="batchrun-otel", daemon=True)
        leaving.start()
        leaving.join(LEAVE_S)
        problem = "the collector does not answer" if leaving.is_alive() else self._problem
        return [f"not everything was told to OpenTelemetry: {problem}"] if problem else []

    def _leave(self) -> None:
        self._traces.shutdown()
        self._metrics.shutdown(timeout_millis=LEAVE_S * 1000)


def _common(config: RunConfig) -> dict[str, str]:
    """What every measurement says."""
    provider = provider_of(config.endpoint.url)
    name = "mock" if config.mock else provider.name if provider is not None else "openai"
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": name,
        "server.address": config.endpoint.host.rpartition(":")[0] or config.endpoint.host,
    }
