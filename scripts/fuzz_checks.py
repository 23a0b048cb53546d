"""Additional checks for schemathesis, used by ``fuzz_api.py``."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, Response

SERVER_ERROR = 500


@schemathesis.check
def no_server_error(_ctx: CheckContext, response: Response, _case: Case[Any]) -> None:
    """No server error, except a timeout that the request itself configured."""
    if response.status_code >= SERVER_ERROR:
        code = response.json()["error"]["code"]
        if code != "overloaded_waiting":
            raise AssertionError(f"{response.status_code} {code}")


@schemathesis.check
def errors_in_openais_shape(_ctx: CheckContext, response: Response, _case: Case[Any]) -> None:
    """Every error has OpenAI's shape and a request ID, not a framework's default reply."""
    if response.status_code >= 400:
        body = response.json()
        if body.keys() != {"error"} or not {"message", "type", "param", "code"} <= body["error"].keys():
            raise AssertionError(f"not the error shape: {body}")
        if not response.headers.get("x-request-id"):
            raise AssertionError("the X-Request-ID header is missing")
