from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from server.api.structured.schema_checks import MAX_MULTIPLE, check_schema
from server.api.structured.structured_outputs import StructuredOutputs
from server.engine.constraints import Constraint, ConstraintKind
from server.errors import ConstraintError
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["x", None]}}}
CLOSED = SCHEMA | {"additionalProperties": False}
TEXT = json.dumps(CLOSED, separators=(",", ":"))
WRAPPED: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
ROUTES = ["/v1/completions", "/v1/chat/completions"]


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "abc"}
    return prompt | fields


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "kind", "text", "is_lenient"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", "", False),
        ({"response_format": WRAPPED}, "json_schema", TEXT, True),
        (
            {"response_format": {"type": "json_schema", "json_schema": WRAPPED["json_schema"] | {"strict": True}}},
            "json_schema",
            TEXT,
            False,
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]', False),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", False),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", TEXT, False),
        ({"structured_outputs": {"json": json.dumps(SCHEMA, indent=2), "regex": None}}, "json_schema", TEXT, False),
        ({"structured_outputs": {"json_object": True}}, "json_object", "", False),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"', False),
    ],
)
async def test_constraints_reach_the_engine(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    fields: dict[str, Any],
    kind: str,
    text: str,
    is_lenient: bool,
) -> None:
    response = await client.post(path, json=body(path, n=2, stream=True, **fields))
    assert response.status_code == 200, response.text
    assert "[DONE]" in response.text
    want = Constraint(kind=ConstraintKind(kind), text=text, is_lenient=is_lenient)
    assert [request.params.constraint for request in engine.requests] == [want, want]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": None}, "response_format": {"type": "text", "json_schema": None}},
        {"structured_outputs": {"json_object": False}},
    ],
)
async def test_fields_without_a_constraint_have_no_effect(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any]
) -> None:
    assert (await client.post(path, json=body(path, **fields))).status_code == 200
    assert engine.requests[0].params.constraint is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": WRAPPED["json_schema"]}}, "response_format"),
        ({"response_format": WRAPPED | {"json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"response_format": WRAPPED | {"json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        (
            {"response_format": WRAPPED | {"json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": WRAPPED | {"json_schema": {"name": "x", "schema": {}, "strict": 1}}},
            "response_format.json_schema.strict",
        ),
        (
            {"response_format": WRAPPED | {"json_schema": {"name": "x", "schema": nested(65)}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": WRAPPED, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a" * 1025]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 8193}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"const": NaN}'}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"a":' * 9000}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": nested(65)}}, "structured_outputs.json"),
        (
            {"structured_outputs": {"json": {"const": "a" * 60000, "enum": ["\u00e9" * 1000]}}},
            "structured_outputs.json",
        ),
        ({"structured_outputs": {"json": {"multipleOf": 999983}}}, "structured_outputs.json"),
        (
            {"structured_outputs": {"json": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}}},
            "structured_outputs.json",
        ),
        ({"structured_outputs": {"json": {"multipleOf": 1e-12}}}, "structured_outputs.json"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "%llguidance {}"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": 'start: %json {"multipleOf": 999983}'}}, "structured_outputs.grammar"),
    ],
)
async def test_bad_constraints_are_refused_before_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body(path, **fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


def test_size_limits_of_constraints_are_enforced() -> None:
    with pytest.raises(ValidationError, match="65536 characters together"):
        StructuredOutputs.model_validate({"choice": ["a" * 1000] * 66})
    with pytest.raises(ValidationError, match="65536 characters as JSON"):
        StructuredOutputs.model_validate({"json": {"const": "a" * 65536}})
    with pytest.raises(ValidationError, match="at most 65536 characters"):
        StructuredOutputs.model_validate({"json": '"' + "a" * 65536 + '"'})
    with pytest.raises(ValidationError, match="at most 65536 characters"):
        StructuredOutputs.model_validate({"grammar": "a" * 65537})


@pytest.mark.parametrize("value", [2, 100, 0.01, 12.5, 0.25, 1e-9, 49999, MAX_MULTIPLE, "7", True, -3, 0, None])
def test_supported_multiples_are_accepted(value: object) -> None:
    schema = (
        {"allOf": [{"multipleOf": value}, {"multipleOf": 100}]} if value in (0.01, 0.25) else {"multipleOf": value}
    )
    assert check_schema(schema) == schema


@pytest.mark.parametrize("value", [MAX_MULTIPLE + 1, 1e308, 5e-324, 0.000050001])
def test_unsupported_multiples_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="multipleOf"):
        check_schema({"multipleOf": value})


@pytest.mark.parametrize("path", ROUTES)
async def test_deeply_nested_bodies_are_refused(client: httpx.AsyncClient, path: str) -> None:
    text = json.dumps(body(path))[:-1] + ', "structured_outputs": {"json": ' + '{"a":' * 9000 + "1" + "}" * 9002
    response = await client.post(path, content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_constraint_that_the_engine_refuses_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, engine: FakeEngine, app: FastAPI, path: str, stream: bool
) -> None:
    engine.failure = ConstraintError("unclosed group")
    for fields, param in (
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"response_format": WRAPPED}, "response_format"),
    ):
        response = await client.post(path, json=body(path, stream=stream, **fields))
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"], error["type"]) == (
            param,
            "invalid_constraint",
            "invalid_request_error",
        )
        assert error["message"] == f"{param}: unclosed group"
    assert app.state.services.admission.num_in_use == 0


async def test_a_late_constraint_failure_ends_a_stream_with_an_error(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.failure, engine.fail_after = ConstraintError("too complex"), 3
    path = "/v1/completions"
    response = await client.post(path, json=body(path, stream=True, structured_outputs={"regex": "a"}))
    last = response.text.removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["param"] == "structured_outputs"
