"""The messages that templates make of a row: earlier turns, the prompt, its images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

from batchrun.chat.rows import PromptSettings, Row, Unusable
from batchrun.chat.template import Template, compiled
from batchrun.config import JSONValue

Make: TypeAlias = Callable[[Row], JSONValue]
# What a provider decides by; never a text of the user's.
_NAMES: Final = frozenset(("role", "type", "detail"))


class Turns(NamedTuple):
    """The messages before the user's, and the texts around it, as templates."""

    system: Template | None
    messages: tuple[Make, ...]
    prompt: Template | None
    columns: frozenset[str] | None  # those they name; None: they may look at any

    @classmethod
    def of(cls, settings: PromptSettings) -> Turns:
        """UsageError for a template that is none."""
        parts: list[Template] = []
        system = prompt = None
        if settings.system is not None:
            parts.append(system := compiled(settings.system, "--system"))
        messages = tuple(_made(message, parts) for message in settings.messages or ())
        if settings.prompt is not None:
            parts.append(prompt := compiled(settings.prompt, "-p"))
        return cls(system, messages, prompt, _all(part.columns for part in parts))


def _all(columns: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    found = frozenset[str]()
    for each in columns:
        if each is None:
            return None
        found |= each
    return found


def _made(value: JSONValue, parts: list[Template]) -> Make:
    """``value`` with every text in it a template; those found are added to ``parts``."""
    if isinstance(value, str):
        template = compiled(value, "--messages")
        parts.append(template)
        return template.render
    if isinstance(value, dict):
        members = [
            (key, _always(item) if key in _NAMES else _made(item, parts))
            for key, item in value.items()
        ]
        return lambda row: {key: make(row) for key, make in members}
    if isinstance(value, list):
        items = [_made(item, parts) for item in value]
        return lambda row: [make(row) for make in items]
    return _always(value)


def _always(value: JSONValue) -> Make:
    return lambda _: value


def with_images(text: str, urls: Sequence[str]) -> JSONValue:
    """The content of a user's message that has images."""
    content: list[JSONValue] = [{"type": "text", "text": text}]
    content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return content


def no_images(_: JSONValue) -> str:
    """Stands where nobody reads images."""
    raise Unusable("no_image", "an image cannot be read here")
