"""saturate, with its window fixed or (0) adapting itself.

python rival_saturate.py PROMPTS BASE_URL IN_FLIGHT OUTPUT
"""

# Installed only in the environment the benchmark makes for it.
# mypy: disable-error-code="import-not-found"

import json
import sys
from typing import Any

from saturate import Auto, Fixed, pump


def request(row: dict[str, Any]) -> dict[str, Any]:
    return {"model": "bench", "messages": [{"role": "user", "content": row["prompt"]}]}


def columns(row: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    return {
        "response": reply["choices"][0]["message"]["content"],
        "prompt_tokens": reply["usage"]["prompt_tokens"],
        "completion_tokens": reply["usage"]["completion_tokens"],
    }


def main(prompts: str, base_url: str, in_flight: int, output: str) -> None:
    with open(prompts) as lines:
        stats = pump(
            (json.loads(line) for line in lines),
            to_request=request,
            parse=columns,
            endpoint=f"{base_url}/v1",
            output=output,
            window=Fixed(in_flight) if in_flight else Auto(),
            id_key="id",
        )
    if stats.rows_failed:
        raise SystemExit(f"{stats.rows_failed} rows failed")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
