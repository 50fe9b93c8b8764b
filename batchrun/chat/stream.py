"""Bytes of an event stream → events → the one completion they amount to. No I/O.

A stream says the same as a plain reply, piece by piece: ``Assembler`` puts the pieces together so
that nothing behind it needs to know that an answer was streamed. Servers differ in where they put
the usage, in how they say that a generation failed, and in how they end; endpoints.md §3 lists
them. Two rules decide whether the result may count as an answer:

* ``[DONE]`` proves nothing: it also follows errors. A choice is finished by its finish_reason.
* An event that cannot be read is a hole in the answer, even when a finish follows.

Time is linear in the bytes fed, however they are cut: a byte is searched for line ends once, and
text goes into growing buffers. Memory is bounded by ``limit_bytes`` of what must be kept; comments
and padding are forgotten at once and may go on for ever (the attempt's timeout ends them).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import TypeGuard

import msgspec

from batchrun.config import JSONValue
from batchrun.types import Failure

_BOM = b"\xef\xbb\xbf"


_DONE = b"[DONE]"


_decode = msgspec.json.decode


_Object = Mapping[str, JSONValue]


# What Python needs for a piece of a line, however small.
_PIECE_COST = 64


# What Python needs for an empty choice or tool call, roughly: a stream that opens a million of them
# must not pass for a small one.
_CHOICE_COST = 2_000


class Assembler:
    """One streamed reply. ``feed`` what arrives, ``close`` at its end, then ask for the rest.

    Never raises, whatever the bytes. ``first_token`` and ``done`` are also good while it runs.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        self.first_token = False  # some text, reasoning or tool call has come
        self.held_bytes = 0  # about what this takes of the memory
        self._lines = _Lines()
        self._event: list[bytes] = []  # the data lines of the event being read
        self._event_name = b""
        self._stray = bytearray()  # lines of no event, while there was no event at all
        self._has_events = False
        self._saw_done = False
        self._is_unreadable = False
        self._is_not_utf8 = False
        self._is_too_large = False
        self._limit_bytes = limit_bytes
        self._event_bytes = 0
        self._kept = _Budget()
        self._top = _Members(self._kept)
        self._choices: dict[int, _Choice] = {}
        self._unfinished = 0
        self._usage: _Object | None = None
        self._error: JSONValue = None

    def feed(self, chunk: bytes) -> None:
        if self._is_too_large:
            return
        for line in self._lines.feed(chunk):
            self._line(line)
        passing_bytes = self._lines.pending_bytes + self._event_bytes + len(self._stray)
        self.held_bytes = passing_bytes + self._kept.bytes
        if self.held_bytes > self._limit_bytes:
            self._forget()

    def close(self) -> None:
        """The body has ended; an event without its blank line still counts."""
        if self._is_too_large:
            return
        if last := self._lines.close():
            self._line(last)
        # Cut inside its last event, a stream whose choices had all finished has lost no text.
        was_utf8 = not self._is_not_utf8
        was_whole = self._is_finished and not self._is_unreadable and was_utf8
        self._dispatch()
        if was_utf8 and self._is_not_utf8:
            # Cut inside a character.
            self._is_not_utf8, self._is_unreadable = False, True
        if was_whole:
            self._is_unreadable = False

    @property
    def done(self) -> bool:
        """The end was announced: ``[DONE]``, or every choice has its finish_reason."""
        return self._saw_done or self._is_finished

    @property
    def problem(self) -> Failure | None:
        """Why this is no completion; None also when the endpoint says so itself, in an error."""
        if self._is_too_large:
            return "too_large"
        if self._error is not None or self._is_plain_json:
            return None
        if self._is_not_utf8:
            return "not_utf8"
        return None if self._is_finished and not self._is_unreadable else "cut"

    def body(self) -> bytes:
        """One ``chat.completion`` as JSON; with a top-level ``error`` when the stream had one."""
        if self._is_plain_json:
            return bytes(self._stray)
        completion: dict[str, object] = {**self._top.values, "object": "chat.completion"}
        completion["choices"] = [c.json() for _, c in sorted(self._choices.items())]
        if self._usage is not None:
            completion["usage"] = self._usage
        if self._error is not None:
            completion["error"] = self._error
        return _encode(completion)

    @property
    def _is_finished(self) -> bool:
        return bool(self._choices) and self._unfinished == 0

    @property
    def _is_plain_json(self) -> bool:
        """Not a stream at all: some gateways answer so under a stream's Content-Type."""
        return not self._has_events and _object(bytes(self._stray)) is not None

    def _forget(self) -> None:
        self._is_too_large = True
        self._lines = _Lines()
        self._event.clear()
        self._stray.clear()
        self._choices.clear()
        self._top = _Members(_Budget())

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            data = line[6:] if line[5:6] == b" " else line[5:]
            self._event.append(data)
            self._event_bytes += len(data)
        elif not line:
            self._dispatch()
        elif line.startswith(b"event:"):
            self._event_name = line[6:].strip()
        elif not self._has_events and not line.startswith((b":", b"id:", b"retry:")):
            self._stray += line + b"\n"

    def _dispatch(self) -> None:
        lines, name = self._event, self._event_name
        self._event, self._event_name, self._event_bytes = [], b"", 0
        data = lines[0] if len(lines) == 1 else b"\n".join(lines)
        if not data.strip():
            return
        self._has_events = True
        if data.strip() == _DONE:
            self._saw_done = True
        elif (chunk := _object(data)) is not None:
            self._chunk(chunk, name)
        elif len(lines) > 1:
            # Servers that forget the blank line between two events.
            for line in lines:
                self._event = [line]
                self._dispatch()
        elif name == b"error":
            self._error = {"message": data.decode("utf-8", "replace")}
        elif self._saw_done:
            return
        elif _is_utf8(data):
            self._is_unreadable = True
        else:
            self._is_not_utf8 = True

    def _chunk(self, chunk: _Object, event_name: bytes) -> None:
        if (error := _error_of(chunk, event_name)) is not None:
            self._error = error
        for name, value in chunk.items():
            if name == "choices":
                # After the end comes usage, on some servers; text there belongs to nobody.
                if self._saw_done:
                    continue
                for position, piece in enumerate(_objects(value)):
                    self._choice(piece, position)
            elif name == "usage":
                self._note_usage(value)
            elif name == "x_groq" and _is_object(value):
                self._note_usage(value.get("usage"))
            elif name not in ("object", "error", "obfuscation"):
                # The first that says something: Azure opens with a chunk whose id is empty.
                self._top.set_first(name, value)

    def _choice(self, piece: _Object, position: int) -> None:
        index = piece.get("index")
        if not isinstance(index, int):
            index = position
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(index, self._kept)
            self._unfinished += 1
        was_finished = choice.is_finished
        if choice.add(piece):
            self.first_token = True
        self._unfinished -= choice.is_finished - was_finished
        self._note_usage(piece.get("usage"))
        if self._error is None and (error := piece.get("error")):
            self._error = error

    def _note_usage(self, value: JSONValue) -> None:
        if _is_object(value) and value:
            self._usage = value


