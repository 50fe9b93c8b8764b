"""Words that a shell takes for what they are: lines to paste hold file names of any kind."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable


def word(text: str) -> str:
    """``text`` as one word of a POSIX shell.

    What a terminal would not show as it is (control characters, bytes that are no UTF-8) is
    written as ``$'...'`` with escapes, which bash, ksh and zsh understand.
    """
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def file(path: str) -> str:
    """As ``word``, for a file name: one that begins with a dash must not look like an option."""
    return word(f"./{path}" if path.startswith("-") and path != "-" else path)


def line(words: Iterable[str]) -> str:
    """A command line of these words."""
    return " ".join(map(word, words))


def _escaped(character: str) -> str:
    if character in "'\\":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
