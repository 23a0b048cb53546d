"""The OpenAPI document: FastAPI's, completed with statuses, streams, errors and examples."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.routing import compile_path

from server.api.operations import Operation, Operations

_REF = "#/components/schemas/{name}"

ERROR_SCHEMAS: dict[str, Any] = {
    "Error": {
        "title": "Error",
        "description": "An error response in OpenAI's format.",
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "description": "The error.",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string", "description": "Message in plain text."},
                    "type": {"type": "string", "description": "Error type, as in OpenAI's API."},
                    "param": {"type": ["string", "null"], "description": "The request field that caused the error."},
                    "code": {"type": "string", "description": "Stable error code."},
                    "details": {
                        "type": "array",
                        "description": "All faults, for errors that can have several.",
                        "items": {"type": "object"},
                    },
                },
            }
        },
    }
}

STATUSES = {
    400: "The request or an uploaded file is invalid; see `param` or `details`.",
    401: "The API key is missing or invalid.",
    403: "The API key lacks a scope, or the request came from a web page of another origin.",
    404: "The model, soft prompt, version, alias or file does not exist.",
    409: "The request conflicts with the current state; do not retry.",
    408: "The request body was not received in time.",
    413: "The request body is too large.",
    415: "The content type of the body is not supported.",
    416: "The requested range is outside the file.",
    429: "The server is full or the API key is over a limit; retry after `Retry-After` seconds.",
    503: "The server is loading, restarting, draining or overloaded; retry after `Retry-After` seconds.",
}


def describe_api(app: FastAPI, operations: Operations) -> dict[str, Any]:
    """The document; built once per application."""
    if app.openapi_schema is None:
        app.openapi_schema = _describe(app, operations)
    return app.openapi_schema


def _describe(app: FastAPI, operations: Operations) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    by_route = {
        (method.lower(), compile_path(path)[1]): operation
        for (method, path), operation in operations.by_route.items()
    }
    components = document["components"]
    schemas: dict[str, Any] = components["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    structs = [struct for operation in by_route.values() for struct in (operation.reply, operation.event) if struct]
    _, replies = msgspec.json.schema_components(structs, ref_template=_REF)
    schemas |= replies | ERROR_SCHEMAS
    components["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "Required if the server was started with API keys.",
        }
    }
    for path, described in document["paths"].items():
        for method, item in described.items():
            _complete(item, by_route[method, path])
    for name, schema in schemas.items():
        schema.setdefault("title", name)
    return document


def _complete(item: dict[str, Any], operation: Operation) -> None:
    """Add the statuses, content, example and security of an operation to what FastAPI wrote about it."""
    responses = item["responses"]
    for unused in ("422", "default"):
        responses.pop(unused, None)
    for status in sorted(_errors(item, operation)):
        responses[str(status)] = {"description": STATUSES[status], "content": _json_of("Error")}
    for parameter in item.get("parameters", []):
        if parameter["in"] == "path":  # FastAPI writes the examples of a parameter into its schema alone
            parameter["example"] = parameter["schema"].pop("examples")[0]
    if operation.example is not None:
        item["requestBody"]["content"]["application/json"]["example"] = operation.example
    if operation.scopes is not None:
        item["security"] = [{}, {"key": []}]
    if operation.reply is not None:
        responses["200"]["content"] = _json_of(operation.reply.__name__)
    if operation.event is not None:
        responses["200"]["content"] |= _events_of(operation.event.__name__)


def _errors(item: dict[str, Any], operation: Operation) -> set[int]:
    found = set(operation.errors)
    if operation.scopes is not None:
        found |= {401, 403}
    if "parameters" in item or "requestBody" in item:
        found.add(400)
    if "requestBody" in item:
        found |= {408, 413, 415}
    return found


def _json_of(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=name)}}}


def _events_of(name: str) -> dict[str, Any]:
    payload = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": _REF.format(name=name)}, {"$ref": _REF.format(name="Error")}]},
    }
    data = {
        "type": "string",
        "description": f"{name} as JSON, one per chunk, then [DONE]. An error after the first event is sent as a "
        "last event with Error.",
        "anyOf": [{"const": "[DONE]"}, payload],
    }
    return {"text/event-stream": {"schema": {"type": "object", "required": ["data"], "properties": {"data": data}}}}
