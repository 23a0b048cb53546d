"""Applications that want keys, and requests that bring them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI

from server.config import Settings


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def locked(make_app: Callable[[Settings], FastAPI], settings: Settings, path: Path, text: str) -> FastAPI:
    """An application whose keys are in the file at ``path``, which gets this text."""
    path.write_text(text)
    return make_app(replace(settings, http=replace(settings.http, api_key_file=path)))
