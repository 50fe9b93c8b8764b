"""Bytes of an event stream → events → the one completion they amount to. No I/O.

A stream says the same as a plain reply, piece by piece: ``Assembler`` puts the pieces together so
that nothing behind it needs to know that an answer was streamed. Servers differ in where they put
the usage, in how they say that a generation failed, and in how they end. Two rules decide whether
the result may count as an answer:

* ``[DONE]`` proves nothing: it also follows errors. A choice is finished by its finish_reason.
* An event that cannot be read is a hole in the answer, even when a finish follows.

Time is linear in the bytes fed, however they are cut: a byte is searched for line ends once, and
text goes into growing buffers. Memory is bounded by ``limit_bytes`` of what must be kept; comments
and padding are forgotten at once and may go on for ever (the attempt's timeout ends them).
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec

from batchrun.chat.choice import GrowingChoice
from batchrun.chat.growing import Budget, Members, Object, encode_loosely, is_object, objects
from batchrun.chat.text import is_utf8
from batchrun.config import JSONValue
from batchrun.types import Failure

_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
_decode = msgspec.json.decode
# What Python needs for a piece of a line, however small.
_PIECE_COST = 64


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
        self._kept = Budget()
        self._top = Members(self._kept)
        self._choices: dict[int, GrowingChoice] = {}
        self._unfinished = 0
        self._usage: Object | None = None
        self._error: JSONValue = None

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, cut anywhere; ignored once too much is held."""
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
        return encode_loosely(completion)

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
        self._top = Members(Budget())

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
        elif is_utf8(data):
            self._is_unreadable = True
        else:
            self._is_not_utf8 = True

    def _chunk(self, chunk: Object, event_name: bytes) -> None:
        if (error := _error_of(chunk, event_name)) is not None:
            self._error = error
        for name, value in chunk.items():
            if name == "choices":
                # After the end comes usage, on some servers; text there belongs to nobody.
                if self._saw_done:
                    continue
                for position, piece in enumerate(objects(value)):
                    self._choice(piece, position)
            elif name == "usage":
                self._note_usage(value)
            elif name == "x_groq" and is_object(value):
                self._note_usage(value.get("usage"))
            elif name not in ("object", "error", "obfuscation"):
                # The first that says something: Azure opens with a chunk whose id is empty.
                self._top.set_first(name, value)

    def _choice(self, piece: Object, position: int) -> None:
        index = piece.get("index")
        if not isinstance(index, int):
            index = position
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = GrowingChoice(index, self._kept)
            self._unfinished += 1
        was_finished = choice.is_finished
        if choice.add(piece):
            self.first_token = True
        self._unfinished -= choice.is_finished - was_finished
        self._note_usage(piece.get("usage"))
        if self._error is None and (error := piece.get("error")):
            self._error = error

    def _note_usage(self, value: JSONValue) -> None:
        if is_object(value) and value:
            self._usage = value


def _error_of(chunk: Object, event_name: bytes) -> JSONValue:
    """The error a chunk reports: nested, flat (older vLLM), Groq's, or by the event's name."""
    if error := chunk.get("error"):
        return error
    if chunk.get("object") == "error" or (event_name == b"error" and "choices" not in chunk):
        return chunk
    groq = chunk.get("x_groq")
    return groq.get("error") or None if is_object(groq) else None


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


def _object(data: bytes) -> Object | None:
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
    return value if is_object(value) else None
