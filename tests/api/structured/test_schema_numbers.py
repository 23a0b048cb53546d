from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.structured.schema_numbers import check_numbers, subschemas

BIG = 2**53 + 1


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "integer", "minimum": BIG}, "minimum"),
        ({"type": "integer", "maximum": -BIG}, "maximum"),
        ({"minimum": 2**62}, "minimum"),
        ({"type": "number", "maximum": 2**62 + 1024}, "maximum"),
        ({"type": "integer", "minimum": 1e20}, "minimum"),
        ({"type": "integer", "maximum": 10**400}, "maximum"),
        ({"type": "integer", "exclusiveMinimum": 2**53}, "exclusiveMinimum"),
        ({"type": "integer", "exclusiveMaximum": -(2**53)}, "exclusiveMaximum"),
        ({"const": BIG}, "const"),
        ({"const": {"a": [1, {"b": 10**400}]}}, "const"),
        ({"enum": [1, 2**64]}, "enum"),
        ({"const": 1e23}, "const"),
        (
            {"const": float(2**53 - 1)},
            "const",
        ),  # written with a zero after the decimal point, which is one digit too many
        ({"const": 5.914578334801731e16}, "const"),
        ({"const": 1.0259818493301033e-60}, "const"),
        ({"const": 1e-23}, "const"),
        ({"maximum": 0.30000000000000004}, "maximum"),
        ({"exclusiveMaximum": 0.30000000000000004}, "exclusiveMaximum"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "exclusive bound of 0"),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "exclusive bound of 0"),
        ({"type": ["null", "number"], "exclusiveMaximum": -0.0, "minimum": -0.5}, "exclusive bound of 0"),
        ({"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]}, "exclusive bound of 0"),
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        lambda schema: schema,
        lambda schema: {"properties": {"const": schema, "a": {}}},
        lambda schema: {"items": [True, schema]},
        lambda schema: {"$defs": {"default": {"anyOf": [{}, schema]}}},
        lambda schema: {"additionalProperties": {"not": schema}},
    ],
)
def test_numbers_that_would_be_rounded_are_refused(schema: dict[str, Any], word: str, place: Any) -> None:
    with pytest.raises(ValueError, match=word):
        check_numbers(place(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "minimum": 2**53, "maximum": 2**60 + 256},
        {"type": "number", "minimum": -1e15, "exclusiveMaximum": 1e15},
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"exclusiveMinimum": 0, "maximum": 1},
        {"exclusiveMinimum": -1, "exclusiveMaximum": 0},
        {"const": 2**60},
        {"const": 1e22, "enum": [0.1, -0.0, 1e21, True, 0.123456789012345, 1e-22]},
        {"default": BIG, "examples": [{"const": BIG}], "description": "minimum"},
        {"properties": {"minimum": {"type": "null"}, "const": {}}, "minimum": "3", "maximum": None, "enum": 5},
    ],
    ids=str,
)
def test_exact_numbers_are_accepted(schema: dict[str, Any]) -> None:
    check_numbers(schema)


nodes = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner),
        st.dictionaries(
            st.sampled_from(
                ["type", "properties", "$defs", "allOf", "const", "enum", "minimum", "exclusiveMinimum", "maximum"]
            ),
            inner,
        ),
    ),
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(["properties", "allOf", "minimum", "type", "const", "x"]), nodes))
def test_any_schema_is_accepted_or_refused(schema: dict[str, Any]) -> None:
    with suppress(ValueError):
        check_numbers(schema)
    assert next(subschemas(schema)) == schema
