"""Equal requests of ``complete``: the first one is sent, the others get what it brings."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from batchrun.types import NO_USAGE, Result


class Equals:
    """Who waits for whose answer, and the answers that were given: they stay for those to come."""

    def __init__(self) -> None:
        self._results: dict[bytes, Result | None] = {}  # None: on its way
        self._waiting: dict[bytes, list[str]] = {}
        self.waiting = 0

    def is_first(self, hash: bytes, custom_id: str) -> bool:
        """Note that this row asks that; False for one that is to wait for the answer of another."""
        if hash not in self._results:
            self._results[hash] = None
            return True
        self._waiting.setdefault(hash, []).append(custom_id)
        self.waiting += 1
        return False

    def settled(self, hash: bytes, result: Result) -> Iterator[Result]:
        """Note what came; yield it for those that waited for it."""
        self._results[hash] = result
        return self.ready(hash)

    def ready(self, hash: bytes) -> Iterator[Result]:
        """What rows get that wait for an answer that is there."""
        if (result := self._results[hash]) is None:
            return
        for custom_id in self._waiting.pop(hash, ()):
            self.waiting -= 1
            yield replace(
                result,
                custom_id=custom_id,
                paid_by=result.custom_id,
                usage=NO_USAGE,
                attempts=0,
                in_doubt_attempts=0,
                latency_s=None,
                ttft_s=None,
            )
