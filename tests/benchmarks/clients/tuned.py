"""The same loop as naive.py with every documented knob of aiohttp turned.

One URL object, headers on the session, bytes out and bytes in with msgspec at both ends, no
``async with`` around a request, and a garbage collector that stays out of the way.

    python tuned.py PROMPTS BASE_URL IN_FLIGHT
"""

import asyncio
import gc
import sys

import aiohttp
import msgspec
import yarl


class Row(msgspec.Struct):
    prompt: str


async def main(prompts: str, base_url: str, in_flight: int) -> None:
    url = yarl.URL(f"{base_url}/v1/chat/completions")
    decode_row = msgspec.json.Decoder(Row).decode
    decode = msgspec.json.Decoder().decode
    encode = msgspec.json.Encoder().encode

    async def worker() -> None:
        for line in lines:
            message = {"role": "user", "content": decode_row(line).prompt}
            body = encode({"model": "bench", "messages": [message]})
            reply = await session.post(url, data=body)
            decode(await reply.read())

    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    connector = aiohttp.TCPConnector(limit=in_flight)
    headers = {"Content-Type": "application/json"}
    with open(prompts, "rb") as lines:
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            await asyncio.gather(*(worker() for _ in range(in_flight)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
