"""The keys and values of one soft prompt on the device. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.types import AdapterSource, SoftPromptSource


def run_key(source: SoftPromptSource, adapter: AdapterSource | None) -> str:
    """The identity of a soft prompt's keys and values.

    The model computes those of embeddings with the adapter. Those in a file are the same under every adapter.
    """
    return source.identity if adapter is None or source.is_key_values else f"{source.identity}+{adapter.identity}"


@dataclass(slots=True)
class SoftPromptRun:
    """The blocks of one soft prompt on the device.

    Attributes:
        source: The soft prompt.
        adapter: The adapter under which rows of embeddings are computed; None for keys and values, which are copied.
        blocks: Block ids in order; the last is full only if the block size divides the number of virtual tokens.
        num_computed: Virtual tokens whose keys and values are written.
        ref_count: Sequences that use it or wait for it.
        is_loading: Whether a copy beside the steps writes to the blocks.
    """

    source: SoftPromptSource
    blocks: list[int]
    adapter: AdapterSource | None = None
    num_computed: int = 0
    ref_count: int = 0
    is_loading: bool = False

    @property
    def key(self) -> str:
        """The identity of its keys and values."""
        return run_key(self.source, self.adapter)

    @property
    def is_filled(self) -> bool:
        """Whether every virtual token's keys and values are written."""
        return self.num_computed == self.source.num_virtual_tokens

    def spoil(self) -> None:
        """Mark the content as unusable, so that the blocks are freed with the last reference."""
        self.num_computed = 0
