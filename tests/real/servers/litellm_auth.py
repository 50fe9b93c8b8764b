"""Keys that say their own limits, which LiteLLM then enforces.

``sk-real`` has none; ``-r30`` is 30 requests a minute, ``-p2`` two in flight.
"""

from __future__ import annotations

import re

from fastapi import HTTPException, Request
from litellm.proxy._types import UserAPIKeyAuth, hash_token


async def user_api_key_auth(request: Request, api_key: str) -> UserAPIKeyAuth:
    if not re.fullmatch(r"sk-real(-[rp]\d+)*", api_key or ""):
        raise HTTPException(status_code=401, detail="Invalid API key")
    limits = {limit[0]: int(limit[1:]) for limit in re.findall(r"-([rp]\d+)", api_key)}
    return UserAPIKeyAuth(
        api_key=hash_token(api_key),
        token=hash_token(api_key),
        rpm_limit=limits.get("r"),
        max_parallel_requests=limits.get("p"),
    )
