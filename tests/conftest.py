"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest

from batchrun.mock_server import Knobs, MockServerThread, Respond


class StartMock(Protocol):
    def __call__(
        self, knobs: Knobs | None = None, *, respond: Respond | None = None
    ) -> MockServerThread: ...


@pytest.fixture
def mock() -> Iterator[StartMock]:
    """Start servers, each in a thread of its own: ``server = mock(Knobs(...), respond=...)``.

    They keep every ledger entry and are stopped at the end of the test.
    """
    servers: list[MockServerThread] = []

    def start(knobs: Knobs | None = None, *, respond: Respond | None = None) -> MockServerThread:
        servers.append(MockServerThread(knobs, respond=respond))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
