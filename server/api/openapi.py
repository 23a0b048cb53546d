"""The OpenAPI document: FastAPI's, completed with statuses, streams, errors and examples."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.api.classification.routes import ClassifyReply
from server.api.inference.responses import ChatCompletion, ChatCompletionChunk, Completion
from server.api.openapi_fields import FIELDS, PARAMETERS
from server.api.operations import OPEN_PATHS

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

_GENERATION = ("/v1/completions", "/v1/chat/completions", "/v1/classify")
_CONFLICTS = {
    ("post", "/v1/prompts"),
    ("put", "/v1/prompts/{id}/aliases/{alias}"),
    ("post", "/v1/prompts/{id}/aliases/{alias}/rollback"),
}
_LIMITED = {*_GENERATION, "/v1/prompts/{id}/warm", "/v1/prompts/{id}/inspect"}
_FILE = "/v1/prompts/{id}/versions/{version}/files/{filename}"

EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "sentiment", "prompt": "The strap feels flimsy.", "max_tokens": 4, "temperature": 0},
    "/v1/chat/completions": {"model": "dates", "messages": [{"role": "user", "content": "Born the 3rd of May 2021"}]},
    "/v1/classify": {
        "model": "sentiment",
        "input": ["The strap feels flimsy."],
        "labels": ["\npositive", "\nnegative"],
    },
    "/tokenize": {"prompt": "The strap feels flimsy.", "return_token_strs": True},
    "/detokenize": {"tokens": [200, 451]},
    "/v1/prompts/{id}/aliases/{alias}": {"version": 1},
    "/v1/prompts/{id}/aliases/{alias}/rollback": {},
    "/v1/prompts/{id}/warm": {"pin": False},
}
"""An example body for each path that takes JSON; all are valid for the demo's soft prompts."""


def describe_api(app: FastAPI) -> dict[str, Any]:
    """The document; built once per application."""
    if app.openapi_schema is None:
        app.openapi_schema = _describe(app)
    return app.openapi_schema


def _describe(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    _, replies = msgspec.json.schema_components(
        (Completion, ChatCompletion, ChatCompletionChunk, ClassifyReply), ref_template=_REF
    )
    components = document["components"]
    schemas: dict[str, Any] = components["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= {name: schema | {"title": name} for name, schema in replies.items()} | ERROR_SCHEMAS
    components["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "Required if the server was started with API keys.",
        }
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _describe_operation(method, path, operation)
    for name, schema in schemas.items():
        for field, described in schema.get("properties", {}).items():
            if "description" not in described and (text := FIELDS.get(field)):
                described["description"] = text
        schema.setdefault("title", name)
    return document


def _describe_operation(method: str, path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    for unused in ("422", "default"):
        responses.pop(unused, None)
    for status in sorted(_statuses(method, path, operation)):
        responses[str(status)] = {
            "description": STATUSES[status],
            "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}},
        }
    for parameter in operation.get("parameters", []):
        known = PARAMETERS.get(parameter["name"])
        if known is not None:
            parameter.setdefault("description", known[0])
            if parameter["in"] == "path":
                parameter.setdefault("example", known[1])
    if path in EXAMPLES and method != "delete":
        operation["requestBody"]["content"]["application/json"]["example"] = EXAMPLES[path]
    if path not in OPEN_PATHS:
        operation["security"] = [{}, {"key": []}]
    content = _content(path)
    if content is not None and "200" in responses:
        responses["200"]["content"] = content
    if path == _FILE:
        responses["206"] = {"description": "The requested range.", "content": content}


def _statuses(method: str, path: str, operation: dict[str, Any]) -> set[int]:
    if path == "/live":
        return set()
    found = {503}
    if path not in OPEN_PATHS:
        found |= {401, 403}
    if path == "/metrics":
        found.discard(503)
    names_something = "{" in path or path in _GENERATION or path in ("/tokenize", "/detokenize")
    if "parameters" in operation or "requestBody" in operation:
        found.add(400)
    if names_something:
        found.add(404)
    if "requestBody" in operation:
        found |= {408, 413, 415}
    if (method, path) in _CONFLICTS:
        found.add(409)
    if path in _LIMITED:
        found.add(429)
    if path == _FILE:
        found.add(416)
    return found


def _content(path: str) -> dict[str, Any] | None:
    """The content of a successful response, if FastAPI does not know it."""

    def json_of(name: str) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": _REF.format(name=name)}}}

    def events_of(name: str) -> dict[str, Any]:
        payload = {
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [{"$ref": _REF.format(name=name)}, {"$ref": _REF.format(name="Error")}]},
        }
        data = {
            "type": "string",
            "description": f"{name} as JSON, one per chunk, then [DONE]. An error after the first event is sent "
            "as a last event with Error.",
            "anyOf": [{"const": "[DONE]"}, payload],
        }
        return {
            "text/event-stream": {"schema": {"type": "object", "required": ["data"], "properties": {"data": data}}}
        }

    text = {"schema": {"type": "string"}}
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "/v1/completions": json_of("Completion") | events_of("Completion"),
        "/v1/chat/completions": json_of("ChatCompletion") | events_of("ChatCompletionChunk"),
        "/v1/classify": json_of("ClassifyReply"),
        "/metrics": {"text/plain": text, "application/openmetrics-text": text},
        _FILE: {"application/json": {"schema": {"type": "object"}}, "application/octet-stream": binary},
    }.get(path)
