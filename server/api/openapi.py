"""The OpenAPI document: what FastAPI knows, and what it cannot know: statuses, streams, errors and examples."""

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
        "description": "Every answer that is not a result, in OpenAI's shape.",
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "description": "What went wrong.",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string", "description": "For people."},
                    "type": {"type": "string", "description": "OpenAI's class of errors."},
                    "param": {"type": ["string", "null"], "description": "The request's field at fault."},
                    "code": {"type": "string", "description": "A stable word for programs."},
                    "details": {
                        "type": "array",
                        "description": "Every fault, where there can be several.",
                        "items": {"type": "object"},
                    },
                },
            }
        },
    }
}

STATUSES = {
    400: "The request or the soft prompt's file is wrong; `param` or `details` tell where.",
    401: "No API key, or an unknown one (where the server asks for keys).",
    403: "The API key may not do this, or a page of another origin sent it.",
    404: "There is no such model, soft prompt, version, alias or file.",
    409: "What is there now forbids it; trying again does not help.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not of the type that this path takes.",
    416: "The Range header asks for what the file does not have.",
    429: "The server is full; `Retry-After` tells when to try again.",
    503: "The server is loading, restarting, draining or overloaded; `Retry-After` tells when to try again.",
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
"""A body for each path that takes JSON; with the soft prompts of the demo, each of them is answered."""


def describe_api(app: FastAPI) -> dict[str, Any]:
    """The document, made once for an application."""
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
        "key": {"type": "http", "scheme": "bearer", "description": "Where the server was started with keys."}
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
        responses["206"] = {"description": "The part that `Range` asked for.", "content": content}


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
    """What a success holds, where FastAPI does not know."""

    def json_of(name: str) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": _REF.format(name=name)}}}

    def events_of(name: str) -> dict[str, Any]:
        payload = {
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [{"$ref": _REF.format(name=name)}, {"$ref": _REF.format(name="Error")}]},
        }
        data = {
            "type": "string",
            "description": f"{name} as JSON, one a chunk, and [DONE] at the end; after the first event an error is "
            "one event with Error, and the last.",
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
