"""What a request resolved to, looked up in the store: its version, and a lease on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from prompt_store.errors import PromptNotFoundError
from prompt_store.types import LeasedPrompt, PromptVersion
from server.api.inference.target import Target
from server.api.services import Services


async def version_of(services: Services, target: Target) -> PromptVersion | None:
    """The version that a target means now; None for the bare base.

    Raises:
        NotFoundError: If there is no such soft prompt.
    """
    if target.ref is None:
        return None
    try:
        return await services.store.resolve(target.ref, target.access)
    except PromptNotFoundError as error:
        raise target.not_found(error) from error


@asynccontextmanager
async def lease_of(services: Services, target: Target) -> AsyncIterator[LeasedPrompt | None]:
    """A lease on what a target means now, until the block ends; None for the bare base.

    Raises:
        NotFoundError: If there is no such soft prompt.
    """
    async with AsyncExitStack() as stack:
        found = None
        if target.ref is not None:
            try:
                found = await stack.enter_async_context(services.store.lease(target.ref, target.access))
            except PromptNotFoundError as error:
                raise target.not_found(error) from error
        yield found
