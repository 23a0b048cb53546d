"""What ``fuzz_api.py`` has schemathesis check besides its own checks."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, Response

SERVER_ERROR = 500


@schemathesis.check
def no_server_error(_ctx: CheckContext, response: Response, _case: Case[Any]) -> None:
    """No bug, and no outage that the request did not ask for."""
    if response.status_code >= SERVER_ERROR:
        code = response.json()["error"]["code"]
        if code != "overloaded_waiting":
            raise AssertionError(f"{response.status_code} {code}")


@schemathesis.check
def errors_in_openais_shape(_ctx: CheckContext, response: Response, _case: Case[Any]) -> None:
    """Nothing that the frameworks below would answer themselves."""
    if response.status_code >= 400:
        body = response.json()
        if body.keys() != {"error"} or not {"message", "type", "param", "code"} <= body["error"].keys():
            raise AssertionError(f"not the error shape: {body}")
        if not response.headers.get("x-request-id"):
            raise AssertionError("no X-Request-ID")
