"""What a request tells the connector, inside vLLM's ``kv_transfer_params``. Plain data: no torch, no vllm."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from server.engine.types import AdapterSource, SoftPromptSource


class Role(StrEnum):
    """What a request does with its soft prompt."""

    LOAD = "load"
    COMPUTE = "compute"
    PIN = "pin"
    UNPIN = "unpin"
    DISCARD = "discard"


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """A request's soft prompt.

    Attributes:
        request_id: Our own id; vLLM appends random characters to it.
        role: LOAD: the first ``num_virtual_tokens`` tokens are placeholders whose keys and values are loaded.
            COMPUTE: the prompt is the rows themselves, and what vLLM computes for them is kept. PIN, UNPIN,
            DISCARD: the tokens have no meaning. None for a request without a soft prompt.
        source: The soft prompt.
        adapter: The adapter's digest.
    """

    request_id: str
    role: Role | None = None
    source: SoftPromptSource | None = None
    adapter: str | None = None

    def to_params(self) -> dict[str, Any]:
        """The form that crosses to vLLM's processes."""
        params: dict[str, Any] = msgspec.to_builtins(self)
        return params


def source_with(source: SoftPromptSource | None, adapter: AdapterSource | None) -> SoftPromptSource | None:
    """A soft prompt under an identity that tells the adapter, where its keys and values depend on it.

    Embeddings run through the adapted model; keys and values come from the file.
    """
    if source is None or adapter is None or source.is_key_values:
        return source
    return msgspec.structs.replace(source, digest=f"{source.digest}+{adapter.digest}")


def use_of(params: object) -> Use | None:
    """The use in a request's ``kv_transfer_params``; None if there is none, or it is malformed."""
    if params is None:
        return None
    try:
        return msgspec.convert(params, Use)
    except msgspec.ValidationError:
        return None
