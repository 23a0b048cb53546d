"""The scopes that each path needs. Paths that are not in this table are not served."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from server.api.keys.callers import Caller, Scope
from server.errors import PermissionDeniedError

OPEN_PATHS = frozenset({"/live", "/ready", "/health"})
"""Probes carry no key."""

_ANY_KEY: frozenset[Scope] = frozenset()
_GENERATE = frozenset({Scope.GENERATE})
_READ = frozenset({Scope.PROMPTS_READ})
_WRITE = frozenset({Scope.PROMPTS_WRITE})
_ADMIN = frozenset({Scope.ADMIN})

SCOPES: dict[tuple[str, str], frozenset[Scope]] = {
    ("POST", "/v1/completions"): _GENERATE,
    ("POST", "/v1/chat/completions"): _GENERATE,
    ("POST", "/v1/classify"): _GENERATE,
    ("POST", "/tokenize"): _GENERATE,
    ("POST", "/detokenize"): _GENERATE,
    ("GET", "/tokenizer_info"): _GENERATE,
    ("GET", "/v1/models"): _GENERATE | _READ,
    ("GET", "/v1/models/{model_id:path}"): _GENERATE | _READ,
    ("GET", "/v1/prompts"): _READ,
    ("POST", "/v1/prompts"): _WRITE,
    ("GET", "/v1/prompts/{id}"): _READ,
    ("DELETE", "/v1/prompts/{id}"): _WRITE,
    ("GET", "/v1/prompts/{id}/inspect"): _READ,
    ("GET", "/v1/prompts/{id}/history"): _READ,
    ("POST", "/v1/prompts/{id}/warm"): _WRITE,
    ("GET", "/v1/prompts/{id}/versions"): _READ,
    ("GET", "/v1/prompts/{id}/versions/{version}"): _READ,
    ("DELETE", "/v1/prompts/{id}/versions/{version}"): _WRITE,
    ("GET", "/v1/prompts/{id}/versions/{version}/files/{filename}"): _READ,
    ("PUT", "/v1/prompts/{id}/aliases/{alias}"): _WRITE,
    ("DELETE", "/v1/prompts/{id}/aliases/{alias}"): _WRITE,
    ("POST", "/v1/prompts/{id}/aliases/{alias}/rollback"): _WRITE,
    # Admin only, because it shows the soft prompts of all tenants and their use.
    ("GET", "/metrics"): _ADMIN,
    ("HEAD", "/metrics"): _ADMIN,
    **{
        (method, path): _ANY_KEY
        for method in ("GET", "HEAD")
        for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
    },
}
"""By method and path: the scopes of which one is needed; none if empty."""

LIMITED: dict[tuple[str, str], bool] = {
    ("POST", "/v1/completions"): True,
    ("POST", "/v1/chat/completions"): True,
    ("POST", "/v1/classify"): True,
    ("POST", "/tokenize"): True,
    ("POST", "/detokenize"): True,
    ("POST", "/v1/prompts"): False,
    ("GET", "/v1/prompts/{id}/inspect"): False,
    ("POST", "/v1/prompts/{id}/warm"): False,
}
"""Routes that count against a key's limits, and whether they count against its token limit."""

_LIMITED_PATTERNS = [
    (method, compile_path(path)[0], takes_tokens) for (method, path), takes_tokens in LIMITED.items()
]

_PATTERNS = [(compile_path(path)[0], method, needed) for (method, path), needed in SCOPES.items()]


def takes_tokens(method: str, path: str) -> bool | None:
    """Whether a request counts against its key's token limit; None if it counts against no limit."""
    for known, pattern, found in _LIMITED_PATTERNS:
        if known == method and pattern.match(path):
            return found
    return None


def check_access(caller: Caller, method: str, path: str) -> None:
    """Return if a caller may use a path.

    Raises:
        PermissionDeniedError: If the key has none of the required scopes.
        HTTPException: 404 or 405 for paths and methods that are not in the table.
    """
    known = {known: needed for pattern, known, needed in _PATTERNS if pattern.match(path)}
    if not known:
        raise HTTPException(404)
    if method not in known:
        raise HTTPException(405, headers={"allow": ", ".join(sorted(known))})
    needed = known[method]
    if needed and not needed & caller.scopes:
        words = " or ".join(sorted(needed))
        raise PermissionDeniedError(f"this requires an API key with the scope {words}", scopes=sorted(needed))
