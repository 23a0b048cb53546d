"""The table from exceptions to HTTP responses, in OpenAI's format."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from prompt_store.errors import (
    CorruptBlobError,
    InvalidPromptError,
    JobNotFoundError,
    JobsFullError,
    PromptConflictError,
    PromptForbiddenError,
    PromptInUseError,
    PromptNotFoundError,
    PromptStoreError,
    PromptTooLargeError,
    StoreUnavailableError,
)
from server.errors import (
    AuthenticationError,
    ConstraintError,
    ContextLengthError,
    CrossOriginError,
    EngineDeadError,
    EngineNotReadyError,
    EngineRestartingError,
    EngineStartError,
    InvalidRequestError,
    MediaTypeError,
    MisdirectedRequestError,
    ModelNotFoundError,
    NotFoundError,
    NotFromIngressError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    PinBudgetError,
    RateLimitError,
    RequestFailedError,
    RequestRefusedError,
    ServerError,
    SoftPromptNotFoundError,
    UnsupportedByEngineError,
    UnsupportedError,
    WaitTimeoutError,
    WrongAdapterError,
)
from server.logs import FIELDS

logger = logging.getLogger(__name__)

MAX_DETAILS = 32
"""Maximum number of faults reported, which bounds the response to a long list of invalid items."""

_REQUEST_ERROR = "invalid_request_error"
_SERVER_ERROR = "server_error"
_UNAVAILABLE = "service_unavailable_error"


@dataclass(frozen=True, slots=True)
class _Row:
    """The response to one class of exceptions.

    Attributes:
        status: HTTP status.
        type: OpenAI's ``error.type``.
        code: OpenAI's ``error.code``.
        headers: Headers of the response.
        is_public: Whether the client gets the exception's message.
    """

    status: int
    type: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)
    is_public: bool = True


_INTERNAL = _Row(500, _SERVER_ERROR, "internal_error", is_public=False)
_CLOSE = {"connection": "close"}

_TABLE: dict[type[Exception], _Row] = {
    InvalidRequestError: _Row(400, _REQUEST_ERROR, "invalid_request"),
    ContextLengthError: _Row(400, _REQUEST_ERROR, "context_length_exceeded"),
    WrongAdapterError: _Row(400, _REQUEST_ERROR, "wrong_adapter"),
    UnsupportedError: _Row(400, _REQUEST_ERROR, "unsupported_parameter"),
    InvalidPromptError: _Row(400, _REQUEST_ERROR, "invalid_prompt"),
    AuthenticationError: _Row(401, _REQUEST_ERROR, "invalid_api_key", {"www-authenticate": "Bearer"}),
    PermissionDeniedError: _Row(403, _REQUEST_ERROR, "insufficient_scope"),
    CrossOriginError: _Row(403, _REQUEST_ERROR, "cross_origin"),
    NotFromIngressError: _Row(403, _REQUEST_ERROR, "not_from_ingress"),
    PromptForbiddenError: _Row(403, _REQUEST_ERROR, "insufficient_scope"),
    NotFoundError: _Row(404, _REQUEST_ERROR, "not_found"),
    ModelNotFoundError: _Row(404, _REQUEST_ERROR, "model_not_found"),
    SoftPromptNotFoundError: _Row(404, _REQUEST_ERROR, "prompt_not_found"),
    PromptNotFoundError: _Row(404, _REQUEST_ERROR, "prompt_not_found"),
    JobNotFoundError: _Row(404, _REQUEST_ERROR, "not_found"),
    PromptConflictError: _Row(409, "conflict_error", "conflict", {"x-should-retry": "false"}),
    PromptInUseError: _Row(409, "conflict_error", "in_use", {"x-should-retry": "false"}),
    PinBudgetError: _Row(409, "conflict_error", "pin_budget_exceeded", {"x-should-retry": "false"}),
    # The rest of a body that is too large is not read, so the connection has to be closed.
    PayloadTooLargeError: _Row(413, _REQUEST_ERROR, "payload_too_large", _CLOSE),
    PromptTooLargeError: _Row(413, _REQUEST_ERROR, "payload_too_large", _CLOSE),
    MediaTypeError: _Row(415, _REQUEST_ERROR, "unsupported_media_type"),
    MisdirectedRequestError: _Row(421, _REQUEST_ERROR, "misdirected_request"),
    RateLimitError: _Row(429, "rate_limit_error", "rate_limit_exceeded"),
    OverloadedError: _Row(429, "rate_limit_error", "overloaded", {"retry-after": "1"}),
    JobsFullError: _Row(429, "rate_limit_error", "too_many_jobs", {"retry-after": "60"}),
    WaitTimeoutError: _Row(503, _UNAVAILABLE, "overloaded_waiting", {"retry-after": "5"}),
    ConstraintError: _Row(400, _REQUEST_ERROR, "invalid_constraint"),
    RequestRefusedError: _Row(400, _REQUEST_ERROR, "request_refused"),
    UnsupportedByEngineError: _Row(400, _REQUEST_ERROR, "unsupported_by_engine"),
    RequestFailedError: _Row(500, _SERVER_ERROR, "request_failed"),
    EngineNotReadyError: _Row(503, _UNAVAILABLE, "engine_not_ready", {"retry-after": "2"}),
    EngineRestartingError: _Row(503, _UNAVAILABLE, "engine_restarting", {"retry-after": "5"}),
    EngineDeadError: _Row(503, _UNAVAILABLE, "engine_dead", {"retry-after": "10"}),
    EngineStartError: _Row(503, _UNAVAILABLE, "engine_start_failed", {"retry-after": "30"}),
    StoreUnavailableError: _Row(503, _UNAVAILABLE, "store_unavailable", {"retry-after": "2"}, is_public=False),
    CorruptBlobError: _Row(500, _SERVER_ERROR, "corrupt_prompt", is_public=False),
    ServerError: _INTERNAL,
    PromptStoreError: _INTERNAL,
}

_HTTP_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "payload_too_large",
    414: "uri_too_long",
    416: "range_not_satisfiable",
    429: "too_many_pipelined",
    431: "headers_too_large",
    501: "unsupported_transfer_coding",
    505: "http_version_not_supported",
}

_PUBLIC_TEXT = {
    "internal_error": "internal error; see the server's log for this X-Request-ID",
    "store_unavailable": "the prompt store is temporarily unavailable; try again",
    "corrupt_prompt": "the stored soft prompt is damaged; upload it again",
}


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as sent to a client: as a response, or as one event of a stream.

    Attributes:
        status: HTTP status, if it is a response.
        type: OpenAI's ``error.type``.
        code: Stable error code.
        message: Message in plain text.
        param: The request field that caused the error, if any.
        details: All faults found, for errors that can have several.
        headers: Headers of the response.
    """

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    details: Sequence[Mapping[str, object]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The JSON object ``{"error": {...}}``."""
        error: dict[str, object] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.details is not None:
            error["details"] = list(self.details)
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The error as a response."""
        return Response(self.body, self.status, dict(self.headers), media_type="application/json")


def describe(error: Exception, *, request_id: str) -> ErrorReply:
    """Look an exception up in the table. Unknown exceptions are bugs: they are logged, and hidden from the client."""
    if isinstance(error, RequestValidationError):
        return _describe_validation(error)
    if isinstance(error, HTTPException):
        return _describe_http(error)
    row = next((_TABLE[cls] for cls in type(error).__mro__ if cls in _TABLE), _INTERNAL)
    if row.status >= 500 and not row.is_public:
        logger.error("request %s failed", request_id, exc_info=error, extra={FIELDS: {"request_id": request_id}})
    message = (str(error) if row.is_public else _PUBLIC_TEXT[row.code]) or row.code
    details = error.details if isinstance(error, ServerError) else None
    if isinstance(error, InvalidPromptError):
        details = [
            {"code": fault.code, "message": fault.message, "file": fault.file, "field": fault.field}
            for fault in error.faults
        ]
    param = error.param if isinstance(error, ServerError) else None
    return ErrorReply(row.status, row.type, row.code, message, param, details, {**row.headers, **_own_headers(error)})


_BEFORE_PARSING = {
    HTTPStatus.BAD_REQUEST: "this is not an HTTP/1.1 request",
    HTTPStatus.REQUEST_TIMEOUT: "the request was not received in time",
    HTTPStatus.TOO_MANY_REQUESTS: "too many pipelined requests on one connection",
    HTTPStatus.REQUEST_URI_TOO_LONG: "the request's target is too long",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "the request's headers are too many or too long",
    HTTPStatus.NOT_IMPLEMENTED: "the body's transfer coding is not supported",
    HTTPStatus.HTTP_VERSION_NOT_SUPPORTED: "this server speaks HTTP/1.1 and HTTP/1.0",
    HTTPStatus.SERVICE_UNAVAILABLE: "too many connections are open; try again later",
}


def describe_status(status: HTTPStatus, reason: str | None = None) -> ErrorReply:
    """The reply for a request rejected before it was parsed."""
    is_full = status is HTTPStatus.SERVICE_UNAVAILABLE
    kind, code = (_UNAVAILABLE, "too_many_connections") if is_full else (_REQUEST_ERROR, _HTTP_CODES[status.value])
    headers = {"retry-after": "1"} if is_full else {}
    return ErrorReply(status.value, kind, code, reason or _BEFORE_PARSING[status], headers=headers)


def _own_headers(error: Exception) -> Mapping[str, str]:
    """Headers that depend on the exception, not only on its class."""
    if isinstance(error, PermissionDeniedError) and error.scopes:  # RFC 6750, section 3
        return {"www-authenticate": f'Bearer error="insufficient_scope", scope="{" ".join(error.scopes)}"'}
    if isinstance(error, ServerError) and error.retry_after is not None:
        milliseconds = max(1, math.ceil(error.retry_after * 1000))
        when = {"retry-after": str(math.ceil(milliseconds / 1000)), "retry-after-ms": str(milliseconds)}
        is_hopeless = isinstance(error, RateLimitError) and error.is_hopeless
        return when | ({"x-should-retry": "false"} if is_hopeless else {})
    return {}


def _describe_http(error: HTTPException) -> ErrorReply:
    """Errors raised by Starlette and FastAPI: unknown paths, wrong methods, unreadable bodies."""
    type_ = _REQUEST_ERROR if error.status_code < 500 else _SERVER_ERROR
    code = _HTTP_CODES.get(error.status_code, "http_error")
    return ErrorReply(error.status_code, type_, code, error.detail, headers=error.headers or {})


def _describe_validation(error: RequestValidationError) -> ErrorReply:
    faults = error.errors()
    details = [_fault(item) for item in faults[:MAX_DETAILS]]
    first = details[0]
    param = first["field"]
    message = f"{param}: {first['message']}" if param else str(first["message"])
    if len(faults) > 1:
        message += f" (and {len(faults) - 1} more, see details)"
    return ErrorReply(400, _REQUEST_ERROR, "invalid_request", message, param, details)


def _fault(item: Mapping[str, object]) -> dict[str, str | None]:
    """One of pydantic's errors without the input, which may be long or not representable in JSON."""
    kind, message, loc = str(item["type"]), str(item["msg"]), item["loc"]
    if kind == "json_invalid":
        return {"code": kind, "message": "the body is not valid JSON", "field": None}
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
    return {"code": kind, "message": message, "field": field_path(loc[1:]) if isinstance(loc, tuple) else None}


def field_path(loc: Sequence[str | int]) -> str | None:
    """The path of a nested field in OpenAI's notation, e.g. ``messages[0].content``; None for the whole body."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or None
