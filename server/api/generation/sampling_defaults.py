"""What a request gets where it does not say otherwise: the checkpoint's defaults, before the API's own."""

from __future__ import annotations

from typing import TypeVar

from server.api.generation.bodies import GenerationBody
from server.engine.generation_defaults import GenerationDefaults

Body = TypeVar("Body", bound=GenerationBody)

_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens", "stop")


def with_defaults(body: Body, defaults: GenerationDefaults, *, room: int) -> Body:
    """A request with the checkpoint's values in the fields that it does not set.

    Args:
        body: The request; an explicit null sets nothing.
        defaults: The checkpoint's.
        room: The fewest new tokens that one of its texts may have; a default of ``min_tokens`` gives way to it.
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


def default_fields(defaults: GenerationDefaults) -> dict[str, float | int | list[str]]:
    """What a checkpoint sets, by the names of a request's fields."""
    found: dict[str, float | int | list[str]] = {}
    for name in (*_FIELDS, "max_tokens"):
        value = getattr(defaults, name)
        if value is not None:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def shorter_default(limit: int | None, defaults: GenerationDefaults) -> int | None:
    """The new tokens of a request that sets no limit: the endpoint's default or the checkpoint's, the smaller one."""
    if defaults.max_tokens is None:
        return limit
    return defaults.max_tokens if limit is None else min(limit, defaults.max_tokens)
