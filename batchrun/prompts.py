"""One source row becomes one request body: shapes, settings, identity.

A table's shape is detected once (`detect`), then every row goes through a `Builder`. Nothing is
added to a body that neither the row nor the user asked for: Mistral rejects unknown fields.

`request_hash` is frozen for ever: published outputs carry it, and a rerun finds its answers by it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from hashlib import blake2b
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from batchrun.config import API_PATH, JSONValue
from batchrun.errors import UsageError
from batchrun.types import Shape

Row: TypeAlias = Mapping[str, JSONValue]
Body: TypeAlias = dict[str, JSONValue]

HASH_VERSION: Final = 1
CUSTOM_ID: Final = "custom_id"

# The request fields a `messages` row may carry (contract §2); every other column is only carried.
REQUEST_FIELDS: Final = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "stream",
        "seed",
        "random_seed",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "frequency_penalty",
        "presence_penalty",
        "logprobs",
        "top_logprobs",
    }
)

# A table that holds nulls turns its integers into doubles (pandas), and endpoints refuse 256.0.
_WHOLE_NUMBERS: Final = frozenset(
    {"max_tokens", "max_completion_tokens", "seed", "random_seed", "top_logprobs", "n"}
)
_NOT_SENT_AS_BODY: Final = frozenset({CUSTOM_ID, "metadata"})
_SYSTEM_ROLES: Final = ("system", "developer")
_LISTED_WIDTH: Final = 60
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class PromptSettings(Struct, frozen=True, kw_only=True):
    """What the user asks of every row. Names in ``params_replacing`` win over the row's own."""

    model: str | None = None
    model_replaces: bool = False
    system: str | None = None
    params: Mapping[str, JSONValue] = MappingProxyType({})
    params_replacing: frozenset[str] = frozenset()
    stream: bool = False
    stream_usage: bool = False  # this endpoint streams usage only when asked to
    prompt_column: str | None = None
    body_columns: tuple[str, ...] = ()


class Layout(Struct, frozen=True):
    """How one file's rows become bodies; ``sent`` and ``carried_only`` are for the start line."""

    shape: Shape
    prompt_column: str | None
    sent: tuple[str, ...]
    carried_only: tuple[str, ...]
    columns_needed: tuple[str, ...] | None  # None: all


class Built(Struct, gc=False):
    """A row's request: its body, not yet encoded, and which request that is."""

    body: Body
    hash: bytes
    model: str  # "" when nothing names one
    model_from_row: bool


class Identity(Struct, gc=False):
    """Which request a row is."""

    hash: bytes
    model: str


class Invalid(Struct, gc=False):
    """A row that cannot become a request, and why: a code for programs, words for a person."""

    code: str
    reason: str


# A body as it will be sent, its model, and whether the row named that model.
_Settled: TypeAlias = tuple[Body, str, bool]


