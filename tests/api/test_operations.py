"""The declared properties of routes, and the lookup of a request's route."""

from __future__ import annotations

import pytest
from fastapi import APIRouter
from starlette.exceptions import HTTPException

from prompt_store.types import SHARED
from server.api.keys.callers import ANYBODY, Caller, Scope
from server.api.operations import Operation, Operations, Quota
from server.errors import PermissionDeniedError
from tests.support.operations import OPERATIONS

READER = Caller("key", SHARED, frozenset({Scope.PROMPTS_READ}))


@pytest.mark.parametrize(
    ("method", "path", "template"),
    [
        ("GET", "/v1/models/a:b/c@1", "/v1/models/{model_id:path}"),
        ("DELETE", "/v1/prompts/a", "/v1/prompts/{id}"),
        ("PUT", "/v1/prompts/a/aliases/b", "/v1/prompts/{id}/aliases/{alias}"),
        ("HEAD", "/metrics", "/metrics"),
        ("GET", "/console/session", "/console/session"),
        ("GET", "/console/sessions", "/console/{path:path}"),
    ],
)
def test_a_request_is_matched_to_its_operation(method: str, path: str, template: str) -> None:
    assert OPERATIONS.match(method, path).operation is OPERATIONS.by_route[method, template]


@pytest.mark.parametrize("path", ["/", "/v1", "/live/", "//v1/models", "/v1/prompts/a/b", "/no-such"])
def test_an_unknown_path_is_404(path: str) -> None:
    found = OPERATIONS.match("GET", path)
    assert (found.operation, found.is_open, found.is_polled) == (None, False, False)
    with pytest.raises(HTTPException) as caught:
        found.check_access(ANYBODY)
    assert caught.value.status_code == 404


def test_a_wrong_method_is_405_with_the_methods_of_the_path() -> None:
    with pytest.raises(HTTPException) as caught:
        OPERATIONS.match("PUT", "/v1/prompts/a").check_access(ANYBODY)
    assert (caught.value.status_code, caught.value.headers) == (405, {"allow": "DELETE, GET, PATCH"})


def test_one_of_the_scopes_is_enough() -> None:
    OPERATIONS.match("GET", "/v1/models").check_access(READER)
    OPERATIONS.match("GET", "/v1/prompts").check_access(READER)
    with pytest.raises(PermissionDeniedError, match="scope prompts:write"):
        OPERATIONS.match("POST", "/v1/prompts").check_access(READER)


def test_probes_are_open_and_metrics_are_not() -> None:
    open_paths = {path for (_, path), operation in OPERATIONS.by_route.items() if operation.scopes is None}
    probes = {"/live", "/ready", "/health"}
    assert open_paths == probes | {"/console", "/console/session", "/console/{path:path}"}
    assert all(OPERATIONS.match("GET", path).is_polled == (path in probes) for path in open_paths)
    assert all(OPERATIONS.match("PATCH", path).is_open for path in open_paths)
    metrics = OPERATIONS.match("GET", "/metrics")
    assert (metrics.is_open, metrics.is_metrics, metrics.is_polled) == (False, True, True)


def test_operations_that_use_the_model_take_tokens_of_the_key() -> None:
    work = [operation for operation in OPERATIONS.by_route.values() if operation.work is not None]
    assert {operation.work for operation in work} == {"text_completion", "chat", "classify"}
    assert all(operation.quota is Quota.TOKENS for operation in work)


def test_a_route_without_operation_is_refused() -> None:
    router = APIRouter()

    async def endpoint() -> None: ...

    router.add_api_route("/x", endpoint)
    with pytest.raises(TypeError, match=r"/x.* has no operation: add @Operation"):
        Operations(router.routes)
    operation = Operation(scopes=None)
    assert operation(endpoint) is endpoint
    assert Operations(router.routes).by_route == {("GET", "/x"): operation}
