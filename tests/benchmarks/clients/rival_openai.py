"""What people write with the OpenAI SDK: a semaphore, a gather and a bar.

python rival_openai.py PROMPTS BASE_URL IN_FLIGHT
"""

# Installed only in the environment the benchmark makes for it.
# mypy: disable-error-code="import-not-found"

import asyncio
import json
import sys

from openai import AsyncOpenAI
from tqdm.asyncio import tqdm_asyncio


async def main(prompts: str, base_url: str, in_flight: int) -> None:
    client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none")
    places = asyncio.Semaphore(in_flight)

    async def ask(prompt: str) -> None:
        async with places:
            await client.chat.completions.create(
                model="bench", messages=[{"role": "user", "content": prompt}]
            )

    with open(prompts) as lines:
        tasks = [ask(json.loads(line)["prompt"]) for line in lines]
    await tqdm_asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
