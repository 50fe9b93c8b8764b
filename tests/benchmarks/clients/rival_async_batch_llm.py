"""async-batch-llm over an OpenAI-compatible endpoint.

python rival_async_batch_llm.py PROMPTS BASE_URL IN_FLIGHT
"""

# Installed only in the environment the benchmark makes for it.
# mypy: disable-error-code="import-not-found"

import asyncio
import json
import sys

from async_batch_llm import llm, process_prompts


async def main(prompts: str, base_url: str, in_flight: int) -> None:
    model = llm("openai-compatible:bench", base_url=f"{base_url}/v1", api_key="none")
    with open(prompts) as lines:
        batch = await process_prompts(
            model, [json.loads(line)["prompt"] for line in lines], concurrency=in_flight
        )
    if batch.failed:
        raise SystemExit(f"{batch.failed} rows failed")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
