"""The command line's HTTP client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE

_PAGE = 200
_TIMEOUT_SECONDS = 60.0


class ClientError(Exception):
    """The server refused, or could not be reached; the text is one line for people.

    Attributes:
        status: The HTTP status, or None where no answer came.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


class PreludeClient:
    """Talks to one server.

    Args:
        url: Where it is, such as ``http://127.0.0.1:8000``.
        api_key: Sent with every request, if given.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url.rstrip("/")
        self._http = httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def push(self, directory: Path, *, name: str, alias: str | None = None) -> tuple[dict[str, Any], bool]:
        """Upload a PEFT directory; returns the version, and whether it is new.

        Raises:
            ClientError: If a file is missing, or the server refuses.
        """
        with ExitStack() as stack:
            files = []
            for filename in (CONFIG_FILE, WEIGHTS_FILE):
                try:
                    opened = stack.enter_context((directory / filename).open("rb"))
                except OSError as error:
                    raise ClientError(f"{directory / filename}: {error.strerror}") from error
                files.append(("files", (filename, opened, "application/octet-stream")))
            data = {"id": name} | ({"alias": alias} if alias else {})
            response = self._send("POST", "/v1/prompts", data=data, files=files)
        return response.json(), response.status_code == httpx.codes.CREATED

    def prompts(self) -> Iterator[dict[str, Any]]:
        """All soft prompts, page by page.

        Raises:
            ClientError: If the server refuses.
        """
        params: dict[str, str | int] = {"limit": _PAGE}
        while True:
            page = self._send("GET", "/v1/prompts", params=params).json()
            yield from page["data"]
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]

    def remove(self, name: str, version: int | None = None) -> None:
        """Delete one version, or all of a name.

        Raises:
            ClientError: If the server refuses, or has no such soft prompt.
        """
        self._send("DELETE", f"/v1/prompts/{name}" if version is None else f"/v1/prompts/{name}/versions/{version}")

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, self._url + path, **arguments)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ClientError(f"{self._url} cannot be reached: {error}") from error
        if response.is_success:
            return response
        raise ClientError(_reason(response), status=response.status_code)


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered {response.status_code} {response.reason_phrase}: is this a Prelude server?"
