"""Small pictures of numbers. Texts stand beside them as HTML, legible at every width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

WIDTH: Final = 1000
HEIGHT: Final = 200


def bars(counts: Sequence[int], titles: Sequence[str], said: str, kind: str = "bar") -> Markup:
    """Bars side by side, each with its title; ``said`` tells the whole to who cannot see it."""
    most = max([1, *counts])
    width = WIDTH / max(1, len(counts))
    drawn = [
        Markup(
            '<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>'
        ).format(
            kind,
            _short(at * width),
            _short(HEIGHT - HEIGHT * count / most),
            _short(width * 0.9),
            _short(HEIGHT * count / most),
            title,
        )
        for at, (count, title) in enumerate(zip(counts, titles, strict=True))
    ]
    return _framed(drawn, said)


def over_time(
    seconds: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]], said: str
) -> Markup:
    """Steps over time, the later layers before the others; each as (class, values)."""
    total = sum(seconds) or 1.0
    most = max([1e-9, *(value for _, values in layers for value in values)])
    drawn = []
    for kind, values in layers:
        at = 0.0
        points = [f"0,{HEIGHT}"]
        for length, value in zip(seconds, values, strict=True):
            height = _short(HEIGHT - HEIGHT * value / most)
            points += [f"{_short(at)},{height}", f"{_short(at + WIDTH * length / total)},{height}"]
            at += WIDTH * length / total
        points.append(f"{_short(at)},{HEIGHT}")
        drawn.append(Markup('<polygon class="{}" points="{}"/>').format(kind, " ".join(points)))
    return _framed(drawn, said)


def _framed(drawn: Sequence[Markup], said: str) -> Markup:
    return Markup(
        '<svg role="img" viewBox="0 0 {} {}" preserveAspectRatio="none" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, said, Markup("").join(drawn))


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
