"""Log-probabilities of tokens, from the model's logits before temperature, penalties, bias and masks."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.engine.attention.transfers import to_device
from server.engine.sampling.slices import row_slices
from server.engine.types import MIN_LOGPROB, Logprobs


def logprobs_of(logits: torch.Tensor, token_ids: SequenceOf[int], num_top: SequenceOf[int]) -> list[Logprobs]:
    """The log-probabilities of one token of each row, and of the row's most likely tokens.

    All come from one float32 log-softmax, so a token in both has the same value.

    Args:
        logits: [rows, vocabulary], any float dtype.
        token_ids: The token of each row.
        num_top: Number of most likely tokens of each row, in descending order; the first is the argmax.
    """
    if not token_ids:
        return []
    tokens = to_device(token_ids, logits.device)
    parts = []
    for part in row_slices(range(len(token_ids)), logits.shape[-1]):
        own = slice(part[0], part[-1] + 1)
        parts.append(packed_logprobs(logits[own], tokens[own], max(num_top)))
    return unpacked_logprobs(torch.cat(parts).tolist(), num_top)


def packed_logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """The result of ``logprobs_of`` in one tensor, for one copy to the host. Uses twice the memory of float32 logits.

    Args:
        logits: [rows, vocabulary].
        tokens: [rows] int64, on the logits' device.
        num_top: Number of most likely tokens for each row; more than the vocabulary is the vocabulary.

    Returns:
        [rows, 2 + 2 * num_top] float64, which represents token ids and float32 exactly.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(-1, tokens[:, None]).clamp_min(MIN_LOGPROB)
    top = torch.topk(logprobs, min(num_top, logits.shape[-1]), dim=-1)
    parts = (chosen, logits.argmax(dim=-1, keepdim=True), top.values.clamp_min(MIN_LOGPROB), top.indices)
    return torch.cat([part.double() for part in parts], dim=-1)


def unpacked_logprobs(rows: SequenceOf[SequenceOf[float]], num_top: SequenceOf[int]) -> list[Logprobs]:
    """Unpack the rows of ``packed_logprobs`` on the host."""
    result = []
    for (logprob, best, *top), count in zip(rows, num_top, strict=True):
        width = len(top) // 2
        likeliest = list(zip(map(int, top[width:]), top[:width], strict=True))
        result.append(Logprobs(logprob, _best_first(likeliest, int(best))[:count] if count else []))
    return result


def _best_first(top: list[tuple[int, float]], best: int) -> list[tuple[int, float]]:
    """Put the argmax first: ``topk`` orders equal values arbitrarily, and may omit one."""
    others = [item for item in top if item[0] != best]
    return [(best, top[0][1]), *others][: len(top)]
