"""litellm behind a semaphore.

python rival_litellm.py PROMPTS BASE_URL IN_FLIGHT
"""

# Installed only in the environment the benchmark makes for it.
# mypy: disable-error-code="import-not-found"

import asyncio
import json
import os
import sys

# Otherwise the import downloads a price list.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm


async def main(prompts: str, base_url: str, in_flight: int) -> None:
    litellm.telemetry = False
    places = asyncio.Semaphore(in_flight)

    async def ask(prompt: str) -> None:
        async with places:
            await litellm.acompletion(
                model="openai/bench",
                messages=[{"role": "user", "content": prompt}],
                api_base=f"{base_url}/v1",
                api_key="none",
            )

    with open(prompts) as lines:
        tasks = [ask(json.loads(line)["prompt"]) for line in lines]
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
