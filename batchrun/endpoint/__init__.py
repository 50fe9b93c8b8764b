"""One Request in, one Attempt out, over HTTP. The only package that knows aiohttp's client."""

from batchrun.endpoint.client import ChatEndpoint

__all__ = [
    "ChatEndpoint",
]
