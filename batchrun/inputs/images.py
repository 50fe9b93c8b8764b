"""The images that rows name: a URL as it is, the bytes of a file or a cell as a data URL."""

from __future__ import annotations

import os
import re
import stat
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Final

from batchrun.chat import Unusable
from batchrun.config import JSONValue
from batchrun.words import size

# Larger ones are refused by every provider, and a body is held in memory while it is sent.
LIMIT_BYTES: Final = 20_000_000
_URL: Final = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]*://|data:)")
# How the content of a file begins.
_TYPES: Final = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
)


def image_urls(folder: Path) -> Callable[[JSONValue], str]:
    """What makes a URL of a cell. Paths are relative to ``folder``.

    A cell may be a URL, a path, bytes, or a struct of ``bytes`` and ``path`` as the Hugging Face
    libraries write it. The maker raises Unusable for what is no image it can send.
    """

    def url(cell: JSONValue) -> str:
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return _data_url(cell, "the image")
        if not cell:
            raise Unusable("no_image", "the row has no image")
        if not isinstance(cell, str):
            raise Unusable("wrong_type", "an image is a URL, a path or bytes")
        if _URL.match(cell):
            return cell
        return _data_url(_read(folder / cell, cell), f"image {cell}")

    return url


def _read(path: Path, name: str) -> bytes:
    try:
        # A pipe would block for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Unusable("no_image", f"image {name}: not a file")
            return file.read(LIMIT_BYTES + 1)
    except (OSError, ValueError) as exc:
        why = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise Unusable("no_image", f"image {name}: {why}") from None


def _data_url(content: bytes, name: str) -> str:
    if len(content) > LIMIT_BYTES:
        limit = size(LIMIT_BYTES)
        raise Unusable("image_too_large", f"{name}: larger than {limit}, which is the most to send")
    for begins, media_type in _TYPES:
        if begins.match(content):
            return f"data:{media_type};base64,{b64encode(content).decode()}"
    raise Unusable("not_an_image", f"{name}: neither PNG, JPEG, GIF nor WebP")
