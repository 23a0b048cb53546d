"""The record of a finished request, for logs and traces."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

from starlette.requests import Request

from prompt_store.types import PromptKind, PromptVersion
from server.api.errors import ErrorReply, describe
from server.api.inference.responses import Usage
from server.api.operations import matched
from server.api.services import Services
from server.logs import FIELDS
from server.metrics.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_MODEL_CHARS = 256
"""Maximum length of the recorded field ``model``."""

MAX_LOGGED_CHARS = 10_000
"""Maximum length of a text logged by ``--log-prompts``."""


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """The record of one request. A field that does not apply to it, or was not reached, is None.

    Attributes:
        request_id: Its X-Request-ID.
        method: HTTP method.
        path: Path without the query.
        tenant: Tenant of its API key; None if there are no keys.
        key: The API key in records, which does not reveal it.
        key_name: The name of the key in the key file.
        status: HTTP status; None if the client disconnected before the response began.
        error: The ``code`` of the error reply.
        operation: ``text_completion``, ``chat`` or ``classify``.
        model: The field ``model``, truncated, or the base's name.
        prompt: The soft prompt's name.
        version: The version that served it, or that a change is about.
        alias: The alias that a change is about.
        change: For a change of a soft prompt, what was done, as in the history.
        reason: The reason that was given for the change.
        adapter: The adapter's name.
        adapter_version: The adapter's version that served it.
        outcome: For an admitted request: stop, length, abort or error, as in the metrics.
        prompt_tokens: Text tokens of all prompts.
        cached_tokens: The number of them found in the prefix cache.
        virtual_tokens: Positions that soft prompts took, for all prompts.
        completion_tokens: New tokens of all choices.
        queue_seconds: From the first sequence's arrival at the engine to its first blocks.
        prefill_seconds: From its first blocks to its first new token.
        first_token_seconds: From the request's arrival to its first new token.
        decode_seconds: From its first new token to its last.
        total_seconds: From the request's head to the end of the response.
        input: The prompts or messages, with ``--log-prompts``.
        traceparent: The client's trace, in the format of W3C's Trace Context.
        first_output: When the engine's first output for it arrived, by the monotonic clock.
        started: When its head had come, by the monotonic clock.
        started_at: The same in Unix seconds.
        is_polled: Whether it is for a probe or metrics; logged at DEBUG.
    """

    request_id: str
    method: str
    path: str
    tenant: str | None = None
    key: str | None = None
    key_name: str | None = None
    status: int | None = None
    error: str | None = None
    operation: str | None = None
    model: str | None = None
    prompt: str | None = None
    version: int | None = None
    alias: str | None = None
    change: str | None = None
    reason: str | None = None
    adapter: str | None = None
    adapter_version: int | None = None
    outcome: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    virtual_tokens: int | None = None
    completion_tokens: int | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    first_token_seconds: float | None = None
    decode_seconds: float | None = None
    total_seconds: float | None = None
    input: object = None
    traceparent: str | None = None
    first_output: float | None = None
    started: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    is_polled: bool = False

    def fail(self, error: Exception, metrics: Metrics) -> ErrorReply:
        """Record and count an error.

        Returns:
            The error as the client gets it.
        """
        reply = describe(error, request_id=self.request_id)
        metrics.count_error(reply.code)
        self.error = reply.code
        return reply

    def served_by(self, versions: Iterable[PromptVersion]) -> None:
        """Record the soft prompt and the adapter that answer."""
        for version in versions:
            if version.kind is PromptKind.ADAPTER:
                self.adapter, self.adapter_version = version.name, version.version
            else:
                self.prompt, self.version = version.name, version.version

    def end(self, outcome: str, usage: Usage) -> None:
        """Record the result of an admitted request."""
        self.outcome = outcome
        self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        self.cached_tokens = usage.prompt_tokens_details.cached_tokens
        self.virtual_tokens = usage.prompt_tokens_details.virtual_tokens

    @property
    def described_change(self) -> str:
        """What the request has changed and who sent it, for people; empty if it has changed nothing."""
        if self.change is None:
            return ""
        version = "" if self.version is None else f"@{self.version}"
        alias = "" if self.alias is None else f", alias {self.alias}"
        by = f" by {self.key_name} ({self.key})" if self.key_name else f" by {self.key}" if self.key else ""
        return f": {self.change} {self.prompt}{version}{alias}{by}"

    @property
    def fields(self) -> dict[str, object]:
        """The fields of the log line; seconds are rounded to microseconds."""
        known = {name: getattr(self, name) for name in _LOGGED}
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in known.items()
            if value is not None
        }


_NOT_LOGGED = {"first_output", "started", "started_at", "is_polled"}
_LOGGED = tuple(item.name for item in fields(RequestRecord) if item.name not in _NOT_LOGGED)


def record_of(request: Request) -> RequestRecord:
    """The record of a request that came through the middleware."""
    record = request.state.record
    if not isinstance(record, RequestRecord):
        raise TypeError("the state of a request holds something else than its record")
    return record


def begin_record(
    request: Request, services: Services, *, model: str | None, text: Callable[[], object]
) -> RequestRecord:
    """The record of a request for the model, with the model and, if they are logged, the texts.

    Args:
        request: The request.
        services: The server.
        model: The request's field ``model``.
        text: Returns the prompts or messages; called only if they are logged.
    """
    record = record_of(request)
    operation = matched(request.scope).operation
    record.operation = None if operation is None else operation.work
    record.model = (model or services.base_name)[:MAX_MODEL_CHARS]
    if services.settings.http.log_prompts:
        record.input = logged_input(text())
    return record


def log_request(record: RequestRecord) -> None:
    """Log a finished request in one line."""
    logger.log(
        logging.DEBUG if record.is_polled else logging.INFO,
        "%s %s %s in %.3f s, request %s%s",
        record.method,
        record.path,
        record.status or "without an answer",
        record.total_seconds or 0.0,
        record.request_id,
        record.described_change,
        extra={FIELDS: record.fields},
    )


def logged_input(value: object) -> object:
    """Prompts or messages for the log, with long texts and lists truncated."""
    if isinstance(value, str):
        return value[:MAX_LOGGED_CHARS]
    if isinstance(value, Mapping):
        return {key: logged_input(item) for key, item in value.items()}
    if isinstance(value, list):
        return [logged_input(item) for item in value[:MAX_LOGGED_CHARS]]
    return value
