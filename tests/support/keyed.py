"""Applications with keys, and requests with a key."""

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
        key: The key, also used as the tenant's name unless ``tenant`` is given.
        tenant: The tenant; an empty string omits the field.
        scopes: Scopes of the key.
        **limits: Limits of the key, such as ``requests_per_minute``.
    """
    owner = key if tenant is None else tenant
    lines = ["[[keys]]", f'key = "{key}"', *([f'tenant = "{owner}"'] if owner else [])]
    quoted = ", ".join(f'"{scope}"' for scope in scopes)
    lines += [f"scopes = [{quoted}]", *(f"{name} = {value}" for name, value in limits.items())]
    return "\n".join([*lines, "", ""])


def locked(make_app: Callable[[Settings], FastAPI], settings: Settings, path: Path, text: str) -> FastAPI:
    """Write a key file and make an application that uses it."""
    path.write_text(text)
    return make_app(replace(settings, http=replace(settings.http, api_key_file=path)))
