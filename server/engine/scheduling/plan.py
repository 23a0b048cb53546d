"""What one step computes: positions of sequences and of soft prompts. Plain data: no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun
from server.engine.types import AdapterSource, SoftPromptSource


@dataclass(slots=True)
class Chunk:
    """Consecutive positions that a step computes, of one sequence or of one soft prompt being filled.

    A sequence's chunk may begin before its text, in the partial last block of a soft prompt of embeddings: see
    ``BlockManager.admit``.

    Attributes:
        block_table: The blocks that hold its keys and values.
        start: First position to compute.
        num_tokens: Positions to compute.
        seq: The sequence, or None for a soft prompt.
        run: The soft prompt being filled, or None.
        shared: Indices in the block table of the blocks that other sequences may use from now on: those that the step
            completes, or those of the soft prompt that it writes. Their contents must be finite.
    """

    block_table: list[int]
    start: int
    num_tokens: int
    seq: Sequence | None = None
    run: SoftPromptRun | None = None
    shared: list[int] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """The position after the last one to compute."""
        return self.start + self.num_tokens

    @property
    def soft_prompt(self) -> SoftPromptSource | None:
        """The soft prompt being filled, or the one before the sequence's text."""
        if self.run is not None:
            return self.run.source
        return None if self.seq is None else self.seq.request.soft_prompt

    @property
    def adapter(self) -> AdapterSource | None:
        """The adapter that changes the model's products for all of the positions."""
        if self.run is not None:
            return self.run.adapter
        return None if self.seq is None else self.seq.request.adapter

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens among the positions to compute; they come first."""
        source = self.soft_prompt
        return 0 if source is None else max(0, min(self.stop, source.num_virtual_tokens) - self.start)

    @property
    def still_runs(self) -> bool:
        """Whether the sequence has not ended or been preempted since; then it has no table, or a new one."""
        return self.seq is not None and self.seq.block_table is self.block_table

    @property
    def samples(self) -> bool:
        """Whether the sequence's last position is computed: a token is chosen, or a text without new tokens ends."""
        return self.seq is not None and self.stop == self.seq.num_positions

    @property
    def needs_logits(self) -> bool:
        """Whether the last position's logits choose a new token, or tell whether the model computed finite values.

        Without new tokens, the labels of a classified text, or the logprobs of a scored one, tell that.
        """
        if self.seq is None or not self.samples:
            return False
        params = self.seq.request.params
        # A text's first token may have no logprob.
        first_scored = max(1, params.prompt_logprobs_start)
        is_scored = params.prompt_logprobs is not None and first_scored < self.seq.num_prompt_tokens
        return params.max_tokens > 0 or not (params.classify or is_scored)


@dataclass(slots=True)
class StepPlan:
    """One step: first the fills, then the copies, then one forward pass over the chunks.

    Attributes:
        key_value_fills: Soft prompts whose keys and values are copied into their blocks.
        block_copies: (source, destination) blocks: partial last blocks of soft prompts.
        chunks: What the forward pass computes; decodes first.
        loads: Soft prompts whose keys and values are copied into their blocks beside this step and later ones. They
            are started once, whatever happens to the rest of the plan.
    """

    key_value_fills: list[SoftPromptRun] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    loads: list[SoftPromptRun] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the step itself has nothing to do."""
        return not self.chunks and not self.key_value_fills

    @property
    def num_tokens(self) -> int:
        """Positions that the forward pass computes."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_distinct_prompts(self) -> int:
        """Distinct soft prompts, or tasks of one, before the sequences of the chunks."""
        return len({source.identity for chunk in self.chunks if chunk.seq and (source := chunk.soft_prompt)})

    @property
    def num_distinct_adapters(self) -> int:
        """Distinct adapters that the forward pass computes with."""
        return len({adapter.identity for chunk in self.chunks if (adapter := chunk.adapter)})
