from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.formats import FormatType, PromptFormat, SamplingDefaults

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
samplings = st.builds(
    SamplingDefaults,
    max_tokens=st.none() | st.integers(1, 4096),
    temperature=st.none() | st.floats(0, 2),
    stop=st.none() | st.lists(texts.filter(bool), max_size=3).map(tuple),
)
formats = st.one_of(
    st.builds(PromptFormat, st.just(FormatType.RAW), separator=texts, sampling=samplings),
    st.builds(
        PromptFormat,
        st.just(FormatType.CHAT),
        system=st.none() | texts.filter(bool),
        separator=texts,
        sampling=samplings,
    ),
    st.builds(PromptFormat, st.just(FormatType.TEMPLATE), template=texts.filter(bool), sampling=samplings),
)


@given(formats)
def test_a_format_survives_json(prompt_format: PromptFormat) -> None:
    assert PromptFormat.parse(prompt_format.to_json()) == prompt_format


@pytest.mark.parametrize("name", ["raw", "chat"])
def test_a_name_is_a_format(name: str) -> None:
    assert PromptFormat.parse(name) == PromptFormat(FormatType(name))
    assert PromptFormat.parse(name).to_json() == {"type": name}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "format must be a JSON object"),
        ("template", r"format\.template is missing"),
        ("other", "must be raw, chat or template"),
        ({"type": ["raw"]}, "must be raw, chat or template"),
        ({"kind": "raw"}, "format has no field 'kind'"),
        ({"type": "raw", "system": "s"}, r"format\.system is only allowed with the type chat, not raw"),
        ({"type": "chat", "template": "{{ text }}"}, r"format\.template is only allowed"),
        ({"type": "template", "template": "x" * 9000}, "at most 8192 characters"),
        ({"type": "raw", "separator": "a\0"}, "without NUL"),
        ({"type": "raw", "separator": "\ud800"}, "Unicode"),
        ({"type": "raw", "separator": 3}, "must be a string"),
        ({"type": "raw", "sampling": []}, None),
        ({"type": "raw", "sampling": [1]}, r"format\.sampling must be a JSON object"),
        ({"type": "raw", "sampling": {"top_p": 1}}, "has no field 'top_p'"),
        ({"type": "raw", "sampling": {"max_tokens": 0}}, "must be a positive integer"),
        ({"type": "raw", "sampling": {"max_tokens": True}}, "must be a positive integer"),
        ({"type": "raw", "sampling": {"temperature": 2.5}}, "from 0 to 2"),
        ({"type": "raw", "sampling": {"temperature": float("nan")}}, "from 0 to 2"),
        ({"type": "raw", "sampling": {"temperature": True}}, "from 0 to 2"),
        ({"type": "raw", "sampling": {"stop": ["a"] * 17}}, "at most 16"),
        ({"type": "raw", "sampling": {"stop": [""]}}, "empty"),
        ({"type": "raw", "sampling": {"stop": [3]}}, "must be a string"),
    ],
)
def test_anything_else_is_refused(value: Any, message: str | None) -> None:
    if message is None:
        assert PromptFormat.parse(value) == PromptFormat(FormatType.RAW)
        return
    with pytest.raises(ValueError, match=message):
        PromptFormat.parse(value)
