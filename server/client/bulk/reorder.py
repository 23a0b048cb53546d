"""A buffer that puts results into the order of the rows."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class ReorderBuffer(Generic[T]):
    """Holds each result until all results before it have been added. The caller bounds how far ahead it runs.

    Args:
        first: Index of the first result.
    """

    def __init__(self, first: int = 0) -> None:
        self._next = first
        self._held: dict[int, T] = {}

    def add(self, index: int, item: T) -> None:
        """Add a result.

        Raises:
            ValueError: If there already was a result with this index.
        """
        if index < self._next or index in self._held:
            raise ValueError(f"result {index} was added twice")
        self._held[index] = item

    def take(self) -> list[T]:
        """Remove and return the results that are next in order."""
        ready = []
        while self._next in self._held:
            ready.append(self._held.pop(self._next))
            self._next += 1
        return ready