def _error_of(chunk: _Object, event_name: bytes) -> JSONValue:
    """The error a chunk reports: nested, flat (older vLLM), Groq's, or by the event's name."""
    if error := chunk.get("error"):
        return error
    if chunk.get("object") == "error" or (event_name == b"error" and "choices" not in chunk):
        return chunk
    groq = chunk.get("x_groq")
    return groq.get("error") or None if _is_object(groq) else None


class _Lines:
    """Cuts bytes into lines at LF, CRLF or CR, wherever the chunks were cut."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self.pending_bytes = 0
        self._ended_in_cr = False
        self._is_first = True

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        if not chunk:
            return
        if self._ended_in_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._ended_in_cr = False
            if not chunk:
                return
        self._ended_in_cr = chunk.endswith(b"\r")
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, tail = chunk.split(b"\n")
        for line in lines:
            yield self._take(line)
        if tail:
            self._pending.append(tail)
            self.pending_bytes += len(tail) + _PIECE_COST

    def close(self) -> bytes:
        return self._take(b"")

    def _take(self, end: bytes) -> bytes:
        """The line that ``end`` ends."""
        line = end
        if self._pending:
            line = b"".join(self._pending) + end
            self._pending.clear()
            self.pending_bytes = 0
        if self._is_first:
            self._is_first = False
            line = line.removeprefix(_BOM)
        return line


class _Budget:
    """Bytes kept so far; one for all parts of a reply."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class _Text:
    """Text that grows by pieces."""

    __slots__ = ("_buffer", "_kept")

    def __init__(self, kept: _Budget) -> None:
        self._kept = kept
        self._buffer = io.StringIO()

    def add(self, piece: str) -> None:
        # One wide character makes all of a text wide.
        self._kept.bytes += len(piece) if piece.isascii() else 4 * len(piece)
        self._buffer.write(piece)

    def __str__(self) -> str:
        return self._buffer.getvalue()


