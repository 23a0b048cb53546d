"""Checks of the store and of a running server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from server.client.http import ClientError, key_headers
from server.config import VLLM_VERSION
from server.doctor.findings import Finding, failed, ok, warning
from server.doctor.machine import GIB

_TIMEOUT_SECONDS = 5.0
_SMALL_DISK = 2 * GIB


def check_store(location: str, catalog_url: str | None) -> list[Finding]:
    """Check that the store can be used, and that its catalog has this release's schema. Nothing is changed.

    Args:
        location: A directory, or the URL of an object store.
        catalog_url: The catalog's URL; None for SQLite in the directory.
    """
    findings = [] if "://" in location else _directory(Path(location))
    if any(finding.status == "failed" for finding in findings):
        return findings
    # Imported here because SQLAlchemy is slow to import.
    from prompt_store.errors import PromptStoreError  # noqa: PLC0415
    from prompt_store.maintenance.existing import existing_store  # noqa: PLC0415

    if "://" not in location and catalog_url is None and not any(Path(location).glob("catalog.sqlite3")):
        return [*findings, ok("catalog", "no catalog yet; the first start creates it")]
    try:
        with existing_store(location, catalog_url) as (database, _):
            findings.append(ok("catalog", f"{database.schema_revision()}, reachable"))
    except PromptStoreError as error:
        advice = "see docs/prompt-store.md; prelude store verify reads all of it"
        findings.append(failed("catalog", " ".join(str(error).split()), advice))
    return findings


def check_vllm(python: str | None) -> list[Finding]:
    """Check the vLLM of ``--engine-python``.

    Args:
        python: The interpreter of the environment with vLLM; None checks nothing.
    """
    if python is None:
        return []
    code = "import importlib.metadata as found; print(found.version('vllm'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return [failed("vllm", f"{python} cannot be run: {error}", "give the path of a Python by --engine-python")]
    version = done.stdout.strip()
    needed = f"pip install 'vllm=={VLLM_VERSION}.*' in the environment of {python}"
    if done.returncode != 0:
        return [failed("vllm", f"{python} has no vLLM", needed)]
    if version.split(".")[:2] != VLLM_VERSION.split("."):
        return [failed("vllm", f"{python} has vLLM {version}; {VLLM_VERSION} is needed", needed)]
    return [ok("vllm", f"vLLM {version} in {python}")]


def check_server(url: str, api_key: str | None) -> list[Finding]:
    """Ask a running server whether it serves.

    Args:
        url: The server's URL.
        api_key: A key, if the server has keys.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if urlsplit(url).scheme not in {"http", "https"}:
        return [failed("server", f"{url} is not the URL of a server", "give http://HOST:PORT by --url")]
    try:
        headers = key_headers(api_key)
    except ClientError as error:
        return [failed("server", str(error), "copy the key again: --api-key or PRELUDE_API_KEY")]
    with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True) as client:
        try:
            live = client.get("/live")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return [ok("server", f"none at {url} ({error})")]
        if not live.is_success:
            text = f"{url} answers /live with status {live.status_code}: another program listens there"
            return [failed("server", text, "give the server's URL by --url, or start it with another --port")]
        try:
            return [_state(url, client)]
        except httpx.HTTPError as error:
            return [failed("server", f"{url} does not answer: {error}", "read its log")]


def _state(url: str, client: httpx.Client) -> Finding:
    """Whether a server that is alive serves, and what."""
    ready = client.get("/ready")
    if not ready.is_success:
        text = f"{url} runs and is not ready: {_message(ready)}"
        return failed("server", text, "wait if it is loading; else read its log")
    models = client.get("/v1/models")
    if models.status_code in {401, 403}:
        text = f"{url} is ready; it answers only with a key"
        return warning("server", text, "give a key by --api-key or PRELUDE_API_KEY")
    if not models.is_success:
        return failed("server", f"{url} answers /v1/models with status {models.status_code}", "read its log")
    try:
        data = models.json()["data"]
        base = next((str(model["id"]) for model in data if not model.get("parent")), "no base model")
    except (ValueError, KeyError, TypeError) as error:
        return failed("server", f"{url} does not answer /v1/models: {error}", "is it a Prelude server?")
    return ok("server", f"{url} serves {base} with {len(data) - 1} soft prompts or adapters")


def _directory(path: Path) -> list[Finding]:
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        return [failed("store", f"{existing} is not a directory", "give another directory by --store")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [failed("store", f"{existing} cannot be written", "change its owner, or give another by --store")]
    free = shutil.disk_usage(existing).free
    text = f"{path.absolute()}{'' if path.exists() else ' (not created yet)'}, {free / GIB:.1f} GiB free"
    if free < _SMALL_DISK:
        return [warning("store", text, "free some space: uploads are refused when the disk is full")]
    return [ok("store", text)]


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
