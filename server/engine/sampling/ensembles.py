"""Merges the distributions of an ensemble's members into one."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from math import log

import torch

from server.engine.scheduling.sequence import Sequence

Rows = tuple[torch.Tensor, SequenceOf[Sequence]]


def merge_ensembles(logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> Rows:
    """Replace each ensemble's rows by one row, the logarithm of the members' mean probability of each token.

    The mean is over the members' own distributions, before penalties, bias, masks and temperature. It is computed in
    logarithms, because a token with probability 0 in float32 may be the only one that a grammar allows.

    Args:
        logits: [rows, vocabulary], any float dtype.
        seqs: The rows' sequences in order; the members of an ensemble are adjacent.

    Returns:
        Logits [sequences and ensembles, vocabulary] in float32, with the sequences, or the leaders of ensembles; the
        arguments themselves if there is no ensemble. A value that is not finite makes its ensemble's row NaN.

    Raises:
        AssertionError: If an ensemble's members are not adjacent.
    """
    leaders = [seq for seq in seqs if not seq.is_follower]
    if len(leaders) == len(seqs):
        return logits, seqs
    merged = torch.empty(len(leaders), logits.shape[-1], dtype=torch.float32, device=logits.device)
    first = 0
    for row, leader in enumerate(leaders):
        members = leader.members
        rows = logits[first : first + len(members)]
        if list(seqs[first : first + len(members)]) != list(members):
            raise AssertionError(f"the members of the ensemble {leader.request_id} do not sample together")
        if len(members) == 1:
            merged[row] = rows[0]
        else:
            merged[row] = torch.log_softmax(rows.float(), dim=-1).logsumexp(dim=0) - log(len(members))
        first += len(members)
    return merged, leaders
