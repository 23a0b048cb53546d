"""The gate of a replica: requests that did not come through the ingress of its cluster are refused."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prompt_store.types import SHARED
from server.api.http.http_middleware import HttpMiddleware
from server.api.keys.callers import ALL_SCOPES, IN_PROCESS_CALLER, Caller
from server.api.keys.signed_callers import (
    INGRESS_HEADER,
    LOAD_HEADER,
    CallerKind,
    CallerSigner,
    SignedCaller,
    target_of,
)
from server.api.services import Services
from server.errors import AuthenticationError

CLUSTER = Caller("cluster", SHARED, ALL_SCOPES)
"""The cluster itself, which asks its replicas for load and metrics."""


class IngressMiddleware(HttpMiddleware):
    """Lets in what the ingress has signed, as the caller that it names, and adds the load to the response.

    Args:
        app: The rest of the application.
        signer: Checks the signatures.
        services: The server, with its keys.
    """

    def __init__(self, app: ASGIApp, *, signer: CallerSigner, services: Services) -> None:
        super().__init__(app)
        self._signer = signer
        self._services = services

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request."""
        headers = Headers(scope=scope)
        signed = self._signer.check(
            headers.get(INGRESS_HEADER),
            method=scope["method"],
            target=target_of(scope["raw_path"], scope["query_string"]),
            request_id=headers.get("x-request-id", ""),
        )
        self._set_caller(scope, signed)

        async def send_with_load(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[LOAD_HEADER] = str(self._services.admission.num_in_use)
            await send(message)

        await self.app(scope, receive, send_with_load)

    def _set_caller(self, scope: Scope, signed: SignedCaller) -> None:
        if signed.kind is CallerKind.CLUSTER:
            scope[IN_PROCESS_CALLER] = CLUSTER
        keys = self._services.api_keys
        if signed.kind is not CallerKind.KEY or keys is None:
            return
        caller = keys.named(signed.key)
        if caller is None:  # the key files of ingress and replica differ for a moment after a change
            raise AuthenticationError("the API key is not valid")
        scope[IN_PROCESS_CALLER] = caller
        scope["state"]["is_current"] = lambda: keys.named(caller.name) is not None
