"""Applications that want keys, and requests that bring them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI

from server.config import Settings

WRITER = ("generate", "prompts:read", "prompts:write")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def key_entry(key: str, tenant: str | None = None, scopes: Sequence[str] = WRITER, **limits: int) -> str:
    """One entry of a key file.

    Args:
        key: The key, which is also the name of the tenant unless one is given.
        tenant: Whose key it is; an empty string leaves it out.
        scopes: What the key may do.
        **limits: Limits of the key, such as ``requests_per_minute``.
    """
    owner = key if tenant is None else tenant
    lines = ["[[keys]]", f'key = "{key}"', *([f'tenant = "{owner}"'] if owner else [])]
    quoted = ", ".join(f'"{scope}"' for scope in scopes)
    lines += [f"scopes = [{quoted}]", *(f"{name} = {value}" for name, value in limits.items())]
    return "\n".join([*lines, "", ""])


def locked(make_app: Callable[[Settings], FastAPI], settings: Settings, path: Path, text: str) -> FastAPI:
    """An application whose keys are in the file at ``path``, which gets this text."""
    path.write_text(text)
    return make_app(replace(settings, http=replace(settings.http, api_key_file=path)))
