"""An endpoint's error, in every dialect, as code, type, message and place."""

from __future__ import annotations

from typing import Any

from batchrun.chat.text import MARKUP, as_text, loads
from batchrun.types import ErrorBody

MAX_MESSAGE_CHARS = 2_000
MAX_PAGE_CHARS = 300


def error_body(value: Any, *, has_choices: bool) -> ErrorBody | None:
    """The error in a reply's JSON; None when there is none. ``has_choices``: it is a completion."""
    if isinstance(value, list):  # Gemini
        value = value[0] if value else None
    if isinstance(value, str):
        return ErrorBody(message=_line(value)) if value.strip() else None
    if not isinstance(value, dict):
        return None
    inner = value.get("error") or _choice_error(value)
    if isinstance(inner, list):
        inner = inner[0]
    if isinstance(inner, dict):
        return _error_body(inner, value)
    if inner:
        return _error_body({"message": inner}, value)
    # A completion may have members of these names; only what is none is a flat error.
    if has_choices or not any(value.get(name) for name in ("message", "detail", "code")):
        return None
    return _error_body(value, {})


def _choice_error(body: dict[str, Any]) -> Any:
    choices = body.get("choices")
    if not isinstance(choices, list):
        return None
    errors = (choice.get("error") for choice in choices if isinstance(choice, dict))
    return next((error for error in errors if error), None)


def _error_body(error: dict[str, Any], around: dict[str, Any]) -> ErrorBody:
    """``error`` holds the members, ``around`` the object it came in, for what it leaves out."""
    detail = _first_detail(error) or _first_detail(around)
    metadata = error.get("metadata")
    limit_source = metadata.get("limit_source") if isinstance(metadata, dict) else None
    # {"type": "error", "error": {...}} is Anthropic's envelope and says nothing.
    kind = word(error.get("type")) or word(error.get("status")) or word(limit_source)
    own_code = word(error.get("code")) or word(around.get("code"))
    return ErrorBody(
        code=own_code or word(detail.get("type")) or word(detail.get("code")) or kind,
        type=kind,
        message=_message(error, around, detail),
        loc=_loc(detail.get("loc") or detail.get("location")) or word(error.get("param")),
    )


def _message(error: dict[str, Any], around: dict[str, Any], detail: dict[str, Any]) -> str:
    said: Any = word(detail.get("msg")) or word(detail.get("message"))
    said = said or error.get("message") or around.get("message")
    said = said or error.get("detail") or around.get("detail")
    if not said:
        # A bare code has nothing more to say; anything else is shown as it came.
        said = "" if set(error) <= {"code", "type", "param", "message", "object"} else error
    return _line(as_text(said) or "")


def _first_detail(error: dict[str, Any]) -> dict[str, Any]:
    """The first {loc, msg, type} of a validation error, wherever Mistral has put the list.

    Prism has its own beside the message: {location, message, code} under ``validation``.
    """
    for held in (error.get("detail"), error.get("message"), error.get("validation")):
        if isinstance(held, str) and held.lstrip()[:1] in ("{", "["):
            held = _maybe_json(held)
        if isinstance(held, dict):
            held = held.get("detail")
        if isinstance(held, list) and held and isinstance(held[0], dict):
            return held[0]
    return {}


def _maybe_json(text: str) -> Any:
    try:
        return loads(text)
    except (ValueError, RecursionError):
        return None


def _loc(value: Any) -> str:
    if isinstance(value, list):
        return ".".join(filter(None, map(word, value)))
    return word(value)


def word(value: Any) -> str:
    """A code, type or name as text: ``1500`` and ``"1500"`` are the same code."""
    if isinstance(value, str):
        return value
    return str(value) if type(value) is int else ""


def _line(text: str) -> str:
    return " ".join(text[: 2 * MAX_MESSAGE_CHARS].split())[:MAX_MESSAGE_CHARS]


def page_text(text: str) -> ErrorBody | None:
    """The first words of a body that is no JSON, for instance of a proxy's HTML page."""
    if text.lstrip()[:1] in ("{", "["):  # JSON cut short says nothing to a person
        return None
    words = " ".join(MARKUP.sub(" ", text[:20_000]).split())
    return ErrorBody(message=words[:MAX_PAGE_CHARS]) if words else None
