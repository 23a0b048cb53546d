from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.types import PromptRef, check_name


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a", PromptRef("a")),
        ("a@3", PromptRef("a", version=3, alias=None)),
        ("a@canary", PromptRef("a", alias="canary")),
        ("a.b_c-9@v2", PromptRef("a.b_c-9", alias="v2")),
    ],
)
def test_parse(text: str, want: PromptRef) -> None:
    assert PromptRef.parse(text) == want
    assert PromptRef.parse(str(want)) == want


@pytest.mark.parametrize(
    "text", ["", "A", "-a", "a@", "a@0", "a@03", "a@b@c", "a@" + "9" * 19, "a" * 129, "../a", "a\n", "a@٣"]
)
def test_parse_rejects_malformed_references(text: str) -> None:
    with pytest.raises(ValueError, match="not"):
        PromptRef.parse(text)


@given(st.text(max_size=20))
def test_parse_never_fails_otherwise(text: str) -> None:
    try:
        ref = PromptRef.parse(text)
    except ValueError:
        return
    assert PromptRef.parse(str(ref)) == ref


def test_an_alias_of_digits_is_rejected_and_a_name_of_digits_is_not() -> None:
    assert check_name("123", "name") == "123"
    with pytest.raises(ValueError, match="read as a version"):
        check_name("123", "alias")
