"""Logprobs of a text's tokens, from the hidden states of its prefill."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from server.engine.adapters.weights import AdapterWeights
from server.engine.model.classification_head import wants_head
from server.engine.model.paged_model import Adapters
from server.engine.sampling.logprobs import logprobs_of
from server.engine.scheduling.plan import Chunk
from server.engine.types import Logprobs

logger = logging.getLogger(__name__)

MAX_ROWS = 256
"""Rows of logits computed at once; all of a long prefill's could be gigabytes."""

MAX_BOUNDARIES = 32
"""Number of soft prompts, each under one adapter or none, whose last row of logits is cached."""


class PromptScorer:
    """Computes prompt logprobs from the hidden states of a model's forward passes.

    The logits at a position give the probability of the next token. A text's first token follows the last virtual
    token of a soft prompt of embeddings. A soft prompt of keys and values has no logits, so the first token has no
    logprob.

    Args:
        model: The model; its base model is the submodule ``base_model_prefix``.
        adapting_head: As of ``PagedModel``.

    Attributes:
        is_exact: Whether ``check`` found that it computes the model's own logits.
        base_suffices: Whether ``check`` found that the base model alone computes the same hidden states, so that
            a pass that needs no logits needs nothing else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapting_head: Callable[[Adapters], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._model = model
        self._adapting_head = adapting_head
        self._base: nn.Module = model.base_model
        self.is_exact = self.base_suffices = False
        self._boundaries: OrderedDict[str, torch.Tensor] = OrderedDict()

    def wants(self, chunks: Sequence[Chunk]) -> bool:
        """Whether one of the chunks needs the output of the base model."""
        return any(_wants(chunk) or wants_head(chunk) for chunk in chunks)

    @contextmanager
    def watching(self, chunks: Sequence[Chunk]) -> Iterator[list[ModelOutput]]:
        """Yield a list that receives the base model's output in a forward pass, if one of the chunks needs it."""
        if self.wants(chunks):
            with self._keeping() as kept:
                yield kept
        else:
            yield []

    def check(
        self, forward: Callable[[], torch.Tensor], forward_base: Callable[[], ModelOutput], tolerance: float
    ) -> None:
        """Set ``is_exact`` and ``base_suffices``, by comparing with what the model computes.

        Args:
            forward: Runs a forward pass; returns the logits of all its rows, [rows, vocabulary].
            forward_base: Runs the same pass through the base model alone.
            tolerance: Largest difference due to rounding, as a fraction of the standard deviation.
        """
        try:
            with self._keeping() as kept:
                expected = forward().float()
            got = self._logits(kept[0], range(len(expected))).float()
            self.is_exact = bool((got - expected).abs().max() <= tolerance * expected.std())
            hidden, alone = kept[0][0].float(), forward_base()[0].float()
            is_equal = bool((alone - hidden).abs().max() <= tolerance * hidden.std())
            self.base_suffices = self.is_exact and is_equal
        except Exception as error:  # a model that cannot be scored can still generate
            reason = f"{type(error).__name__}: {error}"
            logger.warning("prompt logprobs cannot be computed for this model: %s", reason)
            self.is_exact = self.base_suffices = False

    def score(
        self,
        chunks: Sequence[Chunk],
        output: ModelOutput,
        boundary: Callable[[Chunk], torch.Tensor],
        adapters: Adapters | None = None,
    ) -> dict[str, list[Logprobs | None]]:
        """The prompt logprobs that a forward pass adds to its sequences.

        Args:
            chunks: The chunks of the pass.
            output: The output of the base model, with hidden states [1, rows, width].
            boundary: Returns the logits [1, vocabulary] at the last virtual token before a chunk that starts with a
                text's first token.
            adapters: The adapter of each chunk; None if none has one.

        Returns:
            New entries by request id.
        """
        result: dict[str, list[Logprobs | None]] = {}
        targets: list[tuple[str, int, int, int]] = []
        of_targets: list[AdapterWeights | None] = []
        first_row = 0
        for chunk, adapter in zip(chunks, adapters or [None] * len(chunks), strict=True):
            seq = chunk.seq
            if seq is not None and _wants(chunk):
                num_top = seq.request.params.prompt_logprobs or 0
                entries = result.setdefault(seq.request_id, [])
                # The row of a position gives the probability of the token at the next one.
                first = seq.num_virtual_tokens + seq.next_scored - 1
                if first < chunk.start:  # only before a text's first token: the pass has no row for it
                    entries.append(self._first(chunk, num_top, boundary))
                    first += 1
                last = min(chunk.stop, seq.num_virtual_tokens + seq.num_prompt_tokens - 1)
                for position in range(first, last):
                    token = seq.token_ids[position + 1 - seq.num_virtual_tokens]
                    targets.append((seq.request_id, first_row + position - chunk.start, token, num_top))
                    of_targets.append(adapter)
            first_row += chunk.num_tokens
        for start in range(0, len(targets), MAX_ROWS):
            ids, rows, tokens, num_top_of = zip(*targets[start : start + MAX_ROWS], strict=True)
            with self._adapting_head(of_targets[start : start + MAX_ROWS]):
                logits = self._logits(output, rows)
            for request_id, entry in zip(ids, logprobs_of(logits, tokens, num_top_of), strict=True):
                result[request_id].append(entry)
        return result

    def _first(self, chunk: Chunk, num_top: int, boundary: Callable[[Chunk], torch.Tensor]) -> Logprobs | None:
        seq = chunk.seq
        if seq is None or seq.request.soft_prompt is None or seq.request.soft_prompt.is_key_values:
            return None
        identity = seq.flow  # the adapter changes the logits, too
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
        """Logits [rows, vocabulary] of some of the hidden states in the base model's output.

        The model runs with a stub in the place of its base model, so operations after the layers (scaling, soft
        caps) are included.
        """
        stub = _Stub(replace(output, last_hidden_state=output[0][:, list(rows)]))  # type: ignore[type-var]
        ids = torch.zeros(1, len(rows), dtype=torch.long, device=output[0].device)
        self._model.set_submodule(self._model.base_model_prefix, stub)
        try:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            self._model.set_submodule(self._model.base_model_prefix, self._base)
        return logits[0]


class _Stub(nn.Module):
    """A base model that returns a given output."""

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_arguments: object, **_options: object) -> ModelOutput:
        return self._output


def _wants(chunk: Chunk) -> bool:
    return chunk.seq is not None and chunk.seq.wants_prompt_logprobs
