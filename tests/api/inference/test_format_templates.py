from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.inference.format_templates import MAX_OUTPUT_CHARS, check_template, render


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ text }}", " a<b\n"),
        ("Q: {{ text|trim }}\nA:\n", "Q: a<b\nA:\n"),
        ("{{ text ~ '!' }}{{ text|trim|upper }}", " a<b\n!A<B"),
        ("{% if 'z' in text %}z{% else %}{{ text }}{% endif %}", " a<b\n"),
        ("{{ 'x' if text is upper else text }}", " a<b\n"),
        ("{# a comment #}{{ text }}", " a<b\n"),
    ],
)
def test_a_template_is_rendered_without_escaping(source: str, expected: str) -> None:
    check_template(source)
    assert render(source, " a<b\n") == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "does not contain"),
        ("no variable", "does not contain"),
        ("{% raw %}{{ text }}{% endraw %}", "does not contain"),
        ("{{ text", "line 1: unexpected end"),
        ("a\n{{ messages }}", "line 2: 'messages' is not known: the only variable is text"),
        ("{{ text.__class__ }}", "Getattr is not allowed"),
        ("{{ text['__class__'] }}", "Getitem is not allowed"),
        ("{{ text.upper() }}", "Call is not allowed"),
        ("{{ cycler() }}", "Call is not allowed"),
        ("{{ text * 1000000 }}", "Mul is not allowed"),
        ("{{ 'a' * 1000000000 }}{{ text }}", "Mul is not allowed"),
        ("{{ 9 ** 9 ** 9 }}{{ text }}", "Pow is not allowed"),
        ("{% for c in text %}{{ text }}{% endfor %}", "For is not allowed"),
        ("{% set text = 'x' %}{{ text }}", "Assign is not allowed"),
        ("{% macro m() %}{% endmacro %}{{ text }}", "Macro is not allowed"),
        ("{% include 'x' %}{{ text }}", "Include is not allowed"),
        ("{{ text|replace('a', 'b') }}", "'replace' is not allowed"),
        ("{{ text|center(99) }}", "'center' is not allowed"),
        ("{{ text|attr('format') }}", "'attr' is not allowed"),
        ("{{ text|nothing }}", "'nothing' is not allowed"),
        ("{{ text if text is callable }}", "'callable' is not allowed"),
        ("{{ text }}" * 17, "uses text 17 times; at most 16"),
        ("{{ text }}" + "{{ 'a' }}" * 600, "parts; at most 512"),
        ("{{ " + "(" * 4000 + "text" + ")" * 4000 + " }}", "cannot be compiled"),
        ("{{ text" + "|trim" * 1500 + " }}", "cannot be compiled|parts"),
    ],
)
def test_anything_but_its_variable_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_template(source)


def test_deep_conditions_are_refused() -> None:
    source = "{% if 'a' %}" * 150 + "{{ text }}" + "{% endif %}" * 150
    with pytest.raises(ValueError, match="cannot be compiled"):
        check_template(source)


def test_the_output_is_bounded() -> None:
    with pytest.raises(ValueError, match="too long"):
        render("{{ text }}" * 16, "x" * (MAX_OUTPUT_CHARS // 16 + 1))


@given(st.text(), st.text(st.characters(exclude_characters="{}\r\n", exclude_categories=["Cs"])))
def test_the_text_is_never_read_as_a_template(text: str, before: str) -> None:
    assert render(before + "{{ text }}", text) == before + text


@given(st.text("{}%text |~'()[].", max_size=30))
def test_no_source_raises_anything_but_value_errors(source: str) -> None:
    try:
        check_template(source)
    except ValueError:
        return
    assert len(render(source, "ab")) <= len(source) + 16 * 2