class _Members:
    """Members of an object that are passed on as they came, kept as JSON to know their size."""

    __slots__ = ("_kept", "values")

    def __init__(self, kept: _Budget) -> None:
        self._kept = kept
        self.values: dict[str, msgspec.Raw] = {}

    def set_first(self, name: str, value: JSONValue) -> None:
        if name not in self.values and value not in (None, "", 0):
            self.set_last(name, value)

    def set_last(self, name: str, value: JSONValue) -> None:
        if value is None:
            return
        raw = msgspec.Raw(_encode(value))
        before = self.values.get(name)
        self._kept.bytes += len(raw) - (len(before) if before else -len(name) - 100)
        self.values[name] = raw


class _Items:
    """A list that grows by pieces, its items passed on as they came."""

    __slots__ = ("_kept", "values")

    def __init__(self, kept: _Budget) -> None:
        self._kept = kept
        self.values: list[msgspec.Raw] = []

    def add(self, items: JSONValue) -> None:
        if isinstance(items, list):
            for item in items:
                raw = msgspec.Raw(_encode(item))
                self._kept.bytes += len(raw) + 100
                self.values.append(raw)


class _Choice:
    """One of a completion's choices."""

    def __init__(self, index: int, kept: _Budget) -> None:
        kept.bytes += _CHOICE_COST
        self._index = index
        self._kept = kept
        self._finish_reason: JSONValue = None
        self._others = _Members(kept)
        self._logprobs: dict[str, _Items] = {}
        self._content = _Content(kept)
        self._texts: dict[str, _Text] = {}  # refusal, reasoning, reasoning_content …
        self._lists: dict[str, _Items] = {}  # annotations, reasoning_details …
        self._members = _Members(kept)
        self._tool_calls = _ToolCalls(kept)
        self._function_call: _ToolCall | None = None

    @property
    def is_finished(self) -> bool:
        return self._finish_reason is not None

    def add(self, piece: _Object) -> bool:
        """True when the piece says something of the answer itself."""
        for name, value in piece.items():
            if value is None or name in ("index", "delta", "usage", "error"):
                continue
            if name == "finish_reason":
                self._finish_reason = value
            elif name == "logprobs" and _is_object(value):
                self._add_logprobs(value)
            elif name != "message":
                self._others.set_last(name, value)
        delta = piece.get("delta")
        # Imitations that send the last piece as a whole message.
        if delta is None:
            delta = piece.get("message")
        return self._add_delta(delta) if _is_object(delta) else False

    def json(self) -> dict[str, object]:
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

    def _add_delta(self, delta: _Object) -> bool:
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
            elif name == "function_call" and _is_object(value):
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

    def _text(self, name: str) -> _Text:
        if name not in self._texts:
            self._kept.bytes += len(name) + 300
            self._texts[name] = _Text(self._kept)
        return self._texts[name]

    def _list(self, name: str) -> _Items:
        if name not in self._lists:
            self._kept.bytes += len(name) + 300
            self._lists[name] = _Items(self._kept)
        return self._lists[name]

    def _add_logprobs(self, logprobs: _Object) -> None:
        for name, items in logprobs.items():
            if isinstance(items, list):
                if name not in self._logprobs:
                    self._kept.bytes += len(name) + 300
                    self._logprobs[name] = _Items(self._kept)
                self._logprobs[name].add(items)


