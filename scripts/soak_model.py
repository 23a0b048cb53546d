"""The limits of scripts/soak_scheduler.py, and what stands for the model and the files of adapters in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

from server.engine.scheduling.sequence import Sequence
from server.engine.types import AdapterSource, SoftPromptSource

NOT_FINITE = "not finite"
"""The content of a slot where the model would have computed NaN."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the scheduler under test: small, so that every resource becomes scarce.

    Attributes:
        num_blocks: Number of blocks in the cache.
        block_size: Positions per block.
        max_num_seqs: Maximum number of running sequences.
        max_num_batched_tokens: Maximum number of positions per step.
        max_model_len: Maximum number of positions per sequence.
        step_fill_tokens: Virtual tokens of keys and values that a step copies itself; None for all.
        adapter_bytes: Memory for adapters.
        held_adapter_bytes: Memory for adapters that sequences hold; None: the same.
    """

    num_blocks: int = 14
    block_size: int = 3
    max_num_seqs: int = 5
    max_num_batched_tokens: int = 11
    max_model_len: int = 40
    step_fill_tokens: int | None = 4
    adapter_bytes: int = 12
    held_adapter_bytes: int | None = None


@dataclass(slots=True)
class Tally:
    """Counts of events, which show that a run covered them.

    ``ensembles`` counts finished ensembles. ``spoiled`` counts sequences that ended because of a shared block that is
    not finite, and ``not_finite`` those that ended because of their own token. ``repeated`` counts chunks of
    sequences that begin with virtual tokens. ``loaded``, ``abandoned`` and ``unloadable`` count loads that ended with
    all positions copied, that stopped early, and that failed; ``beside`` counts steps with chunks beside a load.
    ``adapted`` counts finished sequences with adapters, and ``unreadable`` those that ended because one was not
    readable. ``outgrown`` counts adapters that did not fit with their actual size.
    """

    steps: int = 0
    added: int = 0
    refused: int = 0
    finished: int = 0
    aborted: int = 0
    expired: int = 0
    promoted: int = 0
    ensembles: int = 0
    spoiled: int = 0
    not_finite: int = 0
    repeated: int = 0
    loaded: int = 0
    abandoned: int = 0
    unloadable: int = 0
    beside: int = 0
    adapted: int = 0
    unreadable: int = 0
    outgrown: int = 0


def expect(holds: bool, message: str) -> None:
    """Raise AssertionError with the message, unless ``holds``."""
    if not holds:
        raise AssertionError(message)


def is_finite(seq: Sequence) -> bool:
    """Whether the model would compute finite values for a sequence and its followers."""
    return not any(NOT_FINITE in contents_of(member) for member in seq.members)


def contents_of(seq: Sequence) -> list[object]:
    """The expected content of each position of a sequence: a hash of its token and everything before it."""
    soft_prompt, adapter = seq.request.soft_prompt, seq.request.adapter
    contents = [] if soft_prompt is None else virtual_contents(soft_prompt, adapter)
    names = [seq.request.salt, soft_prompt and soft_prompt.identity, adapter and adapter.identity]
    before = crc32(repr(names).encode())  # unlike hash(), deterministic
    is_finite = NOT_FINITE not in contents
    for token in seq.token_ids:
        before = hash((before, token))
        is_finite = is_finite and before % 97 > 0
        contents.append(before if is_finite else NOT_FINITE)
    return contents


def virtual_contents(source: SoftPromptSource, adapter: AdapterSource | None) -> list[object]:
    """The expected content of a soft prompt; every third version of embeddings is NaN from some position on."""
    version = int(source.digest.partition(".")[2])
    computed_with = None if source.is_key_values or adapter is None else adapter.identity
    contents: list[object] = [
        (source.identity, computed_with, position) for position in range(source.num_virtual_tokens)
    ]
    if not source.is_key_values and version % 3 == 2:
        first = version % source.num_virtual_tokens
        contents[first:] = [NOT_FINITE] * (source.num_virtual_tokens - first)
    return contents


def actual_bytes(source: AdapterSource) -> int:
    """The size of an adapter in memory: some are larger than their number of parameters says."""
    return source.num_parameters + crc32(source.identity.encode()) % 3


def is_unreadable(source: AdapterSource) -> bool:
    """Whether reading an adapter fails."""
    return crc32(source.identity.encode()) % 11 == 0


@dataclass(slots=True)
class SoakFiles:
    """The files of adapters: reads end in order, when the driver says so.

    Attributes:
        reading: Adapters that are being read, in order.
        resident: Sizes of the adapters that were read and not dropped.
    """

    reading: list[AdapterSource] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)

    def start(self, source: AdapterSource) -> None:
        """Begin a read."""
        expect(source.identity not in self.resident, f"adapter {source.identity} is read again, but is in memory")
        expect(source not in self.reading, f"adapter {source.identity} is read twice at the same time")
        self.reading.append(source)

    def drop(self, identity: str) -> None:
        """Forget an adapter."""
        expect(identity in self.resident, f"adapter {identity} is dropped, but is not in memory")
        del self.resident[identity]

    def end_first(self) -> tuple[AdapterSource, int | None]:
        """End the first read; returns the adapter and its size, or None if it is unreadable."""
        source = self.reading.pop(0)
        if is_unreadable(source):
            return source, None
        self.resident[source.identity] = actual_bytes(source)
        return source, self.resident[source.identity]
