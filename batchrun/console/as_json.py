"""The summary and the models as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec
from msgspec import Struct


def to_json(value: Struct) -> bytes:
    """One object on one line; what a command found carries its exit code as a member too."""
    members = msgspec.to_builtins(value)
    exit_code = getattr(value, "exit_code", None)
    if isinstance(exit_code, int) and "exit_code" not in members:
        members = {"schema": 1, "exit_code": exit_code, **members}
    return json.dumps(members, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def models_json(names: Sequence[str]) -> bytes:
    return json.dumps({"schema": 1, "exit_code": 0, "models": list(names)}).encode() + b"\n"
