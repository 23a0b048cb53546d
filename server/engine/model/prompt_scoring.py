"""Logprobs of the text's own tokens, from the hidden states that a prefill computes anyway."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from server.engine.model.classification_head import wants_head
from server.engine.sampling.logprobs import logprobs_of
from server.engine.scheduling.plan import Chunk
from server.engine.types import Logprobs

logger = logging.getLogger(__name__)

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

    Attributes:
        is_exact: Whether ``check`` has found that it computes the model's own logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._base: nn.Module = model.base_model
        # The model's own forward around a base that hands back what it is given: so whatever a family does after its
        # layers (scaling, soft caps) is done here too, and the model itself is never changed.
        self._given = _GivenOutput()
        self._head = copy.copy(model)
        self._head.__dict__["_modules"] = {**dict(model.named_children()), model.base_model_prefix: self._given}
        self.is_exact = False
        self._boundaries: OrderedDict[str, torch.Tensor] = OrderedDict()

    def wants(self, chunks: Sequence[Chunk]) -> bool:
        """Whether one of the chunks needs what ``watching`` keeps."""
        return any(_wants(chunk) or wants_head(chunk) for chunk in chunks)

    @contextmanager
    def watching(self, chunks: Sequence[Chunk]) -> Iterator[list[ModelOutput]]:
        """Keep what the base model returns in the forward pass inside, if one of the chunks needs it."""
        if self.wants(chunks):
            with self._keeping() as kept:
                yield kept
        else:
            yield []

    def check(self, forward: Callable[[], torch.Tensor], tolerance: float) -> None:
        """See whether this model can be scored, by logits that it computes itself.

        Args:
            forward: One forward pass, returning the logits of all its rows, [rows, vocabulary].
            tolerance: Largest difference that rounding explains, as a share of their standard deviation.
        """
        try:
            with self._keeping() as kept:
                expected = forward().float()
            got = self._logits(kept[0], range(len(expected))).float()
            self.is_exact = bool((got - expected).abs().max() <= tolerance * expected.std())
        except Exception as error:  # whatever keeps a model from being scored, it can generate
            reason = f"{type(error).__name__}: {error}"
            logger.warning("prompt logprobs cannot be computed for this model: %s", reason)
            self.is_exact = False

    def score(
        self, chunks: Sequence[Chunk], output: ModelOutput, boundary: Callable[[Chunk], torch.Tensor]
    ) -> dict[str, list[Logprobs | None]]:
        """What a forward pass adds to its sequences' prompt logprobs.

        Args:
            chunks: What it computed.
            output: What its base model returned, with hidden states [1, rows, width].
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
                num_top = seq.request.params.prompt_logprobs or 0
                entries = result.setdefault(seq.request_id, [])
                index = seq.next_scored
                if index == 0:
                    entries.append(self._first(chunk, num_top, boundary))
                    index = 1
                # The token at text index i is told of by the row of the position before it.
                first = seq.num_virtual_tokens + index - 1
                last = min(chunk.stop, seq.num_virtual_tokens + seq.num_prompt_tokens - 1)
                for position in range(first, last):
                    token = seq.token_ids[position + 1 - seq.num_virtual_tokens]
                    wanted.append((seq.request_id, first_row + position - chunk.start, token, num_top))
            first_row += chunk.num_tokens
        for start in range(0, len(wanted), MAX_ROWS):
            ids, rows, tokens, num_top_of = zip(*wanted[start : start + MAX_ROWS], strict=True)
            logits = self._logits(output, rows)
            for request_id, entry in zip(ids, logprobs_of(logits, tokens, num_top_of), strict=True):
                result[request_id].append(entry)
        return result

    def _first(self, chunk: Chunk, num_top: int, boundary: Callable[[Chunk], torch.Tensor]) -> Logprobs | None:
        seq = chunk.seq
        if seq is None or seq.request.soft_prompt is None or seq.request.soft_prompt.is_key_values:
            return None
        identity = seq.request.soft_prompt.identity
        if identity not in self._boundaries:
            self._boundaries[identity] = boundary(chunk)
            if len(self._boundaries) > MAX_BOUNDARIES:
                self._boundaries.popitem(last=False)
        self._boundaries.move_to_end(identity)
        return logprobs_of(self._boundaries[identity], seq.token_ids[:1], [num_top])[0]

    @contextmanager
    def _keeping(self) -> Iterator[list[ModelOutput]]:
        kept: list[ModelOutput] = []
        hook = self._base.register_forward_hook(lambda _module, _arguments, output: kept.append(output))
        try:
            yield kept
        finally:
            hook.remove()

    def _logits(self, output: ModelOutput, rows: Sequence[int]) -> torch.Tensor:
        """Logits [rows, vocabulary] of some of the hidden states that the base model returned."""
        self._given.output = replace(output, last_hidden_state=output[0][:, list(rows)])  # type: ignore[type-var]
        try:
            ids = torch.zeros(1, len(rows), dtype=torch.long, device=output[0].device)
            logits: torch.Tensor = self._head(input_ids=ids, use_cache=False).logits
        finally:
            self._given.output = None
        return logits[0]


class _GivenOutput(nn.Module):
    """Stands where a base model does, and returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.output: ModelOutput | None = None

    def forward(self, *_arguments: object, **_more: object) -> ModelOutput | None:
        return self.output


def _wants(chunk: Chunk) -> bool:
    return chunk.seq is not None and chunk.seq.wants_prompt_logprobs
