"""The parameters that change logits, against transformers' processors and brute-force computations."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.sampling.logprobs import logprobs_of
from server.engine.sampling.sampler import NOT_FINITE, Sampler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import MIN_LOGPROB, SamplingParams
from tests.support.engine.sequences import make_sequence

VOCABULARY = 24
EOS = 3
MAKE = Sampler((EOS,))


def make_seq(prompt: list[int], new: list[int], **params: Any) -> Sequence:
    seq = make_sequence("s", prompt, SamplingParams(**params))
    seq.token_ids += new
    return seq


def distribution(logits: torch.Tensor, seq: Sequence, draws: int = 400) -> torch.Tensor:
    """The frequency of each token in ``choose`` over evenly spaced draws, exact to one part in ``draws``."""

    class Even(random.Random):
        def __init__(self) -> None:
            super().__init__()
            self.next = 0

        def random(self) -> float:
            self.next += 1
            return (self.next - 0.5) / draws

    seq.rng = Even()
    tokens = MAKE.choose(logits.expand(draws, -1), [seq] * draws)[0]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / draws


params_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.8]),
        "top_k": st.sampled_from([0, 1, 3, 10, 99]),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 3.0]),
    }
)
texts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    params=params_strategy,
    prompt=texts,
    new=st.lists(st.integers(0, VOCABULARY - 1), max_size=8),
    seed=st.integers(0, 9),
)
def test_the_order_equals_transformers(
    params: dict[str, float], prompt: list[int], new: list[int], seed: int
) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    chain = LogitsProcessorList()
    if params["repetition_penalty"] != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    chain.append(TemperatureLogitsWarper(params["temperature"]))
    if params["top_k"]:
        chain.append(TopKLogitsWarper(int(params["top_k"])))
    if params["top_p"] < 1.0:
        chain.append(TopPLogitsWarper(params["top_p"]))
    if params["min_p"]:
        chain.append(MinPLogitsWarper(params["min_p"]))
    want = torch.softmax(chain(torch.LongTensor([prompt + new]), logits.clone()), -1)[0]
    got = distribution(logits, make_seq(prompt, new, **params))
    assert torch.allclose(got, want, atol=1 / 400 + 1e-6)
    assert (got[want == 0] == 0).all()


@settings(deadline=None, max_examples=60)
@given(
    prompt=texts,
    new=st.lists(st.integers(0, VOCABULARY - 1), max_size=8),
    presence=st.sampled_from([-2.0, 0.0, 0.7]),
    frequency=st.sampled_from([-0.4, 0.0, 1.1]),
    repetition=st.sampled_from([0.8, 1.0, 1.5]),
    bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100, width=32), max_size=4),
    min_tokens=st.integers(0, 9),
    stop=st.lists(st.integers(0, VOCABULARY - 1), max_size=2),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 9),
)
def test_adjusted_logits_equal_a_brute_force_computation(
    prompt: list[int],
    new: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
    min_tokens: int,
    stop: list[int],
    ignore_eos: bool,
    seed: int,
) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    seq = make_seq(
        prompt,
        new,
        temperature=0.0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
        min_tokens=min_tokens,
        stop_token_ids=tuple(stop),
        ignore_eos=ignore_eos,
    )
    want = []
    for token, score in enumerate(logits[0].tolist()):
        if token in prompt + new:
            score = score * repetition if score < 0 else score / repetition
        score -= frequency * new.count(token) + presence * (token in new)
        score += bias.get(token, 0.0)
        if len(new) < min_tokens and (token in stop or (token == EOS and not ignore_eos)):
            score = -math.inf
        want.append(score)
    neighbour = make_seq([1, 1], [2], temperature=0.0, repetition_penalty=2.0)
    got = MAKE._adjust(torch.cat([logits, logits]), [neighbour, seq], {})[1]
    assert torch.allclose(got, torch.tensor(want), atol=1e-4)
    greedy = make_seq([5], [], temperature=0.0)
    tokens = MAKE.choose(logits.expand(3, -1), [greedy, seq, neighbour])[0]
    assert got[tokens[1]] == got.max()
    assert tokens[0] == logits.argmax()


def test_virtual_tokens_are_never_counted() -> None:
    seq = make_seq([1], [], repetition_penalty=2.0, presence_penalty=1.0)
    seq.num_virtual_tokens = 20
    scores = MAKE._adjust(torch.ones(1, 4), [seq], {})
    assert scores.tolist() == [[1.0, 0.5, 1.0, 1.0]]


@pytest.mark.parametrize("params", [{"min_p": 0.1}, {"repetition_penalty": 1.2}, {"logit_bias": {4: 1.0}}])
def test_the_tokens_of_a_seed_do_not_depend_on_the_batch(params: dict[str, object]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCABULARY)

    def tokens(beside: list[Sequence], row: int) -> list[int]:
        mine = make_seq([1, 2, 3], [], seed=7, **params)
        rows = [*beside[:row], mine, *beside[row:]]
        result = []
        for _ in range(6):
            step = torch.stack([logits[3] if index == row else logits[index] for index in range(len(rows))])
            result.append(MAKE.choose(step, rows)[0][row])
            mine.token_ids.append(result[-1])
        return result

    others = [
        make_seq([5], [], presence_penalty=1.0),
        make_seq([6], [], temperature=0.0),
        make_seq([6], [], min_p=0.5),
    ]
    alone = tokens([], 0)
    assert len(set(alone)) > 1
    assert tokens(others, 2) == tokens(others, 0) == alone


def test_plain_rows_need_an_argmax_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Sampler._adjust", "_drawn", "packed_logprobs"):
        monkeypatch.setattr(
            f"server.engine.sampling.sampler.{name}", lambda *_: pytest.fail("a greedy row needs none")
        )
    rows = [make_seq([1], [], temperature=0.0)] * 3
    logits = torch.randn(3, VOCABULARY)
    assert MAKE.choose(logits, rows) == (logits.argmax(-1).tolist(), [])
    assert MAKE.choose(logits, rows)[0] == logits.argmax(-1).tolist()


def test_logprobs_are_returned_if_requested_and_there_is_a_token() -> None:
    logits = torch.randn(4, VOCABULARY)
    logits[2, 1] = math.nan
    rows = [make_seq([1], [], temperature=0.0, logprobs=count) for count in (2, None, 1, 0)]
    tokens, entries = MAKE.choose(logits, rows)
    best = logits.argmax(-1).tolist()
    assert tokens == [best[0], best[1], NOT_FINITE, best[3]]
    assert entries == [*logprobs_of(logits[:1], best[:1], [2]), None, None, *logprobs_of(logits[3:], best[3:], [0])]


@settings(deadline=None)
@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 2.0, 2.0000002]), min_size=VOCABULARY, max_size=VOCABULARY),
    token=st.integers(0, VOCABULARY - 1),
    num_top=st.integers(0, VOCABULARY + 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_top_token_is_the_argmax_with_the_same_float(
    values: list[float], token: int, num_top: int, dtype: torch.dtype
) -> None:
    logits = torch.tensor([values], dtype=dtype)
    (entry,) = logprobs_of(logits, [token], [num_top])
    assert len(entry.top) == min(num_top, VOCABULARY)
    assert len({other for other, _ in entry.top}) == len(entry.top)
    logprobs = torch.log_softmax(logits.float(), -1)[0]
    assert entry.logprob == logprobs[token].item()
    assert all(value == logprobs[other].item() for other, value in entry.top)
    if entry.top:
        assert entry.top[0] == (logits.argmax().item(), logprobs.max().item())
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)


def test_impossible_tokens_have_a_finite_logprob() -> None:
    (entry,) = logprobs_of(torch.tensor([[0.0, -math.inf]]), [1], [2])
    assert entry.logprob == MIN_LOGPROB
    assert entry.top == [(0, 0.0), (1, MIN_LOGPROB)]
