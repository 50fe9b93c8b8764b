"""The knobs of the stand-in: how slow, limited and faulty it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from batchrun.errors import UsageError

LimitHeaders = Literal["none", "mistral", "openai"]
StreamUsage = Literal["auto", "final_choice", "extra_chunk", "every_chunk", "x_groq", "none"]


class Knobs(Struct, frozen=True, kw_only=True):
    """How the server behaves; the defaults answer at once, always and without limits.

    ``faults`` maps a kind of fault to its share of requests (together at most 1). ``script`` names
    what the 1st, 2nd … sending of every body meets ("ok" for an answer), before ``faults``.
    """

    latency_s: float = 0.0
    latency_jitter_s: float = 0.0  # up to this much more, fixed per body
    seed: int = 0
    faults: Mapping[str, float] = {}
    script: tuple[str, ...] = ()
    retry_after_s: float = 1.0  # what injected faults with a Retry-After name

    rpm: float | None = None  # per model, as are tokens
    tpm: float | None = None
    limit_headers: LimitHeaders = "none"
    slots: int | None = None  # requests worked on at a time; others wait

    models: tuple[str, ...] = ()  # those there are; () accepts any name
    key: str | None = None  # the Bearer token demanded
    completion_tokens: int | None = None  # length of every answer; None: a short one

    stream_usage: StreamUsage = "auto"  # include_usage: an extra chunk, else on the last choice
    stream_comments: bool = False
    stream_split_bytes: int | None = None  # cut the stream anywhere, also inside a character
    stream_pause_s: float = 0.0  # between the writes of a stream

    def __post_init__(self) -> None:
        if any(not 0 <= rate <= 1 for rate in self.faults.values()) or (
            sum(self.faults.values()) > 1 + 1e-9
        ):
            raise UsageError("fault rates are shares between 0 and 1, together at most 1")
