"""batchrun's mock server as the endpoint, for machines without nginx: python stand_in.py PORT

It speaks as upstream.lua does, /reset and /books included, but only of latency and refusals.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, replace
from urllib.parse import parse_qsl, urlsplit

from upstream import REPLY, Books, Endpoint

from batchrun.mock.replies import MockReply, MockRequest
from batchrun.mock.server import MockServer

JSON = {"Content-Type": "application/json"}
REFUSAL = MockReply(
    status=429,
    headers=JSON,
    body=b'{"object":"error","message":"Requests rate limit exceeded","type":"rate_limited",'
    b'"param":null,"code":"1300"}',
)


class StandIn:
    def __init__(self) -> None:
        self._reset(Endpoint())

    def _reset(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._answer = MockReply(headers=JSON, body=REPLY, delay_s=endpoint.latency_s)
        self._owed_refusals = 0.0
        self._books = Books(0.0, 0.0, 0, 0, 0, 0, [])

    def respond(self, request: MockRequest) -> MockReply:
        url = urlsplit(request.path)
        if url.path == "/reset":
            told = {name: float(value) for name, value in parse_qsl(url.query)}
            self._reset(Endpoint(told["latency_s"], told["refused_share"]))
            return MockReply(headers=JSON)
        if url.path == "/books":
            return MockReply(headers=JSON, body=json.dumps(asdict(self._books)).encode())
        return self._reply()

    def _reply(self) -> MockReply:
        now, books = time.time(), self._books
        self._owed_refusals += self._endpoint.refused_share
        refused = self._owed_refusals >= 1
        self._owed_refusals -= refused
        reply = REFUSAL if refused else self._answer
        self._books = replace(
            books,
            first=books.first or now,
            last=max(books.last, now + reply.delay_s),
            requests=books.requests + 1,
            answered=books.answered + (not refused),
            refused=books.refused + refused,
        )
        return reply


async def main(port: int) -> None:
    async with MockServer(respond=StandIn().respond, port=port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
