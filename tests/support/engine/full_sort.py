"""Top-k, top-p and min-p by sorting the vocabulary: the plain method, as a reference for the sampler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.engine.types import SamplingParams


def draw_by_sorting(
    logits: torch.Tensor, params: SequenceOf[SamplingParams], draws: SequenceOf[float]
) -> torch.Tensor:
    """Draw a token for each row of logits [rows, vocabulary]: [rows]."""
    temperatures = torch.tensor([own.temperature for own in params])
    scores = logits.float()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    probs, order = torch.softmax(scores, dim=-1).sort(dim=-1, descending=True, stable=True)
    probs.masked_fill_(excluded(probs, params), 0.0)
    cumulated = probs.cumsum(dim=-1)
    targets = torch.tensor(draws)[:, None] * cumulated[:, -1:]
    picked = torch.searchsorted(cumulated, targets, right=True).clamp_max(probs.shape[-1] - 1)
    has_chance = probs.gather(-1, picked) > 0
    picked = torch.where(has_chance, picked, probs.argmax(dim=-1, keepdim=True))
    return order.gather(-1, picked)[:, 0]


def excluded(probs: torch.Tensor, params: SequenceOf[SamplingParams]) -> torch.Tensor:
    """Which of the probabilities [rows, vocabulary], in descending order, are excluded: bool; the first never is."""
    vocabulary = probs.shape[-1]
    limits = torch.tensor([own.top_k or vocabulary for own in params])
    out = probs < probs[:, :1] * torch.tensor([own.min_p for own in params])[:, None]
    beyond = torch.arange(vocabulary) >= limits[:, None]
    probs = probs.masked_fill(beyond, 0.0)
    probs /= probs.sum(dim=-1, keepdim=True)
    before = probs.cumsum(dim=-1) - probs
    shares = torch.tensor([own.top_p if own.top_p < 1.0 else 2.0 for own in params])
    out |= (before >= shares[:, None]) | beyond
    out[:, 0] = False
    return out
