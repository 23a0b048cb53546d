"""Draws from probabilities that top-k, top-p and min-p truncate, without sorting the vocabulary.

The kept tokens are the first ones in descending order of probability; equal ones are in ascending order of their ids.
So the most likely tokens, the *candidates*, suffice if the last of them is not kept. This is certain for a small
top-k. With top-p and min-p it is the rule, but a flat distribution keeps more tokens: its row gets NOT_COVERED, and
the caller draws it again from all tokens.

A token does not depend on the number of candidates (on GPUs: but for rounding), because all sums are cumulative, and
none includes what follows.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.engine.attention.transfers import to_device
from server.engine.types import SamplingParams

CANDIDATES = (128, 1024)
"""Numbers of candidates: the first one larger than top-k, and the last one without a top-k."""

NOT_COVERED = -3
"""Returned instead of a token if the candidates may not include all tokens that are kept."""

_LOWER_HALF = 2**32 - 1


def truncates(params: SamplingParams) -> bool:
    """Whether top-k, top-p or min-p may exclude tokens."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def num_candidates(params: SamplingParams, vocabulary: int, *, is_flat: bool) -> int:
    """From how many of the most likely tokens to draw; the size of the vocabulary if it has to be sorted.

    Args:
        params: A row's parameters.
        vocabulary: Number of tokens.
        is_flat: Whether candidates are not expected to suffice.
    """
    is_limited = 0 < params.top_k < vocabulary
    if is_limited:
        return next((count for count in CANDIDATES if params.top_k < count < vocabulary), vocabulary)
    return vocabulary if is_flat else min(CANDIDATES[-1], vocabulary)


def draw_truncated(
    probs: torch.Tensor, params: SequenceOf[SamplingParams], draws: torch.Tensor, num_candidates: int
) -> torch.Tensor:
    """Apply top-k, top-p and min-p, and draw a token for each row; does not wait for the device.

    Args:
        probs: [rows, vocabulary] float32; each row's sum is 1.
        params: Each row's parameters.
        draws: [rows] random numbers in [0, 1).
        num_candidates: For all rows, as ``num_candidates`` returns it for each.

    Returns:
        [rows] int64: a token that is kept, or NOT_COVERED. A row with NaN has any token or NOT_COVERED.
    """
    vocabulary = probs.shape[-1]
    if num_candidates < vocabulary:
        ordered, order = _most_likely(probs, num_candidates)
    else:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    picked, is_covered = _draw_ordered(ordered, params, draws, vocabulary)
    return torch.where(is_covered, order.gather(-1, picked), NOT_COVERED)[:, 0]


def _most_likely(probs: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` columns of a stable descending sort, and their tokens: [rows, count] each."""
    last = probs.shape[-1] - 1
    # The bits of numbers that are not negative have the numbers' order. ``topk`` orders equal values arbitrarily, so
    # the lower half makes all keys different.
    keys = probs.view(torch.int32).to(torch.int64)
    keys <<= 32
    keys += torch.arange(last, -1, -1, device=probs.device)
    best = keys.topk(count, dim=-1).values
    return (best >> 32).to(torch.int32).view(torch.float32), last - (best & _LOWER_HALF)


def _draw_ordered(
    probs: torch.Tensor, params: SequenceOf[SamplingParams], draws: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a column of each row of the most likely tokens' probabilities [rows, count], in descending order.

    Returns:
        The columns, and whether the row's kept tokens are all among the ``count`` first: [rows, 1] each.
    """
    count, device = probs.shape[-1], probs.device
    host_limits = [min(own.top_k or vocabulary, vocabulary) for own in params]
    limits = to_device(host_limits, device)[:, None]
    is_last_impossible = probs[:, -1:] == 0
    # Relative to the largest probability, so it is the same before and after top-k and top-p.
    out = probs < probs[:, :1] * _column([own.min_p for own in params], device)
    out |= torch.arange(count, device=device) >= limits
    if min(host_limits) < vocabulary:
        # Top-p applies to the distribution after top-k, as in transformers.
        totals = _cumulated(probs).gather(-1, limits.clamp_max(count) - 1)
        probs = probs / torch.where(limits < vocabulary, totals, 1.0)
    cumulated = _cumulated(probs)
    # Rounded sums may reach 1 too early, and a top-p of 1 has to keep all tokens.
    out[:, 1:] |= cumulated[:, :-1] >= _column([own.top_p if own.top_p < 1.0 else 2.0 for own in params], device)
    out[:, 0] = False
    num_kept = count - out.sum(dim=-1, keepdim=True)
    is_covered = (limits <= count) | out[:, -1:] | is_last_impossible
    targets = draws[:, None] * cumulated.gather(-1, num_kept - 1)
    picked = torch.searchsorted(cumulated, targets, right=True).clamp_max(count - 1)
    # The target can round up to the total.
    has_chance = (picked < num_kept) & (probs.gather(-1, picked) > 0)
    return torch.where(has_chance, picked, 0), is_covered


def _cumulated(probs: torch.Tensor) -> torch.Tensor:
    """Cumulative sums along the rows; torch adds in float64 on CPUs.

    On GPUs, torch's order of additions depends on the shape for rows as short as those of candidates, so these are
    added in float64 there, too.
    """
    if probs.shape[-1] > CANDIDATES[-1]:
        return probs.cumsum(dim=-1)
    return probs.cumsum(dim=-1, dtype=torch.float64).float()


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return to_device(values, device, torch.float32)[:, None]
