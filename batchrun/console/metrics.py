"""A run as numbers to scrape: the text format of Prometheus and its node exporter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Final

from batchrun.console.progress import Snapshot

# Only a file that begins so is ours to replace.
FIRST_LINE: Final = b"# batchrun: "


def metrics_text(
    snapshot: Snapshot, labels: Mapping[str, str], started_s: float, exit_code: int | None
) -> bytes:
    """All of them, whole; ``exit_code`` None while the run goes on."""
    lines = [f"{FIRST_LINE.decode()}the run of {_escaped(labels['output'])}"]
    for name, kind, words, values in _families(snapshot, started_s, exit_code):
        lines += (f"# HELP batchrun_{name} {words}", f"# TYPE batchrun_{name} {kind}")
        for more, value in values:
            told = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**labels, **more}.items())
            lines.append(f"batchrun_{name}{{{told}}} {value!r}")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


_Values = list[tuple[dict[str, str], float]]


def _families(
    snapshot: Snapshot, started_s: float, exit_code: int | None
) -> Iterator[tuple[str, str, str, _Values]]:
    pending = snapshot.total - snapshot.ok - snapshot.failed
    rows = {"answered": snapshot.ok, "failed": snapshot.failed, "pending": pending}
    yield (
        *("rows", "gauge", "Rows of the input by state."),
        [({"state": state}, number) for state, number in rows.items()],
    )
    yield "in_flight", "gauge", "Requests on their way.", [({}, snapshot.in_flight)]
    yield "resting_rows", "gauge", "Rows that wait for another try.", [({}, snapshot.resting)]
    attempts = {
        "attempts": "Attempts of this run.",
        "retries": "Attempts that led to another one.",
        "rate_limited": "Attempts refused for a limit.",
        "in_doubt": "Attempts that may have been billed without an answer.",
    }
    for name, words in attempts.items():
        yield f"{name}_total", "counter", words, [({}, getattr(snapshot, name))]
    counts = snapshot.spent
    tokens = {"prompt": counts.prompt, "completion": counts.completion, "cached": counts.cached}
    yield (
        *("tokens_total", "counter", "Tokens of this run, as the endpoint reported them."),
        [({"kind": kind}, number or 0) for kind, number in tokens.items()],
    )
    if counts.cost_usd is not None:
        words = "US dollars of this run, at the price given."
        yield "cost_usd_total", "counter", words, [({}, counts.cost_usd)]
    yield "start_time_seconds", "gauge", "When the run began.", [({}, round(started_s, 3))]
    words = "When this was written."
    yield "last_update_seconds", "gauge", words, [({}, round(time.time(), 3))]
    yield "running", "gauge", "1 while the run goes on.", [({}, int(exit_code is None))]
    if exit_code is not None:
        yield "exit_code", "gauge", "How the run ended.", [({}, exit_code)]


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
