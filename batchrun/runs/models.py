"""``batchrun models``: what the endpoint offers."""

from __future__ import annotations

from batchrun.config import RunConfig
from batchrun.runs.opening import chat_endpoint


async def models(config: RunConfig) -> list[str]:
    """The model names that the endpoint offers to this key."""
    async with chat_endpoint(config) as endpoint:
        return await endpoint.models()
