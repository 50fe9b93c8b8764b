"""Bytes that should be UTF-8, and JSON that is almost JSON, made fit for strict readers."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from batchrun.chat.completion import SURPRISES, decode_raw

MAX_FLOAT = sys.float_info.max
_RAW_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MARKUP = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)|<[^<>]*>", re.IGNORECASE | re.DOTALL)


def is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def utf8_text(body: bytes) -> str:
    """The text without a BOM; lone surrogates, and what else is no UTF-8, are U+FFFD in it."""
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError:
        mended = _RAW_SURROGATE.sub(b"\xef\xbf\xbd", body)
        return mended.decode("utf-8-sig", "replace")


def loads(text: str) -> Any:
    """Decode leniently: no number, constant or surrogate is left that JSON or UTF-8 cannot hold.

    ValueError and RecursionError as of ``json.loads``.
    """
    value = _loads_sloppily(text)
    if not _ESCAPED_SURROGATE.search(text):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return _loads_sloppily(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def _loads_sloppily(text: str) -> Any:
    return json.loads(
        text, strict=False, parse_int=_int, parse_float=_float, parse_constant=lambda _: None
    )


def _int(digits: str) -> int | None:
    try:
        return int(digits)
    except ValueError:  # more digits than the interpreter is willing to convert
        return None


def _float(digits: str) -> float | None:
    number = float(digits)
    return number if abs(number) <= MAX_FLOAT else None


def mended(body: bytes) -> bytes | None:
    """The JSON of ``body`` as strict readers take it; None when it is none."""
    try:
        return compact(loads(utf8_text(body))).encode()
    except (ValueError, RecursionError):
        return None


def is_json(text: str) -> bool:
    """Whether strict readers take ``text`` for JSON."""
    try:
        decode_raw(text)
        text.encode()
    except SURPRISES:
        return False
    return True


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def as_text(value: Any) -> str | None:
    """Text as it is; any other value as compact JSON, so that it arrives at all."""
    return value if value is None or isinstance(value, str) else compact(value)
