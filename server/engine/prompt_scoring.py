"""Logprobs of the text's own tokens, from the hidden states that a prefill computes anyway."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from server.engine.logprobs import logprobs_of
from server.engine.scheduler import Chunk
from server.engine.types import Logprobs

MAX_ROWS = 256
"""Rows of logits that exist at once: a long prefill's would be gigabytes with a large vocabulary."""

MAX_BOUNDARIES = 32
"""Soft prompts whose last row of logits is kept."""


class PromptScorer:
    """Computes what ``Sequence.prompt_logprobs`` asks for, beside the forward passes of a model.

    The logits at a position tell how likely the next token was. A text's first token follows the last virtual one
    where the soft prompt is made of embeddings; keys and values have no logits, so there it stays without.

    Args:
        model: The model, whose base model is ``base_model_prefix`` as in all of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._base: nn.Module = model.base_model
        # The model's own forward around a base that hands back given states: so whatever a family does after its
        # layers (scaling, soft caps) is done here too, and the model itself is never changed.
        self._given = _GivenStates()
        self._head = copy.copy(model)
        self._head.__dict__["_modules"] = {**dict(model.named_children()), model.base_model_prefix: self._given}
        self._boundaries: OrderedDict[str, torch.Tensor] = OrderedDict()

    @contextmanager
    def watching(self, chunks: Sequence[Chunk]) -> Iterator[list[torch.Tensor]]:
        """Keep the hidden states [rows, width] of the forward pass inside, if one of its chunks needs them."""
        kept: list[torch.Tensor] = []
        if not any(_wants(chunk) for chunk in chunks):
            yield kept
            return

        def keep(_module: nn.Module, _arguments: object, output: Any) -> None:
            kept.append(output[0][0])

        hook = self._base.register_forward_hook(keep)
        try:
            yield kept
        finally:
            hook.remove()

    def score(
        self, chunks: Sequence[Chunk], states: torch.Tensor, boundary: Callable[[Chunk], torch.Tensor]
    ) -> dict[str, list[Logprobs | None]]:
        """What a forward pass adds to its sequences' prompt logprobs.

        Args:
            chunks: What it computed.
            states: Its hidden states, [rows, width].
            boundary: Logits [1, vocabulary] at the last virtual token before a chunk that begins its text.

        Returns:
            New entries by request id.
        """
        result: dict[str, list[Logprobs | None]] = {}
        wanted: list[tuple[str, int, int, int]] = []
        first_row = 0
        for chunk in chunks:
            seq = chunk.seq
            if seq is not None and _wants(chunk):
                num_top = seq.params.prompt_logprobs or 0
                entries = result.setdefault(seq.request_id, [])
                known = len(seq.prompt_logprobs)
                if known == 0:
                    entries.append(self._first(chunk, num_top, boundary))
                    known = 1
                # The token at text index i is told of by the row of the position before it.
                first = seq.num_virtual_tokens + known - 1
                last = min(chunk.stop, seq.num_virtual_tokens + seq.num_prompt_tokens - 1)
                for position in range(first, last):
                    token = seq.token_ids[position + 1 - seq.num_virtual_tokens]
                    wanted.append((seq.request_id, first_row + position - chunk.start, token, num_top))
            first_row += chunk.num_tokens
        for start in range(0, len(wanted), MAX_ROWS):
            ids, rows, tokens, num_top_of = zip(*wanted[start : start + MAX_ROWS], strict=True)
            logits = self._logits(states[list(rows)])
            for request_id, entry in zip(ids, logprobs_of(logits, tokens, num_top_of), strict=True):
                result[request_id].append(entry)
        return result

    def _first(self, chunk: Chunk, num_top: int, boundary: Callable[[Chunk], torch.Tensor]) -> Logprobs | None:
        seq = chunk.seq
        if seq is None or seq.soft_prompt is None or seq.soft_prompt.is_key_values:
            return None
        identity = seq.soft_prompt.identity
        if identity not in self._boundaries:
            self._boundaries[identity] = boundary(chunk)
            if len(self._boundaries) > MAX_BOUNDARIES:
                self._boundaries.popitem(last=False)
        self._boundaries.move_to_end(identity)
        return logprobs_of(self._boundaries[identity], seq.token_ids[:1], [num_top])[0]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of hidden states [rows, width]."""
        self._given.states = states[None]
        try:
            ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            logits: torch.Tensor = self._head(input_ids=ids, use_cache=False).logits
        finally:
            self._given.states = None
        return logits[0]


class _GivenStates(nn.Module):
    """Stands where a base model does, and returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.states: torch.Tensor | None = None

    def forward(self, *_arguments: object, **_more: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states)


def _wants(chunk: Chunk) -> bool:
    return chunk.seq is not None and chunk.seq.wants_prompt_logprobs
