"""One choice of a streamed completion: its deltas put together, tool calls included."""

from __future__ import annotations

import msgspec

from batchrun.chat.growing import (
    OBJECT_COST,
    Budget,
    Items,
    Members,
    Object,
    Text,
    as_list,
    encode_loosely,
    is_object,
    objects,
)
from batchrun.config import JSONValue


class GrowingChoice:
    """One of a completion's choices."""

    def __init__(self, index: int, kept: Budget) -> None:
        kept.bytes += OBJECT_COST
        self._index = index
        self._kept = kept
        self._finish_reason: JSONValue = None
        self._others = Members(kept)
        self._logprobs: dict[str, Items] = {}
        self._content = _Content(kept)
        self._texts: dict[str, Text] = {}  # refusal, reasoning, reasoning_content …
        self._lists: dict[str, Items] = {}  # annotations, reasoning_details …
        self._members = Members(kept)
        self._tool_calls = _ToolCalls(kept)
        self._function_call: _ToolCall | None = None

    @property
    def is_finished(self) -> bool:
        return self._finish_reason is not None

    def add(self, piece: Object) -> bool:
        """True when the piece says something of the answer itself."""
        for name, value in piece.items():
            if value is None or name in ("index", "delta", "usage", "error"):
                continue
            if name == "finish_reason":
                self._finish_reason = value
            elif name == "logprobs" and is_object(value):
                self._add_logprobs(value)
            elif name != "message":
                self._others.set_last(name, value)
        delta = piece.get("delta")
        # Imitations that send the last piece as a whole message.
        if delta is None:
            delta = piece.get("message")
        return self._add_delta(delta) if is_object(delta) else False

    def json(self) -> dict[str, object]:
        """The choice as a plain completion has it."""
        choice: dict[str, object] = {"index": self._index, "message": self._message()}
        if self._logprobs:
            choice["logprobs"] = {name: items.values for name, items in self._logprobs.items()}
        choice["finish_reason"] = self._finish_reason
        return choice | self._others.values

    def _message(self) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", **self._members.values}
        message |= {name: str(text) for name, text in self._texts.items()}
        message |= {name: items.values for name, items in self._lists.items()}
        calls = self._tool_calls.json()
        if calls:
            message["tool_calls"] = calls
        if self._function_call is not None:
            message["function_call"] = self._function_call.function_json()
        content = self._content.json()
        speaks_elsewhere = bool(calls or self._function_call or "refusal" in self._texts)
        message["content"] = None if content == "" and speaks_elsewhere else content
        return message

    def _add_delta(self, delta: Object) -> bool:
        says_something = False
        for name, value in delta.items():
            if name == "content":
                says_something |= self._content.add(value)
            elif not value:
                continue
            elif name == "role":
                self._members.set_first(name, value)
            elif name == "tool_calls":
                says_something |= self._tool_calls.add(value)
            elif name == "function_call" and is_object(value):
                if self._function_call is None:
                    self._function_call = _ToolCall(self._kept)
                self._function_call.add({"function": value})
                says_something = True
            elif isinstance(value, str):
                self._text(name).add(value)
                says_something = True
            elif isinstance(value, list):
                self._list(name).add(value)
            else:
                self._members.set_last(name, value)
        return says_something

    def _text(self, name: str) -> Text:
        if name not in self._texts:
            self._kept.bytes += len(name) + 300
            self._texts[name] = Text(self._kept)
        return self._texts[name]

    def _list(self, name: str) -> Items:
        if name not in self._lists:
            self._kept.bytes += len(name) + 300
            self._lists[name] = Items(self._kept)
        return self._lists[name]

    def _add_logprobs(self, logprobs: Object) -> None:
        for name, items in logprobs.items():
            if isinstance(items, list):
                if name not in self._logprobs:
                    self._kept.bytes += len(name) + 300
                    self._logprobs[name] = Items(self._kept)
                self._logprobs[name].add(items)


class _Content:
    """``content``: text, or Mistral's list of parts once a piece was one."""

    def __init__(self, kept: Budget) -> None:
        self._kept = kept
        self._runs: list[_Run | msgspec.Raw] = []
        self._is_list = False
        self._is_null = True

    def add(self, value: JSONValue) -> bool:
        if isinstance(value, str):
            self._is_null = False
            if value:
                self._run("text").add(value)
            return bool(value)
        if isinstance(value, list) and value:
            self._is_null, self._is_list = False, True
            for part in value:
                self._add_part(part)
            return True
        return False

    def json(self) -> object:
        if self._is_null:
            return None
        if self._is_list:
            return [run.json() if isinstance(run, _Run) else run for run in self._runs]
        return "".join(str(run) for run in self._runs)

    def _add_part(self, part: JSONValue) -> None:
        if is_object(part):
            text = _text_of(part)
            if text is not None:
                self._run(str(part["type"])).add(text, closed=part.get("closed"))
                return
        raw = msgspec.Raw(encode_loosely(part))
        self._kept.bytes += len(raw) + 100
        self._runs.append(raw)

    def _run(self, kind: str) -> _Run:
        last = self._runs[-1] if self._runs else None
        if isinstance(last, _Run) and last.kind == kind and last.closed is not True:
            return last
        self._kept.bytes += 300
        run = _Run(kind, self._kept)
        self._runs.append(run)
        return run


