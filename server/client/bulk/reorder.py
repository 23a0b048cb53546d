"""Results come in any order and leave in the order of the rows."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class ReorderBuffer(Generic[T]):
    """Holds results until all before them are there. Who adds bounds it, by not running further ahead.

    Args:
        first: The index that leaves first.
    """

    def __init__(self, first: int = 0) -> None:
        self._next = first
        self._held: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, index: int, item: T) -> None:
        """Take a result in.

        Raises:
            ValueError: If that index has left already or is held.
        """
        if index < self._next or index in self._held:
            raise ValueError(f"the result {index} came twice")
        self._held[index] = item

    def take(self) -> list[T]:
        """All that may leave now, in order; they are forgotten here."""
        ready = []
        while self._next in self._held:
            ready.append(self._held.pop(self._next))
            self._next += 1
        return ready
