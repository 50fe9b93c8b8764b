"""Streams, honest and broken, and the completions they amount to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.chat.stream import Assembler

MB = 2**20


def assemble(stream: bytes, *, limit_bytes: int = MB) -> Assembler:
    assembler = Assembler(limit_bytes=limit_bytes)
    assembler.feed(stream)
    assembler.close()
    return assembler


def completion(stream: bytes) -> Any:
    assembler = assemble(stream)
    assert assembler.problem is None
    return json.loads(assembler.body())


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def chunk(
    delta: dict[str, object] | None = None, finish: str | None = None, **more: object
) -> bytes:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish}
    return event({"id": "c1", "model": "m", "created": 7, "choices": [choice], **more})


DONE = b"data: [DONE]\n\n"
HELLO = (
    chunk({"role": "assistant", "content": ""})
    + chunk({"content": "Hé"})
    + chunk({"content": "llo 🙂"})
    + chunk({}, "stop", usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
    + DONE
)


def test_pieces_become_one_completion() -> None:
    assert completion(HELLO) == {
        "id": "c1",
        "model": "m",
        "created": 7,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Héllo 🙂"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


RICH = (
    b"\xef\xbb\xbf: OPENROUTER PROCESSING\r\n\r\n"
    + event({"id": "", "model": "", "choices": [], "prompt_filter_results": [{"a": 1}]})
    + chunk({"role": "assistant", "reasoning_content": "hm "}).replace(b"\n", b"\r\n")
    + b": keep-alive\n\n"
    + chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "é"}]}]})
    + chunk({"content": "Ünïcode 🙂"}).replace(b"\n", b"\r")
    + chunk({"tool_calls": [{"index": 0, "id": "t", "function": {"name": "f", "arguments": "{"}}]})
    + b"event: message\nid: 9\nretry: 3\n"
    + chunk({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]})
    + chunk({}, "tool_calls").replace(b"data: ", b"data:")
    + b'data: {"choices": [],\r\ndata: "usage": {"prompt_tokens": 1}}\r\n\r\n'
    + b"data: [DONE]"
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([HELLO, RICH]), st.lists(st.integers(0, len(RICH)), max_size=40))
def test_any_split_into_chunks_gives_the_same_completion(stream: bytes, cuts: list[int]) -> None:
    whole = assemble(stream)
    split = Assembler(limit_bytes=MB)
    edges = [0, *sorted(cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        split.feed(stream[start:end])
    split.close()
    assert (split.body(), split.problem, split.done) == (whole.body(), None, True)


def test_byte_by_byte_is_the_same_too() -> None:
    split = Assembler(limit_bytes=MB)
    for at in range(len(RICH)):
        split.feed(RICH[at : at + 1])
    split.close()
    assert split.body() == assemble(RICH).body()


@settings(max_examples=500, deadline=None)
@given(st.lists(st.binary(max_size=80) | st.sampled_from([HELLO[:150], RICH, b"data: ", b"\n"])))
def test_no_bytes_make_it_raise(chunks: list[bytes]) -> None:
    assembler = Assembler(limit_bytes=2_000)
    for piece in chunks:
        assembler.feed(piece)
    assembler.close()
    json.loads(assembler.body())
    assert assembler.problem in (None, "cut", "not_utf8", "too_large")


# Where the usage arrives.

USAGE = {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(
            chunk({"content": "a"}, usage=None) + chunk({}, "stop", usage=USAGE) + DONE,
            id="mistral: the chunk with the finish",
        ),
        pytest.param(
            chunk({"content": "a"}, usage=None)
            + chunk({}, "stop", usage=None)
            + event({"choices": [], "usage": USAGE})
            + DONE,
            id="openai: a chunk of its own",
        ),
        pytest.param(
            chunk({"content": "a"}, usage={"prompt_tokens": 4, "completion_tokens": 1})
            + chunk({}, "stop", usage=USAGE)
            + DONE,
            id="vllm: on every chunk, the last counts",
        ),
        pytest.param(
            chunk({"content": "a"}) + chunk({}, "stop", x_groq={"usage": USAGE}) + DONE,
            id="groq: in x_groq",
        ),
        pytest.param(
            chunk({"content": "a"})
            + event(
                {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": USAGE}]}
            ),
            id="inside the choice",
        ),
        pytest.param(
            chunk({"content": "a"}) + chunk({}, "stop") + DONE + event({"usage": USAGE}),
            id="after [DONE]",
        ),
        pytest.param(
            chunk({"content": "a"}, usage=USAGE) + chunk({}, "stop", usage=None) + DONE,
            id="nulls do not erase it",
        ),
    ],
)
def test_usage_is_found_wherever_it_arrives(stream: bytes) -> None:
    assert completion(stream)["usage"] == USAGE


def test_a_stream_without_usage_has_none() -> None:
    assert "usage" not in completion(chunk({"content": "a"}, "stop") + DONE)


# Ends.


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(DONE, id="only [DONE]"),
        pytest.param(chunk({"content": "a"}) + DONE, id="[DONE] without finish"),
        pytest.param(chunk({"content": "a"}), id="clean end without finish"),
        pytest.param(HELLO[: len(HELLO) // 2], id="end inside an event"),
        pytest.param(
            HELLO[: HELLO.index("🙂".encode()) + 2],
            id="end inside a character",
        ),
        pytest.param(
            chunk({"content": "a"}) + b"data: {broken\n\n" + chunk({}, "stop") + DONE,
            id="an unreadable event before the finish",
        ),
        pytest.param(
            event({"choices": [{"index": i, "delta": {"content": "a"}} for i in (0, 1)]})
            + chunk({}, "stop")
            + DONE,
            id="one of two choices unfinished",
        ),
        pytest.param(b"<html>bad gateway</html>", id="a page instead"),
        pytest.param(b"data: " + b'{"a":' * 100_000, id="nested too deep"),
    ],
)
def test_an_end_without_finish_is_cut(stream: bytes) -> None:
    assert assemble(stream).problem == "cut"


@pytest.mark.parametrize("spoilt", [b"\xff", b"\xc3", b"\xed\xa0\x80"])
def test_an_event_that_is_not_utf_8_is_no_answer(spoilt: bytes) -> None:
    broken = chunk({"content": "ABC"}).replace(b"ABC", spoilt)
    assert assemble(broken + chunk({}, "stop") + DONE).problem == "not_utf8"
    assert assemble(chunk({"content": "a"}) + broken).problem == "not_utf8"


def test_a_character_cut_in_two_by_the_network_is_whole() -> None:
    stream = chunk({"content": "💡"}, "stop")
    assembler = Assembler(limit_bytes=10_000)
    for at in range(len(stream)):
        assembler.feed(stream[at : at + 1])
    assembler.close()
    assert json.loads(assembler.body())["choices"][0]["message"]["content"] == "💡"


def test_a_finish_without_done_is_an_answer() -> None:
    assert completion(chunk({"content": "a"}, "stop"))["choices"][0]["finish_reason"] == "stop"


def test_a_last_event_without_its_blank_line_counts() -> None:
    assert completion(chunk({"content": "a"}, "stop").rstrip(b"\n"))


def test_a_cut_after_the_finish_loses_no_text() -> None:
    stream = chunk({"content": "whole"}, "stop") + b'data: {"choices":[],"usage":{"prom'
    assert completion(stream)["choices"][0]["message"]["content"] == "whole"


@pytest.mark.parametrize("after", [chunk({"content": "zzz"}), chunk({}, "length"), b"data: ??\n\n"])
def test_what_follows_the_end_is_no_part_of_the_answer(after: bytes) -> None:
    assert completion(HELLO + after) == completion(HELLO)


def test_done_tells_while_the_stream_runs() -> None:
    assembler = Assembler(limit_bytes=MB)
    assembler.feed(chunk({"content": "a"}))
    assert not assembler.done
    assembler.feed(chunk({}, "stop"))
    assert assembler.done


# Errors inside a stream.


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        pytest.param(
            event({"error": {"message": "died", "code": 500}}) + DONE,
            {"message": "died", "code": 500},
            id="vllm, then still [DONE]",
        ),
        pytest.param(
            chunk({"content": ""}, "error", error={"code": "server_error", "message": "x"}),
            {"code": "server_error", "message": "x"},
            id="openrouter, with a finish",
        ),
        pytest.param(
            event(
                {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "error": {"c": 1}}]}
            ),
            {"c": 1},
            id="inside the choice",
        ),
        pytest.param(
            event({"object": "error", "message": "old", "code": 400}),
            {"object": "error", "message": "old", "code": 400},
            id="flat",
        ),
        pytest.param(
            b"event: error\ndata: overloaded\n\n", {"message": "overloaded"}, id="event name, text"
        ),
        pytest.param(
            b'event: error\ndata: {"message":"no"}\n\n', {"message": "no"}, id="event name, JSON"
        ),
        pytest.param(event({"x_groq": {"error": "gone"}, "choices": []}), "gone", id="groq"),
    ],
)
def test_an_error_in_the_stream_is_the_bodys_error(failure: bytes, error: object) -> None:
    assert completion(chunk({"content": "so far"}) + failure)["error"] == error


def test_an_error_reply_under_a_streams_content_type_is_passed_on() -> None:
    assert completion(b'{"error": {"message": "no"},\n\n "x": 1}\n') == {
        "error": {"message": "no"},
        "x": 1,
    }


# What the pieces become.


def call(**members: object) -> dict[str, object]:
    return {"tool_calls": [members]}


def thinking(*texts: str, **more: object) -> dict[str, object]:
    inner = [{"type": "text", "text": text} for text in texts]
    return {"type": "thinking", "thinking": inner, **more}


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        pytest.param(
            [{"content": "a"}, {"content": None}, {"content": "b"}], {"content": "ab"}, id="text"
        ),
        pytest.param([{"role": "assistant"}], {"content": None}, id="no content is null"),
        pytest.param(
            [{"reasoning_content": "th"}, {"reasoning_content": "ink"}, {"content": "x"}],
            {"reasoning_content": "think", "content": "x"},
            id="deepseek reasoning",
        ),
        pytest.param(
            [{"reasoning": "a"}, {"reasoning": "b", "reasoning_details": [{"t": 1}]}],
            {"reasoning": "ab", "reasoning_details": [{"t": 1}], "content": None},
            id="openrouter reasoning",
        ),
        pytest.param(
            [{"content": ""}, {"refusal": "I "}, {"refusal": "won't"}],
            {"refusal": "I won't", "content": None},
            id="refusal",
        ),
        pytest.param(
            [
                {"content": [thinking("a")]},
                {"content": [thinking("b")]},
                {"content": [thinking(closed=True)]},
                {"content": "c"},
                {"content": [{"type": "text", "text": "d"}]},
                {"content": [{"type": "reference", "reference_ids": [1]}]},
                {"content": "e"},
            ],
            {
                "content": [
                    thinking("ab", closed=True),
                    {"type": "text", "text": "cd"},
                    {"type": "reference", "reference_ids": [1]},
                    {"type": "text", "text": "e"},
                ]
            },
            id="mistral: a list of parts",
        ),
        pytest.param(
            [
                {"content": [{"type": "text", "text": "a", "annotations": []}]},
                {"content": [{"type": "image_url"}, 7]},
            ],
            {
                "content": [
                    {"type": "text", "text": "a", "annotations": []},
                    {"type": "image_url"},
                    7,
                ]
            },
            id="parts of unknown shape are passed on",
        ),
        pytest.param(
            [
                call(index=0, id="t1", type="function", function={"name": "f", "arguments": ""}),
                call(index=0, function={"name": "f", "arguments": '{"a"'}),
                call(index=1, id="t2", function={"name": "g"}),
                call(index=0, function={"arguments": ":1}"}),
            ],
            {
                "tool_calls": [
                    {
                        "id": "t1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"a":1}'},
                    },
                    {"id": "t2", "type": "function", "function": {"name": "g", "arguments": ""}},
                ],
                "content": None,
            },
            id="tool calls by index",
        ),
        pytest.param(
            [
                call(index=0, id="x1", function={"name": "f", "arguments": {"a": 1}}),
                call(index=0, id="x2", function={"name": "f", "arguments": "{}"}),
            ],
            {
                "tool_calls": [
                    {
                        "id": "x1",
                        "type": "function",
                        "function": {"name": "f", "arguments": {"a": 1}},
                    },
                    {"id": "x2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                ],
                "content": None,
            },
            id="mistral: every call has index 0, arguments an object",
        ),
        pytest.param(
            [{"function_call": {"name": "f", "arguments": a}} for a in ("{", "}")],
            {"function_call": {"name": "f", "arguments": "{}"}, "content": None},
            id="legacy function_call",
        ),
        pytest.param(
            [{"content": "\ud83d"}, {"content": "\ude42"}],
            {"content": "🙂"},
            id="a surrogate pair in two events",
        ),
    ],
)
def test_the_message_is_put_together(
    deltas: list[dict[str, object]], message: dict[str, object]
) -> None:
    stream = b"".join(
        b"data: " + json.dumps({"choices": [{"index": 0, "delta": d}]}).encode() + b"\n\n"
        for d in deltas
    )
    [choice] = completion(stream + chunk({}, "stop"))["choices"]
    assert choice["message"] == {"role": "assistant", **message}


def test_choices_are_told_apart_by_index() -> None:
    def piece(index: int, content: str, finish: str | None = None) -> bytes:
        delta = {"content": content}
        return event({"choices": [{"index": index, "delta": delta, "finish_reason": finish}]})

    stream = piece(1, "b") + piece(0, "a") + piece(1, "B", "stop") + piece(0, "A", "length")
    choices = completion(stream)["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in choices] == [
        (0, "aA", "length"),
        (1, "bB", "stop"),
    ]


def test_logprobs_and_other_members_of_a_choice_are_kept() -> None:
    def piece(token: str, finish: str | None) -> bytes:
        choice = {
            "index": 0,
            "delta": {"content": token},
            "logprobs": {"content": [{"token": token, "logprob": -0.5}], "refusal": None},
            "finish_reason": finish,
            "stop_reason": None if finish is None else 7,
        }
        return event({"choices": [choice], "service_tier": "default", "obfuscation": "xxx"})

    body = completion(piece("a", None) + piece("b", "stop"))
    [choice] = body["choices"]
    assert [t["token"] for t in choice["logprobs"]["content"]] == ["a", "b"]
    assert choice["stop_reason"] == 7
    assert body["service_tier"] == "default"
    assert "obfuscation" not in body


def test_azures_empty_first_chunk_names_nothing() -> None:
    first = event({"id": "", "model": "", "choices": [], "prompt_filter_results": [1]})
    body = completion(first + chunk({"content": "a"}, "stop"))
    assert (body["id"], body["model"], body["prompt_filter_results"]) == ("c1", "m", [1])


def test_data_over_several_lines_is_one_event() -> None:
    lines = b'data: {"choices": [{"index": 0,\ndata: "delta": {"content": "a"},'
    body = completion(lines + b'\ndata: "finish_reason": "stop"}]}\n\n')
    assert body["choices"][0]["message"]["content"] == "a"


def test_events_without_blank_lines_between_are_read() -> None:
    stream = (chunk({"content": "a"}) + chunk({"content": "b"}, "stop") + DONE).replace(
        b"\n\n", b"\n"
    )
    assert completion(stream)["choices"][0]["message"]["content"] == "ab"


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning_content": "a"},
        {"content": [{"type": "text", "text": "a"}]},
        {"tool_calls": [{"index": 0, "function": {"name": "f"}}]},
    ],
    ids=["text", "reasoning", "parts", "tool calls"],
)
def test_the_first_token_is_the_first_piece_of_an_answer(delta: dict[str, object]) -> None:
    assembler = Assembler(limit_bytes=MB)
    assembler.feed(b": keep-alive\n\n" + chunk({"role": "assistant", "content": ""}))
    assert not assembler.first_token
    assembler.feed(chunk(delta))
    assert assembler.first_token


# Bounds.


def a_line_without_end(n: int) -> bytes:
    return b"data: " + b"x" * 1000 if n == 0 else b"x" * 1000


ENDLESS: dict[str, Callable[[int], bytes]] = {
    "one line": a_line_without_end,
    "data lines": lambda n: b"data: xxxxxxxxxxxxxxxxxxxxx\n",
    "content": lambda n: chunk({"content": "x" * 100}),
    "thinking": lambda n: chunk(
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "x" * 100}]}]}
    ),
    "parts": lambda n: chunk({"content": [{"type": "reference", "n": n}]}),
    "choices": lambda n: event({"choices": [{"index": n, "delta": {}}]}),
    "tool calls": lambda n: chunk({"tool_calls": [{"index": n, "id": str(n)}]}),
    "arguments": lambda n: chunk({"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]}),
    "members": lambda n: event({f"member{n}": n + 1}),
    "delta members": lambda n: chunk({f"member{n}": "x"}),
    "logprobs": lambda n: event(
        {"choices": [{"index": 0, "delta": {}, "logprobs": {"content": [{"token": "x"}]}}]}
    ),
    "stray lines": lambda n: b"xxxxxxxxxxxxxxxxxxxx\n",
}


@pytest.mark.parametrize("piece", ENDLESS.values(), ids=ENDLESS.keys())
def test_an_endless_stream_is_too_large_and_forgotten(piece: Callable[[int], bytes]) -> None:
    assembler = Assembler(limit_bytes=20_000)
    for n in range(20_001):
        assembler.feed(piece(n))
        if assembler.problem == "too_large":
            break
    assembler.feed(chunk({}, "stop"))
    assembler.close()
    assert assembler.problem == "too_large"
    assert len(assembler.body()) < 100


def test_comments_and_replaced_members_cost_nothing() -> None:
    assembler = Assembler(limit_bytes=20_000)
    for n in range(2_000):
        assembler.feed(b": keep-alive\n\n" + chunk({}, usage={"completion_tokens": n}))
        assembler.feed(event({"choices": [{"index": 0, "content_filter_results": {"n": n}}]}))
    assembler.feed(chunk({}, "stop"))
    assembler.close()
    assert assembler.problem is None
