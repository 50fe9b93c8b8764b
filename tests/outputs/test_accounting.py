"""What is counted, and that nothing unknown becomes a zero."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from batchrun.outputs.tally import MAX_CAUSES, OTHER_CODES, OutputTally
from batchrun.sending.tally import RunTally
from batchrun.types import NO_USAGE, Answer, Answers, Decision, Outcome, Reply, Tokens, Usage

OK = Outcome(
    hash=b"h" * 16,
    occurrence=0,
    kind="ok",
    final=True,
    attempts=1,
    in_doubt=0,
    http_status=200,
    code="",
    message="",
    request_id="",
    model="m",
    latency_s=0.1,
    ttft_s=None,
    finished_at_ms=1,
    usage=Usage(prompt_tokens=10, completion_tokens=5, total_tokens=15),
    body=b"{}",
)
REJECTED = replace(OK, kind="rejected", code="3051", message="too long", usage=NO_USAGE)
TIMEOUT = replace(OK, kind="timeout", final=False, code="timeout", message="slow", usage=NO_USAGE)
ANSWER = Answer(response="hi", finish_reason="stop", usage=OK.usage)


def _told(*rows: tuple[Outcome | None, str | None, Answer | None]) -> OutputTally:
    tally = OutputTally()
    for number, (outcome, reason, answer) in enumerate(rows, 1):
        tally.add(outcome, reason, answer, f"id-{number}", f"a.jsonl:{number}")
    return tally


def test_every_row_of_an_output_is_ok_failed_or_pending() -> None:
    tally = _told(
        (OK, None, ANSWER),
        (REJECTED, None, None),
        (TIMEOUT, None, None),
        (None, "broken JSON at column 33", None),
        (None, None, None),
    )
    rows = tally.rows
    assert (rows.total, rows.ok, rows.error, rows.pending) == (5, 1, 3, 1)
    assert tally.rows.passing == 1


def test_tokens_that_nobody_reported_stay_unknown() -> None:
    tally = _told((replace(OK, usage=NO_USAGE), None, Answer(response="hi")))
    assert tally.tokens.prompt is None
    assert tally.tokens.rows_without_usage == 1


def test_tokens_add_up_and_a_partial_report_counts_as_one() -> None:
    partial = Usage(prompt_tokens=7, cached_tokens=4)
    tally = _told((OK, None, ANSWER), (replace(OK, usage=partial), None, Answer(response="x")))
    tokens = tally.tokens
    assert (tokens.prompt, tokens.completion, tokens.total) == (17, 5, 15)
    assert (tokens.cached, tokens.reasoning, tokens.rows_without_usage) == (4, None, 0)


def test_failures_are_grouped_by_cause_largest_first_with_the_first_example() -> None:
    tally = _told(
        (TIMEOUT, None, None),
        (REJECTED, None, None),
        (replace(REJECTED, message="other words"), None, None),
        (None, '"prompt" is null', None),
    )
    assert [(e.kind, e.code, e.rows, e.retried_on_rerun) for e in tally.errors] == [
        ("rejected", "3051", 2, False),
        ("timeout", "timeout", 1, True),
        ("invalid_input", "", 1, False),
    ]
    example = tally.errors[0].example
    assert example is not None
    assert (example.custom_id, example.source, example.message) == ("id-2", "a.jsonl:2", "too long")


def test_one_cause_with_and_without_a_retry_on_rerun_is_two() -> None:
    tally = _told((TIMEOUT, None, None), (replace(TIMEOUT, final=True), None, None))
    assert sorted(e.retried_on_rerun for e in tally.errors) == [False, True]


def test_codes_that_never_repeat_do_not_fill_the_memory() -> None:
    tally = _told(*((replace(REJECTED, code=f"c{n}"), None, None) for n in range(MAX_CAUSES + 500)))
    assert len(tally.errors) == MAX_CAUSES + 1
    assert (tally.errors[0].code, tally.errors[0].rows) == (OTHER_CODES, 500)
    assert sum(e.rows for e in tally.errors) == MAX_CAUSES + 500


@pytest.mark.parametrize(
    ("answer", "truncated", "filtered", "empty"),
    [
        pytest.param(ANSWER, 0, 0, 0, id="whole"),
        pytest.param(replace(ANSWER, finish_reason="length"), 1, 0, 0, id="length"),
        pytest.param(replace(ANSWER, finish_reason="model_length"), 1, 0, 0, id="mistral length"),
        pytest.param(Answer(finish_reason="length"), 1, 0, 1, id="reasoned its budget away"),
        pytest.param(Answer(finish_reason="content_filter"), 0, 1, 0, id="filtered"),
        pytest.param(Answer(response="No.", refusal=True), 0, 1, 0, id="refusal"),
        pytest.param(Answer(response="", finish_reason="stop"), 0, 0, 1, id="empty text"),
        pytest.param(Answer(tool_calls="[]", finish_reason="tool_calls"), 0, 0, 0, id="tool call"),
    ],
)
def test_doubtful_answers_stay_ok_but_are_counted(
    answer: Answer, truncated: int, filtered: int, empty: int
) -> None:
    rows = _told((OK, None, answer)).rows
    assert (rows.ok, rows.truncated, rows.filtered, rows.empty) == (1, truncated, filtered, empty)


def test_repeats_and_models_of_an_output_are_known() -> None:
    tally = _told(
        (replace(OK, model="b"), None, ANSWER),
        (replace(OK, model="a", occurrence=1), None, ANSWER),
        (replace(OK, model="b"), None, ANSWER),
        (replace(OK, model=""), None, ANSWER),
    )
    assert tally.request_models == ["b", "a"]
    assert tally.rows.duplicate == 1


_count = st.none() | st.integers(0, 9)
_rows = st.tuples(
    st.builds(Usage, _count, _count, _count, _count, _count),
    st.integers(0, 2),
    st.sampled_from(["", "a", "b"]),
    st.none() | st.sampled_from(["", "hi"]),
    st.none() | st.sampled_from(["stop", "length", "content_filter"]),
    st.none() | st.just("[]"),
    st.booleans(),
)


@given(st.lists(_rows))
def test_rows_told_together_count_as_rows_told_one_by_one(
    rows: list[tuple[Usage, int, str, str | None, str | None, str | None, bool]],
) -> None:
    singly, together = OutputTally(), OutputTally()
    for usage, occurrence, model, response, reason, tool_calls, refusal in rows:
        outcome = replace(OK, usage=usage, occurrence=occurrence, model=model)
        answer = Answer(response, reason, tool_calls=tool_calls, refusal=refusal)
        singly.add(outcome, None, answer, "", "")
    usages = [row[0] for row in rows]
    tokens = Tokens(
        *([getattr(usage, name) for usage in usages] for name in Usage.__struct_fields__)
    )
    nothing = [None] * len(rows)
    answers = Answers(
        [row[3] for row in rows],
        [row[4] for row in rows],
        nothing,
        nothing,
        [row[5] for row in rows],
        [row[6] for row in rows],
    )
    together.add_ok([row[2] for row in rows], [row[1] for row in rows], tokens, answers)
    assert together.rows == singly.rows
    assert together.tokens == singly.tokens
    assert together.request_models == singly.request_models


def test_attempts_of_a_run_are_told_once_each() -> None:
    tally = RunTally()
    limited = Decision("rate_limit", "429")
    slow = Decision("timeout", "timeout", in_doubt=True)
    # One row: refused, timed out, answered. Another: timed out for good. A third: cut off.
    tally.attempt_failed(limited, again=True)
    tally.attempt_failed(slow, again=True)
    tally.add(OK, Reply(is_json=True, has_content=True, finish_reason="stop"), 0)
    tally.attempt_failed(slow, again=False)
    tally.add(TIMEOUT, None, 213)
    tally.withdrawn()

    assert (tally.attempts, tally.retries, tally.rate_limited, tally.in_doubt) == (5, 2, 1, 3)
    assert (tally.ok, tally.failed, tally.done) == (1, 1, 2)
    assert tally.tokens_spent == 15
    assert tally.errors[0].example is not None
    assert tally.errors[0].example.source == "row 214"


def test_a_run_counts_doubtful_replies_live() -> None:
    tally = RunTally()
    tally.add(OK, Reply(is_json=True, finish_reason="length", has_content=True), 0)
    tally.add(OK, Reply(is_json=True, finish_reason="content_filter"), 1)
    tally.add(OK, Reply(is_json=True, finish_reason="stop"), 2)
    assert (tally.truncated, tally.filtered, tally.empty) == (1, 1, 1)
