"""Texts that must never show, and how to take them out of what others say.

An endpoint that refuses a key may quote it back: whole, without its ``Bearer``, as the user and
password that its base64 stands for, and in the spelling of JSON, of a URL or of HTML.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import unquote

HIDDEN: Final = "[key]"
# Shorter texts ("1", "true", "enabled") are values of headers that hide nothing.
MIN_CHARS: Final = 8
# A key may be as short as "none": then it is a key only where it stands alone.
MIN_KEY_CHARS: Final = 4


_SECRET_IN_URL: Final = re.compile(
    r"([?&][^=&\s]*(?:key|token|sig|secret)[^=&\s]*=)([^&\s]+)", re.IGNORECASE
)


_SCHEME: Final = re.compile(r"[A-Za-z][\w.-]*[ \t]+(\S.*)", re.DOTALL)


class Secret:
    """A text that never shows: not in ``repr``, ``str`` or a format."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def parts(self) -> Iterator[str]:
        """What of it is secret by itself: ``Basic dXNlcjpwYXNz`` has five such parts."""
        yield self._value
        scheme = _SCHEME.fullmatch(self._value)
        credential = scheme[1].strip() if scheme else self._value
        plain = unquote(credential)
        yield from {credential, plain}
        if scheme and scheme[0].lower().startswith("basic") and (pair := _from_base64(plain)):
            yield pair
            yield from pair.split(":", 1)

    def scrub(self, text: str) -> str:
        """``text`` with every copy of the secret replaced, also inside an endpoint's own words."""
        return Scrubber([self]).scrub(text)

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def _from_base64(text: str) -> str | None:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def hidden_in_url(text: str) -> str:
    """``text`` with the keys in the queries of its URLs as ``***``."""
    return _SECRET_IN_URL.sub(r"\1***", text)


def in_url(url: str) -> list[Secret]:
    """The values of a query that are keys by their names: ``?api-key=…``."""
    return [Secret(match[2]) for match in _SECRET_IN_URL.finditer(url)]


class Scrubber:
    """Takes every part of some secrets out of texts and bodies, however they are spelled.

    ``keys`` are known to be secret; ``values`` (of headers) are, unless they are very short.
    """

    def __init__(self, keys: Iterable[Secret] = (), values: Iterable[Secret] = ()) -> None:
        parts = {part for key in keys for part in key.parts() if len(part) >= MIN_KEY_CHARS}
        parts |= {part for value in values for part in value.parts() if len(part) >= MIN_CHARS}
        parts = {part for part in parts if not any(_covers(other, part) for other in parts)}
        spelled = "|".join(map(_spelled, sorted(parts, key=lambda part: (-len(part), part))))
        self._plain = [part.encode(errors="replace") for part in parts]
        self._text = re.compile(spelled) if parts else None
        self._bytes = re.compile(spelled.encode()) if parts else None

    def scrub(self, text: str) -> str:
        return text if self._text is None else self._text.sub(HIDDEN, text)

    def scrub_bytes(self, body: bytes) -> bytes:
        if self._bytes is None or not self._may_be_in(body):
            return body
        return self._bytes.sub(HIDDEN.encode(), body)

    def _may_be_in(self, body: bytes) -> bool:
        # The pattern takes a quarter of a second for each megabyte, this nothing.
        return any(part in body for part in (*self._plain, *_ESCAPES))


_ESCAPES: Final = (b"\\", b"%", b"&#")


def _covers(part: str, whole: str) -> bool:
    """Whether taking out ``part`` takes the secret out of ``whole``."""
    return part != whole and len(part) >= MIN_CHARS and part in whole


def _spelled(secret: str) -> str:
    """A pattern of ``secret`` in which each character may be escaped in any usual way."""
    pattern = "".join(map(_any_spelling, secret))
    alone = len(secret) < MIN_CHARS
    return rf"(?<![0-9A-Za-z]){pattern}(?![0-9A-Za-z])" if alone else pattern


def _any_spelling(char: str) -> str:
    # Several backslashes: a gateway puts the JSON it was told into a string of its own JSON.
    code = ord(char)
    percent = "".join(f"%{byte:02x}" for byte in char.encode(errors="replace"))
    plain = re.escape(char)
    json = rf"\\{{1,9}}(?:u(?i:{code:04x})|{plain})"
    html = rf"&\#(?:0{{0,6}}{code}|[xX]0{{0,6}}(?i:{code:x}));"
    return f"(?:{plain}|{json}|(?i:{percent})|{html})"
