"""The command line's HTTP client."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self
from urllib.parse import quote

import httpx

from prompt_store.durable import replace_file
from prompt_store.types import CONFIG_FILE, DEFAULT_ALIAS, WEIGHTS_FILE, PromptRef
from server.client.peft_directory import explain_directory

_PAGE = 200
_TIMEOUT_SECONDS = 60.0
_ENGINE_SECONDS = 600.0
"""Timeout of requests that the engine works on; a multitask prompt can take long."""
_CHUNK_BYTES = 1024 * 1024

_HOW_TO_START = (
    "Start a server with prelude demo or prelude serve --model M, or give its address by --url or PRELUDE_URL"
)
_GIVE_KEY = "Give a key by --api-key or PRELUDE_API_KEY"
_OTHER_KEY = "The sent key is from --api-key or PRELUDE_API_KEY"

OnBytes = Callable[[int], None]
"""Called with the number of bytes sent or received since the last call."""


class ClientError(Exception):
    """The server cannot be reached or sends an error, or a local file cannot be used; the message is one line.

    Attributes:
        status: The HTTP status; None without a response.
        code: The server's ``error.code``; ``unreachable``, ``usage`` or ``local`` without a response.
        faults: (code, message) of every fault of rejected files.
        body: The error in the API's format: the server's own if it sent one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str = "local",
        body: Mapping[str, Any] | None = None,
        faults: Sequence[tuple[str, str]] = (),
    ) -> None:
        message = " ".join(message.split())
        super().__init__(message)
        self.status = status
        self.code = code
        self.faults = tuple(faults)
        self.body = body or {"error": {"message": message, "type": "client_error", "param": None, "code": code}}


