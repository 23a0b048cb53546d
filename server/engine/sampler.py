"""Choosing the next token of every row at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.engine.types import Sequence

NOT_FINITE = -1
"""Returned instead of a token where a row's logits hold NaN or infinity."""


class Sampler:
    """Greedy and random choice, vectorised over the rows of a step.

    Each sequence draws one number in [0, 1) per token from its own generator, and the token is where the cumulated
    probabilities pass it (inverse transform sampling). So what a seed gives does not depend on what else is in the
    batch, and no generator has to live on the device.
    """

    def sample(self, logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> list[int]:
        """Choose one token for each row.

        Args:
            logits: [rows, vocabulary], any float dtype.
            seqs: The rows' sequences, in order.

        Returns:
            A token id for each row, or NOT_FINITE. One synchronisation with the device.
        """
        best = torch.max(logits, dim=-1)  # NaN, if there is any, is the maximum
        tokens = best.indices
        drawn = [row for row, seq in enumerate(seqs) if not seq.params.is_greedy]
        # Rows are cut in two by what they ask for, never by what their neighbours do, so that a row's arithmetic,
        # and with it what its seed gives, is its own.
        plain = [row for row in drawn if seqs[row].params.top_k == 0 and seqs[row].params.top_p == 1.0]
        cut = [row for row in drawn if seqs[row].params.top_k > 0 or seqs[row].params.top_p < 1.0]
        if plain:
            probs, draws, rows = self._probabilities(logits, seqs, plain)
            tokens[rows] = _inverse_transform(probs, draws)
        if cut:
            probs, draws, rows = self._probabilities(logits, seqs, cut)
            probs, order = probs.sort(dim=-1, descending=True, stable=True)
            _cut(probs, [seqs[row].params.top_k for row in cut], [seqs[row].params.top_p for row in cut])
            tokens[rows] = order.gather(-1, _inverse_transform(probs, draws)[:, None])[:, 0]
        result: list[int] = torch.where(best.values.isfinite(), tokens, NOT_FINITE).tolist()
        return result

    def _probabilities(
        self, logits: torch.Tensor, seqs: SequenceOf[Sequence], rows: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = logits.device
        index = torch.tensor(rows, device=device)
        temperatures = torch.tensor([seqs[row].params.temperature for row in rows], device=device)
        draws = torch.tensor([seqs[row].rng.random() for row in rows], device=device)
        scores = logits[index].float()
        # The maximum is taken off before the division: a tiny temperature would overflow float32 otherwise.
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperatures[:, None]
        return torch.softmax(scores, dim=-1), draws, index


def _cut(probs: torch.Tensor, top_k: list[int], top_p: list[float]) -> None:
    """Zero, in place, what top-k and top-p leave out of rows sorted in descending order; the first always stays."""
    vocabulary = probs.shape[-1]
    limits = torch.tensor([k or vocabulary for k in top_k], device=probs.device)
    probs.masked_fill_(torch.arange(vocabulary, device=probs.device) >= limits[:, None], 0.0)
    probs /= probs.sum(dim=-1, keepdim=True)  # top-p is a share of what top-k leaves, as in transformers
    before = probs.cumsum(dim=-1) - probs
    out = before >= torch.tensor(top_p, device=probs.device)[:, None]
    out[:, 0] = False
    probs.masked_fill_(out, 0.0)


def _inverse_transform(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """For each row the index where the cumulated probability passes draw * total."""
    cumulated = probs.cumsum(dim=-1)
    targets = draws[:, None] * cumulated[:, -1:]
    picked = torch.searchsorted(cumulated, targets, right=True)[:, 0]
    # Rounding can put the target on the total itself; the last token that has any probability is meant.
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(picked, last)
