"""The memory that sampling takes, counted on the device "meta"."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any
from unittest import mock

import pytest
import torch

from server.engine.generation_defaults import NO_RULES, TokenRules
from server.engine.sampling.ensembles import merge_ensembles
from server.engine.sampling.grammars import TokenMasks
from server.engine.sampling.logprobs import packed_logprobs
from server.engine.sampling.sampler import Sampler
from server.engine.sampling.slices import SLICE_BYTES
from server.engine.scheduling.sequence import Sequence
from server.engine.types import SamplingParams
from tests.support.engine.live_bytes import LiveBytes
from tests.support.engine.sequences import make_sequence

META = torch.device("meta")
ROWS, VOCABULARY = 256, 128_256
LIMIT = 500_000_000
CUT: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "min_p": 0.01}
PENALISED: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {3: 1.0},
}
RULES = TokenRules(suppress_tokens=(5,), no_repeat_ngram_size=2, forced_eos_token_ids=(1,))


class Masks(TokenMasks):
    """A fake of grammar masks that allow any token."""

    def allowed(self, matchers: SequenceOf[Any], vocab_size: int, device: torch.device) -> torch.Tensor:
        return torch.ones(len(matchers), vocab_size, dtype=torch.bool, device=device)


def make_seqs(count: int = ROWS, num_members: int = 1, **params: Any) -> list[Sequence]:
    params = {"max_tokens": 9} | params
    return [
        make_sequence("s", [1, 2, 3], SamplingParams(**params), others=(None,) * (num_members - 1))
        for _ in range(count)
    ]


def peak(
    seqs: list[Sequence],
    rules: TokenRules = NO_RULES,
    *,
    sorts: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes for one attempt to choose the tokens of some logits, without the logits.

    With ``sorts`` it is the second attempt for all rows, whose logits are a copy.
    """
    members = [member for seq in seqs for member in seq.members]
    sampler = Sampler((0,), rules)
    sampler._masks = Masks()
    live = LiveBytes(META)
    with live:
        logits = torch.empty(len(members), VOCABULARY, dtype=dtype, device=META)
        merged, leaders = merge_ensembles(logits, members)
        rows = sampler._rows(merged, leaders)
        chosen = merged[torch.arange(len(leaders), device=META)] if sorts else merged
        packed = sampler._packed(chosen, rows.select(range(len(leaders)), sorts=sorts))
    assert packed.shape == (len(seqs) * (1 + 2 + 2 * 20),)
    assert live.peak > logits.nbytes
    return live.peak - logits.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sorts", [False, True])
@pytest.mark.parametrize("params", [{}, CUT, PENALISED, CUT | PENALISED, {"top_p": 0.9} | PENALISED])
def test_a_step_of_256_rows_takes_less_than_half_a_gigabyte_beside_its_logits(
    params: dict[str, Any], sorts: bool, dtype: torch.dtype
) -> None:
    assert peak(make_seqs(logprobs=20, **params), sorts=sorts, dtype=dtype) < LIMIT


def test_grammars_and_rules_are_within_the_limit() -> None:
    seqs = make_seqs(logprobs=20, min_tokens=2, max_tokens=1, **CUT, **PENALISED)  # so the rule forces the end
    for seq in seqs:
        seq.matcher, seq.adjusts_logits = mock.Mock(), True
    assert peak(seqs, RULES) < LIMIT
    assert peak(seqs, RULES, sorts=True) < LIMIT


@pytest.mark.parametrize("num_members", [2, 16])
def test_ensembles_are_within_the_limit(num_members: int) -> None:
    every = make_seqs(ROWS // num_members, num_members, logprobs=20, **CUT, **PENALISED)
    assert peak(every) < LIMIT
    params = {"logprobs": 20} | CUT | PENALISED
    one = [*make_seqs(1, num_members, **params), *make_seqs(ROWS - num_members, **params)]
    assert peak(one) < LIMIT


def test_without_slices_a_step_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.sampling.slices.SLICE_BYTES", 2**40)
    assert peak(make_seqs(logprobs=20, **CUT, **PENALISED)) > LIMIT


def test_slices_that_are_sorted_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sort has buffers within the operation, which are not counted."""
    sizes = []
    sort = torch.Tensor.sort

    def measured(tensor: torch.Tensor, **options: Any) -> Any:
        sizes.append(tensor.nbytes)
        return sort(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "sort", measured)
    peak(make_seqs(logprobs=20, top_p=0.9), sorts=True)
    assert sum(sizes) == ROWS * VOCABULARY * 4
    assert max(sizes) <= SLICE_BYTES // 4


def test_logprobs_take_twice_the_logits_in_float32() -> None:
    live = LiveBytes(META)
    with live:
        logits = torch.empty(16, VOCABULARY, dtype=torch.bfloat16, device=META)
        packed_logprobs(logits, torch.zeros(16, dtype=torch.long, device=META), 20)
    assert live.peak < 16 * VOCABULARY * (2 + 2 * 4) + 2**20
