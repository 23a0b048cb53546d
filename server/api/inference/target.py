"""Resolution of ``model``, ``prompt_id`` and ``adapter_id`` to the names of a soft prompt, an adapter, or both."""

from __future__ import annotations

from dataclasses import dataclass

from prompt_store.errors import AliasNotFoundError, PromptNotFoundError
from prompt_store.types import Access, PromptRef
from server.errors import InvalidRequestError, ModelNotFoundError, NotFoundError, SoftPromptNotFoundError

ADAPTER_FIELD = "adapter_id"

_JOINT = "+"
"""Stands between the two names of a pair; no name has it."""

_MAX_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Named:
    """One name in a request.

    Attributes:
        ref: The named version or alias.
        param: The request field that names it.
    """

    ref: PromptRef
    param: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a request names: the base model, a soft prompt, an adapter, or a soft prompt and an adapter.

    A name may have versions of both kinds, so the kinds are known only when the versions are (``pair``).

    Attributes:
        model: The request's ``model`` field, or the base's name.
        access: The soft prompts and adapters visible to the caller.
        names: At most two different names; none for the bare base.
        param: The field that named it.
    """

    model: str
    access: Access
    names: tuple[Named, ...] = ()
    param: str = "model"

    def not_found(self, named: Named, error: PromptNotFoundError) -> NotFoundError:
        """The error if the store does not have a name; a bare name in ``model`` may have meant another base model."""
        is_unknown = not isinstance(error, AliasNotFoundError)
        if is_unknown and named.param == "model" and self.model == named.ref.name:
            return _model_not_found(self.model)
        where = f"{ADAPTER_FIELD}: " if named.param == ADAPTER_FIELD else ""
        return SoftPromptNotFoundError(f"{where}{error}", param=named.param)


def resolve(
    model: str | None,
    prompt_id: str | None,
    adapter_id: str | None = None,
    *,
    base_name: str,
    access: Access,
    param: str = "prompt_id",
) -> Target:
    """Read the fields ``model``, ``prompt_id`` and ``adapter_id``.

    Args:
        model: The base's name, ``NAME[@SELECTOR]`` or ``BASE:NAME[@SELECTOR]``, or two names with ``+`` between; None
            is the base.
        prompt_id: ``NAME[@SELECTOR]``, or two names with ``+`` between; only if ``model`` is the base.
        adapter_id: ``NAME[@SELECTOR]`` of an adapter.
        base_name: The base's name in the API.
        access: The soft prompts and adapters visible to the caller.
        param: The request field that ``prompt_id`` is from.

    Raises:
        ModelNotFoundError: If ``model`` is not a valid name.
        InvalidRequestError: If another field is not well formed, both ``model`` and ``prompt_id`` name something, or
            there are more than two names, or one twice.
    """
    names: tuple[Named, ...] = ()
    is_base = model is None or model == base_name
    if model is not None and not is_base:
        try:
            names = _parse(model.removeprefix(f"{base_name}:"), "model")
        except ValueError as error:
            raise _model_not_found(model) from error
        if prompt_id is not None:
            raise InvalidRequestError(
                f"{param}: model {model[:_MAX_SHOWN]!r} already names a soft prompt or an adapter; send model "
                f"{base_name!r} with {param}",
                param=param,
            )
    elif prompt_id is not None:
        names = _checked(prompt_id, param)
    if adapter_id is not None:
        try:
            names += (Named(PromptRef.parse(adapter_id), ADAPTER_FIELD),)
        except ValueError as error:
            raise InvalidRequestError(f"{ADAPTER_FIELD}: {error}", param=ADAPTER_FIELD) from error
    _check_number(names)
    target_param = names[0].param if names else "model"
    return Target(base_name if is_base or model is None else model, access, names, target_param)


def _checked(text: str, param: str) -> tuple[Named, ...]:
    try:
        return _parse(text, param)
    except ValueError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param) from error


def _parse(text: str, param: str) -> tuple[Named, ...]:
    """One name, or several with ``+`` between; ValueError if one is not well formed."""
    return tuple(Named(PromptRef.parse(part), param) for part in text.split(_JOINT))


def _check_number(names: tuple[Named, ...]) -> None:
    if not names:
        return
    param = names[-1].param
    shown = _JOINT.join(str(named.ref) for named in names)[:_MAX_SHOWN]
    if len(names) > 2:
        raise InvalidRequestError(
            f"{param}: a request has at most one soft prompt and one adapter, and {shown!r} are {len(names)}",
            param=param,
        )
    if len(names) == 2 and names[0].ref == names[1].ref:
        raise InvalidRequestError(
            f"{param}: {names[0].ref} is named twice; a pair is one soft prompt and one adapter", param=param
        )


def _model_not_found(model: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the model {model[:_MAX_SHOWN]!r} does not exist: it is neither the base model nor a known soft prompt or "
        "adapter",
        param="model",
    )
