"""The stand-in's own books: what was asked, served and billed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import BinaryIO

import msgspec
from msgspec import Struct

from batchrun.types import Usage


class Entry(Struct):
    """One request in the ledger. ``delivered`` may still be taken back while the connection lives.

    Instants are monotonic seconds. ``headers`` and ``body`` hold secrets and prompts: they stay in
    memory and never reach the ledger file.
    """

    n: int
    seen: int
    path: str
    model: str
    digest: str
    streamed: bool
    started_s: float
    prompt: str = ""
    headers: Mapping[str, str] = {}
    body: bytes = b""
    status: int | None = None  # None: no status line was sent
    fault: str = ""
    billed: Usage | None = None
    delivered: bool = False
    ended_s: float | None = None


class Ledger:
    """What the server received, billed and delivered.

    Only the server's thread writes. Another thread may read any number at any time; for a
    consistent whole it asks ``MockServerThread.ledger``, which lets pending events settle first.
    """

    def __init__(self, *, keep: bool = False, file: BinaryIO | None = None) -> None:
        self.requests = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.statuses: Counter[int | None] = Counter()
        self.faults: Counter[str] = Counter()
        self.billed = Usage()
        self.billed_answers = 0
        self.delivered = Usage()
        self.delivered_answers = 0
        self._keep = keep
        self._entries: list[Entry] = []
        self._file = file

    @property
    def entries(self) -> list[Entry]:
        """A copy, in order of arrival; empty unless the server was told to keep them."""
        return list(self._entries)

    def begin(self, entry: Entry) -> None:
        self.requests += 1
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        if self._keep:
            self._entries.append(entry)

    def bill(self, entry: Entry, usage: Usage) -> None:
        entry.billed = usage
        self.billed += usage
        self.billed_answers += 1

    def end(self, entry: Entry, *, delivered: bool) -> None:
        """The exchange is over; ``delivered`` when a whole answer was written."""
        entry.ended_s = time.monotonic()
        self.in_flight -= 1
        self.statuses[entry.status] += 1
        if entry.fault:
            self.faults[entry.fault] += 1
        if delivered:
            entry.delivered = True
            self._recount(entry, +1)

    def take_back(self, entry: Entry) -> None:
        """The client was gone before it read the answer."""
        if entry.delivered:
            entry.delivered = False
            self._recount(entry, -1)

    def settle(self, entry: Entry) -> None:
        """Nothing about this request can change any more."""
        if self._file is not None:
            self._file.write(_ledger_line(entry))

    def _recount(self, entry: Entry, sign: int) -> None:
        self.delivered_answers += sign
        if entry.billed is not None:
            self.delivered += entry.billed if sign > 0 else _negative(entry.billed)


def _negative(usage: Usage) -> Usage:
    counts = msgspec.structs.asdict(usage)
    return Usage(**{name: None if n is None else -n for name, n in counts.items()})


def _ledger_line(entry: Entry) -> bytes:
    record = msgspec.structs.asdict(entry)
    for private in ("prompt", "headers", "body"):
        del record[private]
    return msgspec.json.encode(record) + b"\n"
