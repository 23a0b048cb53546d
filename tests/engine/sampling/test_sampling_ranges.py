"""At the ends of every sampling parameter's range, a possible token is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.generation_defaults import NO_RULES, TokenRules
from server.engine.sampling.ensembles import merge_ensembles
from server.engine.sampling.grammars import TokenMasks
from server.engine.sampling.sampler import NO_TOKEN, Sampler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import MIN_LOGPROB, SMALLEST_TEMPERATURE, SamplingParams
from tests.support.engine.sequences import make_sequence
from tests.support.presence import present

VOCABULARY = 12
EOS = 3
LARGEST = torch.finfo(torch.float32).max
INT64 = 2**63
TINY = (0.0, 5e-324, 1e-60, 1e-46, 1e-45, 1e-40, 1e-39, SMALLEST_TEMPERATURE / 2)


def seq_of(prompt: list[int], new: list[int], num_members: int = 1, **params: Any) -> Sequence:
    seq = make_sequence("s", prompt, SamplingParams(**params), others=(None,) * (num_members - 1))
    seq.token_ids += new
    return seq


class Masks(TokenMasks):
    """A fake of grammar masks: the matcher is the list of the allowed tokens."""

    def allowed(self, matchers: SequenceOf[Any], vocab_size: int, device: torch.device) -> torch.Tensor:
        masks = torch.zeros(len(matchers), vocab_size, dtype=torch.bool, device=device)
        for row, matcher in enumerate(matchers):
            masks[row, matcher.tokens] = True
        return masks


token_ids = st.integers(0, VOCABULARY - 1)
values = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([0.0, -0.0, 1e30, -1e30, 3e37, -3e37, LARGEST, -LARGEST, 1e-45, -math.inf]),
)
rules_strategy = st.one_of(
    st.just(NO_RULES),
    st.builds(
        TokenRules,
        sequence_bias=st.lists(
            st.tuples(st.lists(token_ids, min_size=1, max_size=2).map(tuple), st.sampled_from([-1e38, -5.0, 1e38])),
            max_size=3,
        ).map(tuple),
        no_repeat_ngram_size=st.integers(0, 2),
        bad_words=st.lists(st.lists(token_ids, min_size=1, max_size=2).map(tuple), max_size=3).map(tuple),
        min_length=st.integers(0, 20),
        forced_bos_token_id=st.none() | token_ids,
        forced_eos_token_ids=st.lists(token_ids, max_size=2).map(tuple),
        suppress_tokens=st.lists(token_ids, max_size=VOCABULARY).map(tuple),
        begin_suppress_tokens=st.lists(token_ids, max_size=VOCABULARY).map(tuple),
    ),
)
logits_strategy = st.lists(values, min_size=VOCABULARY, max_size=VOCABULARY).filter(
    lambda row: any(math.isfinite(value) for value in row)
)
params_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([*TINY, SMALLEST_TEMPERATURE, 1e-30, 1e-9, 1.0, 2.0, 1e38, 1e300, math.inf]),
        "top_k": st.sampled_from([0, 1, 2, VOCABULARY, 10**6, INT64 - 1]),
        "top_p": st.sampled_from([0.0, 5e-324, 1e-46, 1e-12, 0.5, 1.0 - 1e-9, 1.0]),
        "min_p": st.sampled_from([0.0, 5e-324, 1e-46, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1e-30, 0.01, 1.0, 100.0, 1e30]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
        "frequency_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
        "logit_bias": st.dictionaries(token_ids, st.sampled_from([-100.0, 100.0, -1e38, 1e38]), max_size=VOCABULARY),
        "min_tokens": st.sampled_from([0, 3, 10**9]),
        "stop_token_ids": st.lists(token_ids, max_size=VOCABULARY, unique=True).map(tuple),
        "ignore_eos": st.booleans(),
        "seed": st.sampled_from([None, 0, -1, INT64 - 1, -INT64]),
        "logprobs": st.sampled_from([None, 0, 20]),
    }
)


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(
    rows=st.lists(
        st.tuples(
            logits_strategy,
            params_strategy,
            st.lists(token_ids, min_size=1, max_size=5),
            st.lists(token_ids, max_size=9) | st.just([1] * 3000),
            st.none() | st.lists(token_ids, max_size=4, unique=True),
        ),
        min_size=1,
        max_size=4,
    ),
    is_ensemble=st.booleans(),
    rules=rules_strategy,
)
def test_the_chosen_token_is_always_possible(
    rows: list[tuple[Any, ...]], is_ensemble: bool, rules: TokenRules
) -> None:
    sampler = Sampler((EOS, VOCABULARY + 5), rules)
    sampler._masks = Masks()
    logits = torch.tensor([row[0] for row in rows])
    seqs = []
    for _, params, prompt, new, allowed in rows:
        seq = seq_of(prompt, new, len(rows) if is_ensemble else 1, **params)
        if allowed is not None:
            seq.matcher, seq.adjusts_logits = mock.Mock(tokens=allowed), True
        seqs.append(seq)
    if is_ensemble:
        logits, members = merge_ensembles(logits, seqs[0].members)
        seqs = [*members]
    tokens, logprobs = sampler.choose(logits, seqs)
    for row, (token, seq) in enumerate(zip(tokens, seqs, strict=True)):
        possible = {index for index, value in enumerate(logits[row].tolist()) if math.isfinite(value)}
        if seq.matcher is not None:
            possible &= set(vars(seq.matcher)["tokens"])
        if not possible:
            assert token == NO_TOKEN
            continue
        assert token in possible
        ends = set(seq.request.params.stop_token_ids) | (set() if seq.request.params.ignore_eos else {EOS})
        if seq.num_new_tokens < seq.request.params.min_tokens and possible - ends:
            assert token not in ends
        if seq.request.params.logprobs is not None:
            entry = present(logprobs[row])
            assert MIN_LOGPROB <= entry.logprob <= 0.0
            assert all(MIN_LOGPROB <= value <= 0.0 for _, value in entry.top)


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"repetition_penalty": 1.5}, {"min_p": 0.1, "logprobs": 1}])
def test_a_temperature_below_float32_is_greedy(temperature: float, more: dict[str, Any]) -> None:
    logits = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    rows = [seq_of([1], [2], temperature=temperature, seed=1, **more) for _ in logits]
    greedy = [seq_of([1], [2], temperature=0.0, **more) for _ in logits]
    assert Sampler().choose(logits, rows)[0] == Sampler().choose(logits, greedy)[0]


@pytest.mark.parametrize("temperature", [SMALLEST_TEMPERATURE, 1e-30, 1e-9, 1e-4])
def test_a_small_temperature_draws_among_equal_logits_only(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, -3.0]]).expand(200, -1)
    tokens = Sampler().choose(logits, [seq_of([1], [], temperature=temperature, seed=index) for index in range(200)])
    assert set(tokens[0]) == {1, 2}


def test_a_penalty_beyond_float32_does_not_force_or_exclude_a_token() -> None:
    logits = torch.tensor([[3e38, 2e38, -3e38]])
    boosted = seq_of([1], [], temperature=0.0, repetition_penalty=0.01, logprobs=1)
    assert Sampler().choose(logits, [boosted])[0] == [1]
    all_seen = seq_of([0, 1, 2], [], temperature=0.0, repetition_penalty=100.0)
    assert Sampler().choose(-logits.abs(), [all_seen])[0] == [0]


def test_top_p_of_one_keeps_every_token() -> None:
    """Most cumulative sums in float32 reach 1 before the end."""
    logits = torch.full((1, 200_000), -1.0)
    seq = seq_of([1], [], top_p=1.0, min_p=1e-9)
    seq.rng = mock.Mock(random=lambda: 1.0 - 2.0**-25)
    assert Sampler().choose(logits, [seq])[0][0] >= 199_000


def test_every_64_bit_seed_has_its_own_numbers() -> None:
    seeds = [0, 1, -1, 2, -2, INT64 - 1, -(INT64 - 1), -INT64]
    assert len({seq_of([1], [], seed=seed).rng.random() for seed in seeds}) == len(seeds)
    assert seq_of([1], [], seed=7).rng.random() == seq_of([1], [], seed=7).rng.random()


def test_a_request_takes_precedence_over_the_checkpoint() -> None:
    sampler = Sampler((EOS,), TokenRules(suppress_tokens=(4, 5), forced_bos_token_id=2))
    sampler._masks = Masks()
    logits = torch.randn(1, VOCABULARY)
    for allowed in ([4], [4, 5], [6]):
        seq = seq_of([1], [], temperature=0.0)
        seq.matcher, seq.adjusts_logits = mock.Mock(tokens=allowed), True
        assert sampler.choose(logits, [seq])[0][0] in allowed
    free = seq_of([1, 1], [], temperature=0.0, logit_bias={4: 100.0, 6: 50.0})
    assert sampler.choose(logits, [free])[0] == [6]


def test_end_tokens_are_not_excluded_if_nothing_else_is_possible() -> None:
    every = seq_of([1], [], temperature=0.0, min_tokens=5, stop_token_ids=tuple(range(VOCABULARY)))
    logits = torch.randn(1, VOCABULARY)
    assert Sampler((EOS,)).choose(logits, [every])[0] == [int(logits.argmax())]
