"""One row becomes one request body, or says why it cannot."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from hashlib import blake2b
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import msgspec

from batchrun.chat.identity import canonical, encode_text, hash_begun, json_text, request_hash
from batchrun.chat.rows import (
    CUSTOM_ID,
    NOT_SENT_AS_BODY,
    REQUEST_FIELDS,
    Body,
    Built,
    Identity,
    Invalid,
    Layout,
    PromptSettings,
    Row,
    Unusable,
)
from batchrun.chat.turns import Turns, no_images, with_images
from batchrun.config import JSONValue, Shape
from batchrun.providers import CHAT_PATH
from batchrun.words import kind

# A table that holds nulls turns its integers into doubles (pandas), and endpoints refuse 256.0.
_WHOLE_NUMBERS: Final = frozenset(
    {"max_tokens", "max_completion_tokens", "seed", "random_seed", "top_logprobs", "n"}
)


_SYSTEM_ROLES: Final = ("system", "developer")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
# A body as it will be sent, its model, and whether the row named that model.
_Settled: TypeAlias = tuple[Body, str, bool]


class Builder:
    """Turns the rows of one table into bodies. Rows are never changed, only referred to."""

    def __init__(
        self,
        layout: Layout,
        settings: PromptSettings,
        image_url: Callable[[JSONValue], str] = no_images,
    ) -> None:
        """``image_url`` makes a URL of a cell, or raises Unusable."""
        self._prompt_column = layout.prompt_column or "prompt"
        self._fields = REQUEST_FIELDS | frozenset(settings.body_columns)
        self._more = settings.body_columns
        self._model = settings.model
        self._model_replaces = settings.model_replaces and settings.model is not None
        replacing = settings.params_replacing
        self._replace = {k: v for k, v in settings.params.items() if k in replacing}
        self._fill = [(k, v) for k, v in settings.params.items() if k not in replacing]
        self._stream = settings.stream
        self._stream_usage = settings.stream_usage
        self._schema = settings.schema_digest
        self._images = settings.image
        self._image_url = image_url
        self._before: list[JSONValue] = []
        if settings.system is not None:
            self._before.append({"role": "system", "content": settings.system})
        self._turns = Turns(None, (), None, frozenset())
        self._text = self._prompt
        if layout.shape == "template":
            self._use_templates(settings)
        makers: dict[Shape, Callable[[Row], Body]] = {
            "batch": self._from_batch_line,
            "messages": self._from_messages,
            "prompt": self._from_prompt,
            "template": self._from_templates,
            "body": self._from_whole_row,
        }
        self._around: _Around | None = None
        make = makers[layout.shape]
        self._make: Callable[[Row], _Settled] = lambda row: self._settled(make(row))
        if self._only_text_differs(layout) and "messages" not in settings.params:
            self._pattern = self._settled({"messages": [{"role": "user", "content": _MARK}]})
            self._make = self._from_pattern
            self._around = _Around.of(self._pattern, self._schema)

    def _use_templates(self, settings: PromptSettings) -> None:
        self._turns = Turns.of(settings)
        system, prompt = self._turns.system, self._turns.prompt
        if system is not None and not system.is_constant:
            self._before = []
        if prompt is not None:
            self._text = lambda row: _not_blank(prompt.render(row))

    def _only_text_differs(self, layout: Layout) -> bool:
        """Whether bodies are alike but for the text of the prompt."""
        if self._more or self._images:
            return False
        if layout.shape == "prompt":
            return True
        turns = self._turns
        has_system = turns.system is None or turns.system.is_constant
        return turns.prompt is not None and not turns.messages and has_system

    def build(self, row: Row) -> Built | Invalid:
        """The request of one row, or what is wrong with the row."""
        try:
            body, model, from_row = self._make(row)
            return Built(body, request_hash(body, CHAT_PATH, self._schema), model, from_row)
        except Unusable as exc:
            return Invalid(exc.code, str(exc))

    def identify(self, row: Row) -> Identity | Invalid:
        """What ``build`` says of a row except for its body, in less time."""
        around = self._around
        if around is not None:
            with_text = around.before.copy()
            try:
                with_text.update(encode_text(self._text(row)) + around.after)
                return Identity(with_text.digest(), around.model)
            except Unusable as exc:
                return Invalid(exc.code, str(exc))
            except UnicodeEncodeError:
                pass  # for ``build`` to say
        built = self.build(row)
        return built if isinstance(built, Invalid) else Identity(built.hash, built.model)

    def _from_pattern(self, row: Row) -> _Settled:
        """A prompt alone: only its text differs from row to row, so the rest is made once."""
        text = self._text(row)
        body, model, from_row = self._pattern
        body = {**body, "messages": [*self._before, {"role": "user", "content": text}]}
        return body, model, from_row

    def _settled(self, body: Body) -> _Settled:
        """The body with what the user asks of every row."""
        named = _model_of(body)
        from_row = named is not None
        if self._model is not None and (named is None or self._model_replaces):
            from_row = False
            named = self._model
            body = {**body, "model": named} if "model" in body else {"model": named, **body}
        if self._before:
            self._fill_in_system(body)
        if self._replace:
            body.update(self._replace)
            from_row = from_row and "model" not in self._replace
        for key, value in self._fill:
            if body.get(key) is None:
                body[key] = value
        if self._schema and "response_format" in body:
            body = {key: value for key, value in body.items() if key != "response_format"}
        if self._stream:
            self._ask_for_stream(body)
        model = body.get("model")
        return body, model if isinstance(model, str) else "", from_row

    def _from_prompt(self, row: Row) -> Body:
        body: Body = {"messages": [{"role": "user", "content": self._content(row)}]}
        return self._with_more(body, row) if self._more else body

    def _from_templates(self, row: Row) -> Body:
        turns = self._turns
        messages = [make(row) for make in turns.messages]
        system = turns.system
        if system is not None and not system.is_constant and not _has_system(messages):
            messages.insert(0, {"role": "system", "content": system.render(row)})
        if turns.prompt is not None:
            messages.append({"role": "user", "content": self._content(row)})
        elif self._images:
            messages = self._with_images_last(messages, row)
        _check_messages(messages, "messages")
        body: Body = {"messages": messages}
        return self._with_more(body, row) if self._more else body

    def _content(self, row: Row) -> JSONValue:
        text = self._text(row)
        return with_images(text, self._urls(row)) if self._images else text

    def _with_images_last(self, messages: list[JSONValue], row: Row) -> list[JSONValue]:
        """The last message of a user is who shows the images."""
        for at in range(len(messages) - 1, -1, -1):
            message = messages[at]
            if isinstance(message, dict) and message.get("role") == "user":
                text = message.get("content")
                if not isinstance(text, str):
                    break
                messages[at] = {**message, "content": with_images(text, self._urls(row))}
                return messages
        raise Unusable("wrong_type", "--image needs a last user message that is a text")

    def _urls(self, row: Row) -> list[str]:
        return [self._image_url(row.get(column)) for column in self._images]

    def _prompt(self, row: Row) -> str:
        text = row.get(self._prompt_column)
        if not isinstance(text, str):
            raise _wrong(row, self._prompt_column, "text", what="prompt")
        return _not_blank(text)

    def _from_messages(self, row: Row) -> Body:
        messages = row.get("messages")
        if isinstance(messages, str):
            messages = _parsed(messages, "messages", "list")
        if not isinstance(messages, list):
            raise _wrong(row, "messages", "a list")
        _check_messages(messages, "messages")
        body: Body = {"messages": messages}
        for key, value in row.items():
            if key in self._fields and value is not None:
                body[key] = _whole(value) if key in _WHOLE_NUMBERS else value
        return body

    def _from_batch_line(self, row: Row) -> Body:
        _check_target(row)
        body = row.get("body")
        if isinstance(body, str):
            body = _parsed(body, "body", "object")
        if not isinstance(body, dict):
            raise _wrong(row, "body", "an object")
        messages = body.get("messages")
        if not isinstance(messages, list):
            raise _wrong(body, "messages", "a list", where="body.")
        _check_messages(messages, "body.messages")
        return self._with_more(body, row)

    def _from_whole_row(self, row: Row) -> Body:
        return {key: value for key, value in row.items() if key not in NOT_SENT_AS_BODY}

    def _with_more(self, body: Body, row: Row) -> Body:
        """A copy of ``body`` with the row's --body-columns, where it does not have them itself."""
        more = {
            key: _whole(value) if key in _WHOLE_NUMBERS else value
            for key in self._more
            if (value := row.get(key)) is not None
        }
        return {**more, **body}

    def _fill_in_system(self, body: Body) -> None:
        messages = body.get("messages")
        if not isinstance(messages, list):
            return
        if not _has_system(messages):
            body["messages"] = [*self._before, *messages]

    def _ask_for_stream(self, body: Body) -> None:
        body["stream"] = True
        if self._stream_usage:
            options = body.get("stream_options")
            own = options if isinstance(options, dict) else {}
            body["stream_options"] = {"include_usage": True, **own}


