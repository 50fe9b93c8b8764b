"""Facts become one HTML page: nothing is loaded, and everything from outside is escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

import jinja2
from markupsafe import Markup

from batchrun.config import VERSION
from batchrun.report import svg
from batchrun.report.bins import LogBins, Values
from batchrun.report.facts import Facts, Typed
from batchrun.series import Point, Series
from batchrun.words import count, dollars, duration, rate

_FIRST: Final = b"<!doctype html>\n<!-- a page of batchrun report -->\n"
# HTML has no place for these; what they would do to a terminal does not matter here.
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
BARS: Final = 40
MOST_SHOWN: Final = 8
_PACE: Final = {
    "endpoint": "the endpoint",
    "quota": "a quota",
    "input": "reading the input",
    "loop": "this program",
}


class Chart(NamedTuple):
    title: str
    picture: Markup
    most: str  # what its full height is
    start: str
    end: str
    note: str


class Bar(NamedTuple):
    name: str
    rows: int
    width: float  # in percent of the longest


class Column(NamedTuple):
    name: str
    type: str
    note: str
    bars: Sequence[Bar]
    chart: Chart | None


def page(facts: Facts) -> bytes:
    """The page, in UTF-8."""
    files = resources.files("batchrun.report")
    script = (files / "page.js").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string((files / "page.html").read_text("utf-8"))
    rows = facts.footer.rows
    made = template.render(
        facts=facts,
        footer=facts.footer,
        name=Path(facts.output).name,
        version=VERSION,
        tiles=_tiles(facts),
        pace=_pace(facts.series),
        charts=[*_over_time(facts.series), *_distributions(facts)],
        finish=_named_bars(facts.finish_reasons),
        share=lambda part: f"{100 * part / rows.total:.2g}%" if rows.total else "",
        columns=[_column(each) for each in facts.typed],
        style=Markup((files / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=_hash(script),
        count=count,
    )
    return _FIRST + made.encode()


def is_page(first: bytes) -> bool:
    """Whether a file that begins so is a page of ours."""
    return first.startswith(_FIRST)


def _clean(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup):
        return _CONTROLS.sub("\ufffd", value)
    return value


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """The first facts: value, what it is, and what belongs to it."""
    footer = facts.footer
    rows, tokens = footer.rows, footer.tokens
    total = rows.total or 0
    tiles = [(f"{rows.ok:,}", "answered", f"of {count(total, 'row')}")]
    tiles.append((f"{rows.error:,}", "failed", f"{100 * rows.error / (total or 1):.2g}% of all"))
    if tokens.total is not None or tokens.prompt is not None:
        inside = f"{tokens.prompt or 0:,} in, {tokens.completion or 0:,} out"
        cached = f", {tokens.cached:,} cached" if tokens.cached else ""
        tiles.append((_large(tokens.total or 0), "tokens", inside + cached))
    if tokens.cost_usd is not None:
        unknown = tokens.rows_without_usage
        of = f"without {count(unknown, 'row')} of unknown cost" if unknown else "as reported"
        tiles.append((dollars(tokens.cost_usd), "cost", of))
    else:
        tiles.append(("unknown", "cost", "no price was given"))
    if (series := facts.series) and series.points:
        seconds = sum(point.seconds for point in series.points)
        sent = sum(point.ok + point.failed for point in series.points)
        tiles.append((duration(seconds), "of sending", f"{rate(sent / max(seconds, 1e-9))} rows/s"))
    elif took := _took(footer.started_at, footer.finished_at):
        tiles.append((duration(took), "last run", ""))
    if facts.latency.total:
        p50, p99 = facts.latency.quantile(0.5), facts.latency.quantile(0.99)
        tiles.append((_seconds(p50), "median answer", f"99% within {_seconds(p99)}"))
    return tiles


def _large(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.995 else f"{seconds:.3g} s"


def _took(started_at: str, finished_at: str) -> float | None:
    if not (started_at and finished_at):
        return None
    start, end = map(datetime.fromisoformat, (started_at, finished_at))
    return (end - start).total_seconds()


def _pace(series: Series | None) -> str:
    """What set the pace, for most of the time."""
    if series is None or not series.bound:
        return ""
    total = sum(series.bound.values())
    parts = sorted(series.bound.items(), key=lambda each: -each[1])
    shares = [
        f"{_PACE.get(name, name)} for {100 * seconds / total:.0f}% of the time"
        for name, seconds in parts
        if seconds / total >= 0.005
    ]
    return "The pace was set by " + ", by ".join(shares) + "."


def _over_time(series: Series | None) -> list[Chart]:
    if series is None or not series.points:
        return []
    points = series.points
    seconds = [point.seconds for point in points]
    whole_s = sum(seconds)

    def chart(
        title: str, layers: Sequence[tuple[str, Callable[[Point], float]]], unit: str
    ) -> Chart:
        values = [(kind, [value(point) for point in points]) for kind, value in layers]
        most = max(value for _, each in values for value in each)
        said = f"{title}: at most {rate(most)}{unit} in {duration(whole_s)}"
        picture = svg.over_time(seconds, values, said)
        return Chart(title, picture, f"{rate(most)}{unit}", "0 s", duration(whole_s), "")

    rows = chart(
        "Rows settled",
        (
            ("bar", lambda p: (p.ok + p.failed) / p.seconds),
            ("bad", lambda p: p.failed / p.seconds),
        ),
        " rows/s",
    )
    failed = sum(point.failed for point in points)
    charts = [rows._replace(note="failed ones in the other colour" if failed else "")]
    charts.append(chart("Requests in flight", (("line", lambda p: p.in_flight),), ""))
    if refused := sum(point.refused for point in points):
        title = f"Refusals ({refused:,})"
        charts.append(chart(title, (("bad", lambda p: p.refused / p.seconds),), " a second"))
    return charts


def _distributions(facts: Facts) -> list[Chart]:
    told: tuple[tuple[str, LogBins, Callable[[float], str]], ...] = (
        ("Seconds for an answer", facts.latency, _seconds),
        ("Seconds to its first token", facts.ttft, _seconds),
        ("Tokens of a request", facts.prompt_tokens, lambda tokens: f"{tokens:,.0f}"),
        ("Tokens of an answer", facts.completion_tokens, lambda tokens: f"{tokens:,.0f}"),
    )
    return [_distribution(title, bins, words) for title, bins, words in told if bins.total]


def _distribution(title: str, bins: LogBins, words: Callable[[float], str]) -> Chart:
    bars = bins.bars(BARS)
    shares = [(share, bins.quantile(share)) for share in (0.5, 0.9, 0.99)]
    note = ", ".join(f"{share:.0%} ≤ {words(value)}" for share, value in shares)
    titles = [f"{_span(words(low), words(high))}: {number:,}" for low, high, number in bars]
    picture = svg.bars([number for _, _, number in bars], titles, f"{title}: {note}")
    start, end = (words(bars[0][0]), words(bars[-1][1])) if bars else ("", "")
    most = max([0, *(number for _, _, number in bars)])
    return Chart(title, picture, count(most, "row"), start, end, note)


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _named_bars(values: Values, most: int = MOST_SHOWN) -> list[Bar]:
    shown = values.counts.most_common(most)
    others = sum(values.counts.values()) + values.others - sum(rows for _, rows in shown)
    if others:
        shown.append((f"others ({max(0, len(values.counts) - most):,} or more)", others))
    longest = max([1, *(rows for _, rows in shown)])
    return [Bar(name, rows, 100 * rows / longest) for name, rows in shown]


def _column(typed: Typed) -> Column:
    notes = [f"{count(typed.nulls, 'row')} without" if typed.nulls else ""]
    bins, values = typed.numbers, typed.values
    few = values is not None and len(values.counts) <= MOST_SHOWN and not values.others
    chart = None
    if bins is not None and not few:
        if bins.zeros:
            notes.append(f"{bins.zeros:,} are 0")
        if typed.negative:
            notes.append(f"{typed.negative:,} are negative and not shown")
        chart = _distribution(typed.name, bins, lambda number: f"{number:.3g}")
        notes.append(chart.note)
    bars = [] if chart is not None or values is None else _named_bars(values)
    if values is None:
        notes.append("lists and objects are not counted")
    return Column(typed.name, typed.type, "; ".join(filter(None, notes)), bars, chart)
