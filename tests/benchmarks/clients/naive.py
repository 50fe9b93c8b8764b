"""What people write first with aiohttp: N workers, one session, nothing kept.

No journal, no retries, no usage, no output: the price of the requests alone.

    python naive.py PROMPTS BASE_URL IN_FLIGHT
"""

import asyncio
import json
import sys

import aiohttp


async def main(prompts: str, base_url: str, in_flight: int) -> None:
    url = f"{base_url}/v1/chat/completions"

    async def worker() -> None:
        for line in lines:
            message = {"role": "user", "content": json.loads(line)["prompt"]}
            async with session.post(url, json={"model": "bench", "messages": [message]}) as reply:
                await reply.json()

    # The default limit of 100 connections would throttle it.
    connector = aiohttp.TCPConnector(limit=in_flight)
    with open(prompts) as lines:
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(worker() for _ in range(in_flight)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
