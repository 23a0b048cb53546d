"""A checkpoint's rules for every text, like the logits processors of transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.engine.attention.transfers import queue_copy, to_device
from server.engine.generation_defaults import NO_RULES, TokenRules
from server.engine.scheduling.ngrams import NgramIndex
from server.engine.scheduling.sequence import Sequence

Place = tuple[int, int]
"""(row, token)."""


class RuleMasks:
    """Biases and masks of ``TokenRules``, for all rows of a step.

    Args:
        rules: The checkpoint's rules.
        eos_token_ids: The model's end-of-sequence tokens.

    Attributes:
        is_empty: Whether there are no rules.
    """

    def __init__(self, rules: TokenRules = NO_RULES, eos_token_ids: SequenceOf[int] = ()) -> None:
        self.is_empty = rules == NO_RULES
        self._rules = rules
        self._eos_token_ids = tuple(eos_token_ids)
        self._never = sorted({*rules.suppress_tokens, *(word[0] for word in rules.bad_words if len(word) == 1)})
        self._bad_words = [word for word in rules.bad_words if len(word) > 1]
        self._static: torch.Tensor | None = None

    def add_biases(self, scores: torch.Tensor, seqs: SequenceOf[Sequence]) -> None:
        """Add ``sequence_bias`` to scores [rows, vocabulary], in place."""
        biased = [
            (row, ids[-1], bias)
            for row, seq in enumerate(seqs)
            for ids, bias in self._rules.sequence_bias
            if _ends_with(seq.token_ids, ids[:-1])
        ]
        if biased:
            rows, tokens, values = zip(*biased, strict=True)
            places = to_device(rows, scores.device), to_device(tokens, scores.device)
            scores.index_put_(places, to_device(values, scores.device, scores.dtype), accumulate=True)

    def forbid(self, scores: torch.Tensor, seqs: SequenceOf[Sequence]) -> torch.Tensor:
        """Exclude forbidden tokens from scores [rows, vocabulary].

        A row that would have no token left is not changed. The request's own constraints are in the scores already,
        and take precedence over the checkpoint's rules.
        """
        if self._static is None or self._static.device != scores.device:
            static = torch.zeros(scores.shape[-1], dtype=torch.bool)
            static[[token for token in self._never if token < len(static)]] = True
            self._static = queue_copy(static, scores.device)
        mask = self._static.expand(len(seqs), -1).clone()
        _set(mask, [place for row, seq in enumerate(seqs) for place in self._forbidden(row, seq)], mask.new_ones(()))
        forced = [(row, token) for row, seq in enumerate(seqs) for token in self._forced(seq)]
        allowed = scores
        if forced:
            mask[to_device([row for row, _ in forced], mask.device)] = mask.new_ones(())
            _set(mask, forced, mask.new_zeros(()))
            allowed = scores.clone()  # all possible forced tokens get the same score
            _set(allowed, forced, scores.new_zeros(()))
            allowed.masked_fill_(scores == float("-inf"), float("-inf"))
        kept = allowed.masked_fill(mask, float("-inf"))
        return torch.where(kept.amax(dim=-1, keepdim=True) == float("-inf"), scores, kept)

    def _forbidden(self, row: int, seq: Sequence) -> list[Place]:
        rules, token_ids = self._rules, seq.token_ids
        tokens = [word[-1] for word in self._bad_words if _ends_with(token_ids, word[:-1])]
        if rules.no_repeat_ngram_size:
            if seq.ngrams is None:
                seq.ngrams = NgramIndex(rules.no_repeat_ngram_size)
            tokens += seq.ngrams.completing(token_ids)
        if len(token_ids) < rules.min_length:
            tokens += self._eos_token_ids
        # A forced first token does not count as the text's first new token.
        begins_at = 1 if rules.forced_bos_token_id is not None and seq.num_prompt_tokens == 1 else 0
        if seq.num_new_tokens == begins_at:
            tokens += rules.begin_suppress_tokens
        return [(row, token) for token in tokens]

    def _forced(self, seq: Sequence) -> tuple[int, ...]:
        rules = self._rules
        if rules.forced_eos_token_ids and seq.num_new_tokens == seq.request.params.max_tokens - 1:
            return rules.forced_eos_token_ids
        if rules.forced_bos_token_id is not None and len(seq.token_ids) == 1:
            return (rules.forced_bos_token_id,)
        return ()


def _set(matrix: torch.Tensor, places: SequenceOf[Place], value: torch.Tensor) -> None:
    """Set elements in place; ``value`` is a tensor, because a Python number would make the host wait."""
    known = [place for place in places if place[1] < matrix.shape[-1]]
    if known:
        rows, tokens = zip(*known, strict=True)
        matrix.index_put_((to_device(rows, matrix.device), to_device(tokens, matrix.device)), value)


def _ends_with(token_ids: list[int], ending: tuple[int, ...]) -> bool:
    length = len(ending)
    return length <= len(token_ids) and tuple(token_ids[len(token_ids) - length :]) == ending