class _Unusable(ValueError):
    """The reason why a row has no body, and the code that tells it from other reasons."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


# --- which shape a table has -------------------------------------------------------------------


def detect(
    columns: Sequence[str],
    rows: Sequence[Row],
    settings: PromptSettings,
    forced: Shape | None,
    name: str,
) -> Layout:
    """Decide the shape of the table ``name`` from its columns and its first good rows.

    A table without rows fits every shape: it is published empty, not refused.
    UsageError when nothing fits, when two shapes fit, or when a named column is missing.
    """
    table = _Table(columns, rows, settings, name)
    shape = forced or table.shape()
    if rows:
        table.demand(shape)
    return _layout(shape, columns, settings)


class _Table(NamedTuple):
    """What is known of one file before its shape is."""

    columns: Sequence[str]
    rows: Sequence[Row]
    settings: PromptSettings
    name: str

    def shape(self) -> Shape:
        """The one shape the columns fit."""
        if self.settings.prompt_column is not None:
            return "prompt"
        fitting = [shape for shape in ("messages", "prompt") if shape in self.columns]
        if self._fits_batch(alone=not fitting):
            return "batch"
        if len(fitting) > 1:
            raise UsageError(
                f'{self.name}: has a "messages" and a "prompt" column; '
                "choose with --shape messages or --shape prompt"
            )
        if fitting == ["messages"]:
            return "messages"
        if fitting or not self.rows:
            return "prompt"
        raise UsageError(f'{self.name}: no "prompt", "messages" or "body" column.{self._advice()}')

    def _fits_batch(self, *, alone: bool) -> bool:
        """A column "body" beside "prompt" may be a mail's text; only objects make batch lines."""
        if CUSTOM_ID not in self.columns or "body" not in self.columns:
            return False
        return alone or any(_is_object(row.get("body")) for row in self.rows)

    def demand(self, shape: Shape) -> None:
        """UsageError for a column that the shape or an option names and no row has."""
        for column, option in self._named(shape):
            if column not in self.columns:
                raise UsageError(
                    f'{self.name}: no column "{column}", which {option} asks for.\n'
                    f"  It has: {_listed(self.columns)}"
                )

    def _named(self, shape: Shape) -> Iterable[tuple[str, str]]:
        if shape == "prompt":
            given = self.settings.prompt_column
            yield (given, "--prompt-column") if given else ("prompt", "--shape prompt")
        elif shape != "body":
            yield ("messages" if shape == "messages" else "body", f"--shape {shape}")
        for column in self.settings.body_columns:
            yield column, "--body-columns"

    def _advice(self) -> str:
        lines = f"\n  It has: {_listed(self.columns)}."
        if "body" in self.columns:
            return lines + " Try --shape batch"
        guess = self._likely_prompt()
        return f"{lines} Try --prompt-column {guess}" if guess else lines

    def _likely_prompt(self) -> str | None:
        """The column of text most like a prompt: by its usual names, else the longest texts."""
        lengths = {
            column: sum(len(text) for row in self.rows if isinstance(text := row.get(column), str))
            for column in self.columns
        }
        texts = {column: length for column, length in lengths.items() if length}
        for usual in ("prompt", "question", "query", "instruction", "input", "text", "content"):
            for column in texts:
                if column.casefold() == usual:
                    return column
        return max(texts, key=lambda column: texts[column], default=None)


def _layout(shape: Shape, columns: Sequence[str], settings: PromptSettings) -> Layout:
    prompt_column = (settings.prompt_column or "prompt") if shape == "prompt" else None
    sent = tuple(c for c in columns if _is_sent(c, shape, prompt_column, settings.body_columns))
    steering = {CUSTOM_ID, "method", "url"} if shape == "batch" else {CUSTOM_ID}
    used = {*sent, *steering}
    return Layout(
        shape=shape,
        prompt_column=prompt_column,
        sent=sent,
        carried_only=tuple(c for c in columns if c not in used),
        columns_needed=None if shape == "body" else tuple(c for c in columns if c in used),
    )


def _is_sent(
    column: str, shape: Shape, prompt_column: str | None, body_columns: Collection[str]
) -> bool:
    if column in body_columns:
        return True
    if shape == "prompt":
        return column == prompt_column
    if shape == "messages":
        return column == "messages" or column in REQUEST_FIELDS
    if shape == "batch":
        return column == "body"
    return column not in _NOT_SENT_AS_BODY


def _listed(columns: Sequence[str]) -> str:
    """Column names in about one line."""
    shown: list[str] = []
    width = 0
    for column in columns:
        width += len(column) + 2
        if shown and width > _LISTED_WIDTH:
            return f"{', '.join(shown)} and {len(columns) - len(shown):,} more"
        shown.append(column)
    return ", ".join(shown) or "no columns"


# --- one row -----------------------------------------------------------------------------------


