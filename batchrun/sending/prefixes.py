"""Rows that begin alike: one leads, the others follow once its answer is there.

Providers bill a prompt's repeated prefix at a fraction, but only what they have seen: of many rows
sent at once each pays in full. So while the first row with a long prefix is on its way, the others
with the same stand aside and rows with other prefixes go; nobody stands aside for longer than a few
answers take, and not more rows than may wait anyway.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from msgspec import Struct

from batchrun.types import Request

# Bytes of a body, the first some thousand tokens: shorter prefixes are cached by nobody. Texts that
# share a beginning may go on to share more, a document after the instructions.
LEVELS: Final = (4_096, 16_384, 65_536)
MOST_ASIDE: Final = 1_000
MOST_ASIDE_BYTES: Final = 64_000_000
MOST_KNOWN: Final = 4_096
# A leader that takes so many times the longest usual answer has lost its followers.
PATIENCE: Final = 3.0
FIRST_PATIENCE_S: Final = 60.0
_FADE: Final = 0.9


class _Lead(Struct):
    keys: list[int]
    since: float


class Prefixes:
    """Called from one thread; ``now`` never goes backwards."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, None] = OrderedDict()
        self._leads: dict[int, _Lead] = {}  # id(request) ->
        self._aside: dict[int, list[Request]] = {}  # key that is led -> its followers
        self._rows = 0
        self._bytes = 0
        self._usual_s = 0.0

    def __len__(self) -> int:
        """How many stand aside."""
        return self._rows

    def may_go(self, request: Request, now: float) -> bool:
        """Whether the request goes now, perhaps as a leader; else it stands aside."""
        body = request.body
        if len(body) < LEVELS[0]:
            return True
        keys = [hash((request.model, body[:level])) for level in LEVELS if len(body) >= level]
        unknown = [key for key in keys if key not in self._known]
        if not unknown or self._is_full(body):
            return True
        for key in unknown:
            if key in self._aside:
                self._aside[key].append(request)
                self._rows += 1
                self._bytes += len(body)
                return False
        self._leads[id(request)] = _Lead(unknown, now)
        for key in unknown:
            self._aside[key] = []
        return True

    def ended(self, request: Request, now: float, *, ok: bool) -> list[Request]:
        """Those who followed this one, if it led; they may go."""
        if not self._leads or (lead := self._leads.pop(id(request), None)) is None:
            return []
        if ok:
            self._usual_s = max(self._usual_s * _FADE, now - lead.since)
        return self._released(lead, ok=ok)

    def overdue(self, now: float) -> list[Request]:
        """Those whose leader takes too long."""
        patience_s = PATIENCE * self._usual_s if self._usual_s else FIRST_PATIENCE_S
        released: list[Request] = []
        for identity, lead in list(self._leads.items()):
            if now - lead.since > patience_s:
                del self._leads[identity]
                released += self._released(lead, ok=True)  # nobody waits for it again
        return released

    def clear(self) -> None:
        self._leads.clear()
        self._aside.clear()
        self._rows = self._bytes = 0

    def _released(self, lead: _Lead, *, ok: bool) -> list[Request]:
        """Its followers. After a failure the next new row leads; these have waited long enough."""
        released: list[Request] = []
        for key in lead.keys:
            released += self._aside.pop(key, ())
            if not ok:
                continue
            self._known[key] = None
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        self._rows -= len(released)
        self._bytes -= sum(len(each.body) for each in released)
        return released

    def _is_full(self, body: bytes) -> bool:
        return self._rows >= MOST_ASIDE or self._bytes + len(body) > MOST_ASIDE_BYTES
