"""The errors of the server.

ServerError
├── ConfigurationError       the settings are invalid; reported at startup
├── InvalidRequestError      the request is invalid; names the field
│   ├── ContextLengthError   text, soft prompt and new tokens exceed the context
│   ├── PayloadTooLargeError the body exceeds its size limit
│   └── MediaTypeError       the body's content type is not supported
├── AuthenticationError      the API key is missing or unknown
├── PermissionDeniedError    the API key lacks a scope
├── CrossOriginError         a web page of another origin sent the request
├── MisdirectedRequestError  the Host header names another server
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
│   └── RequestFailedError   the engine failed on this request
│       └── NotFiniteError   the model computed NaN or infinity
└── EngineStartError         the engine cannot start: wrong model, too little memory
"""

from __future__ import annotations

from collections.abc import Sequence


class ServerError(Exception):
    """Base of all errors that are reported to clients or operators.

    Attributes:
        message: For people.
        param: The request field that caused the error, if any.
        retry_after: Seconds after which a retry may succeed, if known.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class ConfigurationError(ServerError):
    """The settings cannot be used as they are."""


class InvalidRequestError(ServerError):
    """The request is wrong."""


class ContextLengthError(InvalidRequestError):
    """The text, the soft prompt and the new tokens together do not fit the model's context."""


class PayloadTooLargeError(InvalidRequestError):
    """The body is over its size limit."""


class MediaTypeError(InvalidRequestError):
    """The body's content type is not one that the path takes."""


class AuthenticationError(ServerError):
    """No key was sent, or one that is not known."""


class PermissionDeniedError(ServerError):
    """The key that was sent may not do this.

    Attributes:
        scopes: The required scopes, one of which is enough.
    """

    def __init__(self, message: str, *, scopes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.scopes = tuple(scopes)


class CrossOriginError(ServerError):
    """A web page of another origin sent the request, and it may not."""


class MisdirectedRequestError(ServerError):
    """The request's Host is none of the names that this server answers to."""


class RateLimitError(ServerError):
    """The key that was sent is over one of its limits.

    Attributes:
        is_hopeless: Whether the same request can never succeed.
    """

    def __init__(self, message: str, *, retry_after: float, is_hopeless: bool = False) -> None:
        super().__init__(message, retry_after=retry_after)
        self.is_hopeless = is_hopeless


class PinBudgetError(ServerError):
    """Pinned soft prompts would take more host memory than they may, the tenant's or all together."""


class NotFoundError(ServerError):
    """What the request names does not exist."""


class ModelNotFoundError(NotFoundError):
    """The ``model`` field names neither the base nor a soft prompt."""


class SoftPromptNotFoundError(NotFoundError):
    """The named soft prompt, version or alias does not exist."""


class UnsupportedError(ServerError):
    """A known field asks for a feature that this server does not have."""


class EngineError(ServerError):
    """The engine did not produce a result."""


class EngineNotReadyError(EngineError):
    """The engine is still loading the model, or drains before it stops."""


class EngineRestartingError(EngineNotReadyError):
    """The engine process has ended, and another is being started."""


class EngineDeadError(EngineError):
    """The engine process ended while the request was in flight."""


class OverloadedError(EngineError):
    """No admission permit is free."""


class WaitTimeoutError(EngineError):
    """The request was admitted and waited, but did not begin to run within its timeout."""


class ConstraintError(EngineError):
    """The constraint on a request's text is wrong, too large, or cannot be satisfied; the request's own fault."""


class RequestRefusedError(EngineError):
    """The request asks for what the engine can never do with its model and its memory; the request's own fault."""


class RequestFailedError(EngineError):
    """The engine could not finish this one request; others are not affected."""


class NotFiniteError(RequestFailedError):
    """The model computed NaN or an infinity for this one request, most likely because of its soft prompt."""


class EngineStartError(ServerError):
    """The engine cannot start with these settings."""
