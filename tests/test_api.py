"""The Python API: submit and run return summaries, complete yields answers as they come."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mock_servers import MockServerThread

import batchrun
from batchrun.api import Options, Where
from batchrun.mock.knobs import Knobs

PROMPTS = [{"prompt": f"question {number}", "id": number} for number in range(5)]


def collected(requests: Any, **options: Any) -> list[batchrun.Result]:
    async def collect() -> list[batchrun.Result]:
        async with batchrun.complete(requests, **options) as results:
            return [result async for result in results]

    return asyncio.run(collect())


def test_everything_promised_is_there_and_importing_is_light() -> None:
    script = (
        "import sys, batchrun\n"
        "heavy = {'aiohttp', 'pyarrow', 'tenacity', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "for name in batchrun.__all__: getattr(batchrun, name)\n"
        "assert callable(batchrun.run) and callable(batchrun.submit)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_list_of_dicts_is_answered_and_added_to_without_paying_again(tmp_path: Path) -> None:
    output = tmp_path / "answers.parquet"
    first = batchrun.submit(PROMPTS[:3], output, mock=True)
    assert (first.exit_code, first.rows.ok, first.published) == (0, 3, True)
    more = batchrun.submit(PROMPTS, output, mock=True)
    assert more.this_run is not None
    assert (more.this_run.rows_sent, more.rows.reused, more.rows.ok) == (2, 3, 5)
    table = pq.read_table(output)
    assert table["id"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["response"][4].as_py() == "[synthetic] question 4"


def test_an_arrow_table_keeps_its_types(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"], "size": pa.array([1, 2], pa.int16())})
    output = tmp_path / "answers.parquet"
    assert batchrun.submit(table, output, mock=True).exit_code == 0
    assert pq.read_table(output).schema.field("size").type == pa.int16()


def test_submit_works_where_a_loop_is_running(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n')

    async def in_a_notebook() -> batchrun.RunSummary:
        return batchrun.submit(path, mock=True)

    summary = asyncio.run(in_a_notebook())
    assert summary.output == str(tmp_path / "prompts.mock.parquet")
    assert summary.exit_code == 0


def test_run_takes_a_config(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": null}\n')
    config = batchrun.RunConfig(
        inputs=(str(path),),
        output=str(tmp_path / "out.parquet"),
        mock=True,
        allow_failures=batchrun.Allowance(rows=1),
    )
    summary = asyncio.run(batchrun.run(config))
    assert (summary.exit_code, summary.rows.ok, summary.rows.error) == (0, 1, 1)


def test_a_config_that_names_no_endpoint_is_not_answered_by_the_mock(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n')
    config = batchrun.RunConfig(inputs=(str(path),), output=str(tmp_path / "out.parquet"))
    with pytest.raises(batchrun.UsageError, match="no endpoint"):
        asyncio.run(batchrun.run(config))
    assert [each.name for each in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_every_choice_of_a_run_is_an_option_of_its_own_type() -> None:
    settled = {"inputs", "output", "output_format", "endpoint"}
    fields = get_type_hints(batchrun.RunConfig)
    assert get_type_hints(Options) == get_type_hints(Where) | {
        name: fields[name] for name in fields.keys() - settled
    }


def test_what_cannot_work_is_raised(tmp_path: Path) -> None:
    with pytest.raises(batchrun.UsageError, match="output="):
        batchrun.submit(PROMPTS, mock=True)
    with pytest.raises(batchrun.UsageError, match="no such option"):
        batchrun.submit(PROMPTS, tmp_path / "a.parquet", mock=True, concurrncy=3)  # type: ignore[call-arg]  # the point
    with pytest.raises(batchrun.UsageError, match="no such file"):
        batchrun.submit(tmp_path / "missing.jsonl", mock=True)


def test_complete_answers_prompts_messages_and_batch_lines() -> None:
    message = {"role": "user", "content": "hello"}
    requests = [
        "a prompt",
        {"messages": [message], "custom_id": "m"},
        {"custom_id": "b", "body": {"model": "other", "messages": [message]}},
        {"nothing": "usable"},
    ]
    by_id = {result.custom_id: result for result in collected(requests, mock=True)}
    assert by_id["1"].response == "[synthetic] a prompt"
    assert by_id["m"].response == "[synthetic] hello"
    assert by_id["b"].request_model == "other"
    assert (by_id["4"].status, by_id["4"].error_kind) == ("error", "invalid_input")
    usage = by_id["m"].usage
    assert usage.total_tokens == (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)


def test_complete_reads_no_further_than_its_results_are_read(
    mock: Callable[..., MockServerThread],
) -> None:
    server = mock(Knobs())
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"question {taken}"

    async def read_ten() -> None:
        async with batchrun.complete(endless(), base_url=server.url, model="m") as results:
            seen = 0
            async for _ in results:
                seen += 1
                if seen == 10:
                    break

    asyncio.run(read_ten())
    assert 10 <= taken < 5_000
    assert server.ledger.requests <= taken


def test_complete_raises_what_ends_a_run(mock: Callable[..., MockServerThread]) -> None:
    server = mock(Knobs(key="the right one"))
    with pytest.raises(batchrun.EndpointRefused, match="refused the key"):
        collected(["x"] * 50, base_url=server.url, model="m")
    assert server.ledger.requests < 50


def test_a_budget_binds_complete(mock: Callable[..., MockServerThread]) -> None:
    server = mock()
    options = {"base_url": server.url, "model": "m", "params": {"max_tokens": 10}}
    with pytest.raises(batchrun.BatchrunError, match="--token-budget 1,000 could be exceeded"):
        collected([f"question {n}" for n in range(200)], token_budget=1_000, **options)
    billed = server.ledger.billed
    assert 800 < (billed.prompt_tokens or 0) + (billed.completion_tokens or 0) <= 1_000
    asked = server.ledger.requests
    with pytest.raises(batchrun.BatchrunError, match="no price is known"):
        collected(["x"], max_cost=1.0, **options)
    with pytest.raises(batchrun.BatchrunError, match="its answer has no bound"):
        collected(["x"], token_budget=1_000, base_url=server.url, model="m")
    assert server.ledger.requests == asked


def test_complete_retries_a_passing_failure(mock: Callable[..., MockServerThread]) -> None:
    server = mock(Knobs(script=("429-ms", "ok"), retry_after_s=0.01))
    results = collected(["x", "y"], base_url=server.url, model="m")
    assert [result.status for result in results] == ["ok", "ok"]
    assert sorted(result.attempts for result in results)[-1] == 2


def test_an_error_of_the_callers_own_iterable_or_block_arrives_as_it_is() -> None:
    def broken() -> Iterator[str]:
        yield "x"
        raise LookupError("no more questions")

    with pytest.raises(LookupError, match="no more questions"):
        collected(broken(), mock=True)

    async def leave() -> None:
        async with batchrun.complete(["x"], mock=True):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(leave())


def test_an_input_mistake_is_said_before_a_missing_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATCHRUN_API_KEY", raising=False)
    (tmp_path / "csv.jsonl").write_text("id,text\n1,x\n")
    (tmp_path / "fine.jsonl").write_text('{"prompt": "x"}\n')
    said = {"gone": "no such file", "csv": "CSV", "fine": "no key for"}
    for name, words in said.items():
        with pytest.raises(batchrun.UsageError, match=words):
            batchrun.submit(tmp_path / f"{name}.jsonl")
