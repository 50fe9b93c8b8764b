"""What is typed becomes values: durations, times of day, parameters, headers, columns."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from datetime import time as day_time
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import click

from batchrun.config import EscalateOn, JSONValue
from batchrun.durations import duration_s
from batchrun.errors import UsageError
from batchrun.secret import Secret
from batchrun.words import size

MAX_DEPTH = 100


def seconds(value: object) -> float:
    """A duration as click asks for it."""
    if isinstance(value, (int, float)):
        return float(value)
    try:
        return parse_duration(str(value))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a duration; write 90, 90s, 5m or 1h30m"
        ) from None


def number_or_auto(value: object) -> int | None:
    if value == "auto":
        return None
    try:
        return int(str(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from None


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``2h``, ``1h30m``; else ValueError."""
    seconds = duration_s(text, unitless=True)
    if seconds is None:
        raise ValueError(text)
    return seconds


def parse_deadline(text: str, now: datetime | None = None) -> float:
    """Seconds until a deadline: a duration, or the next such local time of day."""
    with contextlib.suppress(ValueError):
        if (seconds := parse_duration(text)) > 0:
            return seconds
    try:
        at = day_time.fromisoformat(text.zfill(5))  # 6:00 is 06:00
    except ValueError:
        raise UsageError(f"--deadline {text}: write 2h, 1h30m or a time such as 06:00") from None
    now = (now or datetime.now()).astimezone()
    # Built without an offset and localised afterwards, so that a change of clocks counts.
    today = datetime.combine(now.date(), at.replace(tzinfo=None))
    then = today.astimezone()
    if then <= now:
        then = (today + timedelta(days=1)).astimezone()
    return then.timestamp() - now.timestamp()


FOREVER = "forever"


def parse_keep_unused(text: str) -> float | None:
    """``--keep-unused``: days, or None for ever."""
    if text == FOREVER:
        return None
    try:
        if 0 <= (days := float(text)) < math.inf:
            return days
    except ValueError:
        pass
    raise UsageError(f"--keep-unused {text}: a number of days, forever, or 0 to keep none")


def parse_carry(text: str) -> tuple[str, ...] | None:
    if text == "all":
        return None
    return () if text == "none" else split_columns(text)


def split_columns(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold ``text``; what was typed in another encoding has lone surrogates."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def parse_param(text: str) -> tuple[str, JSONValue]:
    """``K=V``: V is JSON if it parses, else the string itself. NaN and Infinity are not JSON."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--param {text}: write it as NAME=VALUE")
    try:
        return name.strip(), strict_json(value)
    except ValueError:
        return name.strip(), value


def strict_json(text: str) -> Any:
    """JSON as the RFC has it, with every number finite; else ValueError.

    UsageError when it nests deeper than anything that reads it later could follow.
    """
    try:
        value = json.loads(text, parse_constant=_not_json, parse_float=_finite)
        is_deep = _is_deep(value)
    except RecursionError:
        is_deep = True
    if is_deep:
        raise UsageError(f"a parameter nests more than {MAX_DEPTH} levels deep")
    if "\\u" in text and not is_text(json.dumps(value, ensure_ascii=False)):
        raise UsageError("a parameter holds half of a surrogate pair (such as \\ud800)")
    return value


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = below
    return bool(level)


def _not_json(text: str) -> NoReturn:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


# More is no template; an image or a table was named by mistake.
_TEMPLATE_LIMIT = 10_000_000


FROM_STDIN = "@-"


@cache
def _stdin(most: int) -> bytes:
    # It can be read once, and a command may settle its options twice.
    with open(os.dup(0), "rb") as file:
        return file.read(most)


def _content(text: str, most: int) -> bytes:
    if text == FROM_STDIN:
        return _stdin(most)
    with open(text[1:], "rb") as file:
        return file.read(most)


def text_or_file(text: str, option: str = "-p") -> str:
    """``TEXT``, or what ``@FILE`` holds but for a byte order mark and the last line's end.

    ``@-`` is standard input.
    """
    if not text.startswith("@"):
        return text
    try:
        content = _content(text, _TEMPLATE_LIMIT + 1)
        if len(content) > _TEMPLATE_LIMIT:
            raise UsageError(f"{option} {text}: larger than {size(_TEMPLATE_LIMIT)}")
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as exc:
        why = (exc.strerror if isinstance(exc, OSError) else None) or "not UTF-8 text"
        raise UsageError(f"{option} {text}: {why}") from None


def parse_messages(text: str) -> tuple[dict[str, JSONValue], ...]:
    """A JSON list of messages, or ``@FILE`` with one."""
    try:
        messages = strict_json(text_or_file(text, "--messages"))
    except ValueError as exc:
        raise UsageError(f"--messages: not JSON: {exc}") from None
    if not isinstance(messages, list) or not messages:
        raise UsageError("--messages: a JSON list of messages is wanted, in a file: @turns.json")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f'--messages: item {number} is no message: it has no "role"')
    return tuple(messages)


_MODEL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_schema(text: str) -> dict[str, JSONValue]:
    """The JSON Schema in a file, or that of ``module:Model``, which has ``model_json_schema()``."""
    if _MODEL.fullmatch(text) and not Path(text).exists():
        schema = _schema_of_model(text)
    else:
        try:
            schema = strict_json(text_or_file("@" + text.removeprefix("@"), "--schema"))
        except ValueError as exc:
            raise UsageError(f"--schema {text}: not JSON: {exc}") from None
    if not isinstance(schema, dict):
        raise UsageError(f"--schema {text}: a JSON Schema is an object")
    return schema


def _schema_of_model(text: str) -> object:
    module, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m has it
    try:
        model: Any = importlib.import_module(module)
        for part in name.split("."):
            model = getattr(model, part)
        return model.model_json_schema()
    except Exception as exc:
        why = f"{type(exc).__name__}: {exc}".partition("\n")[0]
        raise UsageError(f"--schema {text}: {why}") from None


def parse_escalate_on(text: str) -> tuple[EscalateOn, ...]:
    """``schema,refusal,empty,length`` or some of them."""
    known = get_args(EscalateOn)
    for name in (names := split_columns(text)):
        if name not in known:
            raise UsageError(f"--on {name}: there are {', '.join(known)}")
    return cast("tuple[EscalateOn, ...]", names)


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OUR_HEADERS = frozenset({"content-length", "content-type", "host", "transfer-encoding"})


def parse_headers(texts: Sequence[str]) -> tuple[tuple[str, Secret], ...]:
    """``Name: value``, or ``@FILE`` with one on each line. No error repeats a value."""
    return tuple(_parse_header(line) for text in texts for line in _header_lines(text))


def _header_lines(text: str) -> list[str]:
    if not text.startswith("@"):
        return [text]
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "not a text file"
        raise UsageError(f"-H {text}: {why}") from exc
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _parse_header(line: str) -> tuple[str, Secret]:
    name, colon, value = line.partition(":")
    name, value = name.strip(), value.strip()
    if not colon or not _HEADER_NAME.fullmatch(name):
        raise UsageError("-H: write a header as 'Name: value', or @FILE with one on each line")
    if name.lower() in _OUR_HEADERS:
        raise UsageError(f"-H {name}: that header is batchrun's to set")
    if not value.isprintable() or not value.isascii():
        raise UsageError(f"-H {name}: the value holds characters no header can carry")
    return name, Secret(value)
