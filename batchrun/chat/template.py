"""A template and a row make a text.

Templates are Jinja2, sandboxed. One that only names columns is joined without Jinja2, which costs
a tenth and says the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
# After a brace, Jinja2 sees ``{{`` one earlier.
_COLUMN: Final = re.compile(r"(?<!\{)\{\{\s*([^\W\d]\w*)\s*\}\}")
_ANY_MARK: Final = re.compile(r"\{\{|\{%|\{#")
# Not columns in Jinja2: its constants, operators and keywords of expressions.
_WORDS: Final = frozenset(
    ("true", "false", "none", "True", "False", "None", "and", "or", "not", "in", "is", "if", "else")
)
_SHOWN_REASON: Final = 200
# What may be called. Nothing random: a row must make the same text on every pass over the input.
_FUNCTIONS: Final = frozenset(("cycler", "dict", "joiner", "namespace", "range"))
# Of one row. A loop in a loop, or a text times a number, would not end or not fit in memory.
_MOST_STEPS: Final = 1_000_000
_MOST_ITEMS: Final = 10_000_000
_MOST_BITS: Final = 100_000


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
        _refuse_what_is_no_column(tree, option)
        _say_what_is_concatenated(tree)
        template = environment.from_string(tree)
    except jinja2.TemplateSyntaxError as exc:
        raise UsageError(f"{option}: line {exc.lineno}: {exc.message}") from None
    except (RecursionError, MemoryError, SyntaxError):
        # Python's own bounds on the code that Jinja2 makes.
        raise UsageError(f"{option}: nested too deeply") from None
    names = meta.find_undeclared_variables(tree)
    of_row = _columns_of_row(tree) if ROW in names else frozenset[str]()
    called = _only_called(tree)
    columns = None if of_row is None else (frozenset(names - called - {ROW}) | of_row)
    looks_up = of_row is not None

    def render(row: Row) -> str:
        there = {name: value for name, value in row.items() if value is not None}
        known = {**there, ROW: there} if looks_up else {ROW: there, **there}
        try:
            return template.render(known | _functions(called) if called else known)
        except Unusable:
            raise
        except jinja2.UndefinedError as exc:
            reason = f"{exc.message or exc} (null, or not there); default(...) allows it"
            raise Unusable("null_column", reason) from None
        except Exception as exc:
            why = f"{type(exc).__name__}: {exc}"[:_SHOWN_REASON]
            raise Unusable("template_failed", f"the template failed: {why}") from None

    return Template(columns, render)


def _refuse_what_is_no_column(tree: nodes.Template, option: str) -> None:
    from jinja2 import nodes

    others = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    for node in tree.find_all(others):
        raise UsageError(f"{option}: line {node.lineno}: a template cannot read other files")
    for name in tree.find_all(nodes.Name):
        if name.name == "self":
            other = 'a template\'s own name; a column is row["self"]'
            raise UsageError(f'{option}: line {name.lineno}: "self" is {other}')


def _say_what_is_concatenated(tree: nodes.Template) -> None:
    """``a ~ b`` says a value as ``{{ a }}`` does, not as Python does."""
    from jinja2 import nodes

    for concat in list(tree.find_all(nodes.Concat)):
        concat.nodes = [
            nodes.Filter(node, "string", [], [], None, None, lineno=node.lineno)
            for node in concat.nodes
        ]
    tree.set_environment(_environment())


def _only_called(tree: nodes.Template) -> frozenset[str]:
    """The functions that a template calls; one used in any other way is a column of that name."""
    from jinja2 import nodes

    callees = {id(call.node) for call in tree.find_all(nodes.Call)}
    called, other = set[str](), set[str]()
    for name in tree.find_all(nodes.Name):
        (called if id(name) in callees else other).add(name.name)
    return _FUNCTIONS & (called - other)


def _functions(names: Iterable[str]) -> dict[str, Any]:
    """What one row's text may call, by name."""
    from jinja2.defaults import DEFAULT_NAMESPACE
    from jinja2.sandbox import safe_range

    left = _MOST_STEPS

    def limited(*bounds: int) -> range:
        nonlocal left
        steps = safe_range(*bounds)
        left -= len(steps)
        if left < 0:
            raise OverflowError(f"the ranges have more than {_MOST_STEPS:,} steps")
        return steps

    return {name: limited if name == "range" else DEFAULT_NAMESPACE[name] for name in names}


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


def _check_size(operator: str, left: Any, right: Any) -> None:
    """OverflowError for a product or a power that would not fit in memory."""
    too_large = False
    if operator == "**":
        too_large = (
            isinstance(left, int)
            and isinstance(right, int)
            and (left.bit_length() * right > _MOST_BITS)
        )
    else:
        for items, times in ((left, right), (right, left)):
            if isinstance(items, str | bytes | list | tuple) and isinstance(times, int):
                too_large = len(items) * times > _MOST_ITEMS
    if too_large:
        raise OverflowError(f"{operator} makes a value that is too large")


@cache
def _environment() -> Environment:
    from jinja2 import StrictUndefined, Undefined
    from jinja2.filters import make_attrgetter
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class _Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def getattr(self, obj: Any, attribute: str) -> Any:
            # A member is meant before a method of the same name: ``order.items``.
            if isinstance(obj, Mapping) and attribute in obj:
                return obj[attribute]
            return super().getattr(obj, attribute)

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            _check_size(operator, left, right)
            return super().call_binop(context, operator, left, right)

    def finalize(value: Any) -> Any:
        if isinstance(value, str | Undefined):
            return value
        if value is None:
            raise Unusable("null_column", "the template has a null; default(...) allows it")
        if isinstance(value, Iterator | range):
            value = list(value)  # of a filter: unique, map, reverse
        if isinstance(value, bool | int | float | Decimal | list | tuple | dict | bytes):
            return said(cast("JSONValue", value))
        # Its text would be an address in memory, another one each time.
        raise Unusable("template_failed", f"the template has a {type(value).__name__}, no value")

    def string(value: Any) -> str:
        return value if isinstance(value, str) else str(finalize(value))

    def join(value: Iterable[Any], between: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(environment, attribute), value)
        return string(between).join(map(string, value))

    def default(value: Any, instead: Any = "", boolean: bool = False) -> Any:
        absent = value is None or isinstance(value, Undefined) or (boolean and not value)
        return instead if absent else value

    environment = _Environment(
        undefined=StrictUndefined, finalize=finalize, keep_trailing_newline=True
    )
    environment.globals.clear()
    del environment.filters["random"]
    environment.filters |= {"default": default, "d": default, "tojson": json_text}
    environment.filters |= {"string": string, "join": join}
    return environment
