"""The disk cache of compiled kernels.

Numba keys a compiled kernel by its own source file, and misses changes in other files that the kernel inlines. So the
folder's name contains a hash over all sources of this package: any change compiles every kernel again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from hashlib import blake2b
from pathlib import Path

SOURCES = Path(__file__).parent
PREFIX = "kernels-"

MAX_FOLDERS = 4
"""Folders kept in one place, the current one included: checkouts and versions may share a place."""


def kernel_cache(sources: Path = SOURCES, *, variant: str = "") -> Path | None:
    """The folder for kernels compiled from these sources; None if none can be written.

    Numba keeps kernels for different processors apart; ``variant`` names other differences.

    It is in ``NUMBA_CACHE_DIR`` if that is set, else in ``__pycache__`` beside the sources, else in the user's cache
    folder. The least recently used folders of other sources are deleted, down to ``MAX_FOLDERS``.
    """
    name = PREFIX + source_digest(sources) + variant
    configured = os.environ.get("NUMBA_CACHE_DIR")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    places = [Path(configured)] if configured else [sources / "__pycache__", user_cache / "prelude"]
    for place in places:
        folder = place / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            _prune(place, folder)
            return folder
    return None


def source_digest(sources: Path) -> str:
    """A hash over the names and contents of a folder's Python files: 16 hexadecimal digits."""
    digest = blake2b(digest_size=8)
    for path in sorted(sources.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _prune(place: Path, current: Path) -> None:
    """Delete the least recently used folders; a process that still uses one compiles its kernels again."""
    ages: list[tuple[float, Path]] = []
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another process may have deleted it
            ages.append((folder.stat().st_mtime, folder))
    for _, folder in sorted(ages, reverse=True)[MAX_FOLDERS:]:
        if folder != current:
            shutil.rmtree(folder, ignore_errors=True)
