"""The built files of the console, answered from memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response

from server.errors import NotFoundError

DIRECTORY = Path(__file__).parent / "static"
"""The built files, as ``make console`` leaves them."""

INDEX = "index.html"

PAGE_HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
}
"""Headers of every file: nothing from elsewhere, no inline script, no frame around the page."""

_HASHED_FOLDER = "assets/"
"""Folder whose names contain a hash of the content."""

_FOREVER = "public, max-age=31536000, immutable"
_ALWAYS_ASK = "no-cache"

_ENCODINGS = {"br": ".br", "gzip": ".gz"}
"""Suffixes of compressed files by content coding, the preferred one first."""

_ZERO = re.compile(r"q\s*=\s*0(\.0*)?")
"""A quality that refuses a content coding."""

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/vnd.microsoft.icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}


@dataclass(frozen=True, slots=True)
class _File:
    """One file: its bytes by content coding, ``identity`` included, and what every answer says about it."""

    bodies: Mapping[str, bytes]
    etag: str
    media_type: str
    cache_control: str


class Pages:
    """The files of a directory; all are read at once.

    Args:
        directory: The built files; beside each may be compressed ones, ``NAME.br`` and ``NAME.gz``.
    """

    def __init__(self, directory: Path = DIRECTORY) -> None:
        found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        suffixes = tuple(_ENCODINGS.values())
        self._files = {name: _read(name, path, found) for name, path in found.items() if not name.endswith(suffixes)}

    def answer(self, path: str, headers: Headers) -> Response:
        """Answer a request for a file; a path without a dot, which only the page knows, gets the page itself.

        Args:
            path: The path below ``/console/``.
            headers: Headers of the request.

        Raises:
            NotFoundError: If there is no such file.
        """
        name = path if path in self._files else INDEX if "." not in path else None
        if name is None:
            raise NotFoundError("the console has no such file")
        file = self._files[name]
        coding = _choose(headers.getlist("accept-encoding"), file.bodies)
        etag = f'"{file.etag}-{coding}"'
        sent = {
            **PAGE_HEADERS,
            "cache-control": file.cache_control,
            "content-type": file.media_type,
            "etag": etag,
            "vary": "Accept-Encoding",
        }
        if etag in (tag.strip() for line in headers.getlist("if-none-match") for tag in line.split(",")):
            return Response(status_code=304, headers=sent)
        if coding != "identity":
            sent["content-encoding"] = coding
        return Response(file.bodies[coding], headers=sent)


@cache
def built_pages() -> Pages:
    """The pages of this installation."""
    return Pages()


def _read(name: str, path: Path, found: Mapping[str, Path]) -> _File:
    body = path.read_bytes()
    compressed = {
        coding: found[name + suffix].read_bytes() for coding, suffix in _ENCODINGS.items() if name + suffix in found
    }
    return _File(
        bodies=compressed | {"identity": body},
        etag=hashlib.sha256(body).hexdigest()[:32],
        media_type=_MEDIA_TYPES.get(path.suffix, "application/octet-stream"),
        cache_control=_FOREVER if name.startswith(_HASHED_FOLDER) else _ALWAYS_ASK,
    )


def _choose(accepted: list[str], bodies: Mapping[str, bytes]) -> str:
    """The preferred coding that the client accepts; ``identity`` is always accepted."""
    names = set()
    for item in ",".join(accepted).lower().split(","):
        name, _, quality = item.partition(";")
        if not _ZERO.fullmatch(quality.strip()):
            names.add(name.strip())
    return next((coding for coding in _ENCODINGS if coding in names and coding in bodies), "identity")
