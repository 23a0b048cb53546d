"""The versions that a target means now: a soft prompt, an adapter, or both.

A soft prompt that was trained over an adapter brings it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from prompt_store.errors import PromptNotFoundError
from prompt_store.types import Access, LeasedPrompt, PromptKind, PromptRef, PromptVersion
from server.api.inference.target import ADAPTER_FIELD, Named, Target
from server.api.services import Services
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.api.soft_prompts.engine_source import adapter_source, called, full_name, soft_prompt_source
from server.engine.types import Member
from server.errors import InvalidRequestError, SoftPromptNotFoundError, WrongAdapterError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pair(Generic[T]):
    """A soft prompt, an adapter, or both; neither for the bare base."""

    soft_prompt: T | None = None
    adapter: T | None = None

    @property
    def both(self) -> list[T]:
        """Those that there are, the soft prompt first."""
        return [one for one in (self.soft_prompt, self.adapter) if one is not None]


class LeasedPair(Pair[LeasedPrompt]):
    """A pair whose files stay until the leases end."""

    __slots__ = ()

    @property
    def versions(self) -> list[PromptVersion]:
        """The versions, the soft prompt's first; empty for the bare base."""
        return [leased.version for leased in self.both]

    @property
    def name(self) -> str | None:
        """``NAME@VERSION``, or two with ``+`` between, the soft prompt first; None for the bare base."""
        return "+".join(map(full_name, self.versions)) or None

    @property
    def label(self) -> str | None:
        """The same without versions, for metrics."""
        return "+".join(version.name for version in self.versions) or None

    @property
    def version_label(self) -> str | None:
        """The versions alone, for metrics."""
        return "+".join(str(version.version) for version in self.versions) or None

    @property
    def shadow(self) -> str | None:
        """The model name of what gets a copy of the request: this with a shadow's version, if there is one."""
        if not any(leased.shadow for leased in self.both):
            return None
        return "+".join(str(leased.shadow or full_name(leased.version)) for leased in self.both)

    @property
    def num_virtual_tokens(self) -> int:
        """Positions before the text."""
        return 0 if self.soft_prompt is None else self.soft_prompt.version.num_virtual_tokens

    @property
    def with_head(self) -> LeasedPrompt | None:
        """The one with a classification head, if any; of two, the soft prompt."""
        return next((leased for leased in self.both if leased.version.num_labels is not None), None)

    def member(self, task_id: int | None) -> Member:
        """What the engine gets; the task is the soft prompt's."""
        return Member(
            soft_prompt=None if self.soft_prompt is None else soft_prompt_source(self.soft_prompt, task_id),
            adapter=None if self.adapter is None else adapter_source(self.adapter),
        )


async def lease_pair(
    store: AsyncPromptStore, target: Target, stack: AsyncExitStack, key: str | None = None
) -> LeasedPair:
    """Lease what a target means for one request.

    Args:
        store: The store.
        target: What a request names.
        stack: Gets the leases.
        key: Requests with the same key get the same versions of an alias with a rollout; None draws at random.

    Raises:
        NotFoundError: If one of the versions does not exist; the error names it and its field.
        InvalidRequestError: If the target names two soft prompts or two adapters, or an adapter's field names a soft
            prompt.
        WrongAdapterError: If the soft prompt was trained over another adapter.
    """

    async def lease(ref: PromptRef, access: Access) -> LeasedPrompt:
        return await stack.enter_async_context(store.lease_for_request(ref, access, key))

    found = await _arranged(target, lease, lambda leased: leased.version)
    return LeasedPair(found.soft_prompt, found.adapter)


async def versions_of(services: Services, target: Target) -> list[PromptVersion]:
    """The versions that a target means now, the soft prompt's first; empty for the bare base.

    An alias means the version that it points at, also during a rollout. Raises what ``lease_pair`` does.
    """
    return (await _arranged(target, services.store.resolve, lambda version: version)).both


async def _arranged(
    target: Target, get: Callable[[PromptRef, Access], Awaitable[T]], version_in: Callable[[T], PromptVersion]
) -> Pair[T]:
    found: list[T] = []
    for named in target.names:
        try:
            found.append(await get(named.ref, target.access))
        except PromptNotFoundError as error:
            raise target.not_found(named, error) from error
    _check_kinds(target.names, [version_in(one) for one in found])
    by_kind = {version_in(one).kind: one for one in found}
    soft_prompt, adapter = by_kind.get(PromptKind.SOFT_PROMPT), by_kind.get(PromptKind.ADAPTER)
    if soft_prompt is None or version_in(soft_prompt).over is None:
        return Pair(soft_prompt, adapter)
    version = version_in(soft_prompt)
    over = PromptRef.parse(version.over or "")
    if adapter is not None:
        _check_adapter(target.names, version, version_in(adapter))
        return Pair(soft_prompt, adapter)
    try:
        return Pair(soft_prompt, await get(over, target.access))
    except PromptNotFoundError as error:
        raise SoftPromptNotFoundError(
            f"{called(version)} was trained over the adapter {over}, and {error}", param=target.param
        ) from error


def _check_kinds(names: Sequence[Named], versions: Sequence[PromptVersion]) -> None:
    for named, version in zip(names, versions, strict=True):
        if named.param == ADAPTER_FIELD and version.kind is not PromptKind.ADAPTER:
            raise InvalidRequestError(
                f"{ADAPTER_FIELD}: {called(version)} is not an adapter; name it by prompt_id or model",
                param=ADAPTER_FIELD,
            )
    if len({version.kind for version in versions}) < len(versions):
        first, second = versions
        what = "adapters" if second.kind is PromptKind.ADAPTER else "soft prompts"
        # ``adapter_id`` is right if it is there: then the other field names a second adapter.
        param = names[0].param
        raise InvalidRequestError(
            f"{param}: {full_name(first)} and {full_name(second)} are two {what}; a request has at most one "
            "soft prompt and one adapter",
            param=param,
        )


def _check_adapter(names: Sequence[Named], version: PromptVersion, adapter: PromptVersion) -> None:
    if full_name(adapter) != version.over:
        param = names[-1].param
        raise WrongAdapterError(
            f"{param}: {called(version)} was trained over the adapter {version.over}, and gives other answers over "
            f"{full_name(adapter)}: name the soft prompt alone, or with {version.over}",
            param=param,
        )
