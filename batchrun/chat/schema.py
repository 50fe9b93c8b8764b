"""Answers that have to fit a JSON Schema: how it is asked for, and whether a text fits.

The schema itself decides, whatever the endpoint promises. Nothing it names is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from hashlib import blake2b
from typing import Final, Literal, NamedTuple, cast

import msgspec

from batchrun.config import JSONValue, SchemaDialect
from batchrun.errors import UsageError

ProblemCode = Literal["truncated", "refused", "empty", "not_json", "schema"]

_FENCED: Final = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
_THOUGHT: Final = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_SHOWN_ERRORS: Final = 3
_SHOWN_ERROR: Final = 200
_decode: Final = msgspec.json.Decoder().decode
_encoded: Final = msgspec.json.Encoder(decimal_format="number").encode


class Problem(NamedTuple):
    """Why a text is not what was asked for; ``words`` are for the model and for people."""

    code: ProblemCode
    words: str


class AnswerSchema:
    """A JSON Schema whose instances are objects.

    UsageError for what is no schema, names others over the network, or allows no object.
    """

    def __init__(self, schema: Mapping[str, JSONValue]) -> None:
        import jsonschema_rs

        self.schema = dict(schema)
        try:
            self._validator = jsonschema_rs.validator_for(self.schema, offline=True)
        except (ValueError, jsonschema_rs.ReferencingError) as exc:
            why = str(exc).partition("\n")[0][:_SHOWN_ERROR]
            raise UsageError(f"--schema: not a schema that can be used here: {why}") from None
        if "object" not in _types(self.resolved(schema)):
            raise UsageError('--schema: the answer must be an object: "type": "object" at the top')

    @cached_property
    def digest(self) -> bytes:
        """Equal for equal schemas, whatever dialect asks for them."""
        text = msgspec.json.encode(self.schema, order="sorted")
        return blake2b(text, digest_size=16).digest()

    @cached_property
    def is_strict(self) -> bool:
        """Whether OpenAI's strict mode can carry it: every object is closed and asks for all."""
        return _is_strict(self.schema)

    def resolved(self, schema: JSONValue, seen: Sequence[str] = ()) -> Mapping[str, JSONValue]:
        """``schema`` behind its local references; nothing where it refers to itself."""
        if not isinstance(schema, Mapping):
            return {}
        ref = schema.get("$ref")
        if not isinstance(ref, str):
            return schema
        if ref in seen or not ref.startswith("#"):
            return {}
        found: JSONValue = self.schema
        for step in ref[1:].strip("/").split("/") if ref.strip("#/") else ():
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, Mapping) else None
        return self.resolved(found, (*seen, ref))

    def value(self, text: str) -> dict[str, JSONValue] | Problem:
        """The object in ``text``, without the fence and thoughts around it; or what is wrong."""
        bare = unfenced(text)
        try:
            found = _decode(bare)
        except (msgspec.DecodeError, RecursionError, UnicodeError) as exc:
            return Problem("not_json", f"The answer is not JSON: {exc}"[:_SHOWN_ERROR])
        try:
            fits = self._validator.is_valid(found)
        except ValueError as exc:
            return Problem("schema", f"The answer cannot be checked: {exc}"[:_SHOWN_ERROR])
        if not fits or not isinstance(found, dict):
            return Problem("schema", self._wrong(found))
        return found

    def _wrong(self, value: JSONValue) -> str:
        said = []
        for error in self._validator.iter_errors(value):
            where = "/".join(map(str, error.instance_path))
            said.append((f"{where}: " if where else "") + error.message[:_SHOWN_ERROR])
            if len(said) == _SHOWN_ERRORS:
                break
        return "; ".join(said) or "The answer is no object"


def unfenced(text: str) -> str:
    """``text`` without a model's thoughts before it and the code fence around it."""
    text = _THOUGHT.sub("", text, count=1) if "</think>" in text else text
    fenced = _FENCED.fullmatch(text)
    return fenced[1] if fenced else text


def _types(schema: Mapping[str, JSONValue]) -> Sequence[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        return [kind]
    if isinstance(kind, list):
        return [each for each in kind if isinstance(each, str)]
    return ["object"] if "properties" in schema else []


def _is_strict(schema: JSONValue) -> bool:
    if isinstance(schema, list):
        return all(map(_is_strict, schema))
    if not isinstance(schema, Mapping):
        return True
    properties = schema.get("properties", {})
    if properties == {} and "object" not in _types(schema):
        return all(map(_is_strict, schema.values()))
    required = schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    is_closed = schema.get("additionalProperties") is False
    return is_closed and set(properties) == set(required) and _is_strict(list(properties.values()))


def dialects(schema: AnswerSchema, provider: str | None) -> tuple[SchemaDialect, ...]:
    """How to ask this provider, the most exact way first; the last works everywhere."""
    if provider == "deepseek":
        return ("json-object", "prompt")
    strict: tuple[SchemaDialect, ...] = ("json-schema",) if schema.is_strict else ()
    return (*strict, "json-schema-loose", "json-object", "prompt")


def asking(body: bytes, schema: AnswerSchema, dialect: SchemaDialect) -> bytes:
    """A request's ``body``, compact JSON of an object, that also asks for the schema."""
    if dialect in ("json-object", "prompt"):
        return _instructed(body, schema, dialect)
    if dialect == "guided":
        # vLLM before 0.12 knows the first, later ones the second; each ignores the other.
        text = msgspec.json.encode(schema.schema)
        more = b'"guided_json":' + text + b',"structured_outputs":{"json":' + text + b"}"
    else:
        named: dict[str, JSONValue] = {"name": "answer", "schema": schema.schema}
        if dialect == "json-schema":
            named["strict"] = True
        more = b'"response_format":' + msgspec.json.encode(
            {"type": "json_schema", "json_schema": named}
        )
    return body[:-1] + b"," + more + b"}"


def _instructed(body: bytes, schema: AnswerSchema, dialect: SchemaDialect) -> bytes:
    """With the schema in words, which every endpoint understands."""
    members = _members(body)
    messages = members.get("messages")
    told = (
        "Answer with one JSON object and nothing else. It must fit this JSON Schema:\n"
        + msgspec.json.encode(schema.schema).decode()
    )
    said = list(messages) if isinstance(messages, list) else []
    first = said[0] if said else None
    if (
        isinstance(first, dict)
        and first.get("role") == "system"
        and isinstance(text := first.get("content"), str)
    ):
        said[0] = {**first, "content": f"{text}\n\n{told}"}
    else:
        said.insert(0, {"role": "system", "content": told})
    members["messages"] = said
    if dialect == "json-object":
        members["response_format"] = {"type": "json_object"}
    return _encoded(members)


def repairing(body: bytes, said: str, problem: Problem) -> bytes:
    """A request's ``body`` that goes on from a wrong answer with what is wrong about it."""
    members = _members(body)
    messages = members.get("messages")
    asked = list(messages) if isinstance(messages, list) else []
    told = f"That does not fit the schema. {problem.words}. Answer again with the object alone."
    members["messages"] = [
        *asked,
        {"role": "assistant", "content": said},
        {"role": "user", "content": told},
    ]
    return _encoded(members)


def with_model(body: bytes, model: str) -> bytes:
    """A request's ``body`` for another model."""
    members = _members(body)
    return _encoded({**members, "model": model})


def _members(body: bytes) -> dict[str, JSONValue]:
    """Of a body that was encoded here: numbers beyond a double are kept."""
    try:
        return cast("dict[str, JSONValue]", _decode(body))
    except msgspec.DecodeError:
        return cast("dict[str, JSONValue]", json.loads(body, parse_float=Decimal))
