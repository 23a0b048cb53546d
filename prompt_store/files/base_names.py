"""What a base model is called, whatever form its name has: a hub id, a URL, or a path on somebody's machine.

PEFT writes into ``adapter_config.json`` what the trainer gave to ``from_pretrained``. The same checkpoint may be a
hub id here and a directory there, so models are compared by their own names, without what stands before them.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

_HUB_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
"""A repository's folder in the hub's cache; neither owners nor names may hold two hyphens in a row."""

_HUB_FOLDER_WITHOUT_OWNER = re.compile(r"models--(?P<name>.+)")

_HUB_PAGES = frozenset({"tree", "blob", "resolve", "raw", "commit", "commits", "discussions"})
"""What follows ``owner/name`` in an address of a hub's web page."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

_DOT = "___"
"""ModelScope's cache writes this for a dot."""


def model_name(text: str) -> str:
    """The model's own name in lower case, without owner, path and revision; empty where the text names no model."""
    parts = _parts(text)
    if not parts:
        return ""
    hub = _hub_repository(parts)
    name = hub.rpartition("/")[2] if hub is not None else parts[-1].partition("@")[0]
    return name.replace(_DOT, ".").casefold()


def hub_id(path: str) -> str | None:
    """``owner/name`` of a directory in the hub's cache, or None for any other path."""
    return _hub_repository(_parts(path))


def _parts(text: str) -> list[str]:
    """The components, with ``.`` and ``..`` resolved as far as the text alone can."""
    text = text.strip()
    is_url = _URL.match(text) is not None
    if is_url:
        try:
            split = urlsplit(text)
        except ValueError:  # such as brackets that hold no address
            return []
        text = unquote(split.path)
        is_url = split.scheme in ("http", "https")
    found: list[str] = []
    for part in re.split(r"[/\\]", text):
        if part == "..":
            if not found:
                return []
            found.pop()
        elif part not in ("", "."):
            found.append(part)
    if is_url:
        page = next((index for index, part in enumerate(found) if part in _HUB_PAGES and index > 0), len(found))
        found = found[:page]
    return found


def _hub_repository(parts: list[str]) -> str | None:
    """The repository that a path in the hub's cache belongs to.

    A folder inside a snapshot is a model of its own: a repository may hold several.
    """
    for index, part in enumerate(parts):
        match = _HUB_FOLDER.fullmatch(part) or _HUB_FOLDER_WITHOUT_OWNER.fullmatch(part)
        if match is None:
            continue
        rest = parts[index + 1 :]
        if rest and not (rest[0] == "snapshots" and len(rest) <= 2):
            return None
        owner = match.groupdict().get("owner")
        return match["name"] if owner is None else f"{owner}/{match['name']}"
    return None
