"""Resolution of ``model`` and ``prompt_id`` to a soft prompt."""

from __future__ import annotations

from dataclasses import dataclass

from prompt_store.errors import AliasNotFoundError, PromptNotFoundError
from prompt_store.types import Access, PromptRef, PromptVersion
from server.api.services import Services
from server.errors import InvalidRequestError, ModelNotFoundError, NotFoundError, SoftPromptNotFoundError


@dataclass(frozen=True, slots=True)
class Target:
    """The base model, or the soft prompt, that a request names.

    Attributes:
        model: The request's ``model`` field, or the base's name.
        ref: The soft prompt, or None for the bare base.
        param: The field that named the soft prompt.
        access: The soft prompts visible to the caller.
    """

    model: str
    access: Access
    ref: PromptRef | None = None
    param: str = "model"

    def not_found(self, error: PromptNotFoundError) -> NotFoundError:
        """The error if the store does not have it; a bare name in ``model`` may have meant another base model."""
        is_unknown = not isinstance(error, AliasNotFoundError)
        if is_unknown and self.param == "model" and self.ref is not None and self.model == self.ref.name:
            return _model_not_found(self.model)
        return SoftPromptNotFoundError(str(error), param=self.param)


def resolve(
    model: str | None, prompt_id: str | None, *, base_name: str, access: Access, param: str = "prompt_id"
) -> Target:
    """Read the fields ``model`` and ``prompt_id``.

    Args:
        model: The base's name, ``NAME[@SELECTOR]`` or ``BASE:NAME[@SELECTOR]``; None is the base.
        prompt_id: ``NAME[@SELECTOR]``; only if ``model`` is the base.
        base_name: The base's name in the API.
        access: The soft prompts visible to the caller.
        param: The request field that ``prompt_id`` is from.

    Raises:
        ModelNotFoundError: If ``model`` is not a valid name.
        InvalidRequestError: If ``prompt_id`` is not well formed, or both fields name a soft prompt.
    """
    if model is None or model == base_name:
        if prompt_id is None:
            return Target(base_name, access)
        try:
            return Target(base_name, access, PromptRef.parse(prompt_id), param)
        except ValueError as error:
            raise InvalidRequestError(f"{param}: {error}", param=param) from error
    try:
        ref = PromptRef.parse(model.removeprefix(f"{base_name}:"))
    except ValueError as error:
        raise _model_not_found(model) from error
    if prompt_id is not None:
        raise InvalidRequestError(
            f"{param}: model {model[:200]!r} already names a soft prompt; send model {base_name!r} with {param}",
            param=param,
        )
    return Target(model, access, ref)


async def version_of(services: Services, target: Target) -> PromptVersion | None:
    """The version that a target means now; None for the bare base.

    Raises:
        NotFoundError: If the soft prompt does not exist.
    """
    if target.ref is None:
        return None
    try:
        return await services.store.resolve(target.ref, target.access)
    except PromptNotFoundError as error:
        raise target.not_found(error) from error


def _model_not_found(model: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the model {model[:200]!r} does not exist: it is neither the base model nor a known soft prompt",
        param="model",
    )