# Stands for the text in a pattern; no parameter can hold it by chance.
_MARK: Final = "\x00the text of the prompt\x00"


class _Around(NamedTuple):
    """The canonical body of a prompt around its text, which is all that differs between rows."""

    before: blake2b  # what is hashed before the text
    after: bytes
    model: str

    @classmethod
    def of(cls, pattern: _Settled, schema_digest: bytes) -> _Around | None:
        """None for a pattern that cannot be sent, or has the mark twice."""
        body, model, _ = pattern
        try:
            parts = canonical(body).split(encode_text(_MARK))
        except ValueError:
            return None
        if len(parts) != 2:
            return None
        before = hash_begun(CHAT_PATH, schema_digest).copy()
        before.update(parts[0])
        return cls(before, parts[1], model)


def custom_id(row: Row) -> str | None:
    """The row's ``custom_id`` as text, free of lone surrogates; None when it has none."""
    value = row.get(CUSTOM_ID)
    if value is None:
        return None
    return without_surrogates(value if isinstance(value, str) else json_text(value))


def without_surrogates(text: str) -> str:
    """``text`` with every lone surrogate replaced by U+FFFD, so that UTF-8 can hold it."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _model_of(body: Body) -> str | None:
    model = body.get("model")
    if model is None or isinstance(model, str):
        return model
    raise _wrong(body, "model", "text")


def _check_target(row: Row) -> None:
    """A batch line may name its API; only chat completions are ours to send."""
    method = row.get("method")
    if method is not None and (not isinstance(method, str) or method.upper() != "POST"):
        raise Unusable("other_api", f'"method" is {_shown(method)}; only "POST" can be sent')
    url = row.get("url")
    if url is None:
        return
    if not isinstance(url, str) or not _path(url).endswith(CHAT_PATH):
        raise Unusable("other_api", f'"url" is {_shown(url)}; only "/v1{CHAT_PATH}" can be sent')


def _path(url: str) -> str:
    try:
        return urlsplit(url).path.rstrip("/")
    except ValueError:
        return url


def _check_messages(messages: list[JSONValue], where: str) -> None:
    if not messages:
        raise Unusable("no_messages", f'"{where}" is an empty list')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            wrong = f'"{where}" item {number} is {kind(message)}, not an object'
            raise Unusable("wrong_type", wrong)
    if _say_nothing(messages):
        raise Unusable("blank_prompt", _BLANK)


_BLANK: Final = "the prompt is blank"


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _not_blank(text: str) -> str:
    if _is_blank(text):
        raise Unusable("blank_prompt", _BLANK)
    return text


def _has_system(messages: Iterable[JSONValue]) -> bool:
    return any(
        isinstance(message, dict) and message.get("role") in _SYSTEM_ROLES for message in messages
    )


def _say_nothing(messages: list[JSONValue]) -> bool:
    """Whether all that is said beside a system message is empty texts."""
    said = [message for message in messages if isinstance(message, dict)]
    asked = [message for message in said if message.get("role") not in _SYSTEM_ROLES]
    return all(
        isinstance(text := message.get("content"), str) and _is_blank(text)
        for message in asked or said
    )


def _parsed(text: str, column: str, wanted: str) -> JSONValue:
    """The JSON list or object that a column holds as text."""
    try:
        value: JSONValue = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list if wanted == "list" else dict):
        return value
    raise Unusable("not_json", f'"{column}" is text that is not a JSON {wanted}')


def _whole(value: JSONValue) -> JSONValue:
    """256 for 256.0; any other value as it is."""
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _wrong(
    members: Row, key: str, wanted: str, where: str = "", *, what: str | None = None
) -> Unusable:
    """``what`` names in the code what a column of another name stands for."""
    if key not in members:
        return Unusable(f"no_{what or key}", f'no "{where}{key}"')
    found = kind(members[key])
    if found == "null":
        return Unusable(f"null_{what or key}", f'"{where}{key}" is null')
    return Unusable("wrong_type", f'"{where}{key}" is {found}, not {wanted}')


def _shown(value: JSONValue) -> str:
    """A value in an error message: JSON, at most 60 characters."""
    text = json_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
