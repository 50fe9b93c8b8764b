"""The stand-in endpoint with every fault there is, inside a loop or in a thread of its own."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from mock_faults import FAULTS

from batchrun.mock.faults import Fault
from batchrun.mock.knobs import Knobs
from batchrun.mock.ledger import Ledger
from batchrun.mock.replies import Respond
from batchrun.mock.server import MockServer


def mock_server(
    knobs: Knobs | None = None, faults: Mapping[str, Fault] = FAULTS, **more: Any
) -> MockServer:
    """A server for ``async with``; ``more`` is what ``MockServer`` takes."""
    return MockServer(knobs, faults=faults, **more)


class MockServerThread:
    """A MockServer with an event loop and a thread of its own, for tests and synchronous code.

    with MockServerThread(Knobs(faults={"429": 0.05})) as server:
        subprocess.run(["batchrun", "submit", ..., "--base-url", server.url])
    assert server.ledger.delivered_answers == 100
    """

    def __init__(
        self,
        knobs: Knobs | None = None,
        *,
        respond: Respond | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._server = mock_server(knobs, respond=respond, keep_entries=True, tls=tls)
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, name="mock-server", daemon=True)
        self._thread.start()
        self._loop, self._stop = self._started.result()

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def knobs(self) -> Knobs:
        return self._server.knobs

    @property
    def ledger(self) -> Ledger:
        """The ledger, after the server has seen every event that reached this machine before."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(_let_events_pass(), self._loop).result()
        return self._server.ledger

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:
            if self._started.done():
                raise
            self._started.set_exception(exc)

    async def _serve(self) -> None:
        stop = asyncio.Event()
        async with self._server:
            self._started.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()


async def _let_events_pass() -> None:
    # A closed socket is seen in one turn of the loop, its connection_lost comes in the next and the
    # handler it cancels in the one after.
    for _ in range(8):
        await asyncio.sleep(0)
