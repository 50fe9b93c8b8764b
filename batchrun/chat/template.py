"""A template and a row make a text.

Templates are Jinja2, sandboxed. One that only names columns is joined without Jinja2, which costs
a tenth and says the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from batchrun.chat.identity import json_text
from batchrun.chat.rows import Row, Unusable
from batchrun.config import JSONValue
from batchrun.errors import UsageError
from batchrun.words import kind

if TYPE_CHECKING:
    from jinja2 import Environment, nodes

# The whole row, for columns whose names are no identifiers: ``{{ row["first name"] }}``.
ROW: Final = "row"
_COLUMN: Final = re.compile(r"\{\{\s*([^\W\d]\w*)\s*\}\}")
_ANY_MARK: Final = re.compile(r"\{\{|\{%|\{#")
# Not columns in Jinja2: its constants, operators and keywords of expressions.
_WORDS: Final = frozenset(
    ("true", "false", "none", "True", "False", "None", "and", "or", "not", "in", "is", "if", "else")
)
_SHOWN_REASON: Final = 200


class Template(NamedTuple):
    """A text to be made of each row.

    ``columns`` are those it names, None when it may look at any; ``render`` raises Unusable for a
    row that it cannot be made of.
    """

    columns: frozenset[str] | None
    render: Callable[[Row], str]
    is_constant: bool = False


@lru_cache(maxsize=256)
def compiled(text: str, option: str) -> Template:
    """``text`` as a template; UsageError, naming ``option``, for one that is none."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    parts = _COLUMN.split(text)
    literals, names = parts[::2], parts[1::2]
    if any(map(_ANY_MARK.search, literals)) or not (_WORDS | {ROW}).isdisjoint(names):
        return _with_jinja(text, option)
    return Template(frozenset(names), _joined(parts), is_constant=not names)


def _joined(parts: list[str]) -> Callable[[Row], str]:
    slots = [(at, parts[at]) for at in range(1, len(parts), 2)]

    def render(row: Row) -> str:
        pieces = parts.copy()
        for at, name in slots:
            value = row.get(name)
            pieces[at] = value if type(value) is str else _said_of(value, name)
        return "".join(pieces)

    return render


def _said_of(value: JSONValue, name: str) -> str:
    if value is None:
        default = f'{{{{ {name} | default("") }}}}'
        raise Unusable("null_column", f'"{name}" is null; write {default} to allow it')
    return said(value)


def said(value: JSONValue) -> str:
    """A value inside a text: a text as it is, anything else as JSON; Unusable for bytes."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        raise Unusable("wrong_type", f"the template has {kind(value)}")
    return json_text(value)


def _with_jinja(text: str, option: str) -> Template:
    import jinja2
    from jinja2 import meta

    environment = _environment()
    try:
        tree = environment.parse(text)
        template = environment.from_string(tree)
    except jinja2.TemplateSyntaxError as exc:
        raise UsageError(f"{option}: line {exc.lineno}: {exc.message}") from None
    except RecursionError:
        raise UsageError(f"{option}: nested too deeply") from None
    _refuse_files(tree, option)
    names = meta.find_undeclared_variables(tree)
    of_row = _columns_of_row(tree) if ROW in names else frozenset[str]()
    named = frozenset(names - environment.globals.keys() - {ROW})
    columns = None if of_row is None else named | of_row

    def render(row: Row) -> str:
        there = {name: value for name, value in row.items() if value is not None}
        try:
            return template.render({ROW: there, **there})
        except Unusable:
            raise
        except jinja2.UndefinedError as exc:
            reason = f"{exc.message or exc} (null, or not there); default(...) allows it"
            raise Unusable("null_column", reason) from None
        except Exception as exc:
            why = f"{type(exc).__name__}: {exc}"[:_SHOWN_REASON]
            raise Unusable("template_failed", f"the template failed: {why}") from None

    return Template(columns, render)


def _refuse_files(tree: nodes.Template, option: str) -> None:
    from jinja2 import nodes

    others = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    for node in tree.find_all(others):
        raise UsageError(f"{option}: line {node.lineno}: a template cannot read other files")


def _columns_of_row(tree: nodes.Template) -> frozenset[str] | None:
    """The columns looked up in ``row``; None when it is used in any other way."""
    from jinja2 import nodes

    found, lookups = set[str](), 0
    for getitem in tree.find_all(nodes.Getitem):
        if _is_row(getitem.node):
            if not isinstance(getitem.arg, nodes.Const) or not isinstance(getitem.arg.value, str):
                return None
            found.add(getitem.arg.value)
            lookups += 1
    for getattr_ in tree.find_all(nodes.Getattr):
        if _is_row(getattr_.node):
            if hasattr(dict, getattr_.attr):
                return None
            found.add(getattr_.attr)
            lookups += 1
    uses = sum(node.name == ROW for node in tree.find_all(nodes.Name))
    return frozenset(found) if uses == lookups else None


def _is_row(node: nodes.Node) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.name == ROW


@cache
def _environment() -> Environment:
    from jinja2 import StrictUndefined, Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class _Environment(ImmutableSandboxedEnvironment):
        def getattr(self, obj: Any, attribute: str) -> Any:
            # A member is meant before a method of the same name: ``order.items``.
            if isinstance(obj, Mapping) and attribute in obj:
                return obj[attribute]
            return super().getattr(obj, attribute)

    def finalize(value: Any) -> Any:
        if value is None:
            raise Unusable("null_column", "the template has a null; default(...) allows it")
        if isinstance(value, bool | int | float | Decimal | list | dict | bytes):
            return said(cast("JSONValue", value))
        return value

    def default(value: Any, instead: Any = "", boolean: bool = False) -> Any:
        absent = value is None or isinstance(value, Undefined) or (boolean and not value)
        return instead if absent else value

    environment = _Environment(
        undefined=StrictUndefined, finalize=finalize, keep_trailing_newline=True
    )
    environment.filters |= {"default": default, "d": default, "tojson": json_text}
    return environment
