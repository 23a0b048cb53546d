"""The OpenAPI document is complete, and errors follow its standard body."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    document: dict[str, Any] = (await client.get("/openapi.json")).json()
    return document


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, one) for path, item in document["paths"].items() for method, one in item.items()]


async def test_the_version_is_the_servers(document: dict[str, Any]) -> None:
    assert document["info"]["version"] == metadata.version("prelude-server")


async def test_every_field_and_parameter_is_described(document: dict[str, Any]) -> None:
    lacking = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, described in schema.get("properties", {}).items()
        if "description" not in described
    ]
    lacking += [
        f"{method} {path} {parameter['name']}"
        for method, path, operation in operations(document)
        for parameter in operation.get("parameters", [])
        if "description" not in parameter and "description" not in parameter["schema"]
    ]
    assert lacking == []


async def test_every_status_has_a_schema(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        assert operation["summary"], path
        assert operation["description"], path
        for status, response in operation["responses"].items():
            if status == "204":
                assert "content" not in response, path
                continue
            schemas = [content["schema"] for content in response["content"].values()]
            assert schemas, (method, path, status)
            if status >= "400":
                assert schemas == [{"$ref": "#/components/schemas/Error"}], (method, path, status)
        assert "422" not in operation["responses"]
        assert "default" not in operation["responses"]


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        ("post", "/v1/completions", {"200", "400", "401", "403", "404", "408", "413", "415", "429", "503"}),
        ("post", "/v1/prompts", {"200", "201", "400", "401", "403", "408", "409", "413", "415", "503"}),
        ("get", "/v1/models", {"200", "401", "403", "503"}),
        ("get", "/live", {"200"}),
    ],
)
async def test_operations_document_their_statuses(
    document: dict[str, Any], method: str, path: str, statuses: set[str]
) -> None:
    assert document["paths"][path][method]["responses"].keys() == statuses


async def test_every_reference_resolves(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    found = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            found.extend([value["$ref"]] if "$ref" in value else [])
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)
    assert found
    assert {ref.removeprefix("#/components/schemas/") for ref in found} <= schemas.keys()
    assert "text/event-stream" in document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]


async def test_a_bad_range_has_the_standard_error_body(client: httpx.AsyncClient, sentiment: str) -> None:
    url = "/v1/prompts/sentiment/versions/1/files/adapter_model.safetensors"
    assert (await client.get(url, headers={"range": "bytes=0-3"})).status_code == 206
    for header, status, code in (
        ("bytes=9999999-", 416, "range_not_satisfiable"),
        ("bytes=x", 400, "invalid_request"),
    ):
        response = await client.get(url, headers={"range": header})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[]", b"1", b"", b'{"prompt": NaN', b"[" * 100_000])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/classify", "/tokenize", "/detokenize"]
)
async def test_a_body_that_is_not_an_object_has_the_standard_error_body(
    client: httpx.AsyncClient, path: str, body: bytes
) -> None:
    response = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in {400, 413}, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "detail" not in response.json()
