"""Templates: a text made of a row, with and without Jinja2, and what is no text."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.chat.rows import PromptSettings, Unusable
from batchrun.chat.template import _with_jinja, compiled
from batchrun.chat.turns import Turns
from batchrun.config import JSONValue
from batchrun.errors import UsageError

ROW: dict[str, Any] = {
    "a": "x",
    "n": 3,
    "f": 3.0,
    "yes": True,
    "tags": [1, "ü"],
    "order": {"items": [1, 2], "note": None},
    "none_": None,
    "first name": "Bo",
    "big": Decimal("1e400"),
    "dict": "a word",
    "row": "of seats",
    "joiner": "of wood",
}
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
NESTED_LOOPS = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("no column", "no column"),
        ("{{a}} and {{ n }} {{\nf\n}}", "x and 3 3.0"),
        ("{{ yes }} {{ tags }} {{ order.items }}", 'true [1,"ü"] [1,2]'),
        ("{{ a | upper }}{{ n + 1 }}", "X4"),
        ("{{ tags | join(', ') }}", "1, ü"),
        ("{% for tag in tags %}<{{ tag }}>{% endfor %}", "<1><ü>"),
        ("{{ row['first name'] }} {{ row.a }}", "Bo x"),
        ("{{ row | upper }}", "OF SEATS"),
        ("{{ none_ | default('-') }}{{ order.note | d('?') }}", "-?"),
        ("{% if none_ is defined %}there{% else %}gone{% endif %}", "gone"),
        ("{% raw %}{{ a }}{% endraw %} {{ '{{' }}", "{{ a }} {{"),
        ("{{ order | tojson }} <b>", '{"items":[1,2],"note":null} <b>'),
        ("{{ big }} {{ big | default(1) }}", "1E+400 1E+400"),
        ("one\r\ntwo {{ a }}\r\n", "one\ntwo x\n"),
        ("}} %} #}", "}} %} #}"),
        ("{{ tags | unique }}{{ tags | reverse }}{{ range(2) }}", '[1,"ü"]["ü",1][0,1]'),
        ("{{ a ~ yes ~ tags }}{{ yes | string }}", 'xtrue[1,"ü"]true'),
        ("{{ [yes, f] | join('; ') }}{{ [{'k': yes}] | join('', 'k') }}", "true; 3.0true"),
        ("{{ dict | upper }} {{ a }}", "A WORD x"),
        ("{% set s = joiner(',') %}{% for i in range(n) %}{{ s() }}{{ i }}{% endfor %}", "0,1,2"),
        ("{{ '-' * n }}{{ n ** 2 }}", "---9"),
    ],
)
def test_a_row_is_put_into_the_text(template: str, text: str) -> None:
    assert compiled(template, "-p").render(ROW) == text


@given(
    st.lists(TEXT | st.sampled_from(["{{ a }}", "{{b}}", "{{ ünï }}", "{", "}"])), JSON, JSON, JSON
)
def test_a_join_says_what_jinja_says(parts: list[str], a: Any, b: Any, other: Any) -> None:
    text = "".join(parts)
    try:
        template = compiled(text, "-p")
    except UsageError:
        with pytest.raises(UsageError):
            _with_jinja(text, "-p")
        return
    by_jinja = _with_jinja(text.replace("\r\n", "\n").replace("\r", "\n"), "-p")
    assert template.columns == by_jinja.columns
    named = dict.fromkeys(template.columns or (), other)
    row = named | {"a": a, "b": b}
    assert template.render(row) == by_jinja.render(row)


@pytest.mark.parametrize(
    ("template", "columns"),
    [
        ("{{ a }} {{ n }}", {"a", "n"}),
        ("{% for tag in tags %}{{ tag }}{{ range(3) | length }}{% endfor %}", {"tags"}),
        ("{{ row['first name'] }}{{ row.a }}{{ n | abs }}", {"first name", "a", "n"}),
        ("{{ row }}", None),
        ("{{ row.items() | length }}", None),
        ("{{ row[a] }}", None),
        ("{{ dict | upper }}{{ range | list }}", {"dict", "range"}),
        ("{{ range(n) }}{{ cycler | upper }}", {"n", "cycler"}),
    ],
)
def test_the_columns_of_a_template_are_known(template: str, columns: set[str] | None) -> None:
    assert compiled(template, "-p").columns == columns


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{{ none_ }}", "null_column", '"none_" is null'),
        ("{{ gone }}", "null_column", '{{ gone | default("") }}'),
        ("{{ none_ | upper }}", "null_column", "default"),
        ("{{ order.note }}", "null_column", "null"),
        ("{{ order.none.deeper }}", "null_column", "default"),
        ("{{ a.__class__.__mro__ }}", "template_failed", "unsafe"),
        ("{{ n / 0 }}", "template_failed", "ZeroDivisionError"),
        ("{% for i in range(10000000) %}{% endfor %}", "template_failed", "Range too big"),
        ("{{ tags.append(1) }}", "template_failed", "unsafe"),
        (NESTED_LOOPS, "template_failed", "more than 1,000,000 steps"),
        ("{{ a * 10 ** 9 }}", "template_failed", "too large"),
        ("{{ 10 ** 9 * [a] }}", "template_failed", "too large"),
        ("{{ n ** (10 ** 9) }}", "template_failed", "too large"),
        ("{{ a.upper }}", "template_failed", "no value"),
        ("{{ a ~ a.upper }}", "template_failed", "no value"),
        ("{{ range | upper }}", "null_column", "'range' is undefined"),
        ("{{ [a, none_] | join }}", "null_column", "none_"),
        ("{{ order.values() | join }}", "null_column", "null"),
        ("{{ order.note ~ a }}", "null_column", "null"),
    ],
)
def test_a_row_that_does_not_fit_says_why(template: str, code: str, words: str) -> None:
    with pytest.raises(Unusable) as failed:
        compiled(template, "-p").render(ROW)
    assert failed.value.code == code
    assert words in str(failed.value)


def test_bytes_are_no_text() -> None:
    for template in ("{{ a }}", "{{ a | default('') }}"):
        with pytest.raises(Unusable, match="binary data"):
            compiled(template, "-p").render({"a": b"\xff"})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ a", "line 1"),
        ("fine\n{% if a %}", "line 2"),
        ("{% include 'secrets.txt' %}", "cannot read other files"),
        ("{{ a | nonsense }}", "nonsense"),
        ("{{ tags | random }}", "random"),
        ("{{ self | upper }}", 'row["self"]'),
    ],
)
def test_what_is_no_template_is_said_with_its_line(template: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        compiled(template, "--system")
    assert refused.value.message.startswith("--system: line ")
    assert words in refused.value.message


@pytest.mark.parametrize("block", ["for x in tags", "if a"])
def test_what_python_cannot_nest_is_no_template(block: str) -> None:
    ends = f"{{% end{block[:3].strip()} %}}"
    with pytest.raises(UsageError, match="nested too deeply"):
        compiled(f"{{% {block} %}}" * 120 + ends * 120, "-p")


def test_every_text_of_messages_is_a_template() -> None:
    messages: list[JSONValue] = [
        {"role": "user", "content": "Sort {{ a }}"},
        {"role": "assistant", "content": [{"type": "text", "text": "{{ n }}", "cache": True}]},
    ]
    turns = Turns.of(PromptSettings(messages=messages, prompt="{{ f }}", system="{{ yes }}"))
    assert turns.columns == frozenset({"a", "n", "f", "yes"})
    assert [make(ROW) for make in turns.messages] == [
        {"role": "user", "content": "Sort x"},
        {"role": "assistant", "content": [{"type": "text", "text": "3", "cache": True}]},
    ]


def test_columns_alone_need_no_jinja() -> None:
    script = """
import sys
from batchrun.chat.template import compiled
assert compiled("{{ a }} {{ b }}", "-p").render({"a": "x", "b": 1}) == "x 1"
print("jinja2" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
