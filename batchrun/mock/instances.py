"""Values that fit a JSON Schema, made up from a request's digest: equal requests, equal values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import Any, Final, cast

from batchrun.config import JSONValue

_MOST_DEPTH: Final = 12
_FORMATS: Final = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "email": "synthetic@example.org",
    "uri": "https://example.org/synthetic",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


class Instances:
    """Makes instances of one schema. Patterns and the like are not understood."""

    def __init__(self, schema: Mapping[str, JSONValue], seed: bytes, text: str) -> None:
        self._root = schema
        self._random = Random(seed)
        self._text = text

    def make(self) -> JSONValue:
        return self._of(self._root, 0)

    def _of(self, schema: Any, depth: int) -> JSONValue:
        if not isinstance(schema, Mapping) or depth > _MOST_DEPTH:
            return None
        if isinstance(ref := schema.get("$ref"), str):
            return self._of(self._behind(ref), depth + 1)
        if "const" in schema:
            return cast("JSONValue", schema["const"])
        if values := schema.get("enum"):
            return cast("JSONValue", self._random.choice(values))
        for word in ("anyOf", "oneOf"):
            if choices := schema.get(word):
                return self._of(self._random.choice(choices), depth + 1)
        if parts := schema.get("allOf"):
            merged = dict(schema)
            del merged["allOf"]
            for part in parts:
                merged |= self._behind(part["$ref"]) if "$ref" in part else part
            return self._of(merged, depth + 1)
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = self._random.choice(kind)
        return self._of_type(kind, schema, depth)

    def _of_type(self, kind: str, schema: Mapping[str, Any], depth: int) -> JSONValue:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            least = schema.get("minItems", 1)
            most = schema.get("maxItems", max(least, 2))
            number = self._random.randint(least, max(least, most))
            return [self._of(schema.get("items", {}), depth + 1) for _ in range(number)]
        if kind in ("integer", "number"):
            return self._number(kind, schema)
        if kind == "boolean":
            return self._random.random() < 0.5
        return None if kind == "null" else self._string(schema)

    def _object(self, schema: Mapping[str, Any], depth: int) -> JSONValue:
        required = schema.get("required", ())
        return {
            name: self._of(inner, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if name in required or (depth < _MOST_DEPTH / 2 and self._random.random() < 0.7)
        }

    def _number(self, kind: str, schema: Mapping[str, Any]) -> JSONValue:
        step = schema.get("multipleOf", 1 if kind == "integer" else 0)
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", schema.get("exclusiveMaximum", low + 100))
        if kind == "number" and not step:
            # Inside, for the ends may be excluded.
            between = 0.1 + 0.8 * self._random.random()
            return float(round(low + (high - low) * between, 3))
        first = (
            math.floor(low / step) + 1 if "exclusiveMinimum" in schema else math.ceil(low / step)
        )
        last = (
            math.ceil(high / step) - 1 if "exclusiveMaximum" in schema else math.floor(high / step)
        )
        value: int | float = self._random.randint(first, max(first, last)) * step
        return value

    def _string(self, schema: Mapping[str, Any]) -> str:
        text = _FORMATS.get(schema.get("format", ""), self._text)
        least, most = schema.get("minLength", 0), schema.get("maxLength", len(text) + 1_000)
        return text.ljust(least, ".")[:most]

    def _behind(self, ref: str) -> Mapping[str, Any]:
        found: Any = self._root
        for step in filter(None, ref.removeprefix("#").split("/")):
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step, {}) if isinstance(found, Mapping) else {}
        return found if isinstance(found, Mapping) else {}
