"""Parsing of key files: one key per line, or TOML or JSON with tenant, scopes and limits."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from prompt_store.types import check_name
from server.api.keys.callers import ALL_SCOPES, Caller, Scope
from server.api.keys.limits import KeyLimiter, Limits
from server.errors import ConfigurationError

_HASHED = "sha256:"
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_RANDOM_BYTES = 32
_LOOKS_LIKE_A_DIGEST = re.compile(r"key-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Key:
    """One accepted key.

    Attributes:
        digest: SHA-256 of the key, 32 bytes.
        caller: The caller that the key identifies.
    """

    digest: bytes
    caller: Caller


_Limit = Annotated[int, msgspec.Meta(ge=1, le=10**12)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    scopes: list[Scope]
    name: str | None = None
    tenant: str | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    max_concurrency: _Limit | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Entry]


def new_key() -> tuple[str, str]:
    """A random key of 256 bits, and ``sha256:HEX``, which a key file may contain instead."""
    key = f"prelude-{secrets.token_urlsafe(_RANDOM_BYTES)}"
    return key, _HASHED + hashlib.sha256(key.encode()).hexdigest()


def describe_key(digest: str, *, tenant: str | None, scopes: Sequence[str], name: str | None = None) -> str:
    """The text to add to a key file: a TOML entry if the key has a name, a tenant or scopes, otherwise one line.

    Args:
        digest: ``sha256:HEX``.
        tenant: Tenant of the key; None for a separate tenant.
        scopes: Scopes of the key; all if there are none.
        name: Name of the key in history and logs.

    Raises:
        ConfigurationError: If the name, the tenant or a scope is not valid.
    """
    if tenant is None and name is None and not scopes:
        return digest
    lines = ["[[keys]]", f'key = "{digest}"', f"scopes = {json.dumps(list(scopes or Scope))}"]
    lines += [f"{key} = {json.dumps(text)}" for key, text in (("name", name), ("tenant", tenant)) if text is not None]
    entry = "\n".join(lines)
    try:
        _parse_entries(entry, is_toml=True)
    except ValueError as error:
        raise ConfigurationError(f"the key is not valid: {error}") from error
    return entry


def read_keys(path: Path) -> list[Key]:
    """Read a key file: TOML or JSON by its suffix, otherwise one key per line.

    Empty lines and lines that start with ``#`` are skipped. A key on a line has all scopes and a separate tenant.

    Raises:
        ConfigurationError: If the file cannot be read, is malformed, or contains no key; names the line or entry.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the API key file {path} cannot be read: {error}") from error
    try:
        if path.suffix in {".toml", ".json"}:
            found = _parse_entries(text, is_toml=path.suffix == ".toml")
        else:
            lines = ((f"line {number}", line.strip()) for number, line in enumerate(text.splitlines(), 1))
            found = parse_plain((place, line) for place, line in lines if line and not line.startswith("#"))
    except ValueError as error:
        raise ConfigurationError(f"the API key file {path} is not valid: {error}") from error
    if not found:
        raise ConfigurationError(f"the API key file {path} contains no key")
    return found


def parse_plain(keys: Iterable[tuple[str, str]]) -> list[Key]:
    """Read keys, or their ``sha256:HEX``, with all scopes and separate tenants.

    Args:
        keys: Pairs of a place, for messages, and a key.

    Raises:
        ValueError: If one is malformed or repeated; names the place.
    """
    return _without_duplicates((place, _key(place, text, None, ALL_SCOPES, Limits())) for place, text in keys)


def _parse_entries(text: str, *, is_toml: bool) -> list[Key]:
    try:
        file = msgspec.toml.decode(text, type=_File) if is_toml else msgspec.json.decode(text, type=_File)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return _without_duplicates(
        (f"keys[{index}]", _entry(f"keys[{index}]", item)) for index, item in enumerate(file.keys)
    )


def _entry(place: str, entry: _Entry) -> Key:
    if not entry.scopes:
        raise ValueError(f"{place}.scopes: must contain some of {', '.join(Scope)}")
    if entry.tenant is not None:
        try:
            check_name(entry.tenant, "tenant")
        except ValueError as error:
            raise ValueError(f"{place}.{error}") from error
    if entry.name is not None:
        try:
            check_name(entry.name, "name")
        except ValueError as error:
            raise ValueError(f"{place}.{error}") from error
        if _LOOKS_LIKE_A_DIGEST.fullmatch(entry.name):
            raise ValueError(f"{place}.name: {entry.name!r} looks like the digest of a key; choose another name")
    limits = Limits(entry.requests_per_minute, entry.tokens_per_minute, entry.max_concurrency)
    return _key(f"{place}.key", entry.key, entry.tenant, frozenset(entry.scopes), limits, entry.name)


def _key(
    place: str, text: str, tenant: str | None, scopes: frozenset[Scope], limits: Limits, key_name: str | None = None
) -> Key:
    """Make a key. Errors must not contain any part of its text, because they are logged."""
    if text.startswith(_HASHED):
        if not _HEX_DIGEST.fullmatch(text.removeprefix(_HASHED)):
            raise ValueError(f"{place}: after {_HASHED} 64 lower-case hexadecimal digits are expected")
        digest = bytes.fromhex(text.removeprefix(_HASHED))
    else:
        if not text or text != text.strip() or not text.isprintable():
            raise ValueError(
                f"{place}: a key must not be empty, contain control characters, or start or end with a space"
            )
        digest = hashlib.sha256(text.encode()).digest()
    name = f"key-{digest.hex()[:12]}"
    return Key(digest, Caller(name, tenant or name, scopes, KeyLimiter(limits), key_name))


def _without_duplicates(keys: Iterable[tuple[str, Key]]) -> list[Key]:
    places: dict[bytes, str] = {}
    found = []
    for place, key in keys:
        if key.digest in places:
            raise ValueError(f"{place}: the same key appears at {places[key.digest]}")
        places[key.digest] = place
        found.append(key)
    return found
