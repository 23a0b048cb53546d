"""How likely tokens are, by the model's own logits: before temperature, penalties, bias and cuts."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.engine.types import MIN_LOGPROB, Logprobs


def logprobs_of(logits: torch.Tensor, token_ids: SequenceOf[int], num_top: SequenceOf[int]) -> list[Logprobs]:
    """The log-probability of one token of each row, beside those of the likeliest.

    All are taken from one log-softmax in float32, so a token that is both has the same float twice.

    Args:
        logits: [rows, vocabulary], any float dtype.
        token_ids: The token of each row.
        num_top: How many of the likeliest each row tells, best first; the first is the one that argmax gives.
    """
    if not token_ids:
        return []
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].clamp_min(MIN_LOGPROB)
    top = torch.topk(logprobs, min(max(num_top), logits.shape[-1]), dim=-1)
    best: list[int] = logits.argmax(dim=-1).tolist()
    rows = zip(
        chosen.tolist(), top.indices.tolist(), top.values.clamp_min(MIN_LOGPROB).tolist(), best, num_top, strict=True
    )
    return [
        Logprobs(logprob, _best_first(list(zip(ids, values, strict=True)), token)[:count] if count else [])
        for logprob, ids, values, token, count in rows
    ]


def _best_first(top: list[tuple[int, float]], best: int) -> list[tuple[int, float]]:
    """Put the argmax before the tokens that are as likely: ``topk`` takes equals in any order, or leaves one out."""
    others = [item for item in top if item[0] != best]
    return [(best, top[0][1]), *others][: len(top)]
