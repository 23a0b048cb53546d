from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.structured.closed_schemas import closed

A = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "string"}}}
NO = {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "want"),
    [
        (A, A | NO),
        ({"type": "object", "properties": {}}, {"type": "object", "properties": {}} | NO),
        ({"properties": {"x": A}}, {"properties": {"x": A | NO}} | NO),
        ({"type": "array", "items": A}, {"type": "array", "items": A | NO}),
        ({"anyOf": [A, B, True]}, {"anyOf": [A | NO, B | NO, True]}),
        ({"prefixItems": [A]}, {"prefixItems": [A | NO]}),
        ({"$ref": "#/$defs/x", "$defs": {"x": A}}, {"$ref": "#/$defs/x", "$defs": {"x": A | NO}}),
        # As pydantic 1 writes a field that has a description.
        (
            {"properties": {"x": {"title": "X", "allOf": [{"$ref": "#/definitions/x"}]}}, "definitions": {"x": A}},
            {
                "properties": {"x": {"title": "X", "allOf": [{"$ref": "#/definitions/x"}]}},
                "definitions": {"x": A | NO},
            }
            | NO,
        ),
        # Names of properties are not keywords.
        ({"properties": {"items": A, "not": B}}, {"properties": {"items": A | NO, "not": B | NO}} | NO),
        ({"additionalProperties": A}, {"additionalProperties": A | NO}),
    ],
)
def test_objects_with_named_properties_are_closed(schema: dict[str, Any], want: dict[str, Any]) -> None:
    before = copy.deepcopy(schema)
    assert closed(schema) == want
    assert schema == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "required": ["a"]},
        A | {"additionalProperties": True},
        A | {"patternProperties": {"^x": {"type": "string"}}},
        A | {"minProperties": 3},
        A | {"required": ["a", "c"]},
        A | {"required": "a"},
        {"allOf": [A, B]},
        A | {"anyOf": [{"required": ["a"]}, B]},
        A | {"if": A, "then": B},
        A | {"not": B},
        {"$ref": "#/$defs/x", "anyOf": [A], "$defs": {"x": B}},
        {"allOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}], "$defs": {"x": A, "y": B}},
        {"properties": {"x": {"properties": {"y": A}, "$ref": "#/$defs/x"}}, "$defs": {"x": A}},
        {"enum": [A], "default": A, "const": A, "examples": [A]},
        {"properties": 3},
        {"items": [A, 3], "anyOf": 4, "allOf": 5},
    ],
)
def test_objects_that_allow_other_properties_stay_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["properties", "allOf", "anyOf", "$ref", "items", "required", "$defs", "not", "a"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def without_closing(node: Any) -> Any:
    if isinstance(node, list):
        return [without_closing(item) for item in node]
    if isinstance(node, dict):
        return {
            key: without_closing(value)
            for key, value in node.items()
            if (key, value) != ("additionalProperties", False)
        }
    return node


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(["properties", "allOf", "items", "$defs", "anyOf"]), JSON, max_size=3))
def test_closing_any_schema_only_adds_keywords(schema: dict[str, Any]) -> None:
    assert without_closing(closed(schema)) == without_closing(schema)
    assert closed(closed(schema)) == closed(schema)
