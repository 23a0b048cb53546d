from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.structured.schema_checks import MAX_SCHEMA_DEPTH, check_grammar

BOMB = 49_999_999


@pytest.mark.parametrize(
    "text",
    [
        f'start: %json {{"multipleOf": {BOMB}}}',
        f'start: %json{{"type":"integer","multiple\\u004ff":{BOMB}}}',
        f'start: a\na: "x" %json\n\t{{"items": {{"\\u006dultipleOf": {BOMB}}}}}',
        f'start: %json {{"a": 1}} | %json {{"anyOf": [{{"multipleOf": {BOMB}}}]}}',
        f'start: %json {{"multipleOf": 7, "multipleOf": {BOMB}}}',
        f'start: %json [{{"multipleOf": {BOMB}}}]',
        'start: %json {"multipleOf": 1e-12}',
        f'start: %json {{"description": "a\nb", "multipleOf": {BOMB}}}',
        'start: %json {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}',
        f"start: %json {'[' * (MAX_SCHEMA_DEPTH + 2)}{']' * (MAX_SCHEMA_DEPTH + 2)}",
        'start: %json {"const": NaN}',
    ],
)
def test_bad_schemas_in_grammars_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="an unsupported JSON schema: it "):
        check_grammar(text)


@pytest.mark.parametrize(
    "text",
    [
        'start: "a"',
        'start: %json {"type": "integer", "multipleOf": 7}',
        "start: %json true",
        'start: "%json x" "multipleOf"',
        "start: %json",
        "start: %json {",
        f"start: %json {'[' * 30_000}",
        f"start: %json {'1' * 5000}",
    ],
)
def test_other_grammars_are_left_to_the_compiler(text: str) -> None:
    assert check_grammar(text) == text


def test_options_are_refused_in_nested_grammars() -> None:
    with pytest.raises(ValueError, match="%llguidance"):
        check_grammar('start: %lark { start: "a" %llguidance {} }')


names = st.sampled_from(["multipleOf", "type", "items", "a"])


def escaped(text: str, which: list[bool]) -> str:
    return "".join(f"\\u{ord(char):04x}" if spell else char for char, spell in zip(text, which, strict=False))


@given(
    which=st.lists(st.booleans(), min_size=10, max_size=10),
    space=st.text(" \n\t", max_size=3),
    before=st.sampled_from(["", "%json ", '"%json" ', "%json {} ", '%json {"multipleOf": 3} | ', "%regex {} "]),
    path=st.lists(names, max_size=4),
)
def test_no_spelling_of_a_key_hides_a_divisor(which: list[bool], space: str, before: str, path: list[str]) -> None:
    inner = f'{{"{escaped("multipleOf", which)}": {BOMB}}}'
    for name in path:
        inner = f"{{{json.dumps(name)}: {inner}}}"
    with pytest.raises(ValueError, match="least common multiple"):
        check_grammar(f"start: {before}%json{space}{inner}")