def _text_of(part: Object) -> str | None:
    """The text of a part that is nothing but text, or thinking in text; None of any other."""
    kind = part.get("type")
    if kind == "text" and part.keys() == {"type", "text"}:
        text = part["text"]
        return text if isinstance(text, str) else None
    if kind == "thinking" and part.keys() <= {"type", "thinking", "closed"}:
        texts = [_text_of(p) if is_object(p) else None for p in as_list(part.get("thinking"))]
        return None if None in texts else "".join(t for t in texts if t)
    return None


class _Run:
    """Neighbouring pieces of content of one kind."""

    __slots__ = ("_text", "closed", "kind")

    def __init__(self, kind: str, kept: Budget) -> None:
        self.kind = kind
        self.closed: JSONValue = None
        self._text = Text(kept)

    def add(self, text: str, *, closed: JSONValue = None) -> None:
        self._text.add(text)
        if closed is not None:
            self.closed = closed

    def __str__(self) -> str:
        return str(self._text)

    def json(self) -> dict[str, object]:
        text = {"type": "text", "text": str(self)}
        if self.kind == "text":
            return dict(text)
        part: dict[str, object] = {"type": self.kind, "thinking": [text]}
        return part if self.closed is None else {**part, "closed": self.closed}


class _ToolCalls:
    """Tool calls by index; a new id under a used index is a new call (Mistral, Gemini)."""

    def __init__(self, kept: Budget) -> None:
        self._kept = kept
        self._calls: list[_ToolCall] = []
        self._by_index: dict[int, _ToolCall] = {}

    def add(self, pieces: JSONValue) -> bool:
        found = False
        for piece in objects(pieces):
            self._call_of(piece).add(piece)
            found = True
        return found

    def json(self) -> list[dict[str, object]]:
        return [call.json() for call in self._calls]

    def _call_of(self, piece: Object) -> _ToolCall:
        index = piece.get("index")
        if isinstance(index, int):
            call = self._by_index.get(index)
        else:
            call = self._calls[-1] if self._calls else None
        if call is None or call.is_other_than(piece.get("id")):
            call = _ToolCall(self._kept)
            self._calls.append(call)
            if isinstance(index, int):
                self._by_index[index] = call
        return call


class _ToolCall:
    """One tool call. ``arguments`` come as pieces of text, or at once as an object (Mistral)."""

    def __init__(self, kept: Budget) -> None:
        kept.bytes += OBJECT_COST
        self._others = Members(kept)
        self._id: JSONValue = None
        self._function = Members(kept)
        self._name = Text(kept)
        self._first_name = ""
        self._arguments = Text(kept)
        self._argument_object: msgspec.Raw | None = None
        self._kept = kept

    def is_other_than(self, call_id: JSONValue) -> bool:
        # "null" is what Mistral writes for no id.
        return bool(
            call_id not in (None, "", "null")
            and self._id not in (None, "", "null")
            and call_id != self._id
        )

    def add(self, piece: Object) -> None:
        for name, value in piece.items():
            if name == "function" and is_object(value):
                self._add_function(value)
            elif name == "id":
                self._id = self._id or value
            elif name != "index":
                self._others.set_first(name, value)

    def json(self) -> dict[str, object]:
        call: dict[str, object] = {"id": self._id, "type": "function", **self._others.values}
        return {**call, "function": self.function_json()}

    def function_json(self) -> dict[str, object]:
        arguments: object = self._argument_object
        if arguments is None:
            arguments = str(self._arguments)
        return {**self._function.values, "name": str(self._name), "arguments": arguments}

    def _add_function(self, function: Object) -> None:
        for name, value in function.items():
            if name == "name" and isinstance(value, str):
                # Some servers repeat the whole name in every piece.
                if value != self._first_name:
                    self._first_name = self._first_name or value
                    self._name.add(value)
            elif name == "arguments" and isinstance(value, str):
                self._arguments.add(value)
            elif name == "arguments" and value is not None:
                self._argument_object = msgspec.Raw(encode_loosely(value))
                self._kept.bytes += len(self._argument_object)
            else:
                self._function.set_first(name, value)
