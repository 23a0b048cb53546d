"""Folders of new stores, with copies of one empty catalog: its migrations take longer than a test."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from prompt_store.open_store import CATALOG_FILE, open_store


def new_store(folder: Path) -> Path:
    """Create a folder with an empty catalog of this release; returns it."""
    folder.mkdir(parents=True)
    (folder / CATALOG_FILE).write_bytes(_empty_catalog())
    return folder


@cache
def _empty_catalog() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        open_store(directory).close()
        return (Path(directory) / CATALOG_FILE).read_bytes()
