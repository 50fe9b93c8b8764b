"""The texts of the terminal, block by block."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from textwrap import dedent

import pytest
from msgspec.structs import replace

from batchrun import words
from batchrun.config import RunConfig
from batchrun.console.after import final_block as report_final_block
from batchrun.console.after import final_lines, next_steps
from batchrun.console.blocks import place
from batchrun.console.facts import (
    BadRowFacts,
    CollectFacts,
    FileFacts,
    FinalFacts,
    StartFacts,
    StatusFacts,
    ValidateFacts,
    to_json,
)
from batchrun.console.found import collect_block, status_block, validate_block
from batchrun.console.instead import error_summary, error_text
from batchrun.console.start import start_block, start_lines
from batchrun.errors import EndpointRefused, Locked, UsageError
from batchrun.providers import Endpoint
from batchrun.secret import Secret
from batchrun.summary import (
    ErrorCount,
    ErrorExample,
    OutputTotals,
    RowCounts,
    RunSummary,
    ThisRun,
    TokenCounts,
)

PROMPTS = FileFacts(
    name="prompts.jsonl",
    format="jsonl",
    rows=2_000,
    size_bytes=1_300_000,
    shape="prompt",
    prompt_column="prompt",
    sent=("prompt",),
    carried_only=("id", "category"),
)
START = StartFacts(
    files=(PROMPTS,),
    output="prompts.results.parquet",
    rows=2_000,
    to_send=2_000,
    base_url="https://api.mistral.ai/v1",
    host="api.mistral.ai",
    model="mistral-small-latest",
    key_name="$MISTRAL_API_KEY",
)
ENDPOINT = Endpoint(
    url="https://api.mistral.ai/v1/chat/completions",
    host="api.mistral.ai",
    base_url="https://api.mistral.ai/v1",
    key=Secret("sk-very-secret"),
    key_name="$MISTRAL_API_KEY",
    default_model=None,
    provider="mistral",
)
CONFIG = RunConfig(inputs=("prompts.jsonl",), output="prompts.results.parquet", endpoint=ENDPOINT)
TOKENS = TokenCounts(prompt=612_480, completion=498_112, total=1_110_592, cached=96_000)
DONE = RunSummary(
    state="finished",
    output="prompts.results.parquet",
    published=True,
    state_dir="prompts.results.parquet.batchrun",
    rows=RowCounts(total=2_000, ok=2_000, truncated=3),
    output_totals=OutputTotals(TOKENS),
    this_run=ThisRun(rows_sent=2_000, tokens=TOKENS, bound_by="quota", sending_s=65.0),
    wall_s=66.0,
)
FAILURES = [
    ErrorCount(
        "rejected",
        "3051",
        9,
        False,
        ErrorExample(
            "row-214", "prompts.jsonl:214", "Prompt contains 300112 tokens and more words"
        ),
    ),
    ErrorCount(
        "timeout",
        "timeout",
        2,
        True,
        ErrorExample("77", "prompts.jsonl:77", "timeout: no answer within 600 s, 3 attempts"),
    ),
    ErrorCount(
        "invalid_input",
        "",
        1,
        False,
        ErrorExample("1502", "prompts.jsonl:1502", "broken JSON at column 33"),
    ),
]
FAILED = replace(
    DONE,
    exit_code=3,
    rows=RowCounts(total=2_000, ok=1_988, error=12),
    errors=FAILURES,
    this_run=ThisRun(rows_sent=2_000, tokens=TOKENS, bound_by="quota", sending_s=69.2),
    wall_s=70.0,
)


@pytest.fixture
def utc() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def final_block(
    summary: RunSummary, config: RunConfig | None, facts: FinalFacts | None = None
) -> str:
    """The block as a run ends with it: a cause without advice of its own is given some."""
    steps = summary.next_steps or next_steps(summary)
    return report_final_block(replace(summary, next_steps=steps), config, facts)


def _text(block: str) -> str:
    return dedent(block).strip("\n")


def test_the_start_names_rows_columns_endpoint_and_key() -> None:
    assert start_block(START) == _text("""
        prompts.jsonl -> prompts.results.parquet
        rows      2,000, all to send (shape prompt, column "prompt")
        sent      prompt            carried only: id, category
        endpoint  https://api.mistral.ai/v1   model mistral-small-latest
        key       $MISTRAL_API_KEY
    """)


def test_the_start_notes_what_is_replaced_renamed_and_repeated() -> None:
    facts = replace(
        START,
        renamed=(("status", "input_status"),),
        repeats=312,
        models_replaced=("gpt-a",),
        rows_model_replaced=2_000,
    )
    assert start_block(facts).splitlines()[-3:] == [
        'note      input column "status" is carried as "input_status"',
        "note      312 rows repeat an earlier request (each is sent)",
        "note      --model replaces gpt-a in 2,000 rows",
    ]


def test_a_continued_run_says_what_is_answered_and_what_is_sent_again(utc: None) -> None:
    facts = replace(
        START, to_send=692, answered_before=1_308, to_retry=2, continues_since_ms=1_700_000_000_000
    )
    first, rows, shape = start_block(facts).splitlines()[:3]
    assert first.endswith("(continues the run of 2023-11-14 22:13)")
    assert rows == "rows      2,000: 1,308 answered before, 692 to send (2 of them again)"
    assert shape == '          (shape prompt, column "prompt")'


def test_a_log_starts_with_two_lines() -> None:
    facts = replace(START, rows=1_204_512, to_send=12_672, answered_before=1_191_840)
    assert start_lines(facts) == [
        "start prompts.jsonl -> prompts.results.parquet, 1,204,512 rows",
        "1,191,840 reused, 12,672 to send, api.mistral.ai",
    ]


def test_a_mock_run_says_that_its_answers_are_synthetic() -> None:
    block = start_block(replace(START, synthetic=True, key_name=None))
    assert "synthetic" in block
    assert "api.mistral.ai" not in block


def test_success_names_tokens_pace_output_and_how_to_look() -> None:
    facts = FinalFacts(output_bytes=1_900_000)
    assert final_block(DONE, CONFIG, facts) == _text("""
        done      2,000 of 2,000 rows answered in 1 min 5 s (30.8 rows/s)
        note      3 answers were cut short (finish_reason "length")
        tokens    612,480 prompt (96,000 cached) + 498,112 completion
        limit     the endpoint's quota set the pace
        output    prompts.results.parquet (1.9 MB)
        next      batchrun collect prompts.results.parquet -o - | head -n 3
    """)


def test_partial_failure_groups_causes_and_says_what_a_rerun_does() -> None:
    assert final_block(FAILED, CONFIG) == _text("""
        finished  1,988 of 2,000 rows answered, 12 failed, in 1 min 9 s
        failed    9 rejected       line 214: 3051: Prompt contains 300112 tokens and...
                  2 timeout        line 77: timeout: no answer within 600 s, 3 attempts
                  1 invalid_input  line 1502: broken JSON at column 33
        tokens    612,480 prompt (96,000 cached) + 498,112 completion
        limit     the endpoint's quota set the pace
        output    prompts.results.parquet (failed rows have status "error")
        next      the same command sends the 2 timeouts again and nothing else
                  --retry-failed  also the 9 rejected;  edited rows go by themselves
                  --allow-failures 1%  accepts them                          exit code 3
    """)


def test_a_cause_has_one_line_whether_or_not_a_rerun_tries_it_again() -> None:
    spent, passing, blank, null = (
        ErrorCount(
            "transient", "504", 3, False, ErrorExample("1", "p.jsonl:1", "Gateway Time-out")
        ),
        ErrorCount("transient", "504", 2, True, ErrorExample("2", "p.jsonl:2", "Gateway Time-out")),
        ErrorCount("invalid_input", "blank_prompt", 4, False),
        ErrorCount("invalid_input", "null_prompt", 1, False),
    )
    failed = replace(FAILED, errors=[blank, spent, passing, null])
    assert final_block(failed, CONFIG).splitlines()[1:4] == [
        "failed    5 transient      line 1: 504: Gateway Time-out",
        "          4 invalid_input  blank_prompt",
        "          1 invalid_input  null_prompt",
    ]


def test_accepted_failures_are_named_without_a_way_to_accept_them() -> None:
    block = final_block(replace(FAILED, exit_code=0), CONFIG)
    assert "12 failed" in block
    assert "--allow-failures" not in block
    assert "exit code" not in block


def test_a_refused_key_is_named_but_never_shown() -> None:
    summary = RunSummary(
        state="refused",
        exit_code=4,
        reason="api.mistral.ai refused the key: 401 Unauthorized",
        output="prompts.results.parquet",
        state_dir="prompts.results.parquet.batchrun",
        rows=RowCounts(total=2_000, pending=2_000),
    )
    assert final_block(summary, CONFIG) == _text("""
        stopped   api.mistral.ai refused the key: 401 Unauthorized
        key       from $MISTRAL_API_KEY; nothing else was tried
        rows      0 answered, 2,000 waiting (none counts as failed)
        next      correct the key, then run the same command                 exit code 4
    """)


def test_an_interrupted_run_says_what_is_saved() -> None:
    summary = RunSummary(
        state="stopped",
        exit_code=130,
        output="prompts.results.parquet",
        state_dir="prompts.results.parquet.batchrun",
        rows=RowCounts(total=2_000, ok=1_308, pending=692),
    )
    assert final_block(summary, CONFIG) == _text("""
        stopped   1,308 of 2,000 rows answered and saved, 692 waiting
        saved     prompts.results.parquet.batchrun
        next      the same command continues; nothing is paid twice
                  batchrun collect prompts.results.parquet   to look at what is there
                                                                           exit code 130
    """)


def test_an_early_stop_says_why() -> None:
    summary = RunSummary(
        state="stopped",
        exit_code=75,
        reason="the deadline is reached",
        output="o.parquet",
        state_dir="o.parquet.batchrun",
        rows=RowCounts(total=10, ok=4, error=1, pending=5),
    )
    lines = final_block(summary, CONFIG).splitlines()
    assert lines[:3] == [
        "stopped   the deadline is reached",
        "rows      4 answered, 1 failed, 5 waiting",
        "saved     o.parquet.batchrun",
    ]
    assert lines[-1].endswith("exit code 75")


def test_a_continued_run_tells_its_own_share() -> None:
    summary = replace(
        DONE,
        rows=RowCounts(total=2_000, ok=2_000, reused=1_308),
        this_run=ThisRun(
            rows_sent=692,
            tokens=TokenCounts(prompt=211_906, completion=172_340),
            sending_s=23.0,
        ),
    )
    lines = final_block(summary, CONFIG).splitlines()
    assert lines[0] == "done      2,000 of 2,000 rows answered; 692 in this run, in 23 s"
    assert lines[2] == "          (this run: 211,906 + 172,340)"


def test_a_rerun_with_nothing_left_says_so() -> None:
    summary = replace(DONE, rows=RowCounts(total=5, ok=5, reused=5), this_run=None)
    first = final_block(summary, CONFIG).splitlines()[0]
    assert first == "done      5 of 5 rows answered; nothing was left to send"


def test_an_empty_input_is_a_success() -> None:
    block = final_block(RunSummary(output="o.parquet", rows=RowCounts(total=0)), CONFIG)
    assert block.startswith("done      no rows in the input")


def test_a_log_ends_with_counts_and_the_exit_code() -> None:
    assert final_lines(DONE) == [
        "done 2,000 sent, 0 failed, 1.1 M tokens",
        'note 3 answers were cut short (finish_reason "length")',
        "output prompts.results.parquet 2,000 rows, exit code 0",
    ]


def test_a_log_of_an_early_end_says_why() -> None:
    rows = RowCounts(total=9, ok=4, pending=5)
    summary = RunSummary(exit_code=143, reason="stopped by SIGTERM", rows=rows)
    assert final_lines(summary) == [
        "stopped by SIGTERM",
        "4 answered, 5 waiting, exit code 143",
    ]


@pytest.mark.parametrize(
    ("output", "step"),
    [
        ("o.parquet", "batchrun collect o.parquet -o - | head -n 3"),
        ("it's $x.parquet", """batchrun collect 'it'"'"'s $x.parquet' -o - | head -n 3"""),
        ("-dash.parquet", "batchrun collect ./-dash.parquet -o - | head -n 3"),
        ("o.jsonl", "head -n 3 o.jsonl"),
    ],
)
def test_the_way_to_look_can_be_pasted_whatever_the_name(output: str, step: str) -> None:
    block = final_block(replace(DONE, output=output), CONFIG)
    assert block.splitlines()[-1] == f"next      {step}"


def test_a_run_left_at_once_says_what_is_saved_and_what_may_be_billed() -> None:
    summary = RunSummary(
        state="stopped",
        exit_code=130,
        reason="stopped at once by SIGINT",
        output="prompts.results.parquet",
        state_dir="prompts.results.parquet.batchrun",
        rows=RowCounts(total=2_000, ok=1_308, pending=692),
        this_run=ThisRun(rows_sent=1_308, in_doubt=50, cut_off=48),
    )
    assert final_block(summary, CONFIG) == _text("""
        stopped   at once: 1,308 of 2,000 rows answered and saved, 692 waiting
                  48 requests were on their way and may be billed without an answer
        saved     prompts.results.parquet.batchrun
        next      the same command continues; nothing is paid twice
                  batchrun collect prompts.results.parquet   to look at what is there
                                                                           exit code 130
    """)


def test_one_of_a_thing_is_said_as_one() -> None:
    one = replace(
        FAILED,
        rows=RowCounts(total=1, error=1),
        errors=[replace(FAILURES[0], rows=1)],
        this_run=ThisRun(rows_sent=1, cut_off=1),
        exit_code=75,
    )
    texts = [
        final_block(one, CONFIG),
        final_block(replace(one, exit_code=3), CONFIG),
        *final_lines(replace(one, exit_code=3)),
        *start_lines(replace(START, rows=1, to_send=1)),
    ]
    assert not re.search(r"\b1 \w*(rows|requests|answers|attempts)\b", "\n".join(texts))


@pytest.mark.parametrize(
    "block",
    [
        start_block(
            replace(START, files=(replace(PROMPTS, carried_only=tuple(map(str, range(99)))),))
        ),
        final_block(replace(FAILED, errors=FAILURES * 5), CONFIG),
        final_block(replace(DONE, notes=["a note of many words " * 9]), CONFIG),
    ],
    ids=["columns", "causes", "notes"],
)
def test_blocks_stay_within_80_columns(block: str) -> None:
    assert max(map(len, block.splitlines())) <= 80


def test_an_error_is_one_sentence_and_its_choices() -> None:
    error = UsageError(
        "no key for https://api.Mistral.com. Set BATCHRUN_API_KEY, or choose",
        next_steps=("--mock              try it without a key or network (synthetic answers)",),
    )
    assert error_text(error) == _text("""
        batchrun: no key for https://api.Mistral.com. Set BATCHRUN_API_KEY, or choose
          --mock              try it without a key or network (synthetic answers)
    """)


def test_validate_shows_every_bad_row_and_one_request() -> None:
    facts = ValidateFacts(
        files=(PROMPTS,),
        rows=2_000,
        bad=2,
        bad_rows=(
            BadRowFacts("prompts.jsonl:812", '"prompt" is null'),
            BadRowFacts("prompts.jsonl:1502", "broken JSON at column 33"),
        ),
        repeats=312,
        url="https://api.mistral.ai/v1/chat/completions",
        first_body='{"model":"mistral-small-latest","messages":[{"role":"user","content":"Hi"}]}',
    )
    assert validate_block(facts) == _text("""
        file      prompts.jsonl, JSONL, 2,000 rows, 1.3 MB
        shape     prompt (column "prompt")
        sent      prompt            carried only: id, category
        bad       2 rows
                  line 812   "prompt" is null
                  line 1502  broken JSON at column 33
        repeats   312 rows repeat an earlier request
        request   POST https://api.mistral.ai/v1/chat/completions
                  {"model":"mistral-small-latest","messages":[{"role":"user","content...
        sent      nothing                                                    exit code 3
    """)


def test_validate_of_several_files_names_the_file_of_a_bad_row() -> None:
    other = replace(PROMPTS, name="b.parquet", format="parquet")
    facts = ValidateFacts(
        files=(PROMPTS, other), rows=2, bad=3, bad_rows=(BadRowFacts("b.parquet:7", "no prompt"),)
    )
    block = validate_block(facts)
    assert "          b.parquet:7  no prompt\n          ... and 2 more" in block


def test_status_of_a_running_process(utc: None) -> None:
    started = int(datetime(2026, 11, 21, 2, 0).timestamp() * 1000)
    facts = StatusFacts(
        state="running",
        output="o.parquet",
        rows=RowCounts(total=2_000, ok=1_260, error=2, pending=738),
        pid=4711,
        host="etl-3",
        started_at_ms=started,
        updated_at_ms=started + 360_000,
        rows_per_s=30.7,
        in_flight=48,
        bound_by="quota",
    )
    assert status_block(facts) == _text("""
        running   pid 4711 on etl-3 since 02:00 (6 min)
        rows      1,260 of 2,000 answered, 2 failed, 738 waiting
        speed     30.7 rows/s, 48 in flight, bound by the quota; ETA 24 s
    """)
    assert facts.exit_code == 11


def test_status_of_a_stopped_run_can_be_pasted(utc: None) -> None:
    facts = StatusFacts(
        state="stopped",
        output="o.parquet",
        rows=RowCounts(total=2_000, ok=1_260, error=2, pending=738),
        finished_at_ms=int(datetime(2026, 11, 21, 2, 6).timestamp() * 1000),
        reason="deadline reached",
        exit_code_of_run=75,
        command="batchrun submit prompts.jsonl",
    )
    assert status_block(facts) == _text("""
        stopped   2026-11-21 02:06, deadline reached (exit code 75)
        rows      1,260 of 2,000 answered, 2 failed, 738 waiting
        next      batchrun submit prompts.jsonl
    """)
    assert facts.exit_code == 75


def test_status_of_a_finished_output(utc: None) -> None:
    facts = StatusFacts(
        state="finished",
        output="o.parquet",
        rows=RowCounts(total=2_000, ok=1_988, error=12),
        finished_at_ms=int(datetime(2026, 11, 21, 14, 2).timestamp() * 1000),
        models=("mistral-small-latest",),
        endpoint_hosts=("api.mistral.ai",),
        errors=tuple(FAILURES),
        tokens=TOKENS,
    )
    assert status_block(facts) == _text("""
        finished  2026-11-21 14:02, mistral-small-latest at api.mistral.ai
        rows      1,988 answered, 12 failed (9 rejected, 2 timeout, 1 invalid_input)
                  line 214: 3051: Prompt contains 300112 tokens and more words
        tokens    612,480 prompt (96,000 cached) + 498,112 completion
    """)
    assert facts.exit_code == 0


def test_collect_says_what_is_there_and_how_to_go_on() -> None:
    facts = CollectFacts(
        output="o.partial.parquet",
        collected_from="o.parquet",
        rows=RowCounts(total=2_000, ok=1_308, pending=692),
        size_bytes=1_200_000,
        command="batchrun submit prompts.jsonl -o o.parquet",
    )
    assert collect_block(facts) == _text("""
        collected 1,308 of 2,000 answered, 0 failed, 692 waiting
        output    o.partial.parquet (partial, 1.2 MB)
        next      batchrun submit prompts.jsonl -o o.parquet
    """)


def test_json_is_one_object_with_the_exit_code() -> None:
    summary = json.loads(to_json(FAILED))
    assert (summary["schema"], summary["exit_code"], summary["rows"]["error"]) == (1, 3, 12)
    facts = StatusFacts(state="stopped", output="o.parquet", rows=RowCounts())
    assert json.loads(to_json(facts))["exit_code"] == 75


def test_json_survives_a_lone_surrogate_in_a_file_name() -> None:
    assert json.loads(to_json(RunSummary(inputs=["caf\udce9.jsonl"])))["schema"] == 1


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (UsageError("x"), "error", 2),
        (Locked("x"), "error", 11),
        (EndpointRefused("x"), "refused", 4),
        (KeyboardInterrupt(), "stopped", 130),
        (ValueError("x"), "error", 1),
    ],
    ids=["usage", "locked", "refused", "interrupted", "bug"],
)
def test_json_of_a_command_that_never_began(error: BaseException, state: str, code: int) -> None:
    summary = error_summary(error, "0.1.0", ["a.jsonl"])
    assert (summary.state, summary.exit_code, summary.inputs) == (state, code, ["a.jsonl"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0 s"),
        (5.0, "5 s"),
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (38, "38 s"),
        (59.7, "1 min"),
        (65, "1 min 5 s"),
        (3_599.9, "1 h"),
        (7_440, "2 h 4 min"),
        (266_400, "3 d 2 h"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_900_000, "1.9 MB"), (123_456_789, "123 MB")],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert words.size(size_bytes) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [("a.jsonl:214", "line 214"), ("a.parquet:7", "row 7"), ("row 9", "row 9"), ("a:b", "a:b")],
)
def test_places_for_people(source: str, text: str) -> None:
    assert place(source) == text
