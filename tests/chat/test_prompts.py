"""Shapes, settings, bodies and the frozen request_hash."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.chat.build import Builder, custom_id
from batchrun.chat.identity import encode, format_hash, json_text, parse_hash, request_hash
from batchrun.chat.rows import Built, Identity, Invalid, Layout, PromptSettings
from batchrun.chat.shape import detect
from batchrun.config import Shape
from batchrun.errors import UsageError

PLAIN = PromptSettings(model="m")
USER = [{"role": "user", "content": "hi"}]


def layout(rows: list[dict[str, Any]], settings: PromptSettings, forced: Shape | None) -> Layout:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return detect(columns, rows, settings, forced, "prompts.jsonl")


def build(
    row: dict[str, Any], settings: PromptSettings = PLAIN, forced: Shape | None = None
) -> Built | Invalid:
    before = json_text(row)
    built = Builder(layout([row], settings, forced), settings).build(row)
    assert json_text(row) == before, "a row is never changed"
    return built


def body(
    row: dict[str, Any], settings: PromptSettings = PLAIN, forced: Shape | None = None
) -> dict[str, Any]:
    built = build(row, settings, forced)
    assert isinstance(built, Built), built
    return built.body


def invalid(row: dict[str, Any], like: dict[str, Any], forced: Shape | None = None) -> Invalid:
    """What is wrong with ``row`` in a table that has the columns of ``like``."""
    built = Builder(layout([like], PLAIN, forced), PLAIN).build(row)
    assert isinstance(built, Invalid), built
    return built


# --- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        pytest.param({"id": 1, "prompt": "x"}, "prompt", id="prompt"),
        pytest.param({"messages": USER, "topic": "t"}, "messages", id="messages"),
        pytest.param({"custom_id": "a", "body": {"messages": USER}}, "batch", id="mistral-batch"),
        pytest.param(
            {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}},
            "batch",
            id="openai-batch",
        ),
        pytest.param({"custom_id": "a", "body": "{}", "prompt": "x"}, "batch", id="body-as-json"),
        pytest.param({"custom_id": "a", "body": "Dear", "prompt": "x"}, "prompt", id="mail-body"),
    ],
)
def test_the_shape_follows_from_the_columns(row: dict[str, Any], shape: str) -> None:
    assert layout([row], PLAIN, None).shape == shape


def test_a_table_that_fits_two_shapes_asks_for_a_choice() -> None:
    rows: list[dict[str, Any]] = [{"messages": USER, "prompt": "x"}]
    with pytest.raises(UsageError, match="--shape messages or --shape prompt"):
        layout(rows, PLAIN, None)
    assert layout(rows, PLAIN, "messages").shape == "messages"
    assert layout(rows, PLAIN, "prompt").shape == "prompt"


def test_a_table_without_a_usable_column_names_what_to_try() -> None:
    with pytest.raises(UsageError) as raised:
        detect(
            ["id", "question", "category"],
            [{"id": "aaaaaaaaaaaaaaaaaaaaa", "question": "why?", "category": "c"}],
            PLAIN,
            None,
            "prompts.parquet",
        )
    assert str(raised.value) == (
        'prompts.parquet: no "prompt", "messages" or "body" column.\n'
        "  It has: id, question, category. Try --prompt-column question,"
        " or -p 'Summarise: {{ question }}'"
    )


def test_the_longest_text_is_suggested_when_no_name_helps() -> None:
    rows = [{"k": "ab", "frage": "Warum ist der Himmel blau?", "n": 5}]
    with pytest.raises(UsageError, match="Try --prompt-column frage"):
        layout(rows, PLAIN, None)


def test_many_columns_are_listed_on_one_short_line() -> None:
    columns = [f"column_{i}" for i in range(500)]
    with pytest.raises(UsageError) as raised:
        detect(columns, [{"column_0": 1}], PLAIN, None, "wide.parquet")
    assert "more" in str(raised.value)
    assert all(len(line) <= 100 for line in str(raised.value).splitlines())


def test_a_named_column_that_is_missing_is_a_usage_error() -> None:
    row = {"question": "x"}
    for settings, option in (
        (PromptSettings(prompt_column="frage"), "--prompt-column"),
        (PromptSettings(prompt_column="question", body_columns=("tools",)), "--body-columns"),
    ):
        with pytest.raises(UsageError, match=option):
            layout([row], settings, None)
    for shape in ("messages", "batch", "prompt"):
        with pytest.raises(UsageError, match=f"--shape {shape}"):
            layout([row], PLAIN, shape)


def test_a_table_without_rows_is_never_refused() -> None:
    assert detect([], [], PLAIN, None, "empty.jsonl").shape == "prompt"
    assert detect(["x"], [], PromptSettings(prompt_column="y"), None, "e.parquet").shape == "prompt"
    assert detect(["messages"], [], PLAIN, None, "e.parquet").shape == "messages"


@pytest.mark.parametrize(
    ("row", "forced", "sent", "carried", "needed"),
    [
        pytest.param(
            {"custom_id": 1, "id": 1, "prompt": "x", "model": "z"},
            None,
            ("prompt",),
            ("id", "model"),
            ("custom_id", "prompt"),
            id="prompt",
        ),
        pytest.param(
            {"messages": USER, "seed": 1, "topic": "t", "n": 2},
            None,
            ("messages", "seed"),
            ("topic", "n"),
            ("messages", "seed"),
            id="messages",
        ),
        pytest.param(
            {"custom_id": 1, "method": "POST", "url": "u", "body": {}, "note": 1},
            None,
            ("body",),
            ("note",),
            ("custom_id", "method", "url", "body"),
            id="batch",
        ),
        pytest.param(
            {"custom_id": 1, "metadata": {}, "messages": USER, "any": 1},
            "body",
            ("messages", "any"),
            ("metadata",),
            None,
            id="body",
        ),
    ],
)
def test_the_layout_says_what_is_sent_carried_and_needed(
    row: dict[str, Any],
    forced: Shape | None,
    sent: tuple[str, ...],
    carried: tuple[str, ...],
    needed: tuple[str, ...] | None,
) -> None:
    found = layout([row], PLAIN, forced)
    assert (found.sent, found.carried_only, found.columns_needed) == (sent, carried, needed)


# --- bodies ------------------------------------------------------------------------------------


def test_a_prompt_is_one_user_message_and_nothing_else() -> None:
    row = {"id": 1, "prompt": "hi", "temperature": 1, "system": "s"}
    assert body(row) == {"model": "m", "messages": USER}


def test_messages_take_the_known_fields_that_are_not_null() -> None:
    row = {
        "messages": USER,
        "temperature": 0,
        "top_p": None,
        "stop": ["x"],
        "stream": False,
        "n": 2,
        "topic": "t",
    }
    assert body(row) == {
        "model": "m",
        "messages": USER,
        "temperature": 0,
        "stop": ["x"],
        "stream": False,
    }


def test_messages_may_be_a_json_text() -> None:
    assert body({"messages": json.dumps(USER)})["messages"] == USER


def test_a_batch_line_sends_its_body_as_it_is() -> None:
    sent = {"messages": USER, "model": "own", "stop": None, "unknown": {"a": None}}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": sent}
    assert body(line) == sent
    assert body({"custom_id": "a", "body": json.dumps(sent)}) == sent


def test_the_body_shape_sends_the_whole_row() -> None:
    row = {"custom_id": "a", "metadata": {"k": 1}, "messages": USER, "anything": [1], "stop": None}
    assert body(row, forced="body") == {
        "model": "m",
        "messages": USER,
        "anything": [1],
        "stop": None,
    }


def test_body_columns_send_more() -> None:
    more = PromptSettings(body_columns=("safe_prompt", "n"))
    assert body({"prompt": "hi", "safe_prompt": True, "n": 2.0}, more) == {
        "messages": USER,
        "safe_prompt": True,
        "n": 2,
    }
    line = {"custom_id": "a", "safe_prompt": True, "n": 3, "body": {"messages": USER, "n": 1}}
    assert body(line, more) == {"messages": USER, "safe_prompt": True, "n": 1}


@pytest.mark.parametrize("value", [256.0, Decimal("256.00"), 256])
def test_a_whole_number_that_a_table_holds_as_double_is_sent_whole(value: Any) -> None:
    sent = encode(body({"messages": USER, "max_tokens": value, "temperature": 1.0}))
    assert b'"max_tokens":256,' in sent
    assert b'"temperature":1.0' in sent


def test_the_command_line_replaces_and_other_sources_fill_in() -> None:
    row = {"messages": USER, "model": "own", "temperature": 0.1}
    fill = PromptSettings(model="m", params={"temperature": 0.9, "seed": 1})
    assert body(row, fill) == {**row, "seed": 1}
    replace = PromptSettings(
        model="m",
        model_replaces=True,
        params={"temperature": 0.9, "seed": 1},
        params_replacing=frozenset({"temperature"}),
    )
    assert body(row, replace) == {"messages": USER, "model": "m", "temperature": 0.9, "seed": 1}


def test_whose_model_it_is_is_told() -> None:
    own = {"messages": USER, "model": "own"}

    def facts(row: dict[str, Any], settings: PromptSettings) -> tuple[str, bool]:
        built = build(row, settings)
        assert isinstance(built, Built)
        return built.model, built.model_from_row

    replacing = PromptSettings(model="m", model_replaces=True)
    assert facts(own, PLAIN) == ("own", True)
    assert facts(own, replacing) == ("m", False)
    assert facts({"messages": USER, "model": "m"}, replacing) == ("m", False)
    assert facts({"messages": USER}, replacing) == ("m", False)
    assert facts({"messages": USER}, PromptSettings()) == ("", False)


def test_system_fills_in_where_a_row_has_none() -> None:
    settings = PromptSettings(system="Be brief.")
    first = {"role": "system", "content": "Be brief."}
    assert body({"prompt": "hi"}, settings)["messages"] == [first, *USER]
    assert body({"messages": USER}, settings)["messages"] == [first, *USER]
    line = {"custom_id": "a", "body": {"messages": USER}}
    assert body(line, settings)["messages"] == [first, *USER]
    for role in ("system", "developer"):
        own = [*USER, {"role": role, "content": "Be long."}]
        assert body({"messages": own}, settings)["messages"] == own


def test_stream_is_written_only_when_asked_for() -> None:
    assert "stream" not in body({"prompt": "hi"})
    assert body({"prompt": "hi"}, PromptSettings(stream=True))["stream"] is True
    assert "stream_options" not in body({"prompt": "hi"}, PromptSettings(stream=True))
    asked = body({"prompt": "hi"}, PromptSettings(stream=True, stream_usage=True))
    assert asked["stream_options"] == {"include_usage": True}
    own = {"custom_id": "a", "body": {"messages": USER, "stream_options": {"x": 1}}}
    assert body(own)["stream_options"] == {"x": 1}
    both = body(own, PromptSettings(stream=True, stream_usage=True))
    assert both["stream_options"] == {"include_usage": True, "x": 1}
    refused = {"custom_id": "a", "body": {"messages": USER, "stream_options": {"include_usage": 0}}}
    refusing = body(refused, PromptSettings(stream=True, stream_usage=True))
    assert refusing["stream_options"] == {"include_usage": 0}
    assert body({"messages": USER, "stream": True})["stream"] is True
    with_param = PromptSettings(params={"stream": False})
    assert body({"prompt": "hi"}, with_param)["stream"] is False


@pytest.mark.parametrize(
    ("row", "like", "why"),
    [
        pytest.param({"q": 1}, {"prompt": "x"}, 'no "prompt"', id="none"),
        pytest.param({"prompt": None}, {"prompt": "x"}, '"prompt" is null', id="null"),
        pytest.param({"prompt": 4}, {"prompt": "x"}, '"prompt" is a number, not text', id="number"),
        pytest.param({"prompt": ["x"]}, {"prompt": "x"}, '"prompt" is a list, not text', id="list"),
        pytest.param(
            {"prompt": b"\xff"},
            {"prompt": "x"},
            '"prompt" is binary data, not UTF-8, not text',
            id="bytes",
        ),
        pytest.param(
            {"messages": "hello"},
            {"messages": USER},
            '"messages" is text that is not a JSON list',
            id="text",
        ),
        pytest.param(
            {"messages": "[" * 100_000},
            {"messages": USER},
            '"messages" is text that is not a JSON list',
            id="deep-text",
        ),
        pytest.param(
            {"messages": {}}, {"messages": USER}, '"messages" is an object, not a list', id="object"
        ),
        pytest.param(
            {"messages": []}, {"messages": USER}, '"messages" is an empty list', id="empty"
        ),
        pytest.param(
            {"messages": [*USER, "x"]},
            {"messages": USER},
            '"messages" item 2 is text, not an object',
            id="item",
        ),
        pytest.param(
            {"messages": USER, "model": 7},
            {"messages": USER},
            '"model" is a number, not text',
            id="model",
        ),
        pytest.param(
            {"body": {"input": "x"}},
            {"custom_id": 1, "body": {}},
            'no "body.messages"',
            id="no-messages",
        ),
        pytest.param(
            {"body": 3},
            {"custom_id": 1, "body": {}},
            '"body" is a number, not an object',
            id="body",
        ),
        pytest.param(
            {"url": "/v1/embeddings", "body": {"messages": USER}},
            {"custom_id": 1, "body": {}},
            '"url" is "/v1/embeddings"; only "/v1/chat/completions" can be sent',
            id="other-api",
        ),
        pytest.param(
            {"method": "GET", "body": {"messages": USER}},
            {"custom_id": 1, "body": {}},
            '"method" is "GET"; only "POST" can be sent',
            id="method",
        ),
    ],
)
def test_a_row_that_cannot_be_sent_says_why(
    row: dict[str, Any], like: dict[str, Any], why: str
) -> None:
    assert invalid(row, like).reason == why


@pytest.mark.parametrize(
    ("row", "like", "code"),
    [
        ({}, {"prompt": "x"}, "no_prompt"),
        ({"prompt": None}, {"prompt": "x"}, "null_prompt"),
        ({"prompt": 4}, {"prompt": "x"}, "wrong_type"),
        ({"prompt": ""}, {"prompt": "x"}, "blank_prompt"),
        ({"prompt": " \t\u00a0\r\n"}, {"prompt": "x"}, "blank_prompt"),
        ({"prompt": "\ud800"}, {"prompt": "x"}, "lone_surrogate"),
        ({}, {"messages": USER}, "no_messages"),
        ({"messages": []}, {"messages": USER}, "no_messages"),
        ({"messages": None}, {"messages": USER}, "null_messages"),
        ({"messages": "no list"}, {"messages": USER}, "not_json"),
        ({"messages": [{"role": "user", "content": " "}]}, {"messages": USER}, "blank_prompt"),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": ""}]},
            {"messages": USER},
            "blank_prompt",
        ),
        ({"messages": USER, "model": 7}, {"messages": USER}, "wrong_type"),
        ({"messages": USER, "seed": float("nan")}, {"messages": USER}, "not_finite"),
        ({"body": None}, {"custom_id": 1, "body": {}}, "null_body"),
        ({"method": "GET", "body": {}}, {"custom_id": 1, "body": {}}, "other_api"),
    ],
)
def test_reasons_have_codes_that_tell_them_apart(
    row: dict[str, Any], like: dict[str, Any], code: str
) -> None:
    assert invalid(row, like).code == code
    builder = Builder(layout([like], PLAIN, None), PLAIN)
    assert builder.identify(row) == builder.build(row)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "only this"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [{"role": "user", "content": ""}, {"role": "assistant", "content": None}],
        [{"role": "user", "content": ""}, {"role": "tool", "content": "42"}],
    ],
)
def test_messages_that_say_something_are_sent(messages: Any) -> None:
    assert body({"messages": messages})["messages"] == messages


def test_the_code_of_a_prompt_is_the_same_whatever_its_column_is_called() -> None:
    settings = PromptSettings(prompt_column="question")
    builder = Builder(layout([{"question": "x"}], settings, None), settings)
    assert builder.build({"id": 1}) == Invalid("no_prompt", 'no "question"')


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        ("a", "a"),
        ("", ""),
        (17, "17"),
        (1.5, "1.5"),
        (True, "true"),
        ([1, "é"], '[1,"é"]'),
        ("é\ud800\U0001f600", "é\ufffd\U0001f600"),
        (2**80, str(2**80)),
        (float("nan"), "NaN"),
    ],
)
def test_a_custom_id_is_text(value: Any, text: str | None) -> None:
    assert custom_id({"custom_id": value}) == text
    assert custom_id({}) is None


# --- bytes and identity ------------------------------------------------------------------------

TEXTS = st.one_of(st.text(), st.text(st.characters()), st.sampled_from(["\x00", "null", '"\\']))
SETTINGS = st.builds(
    PromptSettings,
    model=st.none() | st.text(max_size=3),
    model_replaces=st.booleans(),
    system=st.none() | st.text(max_size=3),
    params=st.dictionaries(
        st.sampled_from(["a", "messages", "model", "stream", "stream_options", "z"]),
        st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.just({"b": [1]}),
    ),
    params_replacing=st.frozensets(st.sampled_from(["a", "messages", "model", "stream"])),
    stream=st.booleans(),
    stream_usage=st.booleans(),
)


@given(TEXTS, SETTINGS)
def test_a_prompt_is_one_user_message_whatever_else_is_asked(
    text: str, settings: PromptSettings
) -> None:
    prompt = build({"prompt": text}, settings)
    assert prompt == build({"messages": [{"role": "user", "content": text}]}, settings)


@given(TEXTS, SETTINGS)
def test_identifying_a_row_says_what_building_it_says(text: str, settings: PromptSettings) -> None:
    for row in ({"prompt": text}, {"messages": [{"role": "user", "content": text}]}):
        builder = Builder(layout([row], settings, None), settings)
        built, found = builder.build(row), builder.identify(row)
        if isinstance(built, Invalid):
            assert found == built
        else:
            assert found == Identity(built.hash, built.model)
            assert built.hash == request_hash(built.body)


def test_a_body_is_compact_utf8_in_its_own_order() -> None:
    assert encode({"b": "é😀", "a": [1, 1.0, None]}) == '{"b":"é😀","a":[1,1.0,null]}'.encode()


def test_numbers_beyond_a_double_are_sent_as_they_were_written() -> None:
    numbers: dict[str, Any] = {"a": 2**80, "b": Decimal("1E+400")}
    assert encode(numbers) == b'{"a":1208925819614629174706176,"b":1E+400}'


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(float("nan"), id="nan"),
        pytest.param(float("inf"), id="infinity"),
        pytest.param([{"deep": [float("-inf")]}], id="nested"),
        pytest.param("\ud800", id="surrogate"),
        pytest.param({"\udfff": 1}, id="surrogate-key"),
    ],
)
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    for function in (encode, request_hash):
        with pytest.raises(ValueError, match=r"NaN|surrogate"):
            function({"messages": USER, "x": value})


@pytest.mark.parametrize(
    "streaming",
    [
        pytest.param({"stream": "\ud800"}, id="surrogate"),
        pytest.param({"stream_options": {"x": [float("nan")]}}, id="nan"),
        pytest.param({"stream": None, "stream_options": float("-inf")}, id="infinity"),
        pytest.param({"stream_options": {"\udfff": True}}, id="surrogate-key"),
    ],
)
def test_a_row_is_invalid_for_what_only_its_streaming_cannot_hold(
    streaming: dict[str, Any],
) -> None:
    row: dict[str, Any] = {"custom_id": "a", "body": {"messages": USER, **streaming}}
    builder = Builder(layout([row], PLAIN, None), PLAIN)
    built = builder.build(row)
    assert isinstance(built, Invalid)
    assert re.search("NaN|surrogate", built.reason)
    assert builder.identify(row) == built


def test_nesting_without_end_is_refused() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    for function in (encode, request_hash):
        with pytest.raises(ValueError, match="deep"):
            function({"x": value})


# These digests are in published outputs: they never change.
GOLDEN = [
    pytest.param(
        {"model": "mistral-small-latest", "messages": [{"role": "user", "content": "hi"}]},
        "1:97df85860ac0c4c6e36c648919658b17",
        id="plain",
    ),
    pytest.param({}, "1:b978d7a5734387ed70df46bc8e199b1e", id="empty"),
    pytest.param(
        {"messages": [{"role": "user", "content": 'żółw 木漏れ日 🏏 \u2028 \x7f \x01 "\\/'}]},
        "1:593c7f3eaaed18c227d7182a1d060101",
        id="unicode",
    ),
    pytest.param(
        {"f": [0.1, 1.0, -0.0, 1e16, 1e22, 1e-7, 5e-324, 1.7976931348623157e308, 0.3, 100.0]},
        "1:1d411fd48e31299d177a7634008c0e4b",
        id="floats",
    ),
    pytest.param(
        {"i": [0, -1, 2**53, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 10**30]},
        "1:e3ceaac2a6d88ddab68b0358d0d6294f",
        id="integers",
    ),
    pytest.param(
        {"d": [Decimal("1E+400"), Decimal("0.70")], "n": None, "t": True, "e": [[], {}]},
        "1:c24ecc30dbbffa8007e6fa8b1a1cc321",
        id="others",
    ),
    pytest.param(
        {"z": {"é": 1, "z": 2, "a": {"\U0001f600": 1, "\uffff": 2, "Z": 3}}, "": 0, "A": 1},
        "1:00c366fa30aecdad43b0c19a447f5412",
        id="key-order",
    ),
]


@pytest.mark.parametrize(("value", "digest"), GOLDEN)
def test_the_request_hash_is_frozen(value: Any, digest: str) -> None:
    assert format_hash(request_hash(value)) == digest


def test_streaming_does_not_change_the_identity() -> None:
    plain: dict[str, Any] = {"messages": USER}
    streamed: dict[str, Any] = {**plain, "stream": True, "stream_options": {"include_usage": True}}
    assert request_hash(streamed) == request_hash(plain)
    assert request_hash({**plain, "x": {"stream": True}}) != request_hash({**plain, "x": {}})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # codec: whatever UTF-8 can hold
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)
bodies = st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=5)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(bodies)
def test_what_is_sent_reads_back_and_order_is_no_identity(value: dict[str, Any]) -> None:
    assert json.loads(encode(value)) == value
    assert request_hash(shuffled(value)) == request_hash(value)
    assert request_hash(json.loads(encode(value))) == request_hash(value)


@given(bodies, bodies)
def test_different_bodies_have_different_identities(a: dict[str, Any], b: dict[str, Any]) -> None:
    def canonical(value: dict[str, Any]) -> str:
        kept = {k: v for k, v in value.items() if k not in ("stream", "stream_options")}
        return json.dumps(kept, sort_keys=True)

    assert (request_hash(a) == request_hash(b)) == (canonical(a) == canonical(b))


@given(st.binary(min_size=16, max_size=16))
def test_a_hash_text_reads_back(digest: bytes) -> None:
    assert parse_hash(format_hash(digest)) == digest


@pytest.mark.parametrize("text", ["", "1:", "2:" + "0" * 32, "1:" + "0" * 31, "1:" + "g" * 32])
def test_a_foreign_hash_text_is_none(text: str) -> None:
    assert parse_hash(text) is None
    assert parse_hash("1:" + " " * 2 + "0" * 30) is None
