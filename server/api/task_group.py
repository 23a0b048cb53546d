"""Groups of tasks that fail with their first error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """An ``asyncio.TaskGroup`` that raises its first error as it is, because handlers of errors expect no group.

    Do not ``yield`` inside the block: the group cancels the task that entered it, which may have left the generator
    by then (PEP 789).

    Raises:
        BaseException: The first error of a task or of the block, after all tasks have ended.
    """
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        failure = errors.exceptions[0]
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame, which must not refer to it
