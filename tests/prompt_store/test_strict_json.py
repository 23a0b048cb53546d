"""Strict parsing of JSON from outside."""

from __future__ import annotations

import pytest

from prompt_store.files.strict_json import parse_json


def test_values() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "x"]}') == {"a": [1, 2.5, None, True, "x"]}


@pytest.mark.parametrize("text", ["", "{", "NaN", "[Infinity]", "-Infinity", "1e999", "[" * 100_000])
def test_invalid_texts(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


def test_depth() -> None:
    assert parse_json("[[1]]", max_depth=2) == [[1]]
    with pytest.raises(ValueError, match="nested deeper than 1 levels"):
        parse_json("[[1]]", max_depth=1)