class _Content:
    """``content``: text, or Mistral's list of parts once a piece was one."""

    def __init__(self, kept: _Budget) -> None:
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
        if _is_object(part):
            text = _text_of(part)
            if text is not None:
                self._run(str(part["type"])).add(text, closed=part.get("closed"))
                return
        raw = msgspec.Raw(_encode(part))
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


def _text_of(part: _Object) -> str | None:
    """The text of a part that is nothing but text, or thinking in text; None of any other."""
    kind = part.get("type")
    if kind == "text" and part.keys() == {"type", "text"}:
        text = part["text"]
        return text if isinstance(text, str) else None
    if kind == "thinking" and part.keys() <= {"type", "thinking", "closed"}:
        texts = [_text_of(p) if _is_object(p) else None for p in _list(part.get("thinking"))]
        return None if None in texts else "".join(t for t in texts if t)
    return None


class _Run:
    """Neighbouring pieces of content of one kind."""

    __slots__ = ("_text", "closed", "kind")

    def __init__(self, kind: str, kept: _Budget) -> None:
        self.kind = kind
        self.closed: JSONValue = None
        self._text = _Text(kept)

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

    def __init__(self, kept: _Budget) -> None:
        self._kept = kept
        self._calls: list[_ToolCall] = []
        self._by_index: dict[int, _ToolCall] = {}

    def add(self, pieces: JSONValue) -> bool:
        found = False
        for piece in _objects(pieces):
            self._call_of(piece).add(piece)
            found = True
        return found

    def json(self) -> list[dict[str, object]]:
        return [call.json() for call in self._calls]

    def _call_of(self, piece: _Object) -> _ToolCall:
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

    def __init__(self, kept: _Budget) -> None:
        kept.bytes += _CHOICE_COST
        self._others = _Members(kept)
        self._id: JSONValue = None
        self._function = _Members(kept)
        self._name = _Text(kept)
        self._first_name = ""
        self._arguments = _Text(kept)
        self._argument_object: msgspec.Raw | None = None
        self._kept = kept

    def is_other_than(self, call_id: JSONValue) -> bool:
        # "null" is what Mistral writes for no id.
        return bool(
            call_id not in (None, "", "null")
            and self._id not in (None, "", "null")
            and call_id != self._id
        )

    def add(self, piece: _Object) -> None:
        for name, value in piece.items():
            if name == "function" and _is_object(value):
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

    def _add_function(self, function: _Object) -> None:
        for name, value in function.items():
            if name == "name" and isinstance(value, str):
                # Some servers repeat the whole name in every piece.
                if value != self._first_name:
                    self._first_name = self._first_name or value
                    self._name.add(value)
            elif name == "arguments" and isinstance(value, str):
                self._arguments.add(value)
            elif name == "arguments" and value is not None:
                self._argument_object = msgspec.Raw(_encode(value))
                self._kept.bytes += len(self._argument_object)
            else:
                self._function.set_first(name, value)


def _is_object(value: object) -> TypeGuard[_Object]:
    return isinstance(value, dict)


def _list(value: JSONValue) -> list[JSONValue]:
    return value if isinstance(value, list) else []


def _objects(value: JSONValue) -> Iterator[_Object]:
    return (item for item in _list(value) if _is_object(item))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _object(data: bytes) -> _Object | None:
    """``data`` as a JSON object, or None."""
    try:
        value = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # msgspec refuses lone surrogates and 1e400, which are JSON all the same.
        try:
            # Decoded here: json itself would take bytes for UTF-16, and half a surrogate pair.
            value = json.loads(data.decode())
        except (ValueError, RecursionError):
            return None
    return value if _is_object(value) else None


def _encode(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError, ValueError, RecursionError):
        return json.dumps(value, default=_plain).encode()


def _plain(value: object) -> object:
    if isinstance(value, msgspec.Raw):
        return json.loads(bytes(value))
    raise TypeError(f"{type(value).__name__} is not JSON")