class Builder:
    """Turns the rows of one table into bodies. Rows are never changed, only referred to."""

    def __init__(self, layout: Layout, settings: PromptSettings) -> None:
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
        self._before: list[JSONValue] = []
        if settings.system is not None:
            self._before.append({"role": "system", "content": settings.system})
        makers: dict[Shape, Callable[[Row], Body]] = {
            "batch": self._from_batch_line,
            "messages": self._from_messages,
            "prompt": self._from_prompt,
            "body": self._from_whole_row,
        }
        self._around: _Around | None = None
        make = makers[layout.shape]
        self._make: Callable[[Row], _Settled] = lambda row: self._settled(make(row))
        if layout.shape == "prompt" and not self._more and "messages" not in settings.params:
            self._pattern = self._settled({"messages": [{"role": "user", "content": _MARK}]})
            self._make = self._from_pattern
            self._around = _Around.of(self._pattern)

    def build(self, row: Row) -> Built | Invalid:
        """The request of one row, or what is wrong with the row."""
        try:
            body, model, from_row = self._make(row)
            return Built(body, request_hash(body), model, from_row)
        except _Unusable as exc:
            return Invalid(exc.code, str(exc))

    def identify(self, row: Row) -> Identity | Invalid:
        """What ``build`` says of a row except for its body, in less time."""
        around = self._around
        text = row.get(self._prompt_column)
        if around is not None and isinstance(text, str) and not _is_blank(text):
            with_text = around.before.copy()
            try:
                with_text.update(_encode_text(text) + around.after)
                return Identity(with_text.digest(), around.model)
            except UnicodeEncodeError:
                pass  # for ``build`` to say
        built = self.build(row)
        return built if isinstance(built, Invalid) else Identity(built.hash, built.model)

    def _from_pattern(self, row: Row) -> _Settled:
        """A prompt alone: only its text differs from row to row, so the rest is made once."""
        text = self._prompt(row)
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
        if self._stream:
            self._ask_for_stream(body)
        model = body.get("model")
        return body, model if isinstance(model, str) else "", from_row

    def _from_prompt(self, row: Row) -> Body:
        body: Body = {"messages": [{"role": "user", "content": self._prompt(row)}]}
        return self._with_more(body, row) if self._more else body

    def _prompt(self, row: Row) -> str:
        text = row.get(self._prompt_column)
        if not isinstance(text, str):
            raise _wrong(row, self._prompt_column, "text", what="prompt")
        if _is_blank(text):
            raise _Unusable("blank_prompt", _BLANK)
        return text

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
        return {key: value for key, value in row.items() if key not in _NOT_SENT_AS_BODY}

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
        for message in messages:
            if isinstance(message, dict) and message.get("role") in _SYSTEM_ROLES:
                return
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
    def of(cls, pattern: _Settled) -> _Around | None:
        """None for a pattern that cannot be sent, or has the mark twice."""
        body, model, _ = pattern
        try:
            parts = _canonical(body).split(_encode_text(_MARK))
        except ValueError:
            return None
        if len(parts) != 2:
            return None
        before = _HASHED_PATH.copy()
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
        raise _Unusable("other_api", f'"method" is {_shown(method)}; only "POST" can be sent')
    url = row.get("url")
    if url is None:
        return
    if not isinstance(url, str) or not _path(url).endswith(API_PATH):
        raise _Unusable("other_api", f'"url" is {_shown(url)}; only "/v1{API_PATH}" can be sent')


def _path(url: str) -> str:
    try:
        return urlsplit(url).path.rstrip("/")
    except ValueError:
        return url


def _check_messages(messages: list[JSONValue], where: str) -> None:
    if not messages:
        raise _Unusable("no_messages", f'"{where}" is an empty list')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            wrong = f'"{where}" item {number} is {_kind(message)}, not an object'
            raise _Unusable("wrong_type", wrong)
    if _say_nothing(messages):
        raise _Unusable("blank_prompt", _BLANK)


_BLANK: Final = "the prompt is blank"


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


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
    raise _Unusable("not_json", f'"{column}" is text that is not a JSON {wanted}')


