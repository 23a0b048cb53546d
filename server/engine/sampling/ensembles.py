"""One distribution from several: the members of an ensemble that generates together."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from math import log

import torch

from server.engine.scheduling.sequence import Sequence

Rows = tuple[torch.Tensor, SequenceOf[Sequence]]


def merge_ensembles(logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> Rows:
    """Put one row in the place of each ensemble's: the logarithm of its members' mean probability of a token.

    The mean is of the models' own distributions. Penalties, bias, masks, temperature and cuts then change it as they
    change one model's. Logarithms all the way: a token whose probability is 0 in float32 by every member can still be
    the only one that a grammar allows.

    Args:
        logits: [rows, vocabulary], any float dtype.
        seqs: The rows' sequences in order, the members of an ensemble side by side.

    Returns:
        [fewer rows, vocabulary] in float32 and their sequences, of ensembles the leaders; both as they were where
        there is no ensemble. A row with a value that is not finite makes its ensemble's row NaN.

    Raises:
        AssertionError: If an ensemble's members are not side by side; a fault of the scheduler.
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
