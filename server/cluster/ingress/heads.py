"""What the door reads of a request: the names in its body or path, and whom it is for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

import msgspec

from prompt_store.types import PromptRef

BASE_HEADER = b"x-prelude-base"
"""Request header that names the base, for requests whose path and body do not, such as uploads."""

REPLICA_HEADER = b"x-prelude-replica"
"""Request header that names the replica, such as for its page in the console; response header of each answer."""

REPLICAS_HEADER = b"x-prelude-replicas"
"""Response header of ``/v1/engine``: the names that ``replica`` may have."""

STICKY_HEADER = b"x-prelude-sticky-key"

_NAMING = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/classify",
        "/v1/embeddings",
        "/v1/tokenize",
        "/v1/detokenize",
        "/tokenize",
        "/detokenize",
    }
)
"""Paths whose JSON bodies name what answers."""

_OF_ONE_REPLICA = re.compile(r"/v1/(batches|files)(/|$)")
"""Batches and their files are on the disk of the replica that took them."""

_SHOWN = frozenset({"/v1/engine", "/v1/stats", "/v1/events"})
"""Paths that show one replica. Their query may name it, because browsers set no header on a stream of events."""

_OF_A_NAME = re.compile(r"/v1/(prompts|models|history)/([^/]+)")
_JOINT = "+"


class _Fields(msgspec.Struct):
    """The fields that say where a request goes; msgspec skips the others."""

    model: str | list[str] | None = None
    prompt_id: str | None = None
    adapter_id: str | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    """Where a request wants to go.

    Attributes:
        base: The base that it names, by header or ``model``; None if it names none.
        names: Soft prompts and adapters that it names, as they stand there.
        key: Requests with the same key get the same version during a rollout.
        home: Requests with the same text go to the same replica; None for all others.
        replica: The replica that it names; None for any.
    """

    base: str | None = None
    names: tuple[str, ...] = ()
    key: str | None = None
    home: str | None = None
    replica: str | None = None

    @property
    def refs(self) -> list[PromptRef]:
        """The names that are well formed; the replica reports the others."""
        found = []
        for name in self.names:
            for part in name.split(_JOINT):
                try:
                    found.append(PromptRef.parse(part))
                except ValueError:
                    continue
        return found


def names_in_body(method: str, path: str) -> bool:
    """Whether the JSON body of a request names what answers, so that it has to be read first."""
    return method == "POST" and path in _NAMING


def read_head(
    path: str, headers: dict[bytes, bytes], body: bytes | None, bases: frozenset[str], query: bytes = b""
) -> RequestHead:
    """Read where a request wants to go.

    Args:
        path: Its path, decoded.
        headers: Its headers by name in lower case.
        body: Its JSON body, if that names what answers and is not too large.
        bases: Names of the bases.
        query: Its query.
    """
    fields = _fields_of(body)
    base = _text(headers, BASE_HEADER)
    names: list[str] = []
    for model in [fields.model] if isinstance(fields.model, str) else fields.model or []:
        before, colon, after = model.partition(":")
        if model in bases:
            base = model
        elif colon and before in bases:
            base = before
            names.append(after)
        else:
            names.append(model)
    names += [name for name in (fields.prompt_id, fields.adapter_id) if name is not None]
    found = _OF_A_NAME.match(path)
    if found is not None:
        name = unquote(found[2])
        names += [] if name in bases else [name]
        base = name if name in bases else base
    return RequestHead(
        base=base,
        names=tuple(names),
        key=_text(headers, STICKY_HEADER) or fields.user,
        home="/v1/batches" if _OF_ONE_REPLICA.match(path) else None,
        replica=_text(headers, REPLICA_HEADER) or (_replica_in(query) if path in _SHOWN else None),
    )


def _replica_in(query: bytes) -> str | None:
    found = parse_qs(query.decode("latin-1")).get("replica")
    return None if found is None else found[0]


def _fields_of(body: bytes | None) -> _Fields:
    if not body:
        return _Fields()
    try:
        return msgspec.json.decode(body, type=_Fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _Fields()  # the replica reports what is wrong


def _text(headers: dict[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return None if not value else value.decode("latin-1")
