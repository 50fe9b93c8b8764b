"""Canonical bytes and ``request_hash``: what makes two requests the same one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import blake2b
from typing import Final

import msgspec

from batchrun.chat.rows import Body, Unusable
from batchrun.config import JSONValue
from batchrun.providers import CHAT_PATH

HASH_VERSION: Final = 1
# Decimals stand for numbers a double cannot hold (1e400); they are sent as they were written.
_ENCODER: Final = msgspec.json.Encoder(decimal_format="number")
encode_text: Final[Callable[[str], bytes]] = _ENCODER.encode
_CANONICAL: Final = msgspec.json.Encoder(order="sorted", decimal_format="number")


def encode(body: Body) -> bytes:
    """Compact UTF-8 JSON, members in the order they have.

    ValueError, with a reason for people, for what JSON or UTF-8 cannot hold: NaN, infinities,
    lone surrogates, nesting without end; never for a body that was ``Built``.
    """
    return _encoded(body, _ENCODER)


@cache
def hash_begun(path: str, schema_digest: bytes = b"") -> blake2b:
    """What the hash of a request to ``path`` is before its body; to be copied, never updated."""
    begun = blake2b(path.encode() + b"\n", digest_size=16)
    if schema_digest:
        begun.update(b"schema " + schema_digest + b"\n")
    return begun


def request_hash(body: Body, path: str = CHAT_PATH, schema_digest: bytes = b"") -> bytes:
    """The 16 bytes that say which request this is; equal for equal questions, for ever.

    BLAKE2b-128 over path and canonical body: keys sorted at every depth, compact, UTF-8, without
    ``stream`` and ``stream_options``, which change how an answer travels and not what it says. A
    schema for the answer counts as itself, in whatever words an endpoint is asked for it.
    ValueError as for `encode`.
    """
    digest = hash_begun(path, schema_digest).copy()
    digest.update(canonical(body))
    return digest.digest()


def canonical(body: Body) -> bytes:
    """The bytes of a body that ``request_hash`` hashes: those of equal questions are equal."""
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
        raise Unusable("lone_surrogate", reason) from None
    except RecursionError:
        raise Unusable("too_deep", "nested too deeply") from None
    # msgspec writes NaN and the infinities as null, silently.
    if b"null" in encoded and _has_non_finite(value):
        raise Unusable("not_finite", "a number is NaN or infinite, which JSON cannot hold")
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
