"""One completion's JSON, read to decide on it and to publish it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.chat.reply import NOTHING, body_json, body_text, parse, rebuild, request_id
from batchrun.chat.reply import answer as answers_answer
from batchrun.chat.reply import columns as answers_columns
from batchrun.types import NO_USAGE, Answer, ErrorBody, Reply, Usage


def completion(*choices: dict[str, Any], **members: Any) -> bytes:
    whole = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m-2603"} | members
    return json.dumps(whole | {"choices": list(choices)}).encode()


def choice(index: Any = 0, finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", **message},
        "finish_reason": finish_reason,
    }


def of_content(content: Any) -> bytes:
    return completion(choice(content=content))


# --- content -------------------------------------------------------------------------------------


def test_a_usual_completion_fills_the_columns() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    body = completion(choice(content="Hello"), usage=usage)
    assert answers_answer(body) == Answer("Hello", "stop", "m-2603", Usage(3, 4, 7))
    assert parse(body) == Reply(
        True, 1, "stop", has_content=True, model="m-2603", usage=Usage(3, 4, 7)
    )


@pytest.mark.parametrize(
    ("content", "response"),
    [
        pytest.param("text", "text", id="text"),
        pytest.param("", "", id="empty stays empty"),
        pytest.param(None, None, id="null"),
        pytest.param([], "", id="no parts"),
        pytest.param(
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab", id="parts"
        ),
        pytest.param(["a", "b"], "ab", id="parts that are bare strings"),
        pytest.param(
            [{"type": "reference", "reference_ids": [1]}, {"type": "text", "text": "a"}],
            "a",
            id="parts of other kinds hold no text",
        ),
        pytest.param([None, 7, {"type": "text", "text": None}], "", id="parts of nonsense"),
        pytest.param({"a": [1, "é"]}, '{"a":[1,"é"]}', id="an object arrives as JSON"),
        pytest.param(12.5, "12.5", id="a number arrives as JSON"),
        pytest.param("a\x00b\u2028\r\n", "a\x00b\u2028\r\n", id="control characters"),
    ],
)
def test_content_of_every_form_becomes_the_response(content: Any, response: str | None) -> None:
    assert answers_answer(of_content(content)).response == response
    assert parse(of_content(content)).has_content is bool(response)


def test_thinking_parts_are_the_reasoning() -> None:
    content = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}], "closed": True},
        {"type": "thinking", "thinking": " so"},
        {"type": "text", "text": "final"},
    ]
    read = answers_answer(of_content(content))
    assert (read.response, read.reasoning) == ("final", "hm so")


@pytest.mark.parametrize("member", ["reasoning", "reasoning_content"])
def test_reasoning_is_found_under_either_name(member: str) -> None:
    body = completion(choice(content=None, **{member: "because"}))
    assert answers_answer(body).reasoning == "because"
    assert parse(body).has_content


def test_reasoning_that_is_empty_is_none() -> None:
    assert answers_answer(completion(choice(content="x", reasoning_content=""))).reasoning is None


def test_a_refusal_is_the_response_where_there_is_no_other() -> None:
    body = completion(choice(content=None, refusal="I can't."))
    assert answers_answer(body) == Answer("I can't.", "stop", "m-2603", refusal=True)
    assert parse(body).refusal
    assert parse(body).has_content
    assert answers_answer(completion(choice(content="x", refusal="no"))).response == "x"
    assert not answers_answer(completion(choice(content="x", refusal=None))).refusal


@pytest.mark.parametrize(
    ("finish_reason", "read"),
    [(None, None), ("model_length", "model_length"), (5, "5"), ([], None)],
)
def test_finish_reason_is_an_open_set(finish_reason: Any, read: str | None) -> None:
    body = completion(choice(content="x", finish_reason=finish_reason))
    assert answers_answer(body).finish_reason == read
    assert parse(body).finish_reason == read


def test_of_several_choices_the_one_with_index_0_counts() -> None:
    body = completion(choice(2, content="c"), choice(0, content="a"), choice(1, content="b"))
    assert answers_answer(body).response == "a"
    assert parse(body).choices == 3
    without_index = completion({"message": {"content": "first"}}, {"message": {"content": "x"}})
    assert answers_answer(without_index).response == "first"


@pytest.mark.parametrize("odd", [None, {}, [], {"message": None}, {"message": []}, "text", 5])
def test_a_choice_without_a_message_is_an_empty_answer(odd: Any) -> None:
    body = completion(odd)
    assert answers_answer(body) == Answer(response_model="m-2603")
    assert not parse(body).has_content
    assert parse(body).choices == 1


# --- tool calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", ['{"city": "Lyon"}', '{"cut": ', {"city": "Lyon", "n": 1.50}, None]
)
def test_tool_calls_arrive_as_compact_json(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    body = completion(choice(content=None, tool_calls=[call, call], finish_reason="tool_calls"))
    read = answers_answer(body)
    assert read.response is None
    assert read.tool_calls == json.dumps([call, call], separators=(",", ":"))
    assert parse(body).has_content


@pytest.mark.parametrize("none", [None, [], {}, ""])
def test_no_tool_calls_are_none(none: Any) -> None:
    body = completion(choice(content="x", tool_calls=none))
    assert answers_answer(body).tool_calls is None


def test_the_legacy_function_call_is_a_tool_call() -> None:
    body = completion(choice(content=None, function_call={"name": "f", "arguments": "{}"}))
    assert parse(body).has_content
    assert json.loads(answers_answer(body).tool_calls or "") == [
        {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]


def test_tool_calls_that_are_no_list_arrive_all_the_same() -> None:
    body = completion(choice(content=None, tool_calls={"name": "f"}))
    assert answers_answer(body).tool_calls == '[{"name":"f"}]'


# --- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        pytest.param(None, NO_USAGE, id="null"),
        pytest.param({}, NO_USAGE, id="empty"),
        pytest.param([1], NO_USAGE, id="no object"),
        pytest.param({"prompt_tokens": 0}, Usage(0), id="0 is reported"),
        pytest.param(
            {"prompt_tokens": 20, "completion_tokens": 198, "total_tokens": 623},
            Usage(20, 198, 623),
            id="a total that is not the sum is stored as given",
        ),
        pytest.param(
            {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}},
            Usage(9, cached_tokens=5),
            id="OpenAI's cached",
        ),
        pytest.param({"prompt_token_details": {"cached_tokens": 5}}, Usage(cached_tokens=5)),
        pytest.param({"num_cached_tokens": 5}, Usage(cached_tokens=5), id="Mistral's cached"),
        pytest.param({"prompt_cache_hit_tokens": 5}, Usage(cached_tokens=5), id="DeepSeek's"),
        pytest.param(
            {
                "prompt_cache_hit_tokens": 1,
                "num_cached_tokens": 2,
                "prompt_token_details": {"cached_tokens": 3},
                "prompt_tokens_details": {"cached_tokens": 0},
            },
            Usage(cached_tokens=0),
            id="the first spelling wins, also with 0",
        ),
        pytest.param(
            {"prompt_tokens_details": None, "num_cached_tokens": 2},
            Usage(cached_tokens=2),
            id="details are null",
        ),
        pytest.param(
            {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 8}},
            Usage(completion_tokens=9, reasoning_tokens=8),
            id="reasoning",
        ),
        pytest.param({"prompt_tokens": 12.0}, Usage(12), id="a whole float"),
        pytest.param({"prompt_tokens": 12.5}, NO_USAGE, id="a broken float"),
        pytest.param({"prompt_tokens": True}, NO_USAGE, id="a bool"),
        pytest.param({"prompt_tokens": "12"}, NO_USAGE, id="a string"),
        pytest.param(
            {"prompt_tokens": -1, "total_tokens": 4}, Usage(total_tokens=4), id="negative"
        ),
        pytest.param({"prompt_tokens": 2**63 - 1}, Usage(2**63 - 1), id="the largest"),
        pytest.param({"prompt_tokens": 2**63}, NO_USAGE, id="beyond int64"),
        pytest.param({"prompt_tokens": 10**5000 // 3, "total_tokens": 4}, Usage(total_tokens=4)),
        pytest.param({"prompt_tokens": float("nan"), "total_tokens": 4}, Usage(total_tokens=4)),
    ],
)
def test_usage_is_normalised(usage: Any, read: Usage, unlimited_digits: None) -> None:
    body = completion(choice(content="x"), usage=usage)
    assert answers_answer(body) == Answer("x", "stop", "m-2603", read)
    assert parse(body).usage == read


@pytest.fixture
def unlimited_digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    import sys

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(limit)


# --- hostile bytes -------------------------------------------------------------------------------


def test_an_escaped_lone_surrogate_becomes_a_replacement_character() -> None:
    body = of_content("ABC").replace(b"ABC", b"a\\ud800b\\uDFFFc \\ud83d\\ude00")
    read = answers_answer(body)
    assert read.response == "a\ufffdb\ufffdc \U0001f600"
    assert parse(body).has_content


def test_a_raw_lone_surrogate_becomes_a_replacement_character() -> None:
    read = answers_answer(of_content("ABC").replace(b"ABC", b"a\xed\xa0\x80b"))
    assert read.response == "a\ufffdb"


def test_a_surrogate_in_tool_arguments_becomes_a_replacement_character() -> None:
    body = completion(choice(content=None, tool_calls=[{"x": "ABC"}])).replace(b"ABC", b"\\udc00")
    assert answers_answer(body).tool_calls == '[{"x":"\ufffd"}]'


def test_bytes_that_are_not_utf8_are_replaced_wherever_they_are() -> None:
    assert answers_answer(of_content("ABC").replace(b"ABC", b"a\xffb")).response == "a\ufffdb"
    call = completion(choice(content=None, tool_calls=[{"x": "ABC"}]))
    assert answers_answer(call.replace(b"ABC", b"\xff")).tool_calls == '[{"x":"\ufffd"}]'
    elsewhere = completion(choice(content="x"), id="ABC").replace(b"ABC", b"\xff")
    assert answers_answer(elsewhere).response == "x"


def test_five_megabytes_arrive_whole() -> None:
    text = "é\n" * 2_500_000
    assert answers_answer(of_content(text)).response == text


def test_the_last_of_duplicate_keys_wins() -> None:
    body = b'{"choices":[{"message":{"content":"a","content":"b"}}],"model":"x","model":"y"}'
    assert answers_answer(body) == Answer("b", None, "y")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400", "9" * 5000])
def test_numbers_json_cannot_hold_do_not_hide_the_answer(number: str) -> None:
    body = completion(choice(content="x"), logprob="HERE").replace(b'"HERE"', number.encode())
    assert answers_answer(body).response == "x"
    assert parse(body).is_json
    assert body_json(body) is not None


def test_json_nested_without_end_is_not_json() -> None:
    body = b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert parse(body) == Reply(False)
    assert answers_answer(body) == Answer()
    assert body_json(body) is None
    assert body_text(body) == body.decode()


def test_whitespace_and_a_byte_order_mark_may_come_first() -> None:
    assert parse(b"\n\n\n  " + of_content("x")).has_content
    assert parse(b"\xef\xbb\xbf" + of_content("x")).has_content


@pytest.mark.parametrize("body", [b"", b"  ", b"{", of_content("x")[:-9], b"\x00", b"\xff\xfe"])
def test_what_is_not_json_is_said_to_be_so(body: bytes) -> None:
    assert not parse(body).is_json
    assert answers_answer(body) == Answer()


_names = st.sampled_from(
    (
        *("choices", "message", "content", "index", "finish_reason", "model", "usage"),
        *("tool_calls", "function_call", "refusal", "reasoning", "type", "text", "thinking"),
        *("prompt_tokens", "prompt_tokens_details", "cached_tokens"),
        *("error", "detail", "code", "loc", "msg", "metadata"),
    )
)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=5),
    max_leaves=12,
)


_USUAL = of_content("x")
_SEVERAL = (
    _USUAL,
    completion(choice(content=None, refusal="no")),
    completion(choice(1, content="b"), choice(0, content="a")),
    completion(choice(content="x", reasoning="because")),
    completion(choice(content=None, tool_calls=[{"id": "a"}])),
    completion(choice(content=[{"type": "text", "text": "part"}])),
    b"<html>",
    NOTHING,
)


@given(st.lists(st.sampled_from(_SEVERAL) | _values.map(json.dumps).map(str.encode)))
def test_several_bodies_are_read_as_one_by_one(bodies: list[bytes]) -> None:
    together = answers_columns(bodies)
    each = [answers_answer(body) for body in bodies]
    assert list(together.responses) == [answer.response for answer in each]
    assert list(together.finish_reasons) == [answer.finish_reason for answer in each]
    assert list(together.response_models) == [answer.response_model for answer in each]
    assert list(together.reasonings) == [answer.reasoning for answer in each]
    assert list(together.tool_calls) == [answer.tool_calls for answer in each]
    assert list(together.refusals) == [answer.refusal for answer in each]


def test_nothing_fills_no_column() -> None:
    assert answers_answer(NOTHING) == Answer()


def assert_nothing_raises(body: bytes) -> None:
    reply, answer = parse(body), answers_answer(body)
    assert reply.usage == answer.usage
    for text in (answer.response, answer.reasoning, answer.tool_calls, body_text(body)):
        (text or "").encode()
    mended = body_json(body)
    if mended is not None:
        assert b"\n" not in mended
        assert json.loads(mended, parse_constant=pytest.fail) is not None


@given(st.binary())
def test_no_bytes_raise(body: bytes) -> None:
    assert_nothing_raises(body)


@given(_values)
def test_no_json_raises(value: Any) -> None:
    assert_nothing_raises(json.dumps(value).encode())
    assert_nothing_raises(json.dumps({"choices": [{"message": value}], "usage": value}).encode())
    assert_nothing_raises(json.dumps({"error": value, "detail": value}).encode())


@given(st.integers(0, 200), st.binary(max_size=3))
def test_no_damage_raises(at: int, bytes_: bytes) -> None:
    whole = completion(choice(content="é\ud83d\ude00"), usage={"prompt_tokens": 1})
    assert_nothing_raises(whole[:at] + bytes_ + whole[at + 1 :])
    assert_nothing_raises(whole[:at])


# --- errors --------------------------------------------------------------------------------------

EXTRA = {"type": "extra_forbidden", "loc": ["body", "store"], "msg": "Extra inputs", "input": 1}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        pytest.param(
            {"error": {"message": "No.", "type": "t", "param": "messages", "code": "c"}},
            ErrorBody("c", "t", "No.", "messages"),
            id="OpenAI",
        ),
        pytest.param(
            {"object": "error", "message": "Invalid model: x", "type": "invalid_model"}
            | {"param": None, "code": "1500"},
            ErrorBody("1500", "invalid_model", "Invalid model: x"),
            id="Mistral, flat",
        ),
        pytest.param(
            {"message": "Rate limit exceeded", "code": 1300, "type": "rate_limited"},
            ErrorBody("1300", "rate_limited", "Rate limit exceeded"),
            id="a code that is a number",
        ),
        pytest.param({"detail": "Unauthorized"}, ErrorBody(message="Unauthorized"), id="detail"),
        pytest.param(
            {"message": "Unauthorized", "request_id": "7"}, ErrorBody(message="Unauthorized")
        ),
        pytest.param(
            {"detail": [EXTRA]},
            ErrorBody("extra_forbidden", "", "Extra inputs", "body.store"),
            id="a list of details",
        ),
        pytest.param(
            {"object": "error", "message": {"detail": [EXTRA]}, "type": "invalid_request_error"}
            | {"param": None, "code": None},
            ErrorBody("extra_forbidden", "invalid_request_error", "Extra inputs", "body.store"),
            id="details inside the message",
        ),
        pytest.param(
            {"object": "Error", "detail": [EXTRA], "message": [EXTRA], "code": 3001}
            | {"type": "invalid_request_error"},
            ErrorBody("3001", "invalid_request_error", "Extra inputs", "body.store"),
            id="details beside a code",
        ),
        pytest.param(
            {"object": "error", "message": json.dumps({"detail": [EXTRA]}), "type": "t"},
            ErrorBody("extra_forbidden", "t", "Extra inputs", "body.store"),
            id="a message that is JSON in a string",
        ),
        pytest.param(
            {"error": {"message": {"why": "x"}, "code": "c"}},
            ErrorBody("c", "", '{"why":"x"}'),
            id="a message that is an object",
        ),
        pytest.param({"error": "model is overloaded"}, ErrorBody(message="model is overloaded")),
        pytest.param(
            [{"error": {"code": 429, "message": "Quota", "status": "RESOURCE_EXHAUSTED"}}],
            ErrorBody("429", "RESOURCE_EXHAUSTED", "Quota"),
            id="Gemini's array",
        ),
        pytest.param(
            {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
            ErrorBody("overloaded_error", "overloaded_error", "Overloaded"),
            id="Anthropic: the envelope's type says nothing",
        ),
        pytest.param(
            {"error": {"code": 402, "message": "Pay", "metadata": {"limit_source": "in_flight"}}},
            ErrorBody("402", "in_flight", "Pay"),
            id="OpenRouter's limit source",
        ),
        pytest.param(
            {
                "type": "https://stoplight.io/prism/errors#UNPROCESSABLE_ENTITY",
                "title": "Invalid request",
                "status": 422,
                "detail": "Your request is not valid",
                "validation": [
                    {
                        "location": ["body", "messages"],
                        "severity": "Error",
                        "code": "minItems",
                        "message": "must NOT have fewer than 1 items",
                    }
                ],
            },
            ErrorBody(
                "minItems",
                "https://stoplight.io/prism/errors#UNPROCESSABLE_ENTITY",
                "must NOT have fewer than 1 items",
                "body.messages",
            ),
            id="Prism's validation",
        ),
        pytest.param({"error": {"code": "c"}}, ErrorBody("c"), id="nothing but a code"),
        pytest.param({"error": {"why": 1}}, ErrorBody(message='{"why":1}'), id="unknown members"),
        pytest.param({"error": {"message": " a\n  b "}}, ErrorBody(message="a b"), id="one line"),
        pytest.param({"error": {}, "choices": []}, None, id="an empty error is none"),
        pytest.param({"error": None, "id": "x"}, None, id="a null error is none"),
        pytest.param("Unauthorized", ErrorBody(message="Unauthorized"), id="a JSON string"),
        pytest.param([], None, id="an empty array"),
        pytest.param(7, None, id="a number"),
    ],
)
def test_an_error_is_read_in_every_dialect(body: Any, error: ErrorBody | None) -> None:
    reply = parse(json.dumps(body).encode())
    assert (reply.is_json, reply.choices, reply.error) == (True, 0, error)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"id": "chatcmpl-7", "choices": []}', "chatcmpl-7"),
        (b'{"message": "Unauthorized", "request_id": "r-1"}', "r-1"),
        (b'{"id": 7}', ""),
        (b'{"id": "x', ""),
        (b"[1]", ""),
        (b"", ""),
        (b'{"id": "' + b"x" * 1_000 + b'"}', "x" * 200),
    ],
)
def test_a_body_names_itself(body: bytes, name: str) -> None:
    assert request_id(body) == name


def test_an_error_beside_choices_is_an_error() -> None:
    body = completion(
        choice(content="x", finish_reason="error"), error={"code": 502, "message": "p"}
    )
    reply = parse(body)
    assert (reply.choices, reply.finish_reason) == (1, "error")
    assert reply.error == ErrorBody("502", "", "p")


def test_an_error_inside_a_choice_is_an_error() -> None:
    body = completion(choice(content="") | {"error": {"code": 502, "message": "p"}})
    assert parse(body).error == ErrorBody("502", "", "p")


def test_a_completion_with_a_member_named_message_is_no_error() -> None:
    assert parse(completion(choice(content=["x"]), message="hi", code=0)).error is None


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"<html><head><title>502 Bad Gateway</title><style>a{b}</style></head>"
         b"<body><h1>502</h1>\n<script>x<y</script></body></html>", "502 Bad Gateway 502"),
        (b"upstream connect error", "upstream connect error"),
        (b"<html><script>never closed", None),
        (b"x" * 1000, "x" * 300),
        (b'{"cut": "of', None),
    ],
)  # fmt: skip
def test_a_page_gives_its_first_words(page: bytes, message: str | None) -> None:
    error = None if message is None else ErrorBody(message=message)
    assert parse(page) == Reply(False, error=error)


# --- bodies and rebuilding -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "spliced"),
    [
        pytest.param(b'{"a": 1.50}', b'{"a": 1.50}', id="its bytes are kept"),
        pytest.param(b'{"a":\r[1]}', b'{"a":[1]}', id="lone carriage returns"),
        pytest.param(b'\n\n {"a":\r\n [1,\n "x\\ny"]}\n', b'{"a":[1,"x\\ny"]}', id="one line"),
        pytest.param('{"a":"\u2028é"}'.encode(), '{"a":"\u2028é"}'.encode(), id="UTF-8"),
        pytest.param(b'{"a":"\xff"}', '{"a":"\ufffd"}'.encode(), id="not UTF-8"),
        pytest.param(b'{"a":"\\ud800"}', '{"a":"\ufffd"}'.encode(), id="a lone surrogate"),
        pytest.param(b'{"a":NaN}', b'{"a":null}', id="NaN"),
        pytest.param(b"\xef\xbb\xbf[1]", b"[1]", id="a byte order mark"),
        pytest.param(b'"text"', None, id="a string is no object"),
        pytest.param(b"<html>", None, id="a page"),
        pytest.param(b'{"a":', None, id="cut short"),
        pytest.param(b"", None, id="nothing"),
    ],
)
def test_a_body_is_spliced_as_one_line_of_strict_json(body: bytes, spliced: bytes | None) -> None:
    assert body_json(body) == spliced


_text = st.none() | st.text()
_count = st.none() | st.integers(0, 2**63 - 1)
_tool_calls = st.none() | st.lists(st.dictionaries(st.text(), st.text()), min_size=1).map(
    lambda calls: msgspec.json.encode(calls).decode()
)


@given(
    _text,
    _text,
    _text,
    st.builds(Usage, _count, _count, _count, _count, _count),
    st.none() | st.text(min_size=1),
    _tool_calls,
)
def test_a_rebuilt_completion_gives_the_same_answer(
    response: str | None,
    finish_reason: str | None,
    model: str | None,
    usage: Usage,
    reasoning: str | None,
    tool_calls: str | None,
) -> None:
    columns = Answer(response, finish_reason, model, usage, reasoning, tool_calls)
    body = rebuild(columns)
    assert answers_answer(body) == columns
    assert parse(body).usage == usage


def test_tool_calls_that_are_no_json_are_left_out_of_a_rebuilt_completion() -> None:
    body = rebuild(Answer("x", tool_calls='[{"cut'))
    assert answers_answer(body) == Answer("x")
