"""Patterns mean what they mean in re, and take no longer than their length."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_store.files.lora.patterns import MAX_PATTERN_CHARS, MAX_STEPS, Pattern, Text, UnsafePatternError

NAME = "model.layers.12.self_attn.q_proj"


@pytest.mark.parametrize(
    ("source", "is_match"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn.q_proj", True),
        ("self_attnXq_proj", False),
        (NAME, True),
        (r"layers\.(11|12)\..*", True),
        (r"layers\.1\d\.self_attn\.[qk]_proj", True),
        (r"layers\.(?:[0-9]|1[0-1])\..*", False),
        (r"^model\.layers\.\d+\.self_attn\.(q|k|v)_proj$", True),
        (r"^layers\.\d+\..*", False),
        ("k_proj|q_proj", True),
        ("k_proj|v_proj", False),
        (".*q_proj", True),
        (r"\d{2}\.self_attn\.q_proj", True),
        (r"\d{3,}\.self_attn\.q_proj", False),
        (r"(model\.)?layers\.12\.\w+\.\S+?", True),
        ("", False),
    ],
)
def test_patterns_match_as_peft_does(source: str, is_match: bool) -> None:
    assert bool(re.match(rf"(.*\.)?({source})$", NAME)) is is_match
    assert Pattern(source).matches_end(Text(NAME)) is is_match
    assert Pattern(source).matches_whole(Text(NAME)) is bool(re.fullmatch(source, NAME))


@pytest.mark.parametrize(
    "source",
    [
        r"([a-z._0-9]+)+X",
        "(a*)*b",
        "(a|aa)+b",
        "(a|b){2,3}",
        r"(.)\1",
        "(?=a)b",
        "(?i)a",
        "(?P<x>a)",
        r"\bq_proj\b",
        r"\Aq_proj\Z",
        "a**",
        "a*+",
        "a{2}{3}",
        "a{,3}",
        "a{3,2}",
        "a{",
        "*a",
        "(a",
        "a)",
        "a)|(b",
        "[a",
        "[]",
        "[z-a]",
        r"[\d-x]",
        "[a-c-e]",
        "[[:alpha:]]",
        "[a&&b]",
        "^*",
        "a\\",
        "größe",
        "a\nb",
        "a{9999}",
        "a" * (MAX_PATTERN_CHARS + 1),
        "(" * 100 + ")" * 100,
        "a{200}" * 6,
    ],
)
def test_other_patterns_are_refused(source: str) -> None:
    with pytest.raises(UnsafePatternError):
        Pattern(source)


ATOMS = st.sampled_from(
    [*"ab1.", r"\.", r"\d", r"\w", r"\D", r"\W", r"\s", r"\S", "[ab]", "[^a.]", "[a-c1]", r"[\d_]", "[]a]", "[-a]"]
)
QUANTIFIERS = st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,}", "{0,2}", "{1,3}?", "??"])
PIECES = st.one_of(st.tuples(ATOMS, QUANTIFIERS).map("".join), st.sampled_from(["^", "$"]))
PATTERNS = st.recursive(
    st.lists(PIECES, max_size=5).map("".join),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("|".join),
        st.tuples(st.sampled_from(["(", "(?:"]), inner, st.sampled_from([")", ")?", ")??"])).map("".join),
        st.lists(inner, max_size=3).map("".join),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(PATTERNS, st.lists(st.text("ab1.c_-]", max_size=9), min_size=1, max_size=6))
def test_patterns_mean_what_they_mean_in_re(source: str, names: list[str]) -> None:
    pattern = Pattern(source)
    ending, whole = re.compile(rf"(.*\.)?({source})$"), re.compile(source)
    for name in names:
        text = Text(name)
        assert pattern.matches_end(text) is bool(ending.match(name))
        assert pattern.matches_whole(text) is bool(whole.fullmatch(name))


@settings(max_examples=300, deadline=None)
@given(st.text("ab.*+?|()[]{}^$\\-,12dw", max_size=12), st.text("ab1.", max_size=8))
def test_what_is_served_is_a_pattern_of_re(source: str, name: str) -> None:
    try:
        pattern = Pattern(source)
    except UnsafePatternError:
        return
    assert pattern.matches_end(Text(name)) is bool(re.match(rf"(.*\.)?({source})$", name))


@given(st.text("a.*+?|()[]{}^$\\-,1d", max_size=MAX_PATTERN_CHARS))
def test_the_number_of_steps_is_bounded(source: str) -> None:
    with suppress(UnsafePatternError):
        assert Pattern(source).cost <= MAX_STEPS
