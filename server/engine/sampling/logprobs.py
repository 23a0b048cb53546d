"""How likely tokens are, by the model's own logits: before temperature, penalties, bias and cuts."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.engine.attention.transfers import to_device
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
    packed = packed_logprobs(logits, to_device(token_ids, logits.device), num_top)
    return unpacked_logprobs(packed.tolist(), num_top)


def packed_logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: SequenceOf[int]) -> torch.Tensor:
    """What ``logprobs_of`` tells, as one tensor for one copy to the host.

    Args:
        logits: As in ``logprobs_of``.
        tokens: [rows] int64, on the logits' device.
        num_top: As in ``logprobs_of``.

    Returns:
        [rows, 2 + 2 * most of ``num_top``] of float64, which holds every token id and every float32 as it is.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(-1, tokens[:, None]).clamp_min(MIN_LOGPROB)
    top = torch.topk(logprobs, min(max(num_top), logits.shape[-1]), dim=-1)
    parts = (chosen, logits.argmax(dim=-1, keepdim=True), top.values.clamp_min(MIN_LOGPROB), top.indices)
    return torch.cat([part.double() for part in parts], dim=-1)


def unpacked_logprobs(rows: SequenceOf[SequenceOf[float]], num_top: SequenceOf[int]) -> list[Logprobs]:
    """The rows of ``packed_logprobs`` on the host, as what they tell."""
    result = []
    for (logprob, best, *top), count in zip(rows, num_top, strict=True):
        width = len(top) // 2
        likeliest = list(zip(map(int, top[width:]), top[:width], strict=True))
        result.append(Logprobs(logprob, _best_first(likeliest, int(best))[:count] if count else []))
    return result


def _best_first(top: list[tuple[int, float]], best: int) -> list[tuple[int, float]]:
    """Put the argmax before the tokens that are as likely: ``topk`` takes equals in any order, or leaves one out."""
    others = [item for item in top if item[0] != best]
    return [(best, top[0][1]), *others][: len(top)]
