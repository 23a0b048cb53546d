"""The errors of the server.

ServerError
├── ConfigurationError       the settings are invalid; reported at startup
├── InvalidRequestError      the request is invalid; names the field
│   ├── ContextLengthError   text, soft prompt and new tokens exceed the context
│   ├── PayloadTooLargeError the body exceeds its size limit
│   ├── MediaTypeError       the body's content type is not supported
│   └── WrongAdapterError    the soft prompt was trained over another adapter
├── AuthenticationError      the API key is missing or unknown
├── PermissionDeniedError    the API key lacks a scope
├── CrossOriginError         a web page of another origin sent the request
├── MisdirectedRequestError  the Host header names another server
├── NotFromIngressError      a replica of a cluster was asked without its ingress
├── RateLimitError           the API key exceeds one of its limits
├── PinBudgetError           pinned soft prompts would exceed their host memory
├── NotFoundError
│   ├── ModelNotFoundError
│   └── SoftPromptNotFoundError
├── UnsupportedError         a known field that this server does not support
├── EngineError
│   ├── EngineNotReadyError  still loading, or draining
│   │   └── EngineRestartingError  the engine process ended and is being restarted
│   ├── EngineDeadError      the engine process ended while the request was in flight
│   ├── OverloadedError      the server is full
│   ├── WaitTimeoutError     the request timed out in the queue
│   ├── ConstraintError      the engine cannot satisfy the request's constraint
│   ├── RequestRefusedError  the engine can never serve the request
│   ├── UnsupportedByEngineError  this engine lacks a capability that the request needs
│   └── RequestFailedError   the engine failed on this request
│       └── NotFiniteError   the model computed NaN or infinity
├── EngineStartError         the engine cannot start: wrong model, too little memory
└── DeviceError              the device failed; ends the engine process
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class ServerError(Exception):
    """Base of all errors that are reported to clients or operators.

    Attributes:
        message: For people.
        param: The request field that caused the error, if any.
        retry_after: Seconds after which a retry may succeed, if known.
        details: All faults, for errors that can have several; each has a code and a message.
    """

    details: Sequence[Mapping[str, object]] | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class ConfigurationError(ServerError):
    """The settings are invalid."""


class InvalidRequestError(ServerError):
    """The request is invalid."""


class ContextLengthError(InvalidRequestError):
    """Text, soft prompt and new tokens together exceed the model's context."""


class PayloadTooLargeError(InvalidRequestError):
    """The body exceeds its size limit."""


class MediaTypeError(InvalidRequestError):
    """The path does not support the body's content type."""


class WrongAdapterError(InvalidRequestError):
    """The soft prompt was trained over another adapter than the request names."""


class AuthenticationError(ServerError):
    """The API key is missing or unknown."""


class PermissionDeniedError(ServerError):
    """The API key lacks a scope.

    Attributes:
        scopes: The accepted scopes; one of them is enough.
    """

    def __init__(self, message: str, *, scopes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.scopes = tuple(scopes)


class CrossOriginError(ServerError):
    """A web page of another origin sent the request, and this origin is not allowed."""


class MisdirectedRequestError(ServerError):
    """The Host header names another server."""


class NotFromIngressError(ServerError):
    """A replica of a cluster got a request that its ingress has not signed."""


class RateLimitError(ServerError):
    """The API key exceeds one of its limits.

    Attributes:
        is_hopeless: Whether the same request can never succeed.
    """

    def __init__(self, message: str, *, retry_after: float, is_hopeless: bool = False) -> None:
        super().__init__(message, retry_after=retry_after)
        self.is_hopeless = is_hopeless


class PinBudgetError(ServerError):
    """Pinned soft prompts would exceed the host memory of the tenant or of all pins."""


class NotFoundError(ServerError):
    """The requested object does not exist."""


class ModelNotFoundError(NotFoundError):
    """The ``model`` field names neither the base model nor a soft prompt."""


class SoftPromptNotFoundError(NotFoundError):
    """The named soft prompt, version or alias does not exist."""


class UnsupportedError(ServerError):
    """The request uses a known field that this server does not support."""


class EngineError(ServerError):
    """The engine did not produce a result."""


class EngineNotReadyError(EngineError):
    """The engine is loading the model, or draining before it stops."""


class EngineRestartingError(EngineNotReadyError):
    """The engine process has ended and is being restarted."""


class EngineDeadError(EngineError):
    """The engine process ended while the request was in flight."""


class OverloadedError(EngineError):
    """No admission permit is free."""


class WaitTimeoutError(EngineError):
    """The request timed out in the queue."""


class ConstraintError(EngineError):
    """The request's constraint is malformed, too large, or cannot be satisfied; a client error."""


class RequestRefusedError(EngineError):
    """The engine can never serve the request with its model and memory; a client error."""


class UnsupportedByEngineError(EngineError):
    """This engine lacks a capability that the request needs; a client error."""


class RequestFailedError(EngineError):
    """The engine failed on this request; others are not affected."""


class NotFiniteError(RequestFailedError):
    """The model computed NaN or infinity for this request, most likely because of its soft prompt."""


class EngineStartError(ServerError):
    """The engine cannot start with these settings."""


class DeviceError(ServerError):
    """The device failed, and computes nothing more in this process."""