def _whole(value: JSONValue) -> JSONValue:
    """256 for 256.0; any other value as it is."""
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _wrong(
    members: Row, key: str, wanted: str, where: str = "", *, what: str | None = None
) -> _Unusable:
    """``what`` names in the code what a column of another name stands for."""
    if key not in members:
        return _Unusable(f"no_{what or key}", f'no "{where}{key}"')
    kind = _kind(members[key])
    if kind == "null":
        return _Unusable(f"null_{what or key}", f'"{where}{key}" is null')
    return _Unusable("wrong_type", f'"{where}{key}" is {kind}, not {wanted}')


_KINDS: Final[Mapping[type, str]] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    bytes: "binary data, not UTF-8",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _shown(value: JSONValue) -> str:
    """A value in an error message: JSON, at most 60 characters."""
    text = json_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_object(value: JSONValue) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith("{"))


# --- bytes and identity ------------------------------------------------------------------------

# Decimals stand for numbers a double cannot hold (1e400); they are sent as they were written.
_ENCODER: Final = msgspec.json.Encoder(decimal_format="number")
_encode_text: Final[Callable[[str], bytes]] = _ENCODER.encode
_CANONICAL: Final = msgspec.json.Encoder(order="sorted", decimal_format="number")
_HASHED_PATH: Final = blake2b(API_PATH.encode() + b"\n", digest_size=16)


def encode(body: Body) -> bytes:
    """Compact UTF-8 JSON, members in the order they have.

    ValueError, with a reason for people, for what JSON or UTF-8 cannot hold: NaN, infinities,
    lone surrogates, nesting without end; never for a body that was ``Built``.
    """
    return _encoded(body, _ENCODER)


def request_hash(body: Body) -> bytes:
    """The 16 bytes that say which request this is; equal for equal questions, for ever.

    BLAKE2b-128 over path and canonical body: keys sorted at every depth, compact, UTF-8, without
    ``stream`` and ``stream_options``, which change how an answer travels and not what it says.
    ValueError as for `encode`.
    """
    digest = _HASHED_PATH.copy()
    digest.update(_canonical(body))
    return digest.digest()


def _canonical(body: Body) -> bytes:
    if "stream" in body or "stream_options" in body:
        # They must be fit to be sent all the same.
        _encoded([body.get("stream", 0), body.get("stream_options", 0)], _ENCODER)
        body = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
    return _encoded(body, _CANONICAL)


def format_hash(digest: bytes) -> str:
    """The text of the column ``request_hash``."""
    return f"{HASH_VERSION}:{digest.hex()}"


def format_hashes(digests: Iterable[bytes]) -> list[str | None]:
    """As ``format_hash``, for a whole column; None for a digest of no bytes."""
    prefix = f"{HASH_VERSION}:"
    return [prefix + digits if digits else None for digits in map(bytes.hex, digests)]


def parse_hash(text: str) -> bytes | None:
    """The digest in a ``request_hash`` text; None for a version or form that is not ours."""
    version, _, digits = text.partition(":")
    if version != str(HASH_VERSION) or len(digits) != 32:
        return None
    try:
        digest = bytes.fromhex(digits)
    except ValueError:
        return None
    return digest if len(digest) == 16 else None


def json_text(value: JSONValue) -> str:
    """Compact JSON for a column or a message: like `encode`, but never refuses.

    NaN stays ``NaN`` and lone surrogates stay what they are.
    """
    try:
        return _encoded(value, _ENCODER).decode()
    except ValueError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _encoded(value: JSONValue, encoder: msgspec.json.Encoder) -> bytes:
    try:
        encoded = encoder.encode(value)
    except UnicodeEncodeError:
        reason = "a text holds a lone surrogate, which UTF-8 cannot hold"
        raise _Unusable("lone_surrogate", reason) from None
    except RecursionError:
        raise _Unusable("too_deep", "nested too deeply") from None
    # msgspec writes NaN and the infinities as null, silently.
    if b"null" in encoded and _has_non_finite(value):
        raise _Unusable("not_finite", "a number is NaN or infinite, which JSON cannot hold")
    return encoded


def _has_non_finite(value: JSONValue) -> bool:
    waiting: list[JSONValue] = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, float):
            if not math.isfinite(value):
                return True
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return False