class _Counted:
    """A file that reports how much of it has been read."""

    def __init__(self, file: IO[bytes], on_bytes: OnBytes) -> None:
        self._file = file
        self._on_bytes = on_bytes

    def read(self, size: int = -1) -> bytes:
        """Read, and report the number of bytes."""
        data = self._file.read(size)
        self._on_bytes(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class PreludeClient:
    """Client of one server. Every method raises ClientError if the server answers with an error or not at all.

    Args:
        url: URL of the server, such as ``http://127.0.0.1:8000``.
        api_key: API key, sent with every request.
        all_tenants: Whether to see and change the soft prompts of all tenants.

    Raises:
        ClientError: If the URL is not an http or https URL, or the key cannot be sent in a header.
    """

    def __init__(self, url: str, *, api_key: str | None = None, all_tenants: bool = False) -> None:
        self._url = str(server_url(url)).rstrip("/")
        self._has_key = bool(api_key)
        params = {"all_tenants": "true"} if all_tenants else None
        self._http = httpx.Client(headers=key_headers(api_key), params=params, timeout=_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    # Files

    def push(
        self,
        directory: Path,
        *,
        name: str,
        alias: str | None = None,
        description: str | None = None,
        tags: Sequence[str] = (),
        metadata: str | None = None,
        lineage: str | None = None,
        shared: bool = False,
        allow_other_base: bool = False,
        task_type: str | None = None,
        prompt_format: str | None = None,
        over: str | None = None,
        fields: Mapping[str, str] | None = None,
        on_bytes: OnBytes = lambda _: None,
    ) -> tuple[dict[str, Any], bool]:
        """Upload a PEFT directory, streamed from disk; the options are those of ``prelude push``.

        ``fields`` are further fields of the form.

        Returns:
            The version, and whether it is new.

        Raises:
            ClientError: Also if a file is missing.
        """
        texts = {"alias": alias, "description": description, "metadata": metadata, "lineage": lineage}
        texts |= {"task_type": task_type, "format": prompt_format, "over": over}
        data: dict[str, Any] = {"id": name, "tags": list(tags)}
        data |= {key: "true" for key, is_on in (("shared", shared), ("allow_other_base", allow_other_base)) if is_on}
        data |= {key: text for key, text in (texts | dict(fields or {})).items() if text is not None}
        with ExitStack() as stack:
            files = []
            for filename in (CONFIG_FILE, WEIGHTS_FILE):
                try:
                    opened = stack.enter_context((directory / filename).open("rb"))
                except FileNotFoundError as error:
                    raise _not_an_adapter(directory) from error
                except OSError as error:
                    raise _local(directory / filename, error) from error
                files.append(("files", (filename, _Counted(opened, on_bytes), "application/octet-stream")))
            response = self._send("POST", "/v1/prompts", data=data, files=files)
        return _object(response), response.status_code == httpx.codes.CREATED

    def pull(
        self,
        version: Mapping[str, Any],
        directory: Path,
        *,
        force: bool = False,
        on_bytes: OnBytes = lambda _: None,
    ) -> None:
        """Download the files of a version, byte for byte as they were uploaded; all of them or none.

        Args:
            version: The server's record of the version.
            directory: Target directory; created if missing.
            force: Overwrite files that differ.
            on_bytes: Called with the number of received bytes.

        Raises:
            ClientError: Also if a different file exists, a file cannot be written, or a digest differs from the
                record.
        """
        files = {file["filename"]: file for file in version["files"]}
        # Known names only: a name from a server must not choose a path here.
        targets = {directory / name: files[name] for name in (CONFIG_FILE, WEIGHTS_FILE) if name in files}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            missing = {path: file for path, file in targets.items() if not _is_same(path, file["sha256"])}
            different = [str(path) for path in missing if path.exists()]
            if different and not force:
                raise ClientError(f"{' and '.join(different)} would be overwritten; use --force")
            with ExitStack() as stack:  # files are replaced only after all have arrived
                for path, file in missing.items():
                    self._download(version, file, stack.enter_context(replace_file(path)), on_bytes)
        except OSError as error:
            raise _local(error.filename or directory, error) from error

    # Reading

    def prompts(
        self,
        *,
        tag: str | None = None,
        kind: str | None = None,
        limit: int | None = None,
        unused_for: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Soft prompts and adapters, at most ``limit``, fetched page by page.

        Args:
            tag: Only names with this tag.
            kind: Only names with a version of this kind.
            limit: Maximum number; None for all.
            unused_for: Only names that were neither published nor used for this number of seconds.
        """
        params: dict[str, str | int] = _without_nones(tag=tag, kind=kind, unused_for=unused_for)
        while limit is None or limit > 0:
            params["limit"] = _PAGE if limit is None else min(limit, _PAGE)
            page = _object(self._send("GET", "/v1/prompts", params=params))
            yield from page["data"]
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]
            limit = None if limit is None else limit - len(page["data"])

    def prompt(self, name: str) -> dict[str, Any]:
        """The record of a soft prompt, with its aliases."""
        return _object(self._send("GET", f"/v1/prompts/{name}"))

    def version(self, ref: PromptRef) -> dict[str, Any]:
        """Resolve a reference to a version."""
        number = ref.version
        if number is None:
            alias = ref.alias or DEFAULT_ALIAS
            aliases = self.prompt(ref.name)["aliases"]
            number = aliases.get(alias)
            if number is None:
                known = ", ".join(f"{key}={value}" for key, value in sorted(aliases.items()))
                has = f"its aliases are {known}" if known else "it has none; name a version"
                raise ClientError(
                    f"the soft prompt {ref.name!r} has no alias {alias!r}: {has}", status=404, code="prompt_not_found"
                )
        return _object(self._send("GET", f"/v1/prompts/{ref.name}/versions/{number}"))

    def model(self, name: str) -> dict[str, Any]:
        """The entry of the base model or a soft prompt in ``/v1/models``."""
        return _object(self._send("GET", f"/v1/models/{quote(name)}"))

    def versions(self, name: str, *, limit: int) -> dict[str, Any]:
        """The newest versions of a name."""
        return _object(self._send("GET", f"/v1/prompts/{name}/versions", params={"limit": limit}))

    def usage(self, name: str, *, limit: int) -> dict[str, Any]:
        """The use of the newest versions of a name."""
        return _object(self._send("GET", f"/v1/prompts/{name}/usage", params={"limit": limit}))

    def history(self, name: str, *, limit: int) -> dict[str, Any]:
        """The newest changes of a name's aliases and versions."""
        return _object(self._send("GET", f"/v1/prompts/{name}/history", params={"limit": limit}))

    def inspect(self, ref: PromptRef, *, top_k: int | None, task_id: int | None) -> dict[str, Any]:
        """Norms of a soft prompt, and the tokens nearest to its rows."""
        params = _without_nones(version=ref.version, alias=ref.alias, top_k=top_k, task_id=task_id)
        path = f"/v1/prompts/{ref.name}/inspect"
        return _object(self._send("GET", path, params=params, timeout=_ENGINE_SECONDS))

    # Requests to the model

    def models(self) -> list[dict[str, Any]]:
        """All entries of ``/v1/models``; the base model is first."""
        models: list[dict[str, Any]] = _object(self._send("GET", "/v1/models"))["data"]
        return models

    def tokenize(self, body: Mapping[str, Any]) -> list[int]:
        """The token ids of a text (``prompt``) or a conversation (``messages``)."""
        token_ids: list[int] = _object(self._send("POST", "/tokenize", json=body))["tokens"]
        return token_ids

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Generate a completion, without streaming."""
        return _object(self._send("POST", "/v1/completions", json=body, timeout=_ENGINE_SECONDS))

    def classify(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Classify texts."""
        return _object(self._send("POST", "/v1/classify", json=body, timeout=_ENGINE_SECONDS))

    # Changing

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        expected: int | None,
        reason: str | None = None,
        rollout: Mapping[str, Any] | None = None,
        expected_rollout: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Point an alias at a version, with a rollout (``canaries`` and ``shadow``) or none.

        It fails if the alias is not at the ``expected`` version or has not the expected rollout, if these are given.
        """
        body = _without_nones(
            version=version, expected_version=expected, expected_rollout=expected_rollout, reason=reason
        ) | dict(rollout or {})
        return _object(self._send("PUT", f"/v1/prompts/{name}/aliases/{alias}", json=body))

    def rollback(self, name: str, alias: str, *, expected: int | None, reason: str | None = None) -> dict[str, Any]:
        """Point an alias back at its previous version."""
        body = _without_nones(expected_version=expected, reason=reason)
        return _object(self._send("POST", f"/v1/prompts/{name}/aliases/{alias}/rollback", json=body))

    def warm(self, ref: PromptRef, *, task_id: int | None, pin: bool | None) -> dict[str, Any]:
        """Load a soft prompt onto the device, and pin or unpin it."""
        body = _without_nones(version=ref.version, alias=ref.alias, task_id=task_id, pin=pin)
        return _object(self._send("POST", f"/v1/prompts/{ref.name}/warm", json=body, timeout=_ENGINE_SECONDS))

    def remove(
        self, name: str, version: int | None = None, *, force: bool = False, reason: str | None = None
    ) -> dict[str, Any]:
        """Delete one version, or all of a name; ``force`` also deletes aliases and several versions."""
        path = f"/v1/prompts/{name}" if version is None else f"/v1/prompts/{name}/versions/{version}"
        params = _without_nones(force="true" if force else None, reason=reason)
        return _object(self._send("DELETE", path, params=params))

    def restore(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Bring back a deleted version, or all that the last deletion of a name has deleted."""
        return _object(self._send("POST", f"/v1/prompts/{name}/restore", json=_without_nones(version=version)))

    # Others

    def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Send a request whose answer is a JSON object; ``arguments`` are httpx's, such as ``params``, ``json``."""
        return _object(self._send(method, path, **arguments))

    def send(self, method: str, path: str, **arguments: Any) -> None:
        """The same for a request whose answer has no body."""
        self._send(method, path, **arguments)

    # Helpers

    def _download(
        self, version: Mapping[str, Any], file: Mapping[str, Any], output: BinaryIO, on_bytes: OnBytes
    ) -> None:
        path = f"/v1/prompts/{version['id']}/versions/{version['version']}/files/{file['filename']}"
        digest = hashlib.sha256()
        try:
            with self._http.stream("GET", self._url + path) as response:
                if not response.is_success:
                    response.read()
                    raise self._error_of(response)
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    digest.update(chunk)
                    output.write(chunk)
                    on_bytes(len(chunk))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if digest.hexdigest() != file["sha256"]:
            raise ClientError(
                f"the received {file['filename']} does not match the server's record: "
                f"its SHA-256 is {digest.hexdigest()}, not {file['sha256']}"
            )

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, self._url + path, **arguments)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if response.is_success:
            return response
        raise self._error_of(response)

    def _unreachable(self, error: Exception) -> ClientError:
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            reason += f". {_HOW_TO_START}"
        return ClientError(f"{self._url} cannot be reached: {reason}", code="unreachable")

    def _error_of(self, response: httpx.Response) -> ClientError:
        try:
            body = response.json()
            error = body["error"]
            message, code = str(error["message"]), str(error["code"])
            details = error.get("details") if code == "invalid_prompt" else None
            faults = [(str(fault["code"]), str(fault["message"])) for fault in details or ()]
        except (ValueError, KeyError, TypeError, AttributeError):
            return _not_prelude(response)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            message = f"{message.rstrip('.')}. {_OTHER_KEY if self._has_key else _GIVE_KEY}"
        elif response.status_code == httpx.codes.FORBIDDEN and self._has_key:
            message = f"{message.rstrip('.')}. {_OTHER_KEY}"
        return ClientError(message, status=response.status_code, code=code, body=body, faults=faults)


def server_url(text: str) -> httpx.URL:
    """Parse ``--url``, and remove OpenAI's ``/v1`` from its end.

    Raises:
        ClientError: If it is not an http or https URL.
    """
    example = "write it as http://HOST:PORT"
    try:
        url = httpx.URL(text.strip().rstrip("/").removesuffix("/v1").rstrip("/"))
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ClientError(f"--url {text[:200]!r} is not a URL ({error}): {example}", code="usage") from error
    if url.scheme not in ("http", "https") or not _is_host(url.raw_host) or not 0 < (url.port or 80) < 65536:
        raise ClientError(f"--url {text[:200]!r} is not an http or https URL: {example}", code="usage")
    if url.query or url.fragment:
        raise ClientError(f"--url {text[:200]!r} must not have a query or a fragment: {example}", code="usage")
    return url


def _is_host(raw: bytes) -> bool:
    """Whether a host can be looked up; for malformed names the system's lookup raises misleading errors."""
    labels = raw.removesuffix(b".").split(b".")
    return b":" in raw or all(0 < len(label) < 64 and b"%" not in label for label in labels)


def key_headers(api_key: str | None) -> dict[str, str]:
    """The headers with an API key.

    Raises:
        ClientError: If the key contains a character that is not allowed in a header.
    """
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise ClientError("the API key contains a character that is not allowed in a header")
    return {"authorization": f"Bearer {api_key}"}


def _object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a successful response; a Prelude server sends nothing else."""
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _not_prelude(response)
    return value


def _not_prelude(response: httpx.Response) -> ClientError:
    message = f"{response.url} answered {response.status_code} {response.reason_phrase}: is this a Prelude server?"
    if response.has_redirect_location:
        message += f" It redirects to {response.headers['location'][:200]!r}: give that address as --url"
    elif response.status_code in (httpx.codes.BAD_GATEWAY, httpx.codes.GATEWAY_TIMEOUT):
        message += " A proxy in front of it cannot reach it"
    status = None if response.is_success else response.status_code
    return ClientError(message, status=status, code="not_prelude")


def _not_an_adapter(directory: Path) -> ClientError:
    try:
        return ClientError(explain_directory(directory))
    except OSError as error:
        return _local(error.filename or directory, error)


def _local(path: object, error: OSError) -> ClientError:
    return ClientError(f"{path}: {error.strerror or error}")


def _is_same(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _without_nones(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
