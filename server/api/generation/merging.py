"""Several streams of deltas as one, in the order in which they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(
    streams: Sequence[AsyncGenerator[T, None]], *, recover: Callable[[int, Exception], T] | None = None
) -> AsyncGenerator[T, None]:
    """Yield the items of all streams as they arrive. Closing it early closes all of them.

    Args:
        streams: At least one.
        recover: Makes the last item of a stream that fails, from its index and error, once anything was yielded;
            the others continue. None: an error ends all.

    Raises:
        Exception: The first error of a stream that is not recovered.
    """
    if len(streams) == 1 and recover is None:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue()
    # No TaskGroup: it would cancel the reader while this generator is suspended at a yield (PEP 789).
    tasks = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        num_running, has_begun = len(tasks), False
        while num_running:
            index, found = await queue.get()
            if found is None:
                num_running -= 1
                continue
            if isinstance(found, Exception):
                if recover is None or not has_begun:
                    raise found
                num_running -= 1
                found = recover(index, found)
            has_begun = True
            yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int, stream: AsyncGenerator[T, None], queue: asyncio.Queue[tuple[int, T | Exception | None]]
) -> None:
    try:
        async with aclosing(stream) as items:
            async for item in items:
                queue.put_nowait((index, item))
    except Exception as error:  # raised again by the reader of the queue
        queue.put_nowait((index, error))
    else:
        queue.put_nowait((index, None))
