"""Characters that a terminal would obey instead of showing.

File and column names, model names and whatever an endpoint says may hold them: to clear the screen,
to rewrite a line above, to show text backwards. They are shown as ``\x1b``, never acted upon.
"""

from __future__ import annotations

import re
from typing import Final

# How wide our texts are, and the labels in front of them.
WIDTH: Final = 80
LABEL_WIDTH: Final = 10

# A terminal that takes nothing for this long must not keep a finished run from ending.
FAREWELL_S: Final = 2.0

# C0 and C1 controls, line separators, marks that turn the direction of text, lone surrogates.
_OBEYED: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def lines(text: str) -> str:
    """``text`` of several lines with everything else that is obeyed made visible."""
    return _OBEYED.sub(lambda char: "\n" if char[0] == "\n" else _visible(char), text)


def one_line(text: str) -> str:
    """``text`` on one line, with everything that is obeyed made visible."""
    return _OBEYED.sub(_visible, text)


def _visible(char: re.Match[str]) -> str:
    return repr(char[0])[1:-1]
