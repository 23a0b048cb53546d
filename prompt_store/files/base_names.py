"""The name of a base model in any form: a hub id, a URL, or a path on another machine.

PEFT writes the argument of ``from_pretrained`` into ``adapter_config.json``. The same checkpoint may be a hub id on
one machine and a directory on another, so models are compared by their names, without owner and folders.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from prompt_store.errors import Fault
from prompt_store.files.tensor_faults import config_fault
from prompt_store.types import BaseModelSpec

_HUB_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
"""The folder of a repository in the cache of the hub; owners and names cannot contain two hyphens in a row."""

_HUB_FOLDER_WITHOUT_OWNER = re.compile(r"models--(?P<name>.+)")

_HUB_PAGES = frozenset({"tree", "blob", "resolve", "raw", "commit", "commits", "discussions"})
"""The path components after ``owner/name`` in the address of a web page of a hub."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

_DOT = "___"
"""The cache of ModelScope replaces dots by this."""


def model_name(text: str) -> str:
    """The name of a model in lower case, without owner, path and revision; empty if the text names no model."""
    parts = _parts(text)
    if not parts:
        return ""
    hub = _hub_repository(parts)
    name = hub.rpartition("/")[2] if hub is not None else parts[-1].partition("@")[0]
    return name.replace(_DOT, ".").casefold()


def base_faults(stated: str | None, base: BaseModelSpec) -> list[Fault]:
    """Compare the base that a configuration names with the served one, by ``model_name``.

    Args:
        stated: ``base_model_name_or_path``; a missing or blank one has no fault.
        base: The served model.
    """
    ours = {model_name(known) for known in (base.name, *base.other_names)} - {""}
    if stated is None or not stated.strip() or model_name(stated) in ours:
        return []
    message = (
        f"it was trained on {stated[:200]!a}; this server runs {base.name!r}. If this is the same model under "
        "another name, upload with allow_other_base=true (prelude push --allow-other-base)"
    )
    return [config_fault("base_model_mismatch", message, "base_model_name_or_path")]


def hub_id(path: str) -> str | None:
    """``owner/name`` of a directory in the cache of the hub, or None for any other path."""
    return _hub_repository(_parts(path))


def _parts(text: str) -> list[str]:
    """The components, with ``.`` and ``..`` resolved without looking at files."""
    text = text.strip()
    is_url = _URL.match(text) is not None
    if is_url:
        try:
            split = urlsplit(text)
        except ValueError:  # such as brackets without an address
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
    """The repository of a path in the cache of the hub.

    A folder inside a snapshot is a separate model: a repository may contain several.
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
