"""Default values of request fields: a version's format comes first, then the checkpoint, then the API."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from prompt_store.formats import SamplingDefaults
from server.api.generation.bodies import GenerationBody
from server.engine.generation_defaults import GenerationDefaults

Body = TypeVar("Body", bound=GenerationBody)

_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens", "stop")


def with_defaults(body: Body, defaults: GenerationDefaults, *, room: int) -> Body:
    """Fill the fields that a request does not set with the checkpoint's values.

    Args:
        body: The request; an explicit null does not set a field.
        defaults: Defaults of the checkpoint.
        room: Number of new tokens that fit after the longest text; limits a default of ``min_tokens``.
    """
    own: dict[str, object] = {}
    for name in _FIELDS:
        value = getattr(defaults, name)
        if value is not None and name not in body.model_fields_set:
            own[name] = value
    if "min_tokens" in own:
        own["min_tokens"] = min(defaults.min_tokens or 0, room)
    if "stop" in own:
        own["stop"] = list(defaults.stop or ())
    return body.model_copy(update=own) if own else body


def under(sampling: SamplingDefaults, defaults: GenerationDefaults) -> GenerationDefaults:
    """The defaults of a checkpoint, replaced by those of a version's format."""
    own = {"temperature": sampling.temperature, "stop": sampling.stop}
    return msgspec.structs.replace(defaults, **{name: value for name, value in own.items() if value is not None})


def default_fields(defaults: GenerationDefaults) -> dict[str, float | int | list[str]]:
    """The defaults of a checkpoint, by request field."""
    found: dict[str, float | int | list[str]] = {}
    for name in (*_FIELDS, "max_tokens"):
        value = getattr(defaults, name)
        if value is not None:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def shorter_default(limit: int | None, defaults: GenerationDefaults) -> int | None:
    """The token limit of a request without one: the smaller default of endpoint and checkpoint."""
    if defaults.max_tokens is None:
        return limit
    return defaults.max_tokens if limit is None else min(limit, defaults.max_tokens)
