"""The middleware of the server, in its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.middleware import Middleware

from server.api.early_refusal import AdmissionMiddleware
from server.api.http.answers import ExpectMiddleware
from server.api.http.hosts import HostMiddleware, Hosts
from server.api.http.origins import CorsMiddleware, CrossOriginMiddleware, Origins
from server.api.inference.entry import LimitsMiddleware
from server.api.inference.ingress import IngressMiddleware
from server.api.inference.request_record import RequestRecord
from server.api.json_budget import JsonBudgetMiddleware
from server.api.keys.secret_file import read_secret
from server.api.keys.sessions import Sessions
from server.api.keys.signed_callers import CallerSigner
from server.api.middleware import (
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    BodyTimeoutMiddleware,
    RequestIdMiddleware,
)
from server.api.operations import Operations
from server.api.services import Services


def middleware_stack(
    services: Services,
    *,
    operations: Operations,
    observers: Sequence[Callable[[RequestRecord], None]],
    origins: Origins,
    hosts: Hosts | None,
    sessions: Sessions | None,
    entry: Sequence[Middleware] = (),
) -> list[Middleware]:
    """The middleware, the outermost first.

    Args:
        services: The server.
        operations: Everything that is served.
        observers: Callbacks that get the record of each finished request.
        origins: The allowed origins.
        hosts: The accepted host names; None accepts any.
        sessions: The sessions of the console, with the accepted keys; None serves every client without a key.
        entry: Middleware that answers before a key is required, but only to accepted hosts.

    Raises:
        ConfigurationError: If the secret of the ingress cannot be read.
    """
    http, metrics = services.settings.http, services.metrics
    stack = [Middleware(ExpectMiddleware)]
    if origins:
        stack.append(Middleware(CorsMiddleware, origins=origins))
    stack.append(Middleware(RequestIdMiddleware, operations=operations, metrics=metrics, observers=observers))
    if http.ingress_secret_file is not None:
        signer = CallerSigner(read_secret(http.ingress_secret_file, "ingress secret"))
        stack.append(Middleware(IngressMiddleware, signer=signer, services=services))
    if hosts is not None:
        stack.append(Middleware(HostMiddleware, hosts=hosts))
    stack.append(Middleware(CrossOriginMiddleware, origins=origins))
    stack += entry
    if sessions is not None:
        stack.append(Middleware(ApiKeyMiddleware, sessions=sessions, open_metrics=http.open_metrics))
    stack.append(Middleware(LimitsMiddleware, metrics=metrics))
    stack.append(Middleware(BodyTimeoutMiddleware, seconds=http.body_timeout))
    stack.append(Middleware(BodyLimitMiddleware, max_bytes=http.max_body_bytes))
    stack.append(Middleware(JsonBudgetMiddleware))
    stack.append(Middleware(AdmissionMiddleware, services=services))
    return stack
