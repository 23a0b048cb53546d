"""Top-k, top-p and min-p without sorting the vocabulary, against the sort."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sampling import slices, truncation
from server.engine.sampling.sampler import Sampler
from server.engine.sampling.truncation import CANDIDATES, NOT_COVERED, draw_truncated, num_candidates, truncates
from server.engine.scheduling.sequence import Sequence
from server.engine.types import SMALLEST_TEMPERATURE, SamplingParams
from tests.support.engine.full_sort import draw_by_sorting, excluded
from tests.support.engine.sequences import make_sequence

VOCABULARY = 40
FEW = (4, 12)
SLACK = 1e-6
"""Tolerance of top-p, min-p and draws, because sums are rounded."""


@st.composite
def logits_strategy(draw: st.DrawFn, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Logits [vocabulary]: flat or peaked, equal or not, some of them -inf."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(vocabulary, generator=random) * draw(st.sampled_from([0.0, 0.3, 2.0, 8.0, 1e30]))
    rounding = draw(st.sampled_from(["none", "bfloat16", "integer"]))
    if rounding == "bfloat16":
        logits = logits.bfloat16().float()
    elif rounding == "integer":
        logits = logits.round()
    impossible = torch.randperm(vocabulary, generator=random)[: draw(st.sampled_from([0, 1, vocabulary - 1]))]
    logits[impossible] = -math.inf
    return logits


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([SMALLEST_TEMPERATURE, 1e-3, 0.7, 1.0, 5.0, 1e38]),
    top_k=st.one_of(st.just(0), st.integers(1, VOCABULARY + 1), st.just(2**63 - 1)),
    top_p=st.one_of(st.just(1.0), st.sampled_from([0.0, 1e-46, 0.5, 0.9, 1.0 - 1e-9]), st.floats(0.0, 1.0)),
    min_p=st.one_of(st.just(0.0), st.sampled_from([1e-46, 0.5, 1.0]), st.floats(0.0, 1.0)),
).filter(truncates)
draws_strategy = st.floats(0.0, 1.0, exclude_max=True) | st.sampled_from([0.0, 0.5, 1.0 - 2.0**-24, 1.0 - 2.0**-53])


def make_seq(params: SamplingParams, draw: float) -> Sequence:
    seq = make_sequence("s", [1], params)
    seq.rng = mock.Mock(random=lambda: draw)
    return seq


def allowed(logits: torch.Tensor, params: SamplingParams, draw: float) -> set[int]:
    """The tokens that are kept for about these parameters, and whose share includes about this draw."""
    scores = (logits - logits.max()) / torch.tensor(params.temperature)
    probs, order = torch.softmax(scores, -1).sort(descending=True, stable=True)
    tokens = {int(order[0])} if draw + SLACK >= 1.0 else set()
    for share in (-SLACK, 0.0, SLACK):
        for likely in (-SLACK, 0.0, SLACK):
            top_p = params.top_p if params.top_p >= 1.0 else params.top_p + share
            near = SamplingParams(top_k=params.top_k, top_p=top_p, min_p=params.min_p * (1.0 + likely))
            kept = probs.double().masked_fill(excluded(probs[None], [near])[0], 0.0)
            kept /= kept.sum()
            ends = kept.cumsum(-1)
            matches = (kept > 0) & (ends - kept - SLACK <= draw) & (draw <= ends + SLACK)
            tokens |= set(order[matches].tolist())
    return tokens


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(st.tuples(logits_strategy(), params_strategy, draws_strategy), min_size=1, max_size=6),
    candidates=st.sampled_from([FEW, (2, 3), CANDIDATES]),
    slice_rows=st.sampled_from([1, 2, 5, 99]),
)
def test_tokens_equal_those_of_the_sort(
    rows: list[tuple[torch.Tensor, SamplingParams, float]], candidates: tuple[int, ...], slice_rows: int
) -> None:
    logits = torch.stack([row[0] for row in rows])
    seqs = [make_seq(params, draw) for _, params, draw in rows]
    with (
        mock.patch.object(truncation, "CANDIDATES", candidates),
        mock.patch.object(slices, "SLICE_BYTES", slice_rows * 4 * VOCABULARY),
    ):
        tokens, _ = Sampler().choose(logits, seqs)
    for token, (own, params, draw) in zip(tokens, rows, strict=True):
        if token != int(draw_by_sorting(own[None], [params], [draw])[0]):
            assert token in allowed(own, params, draw)


@settings(deadline=None, max_examples=100)
@given(
    logits=logits_strategy(),
    params=params_strategy,
    draws=st.lists(draws_strategy, min_size=8, max_size=8),
    count=st.integers(2, VOCABULARY - 1),
)
def test_candidates_give_the_tokens_of_the_whole_vocabulary(
    logits: torch.Tensor, params: SamplingParams, draws: list[float], count: int
) -> None:
    """Exactly the same, and they always suffice for a top-k below their number."""
    if 0 < params.top_k < VOCABULARY:
        params = SamplingParams(
            temperature=params.temperature, top_k=min(params.top_k, count - 1), top_p=params.top_p, min_p=params.min_p
        )
    scores = (logits - logits.max()) / torch.tensor(params.temperature)
    probs = torch.softmax(scores, -1).expand(8, -1).contiguous()
    numbers = torch.tensor(draws)
    whole = draw_truncated(probs, [params] * 8, numbers, VOCABULARY)
    some = draw_truncated(probs, [params] * 8, numbers, count)
    assert (whole >= 0).all()
    if 0 < params.top_k < VOCABULARY:
        assert (some != NOT_COVERED).all()
    assert ((some == whole) | (some == NOT_COVERED)).all()


@pytest.mark.parametrize(("scale", "is_covered"), [(0.0, False), (1.0, False), (8.0, True)])
@pytest.mark.parametrize("params", [{"top_p": 0.95}, {"min_p": 0.02}, {"top_p": 0.99, "min_p": 0.01}])
def test_candidates_suffice_unless_the_distribution_is_flat(
    params: dict[str, Any], scale: float, is_covered: bool
) -> None:
    logits = torch.randn(64, 20_000, generator=torch.Generator().manual_seed(3)) * scale
    every = [SamplingParams(**params)] * len(logits)
    probs = torch.softmax(logits, -1)
    kept = (~excluded(probs.sort(descending=True).values, every)).sum(-1)
    assert ((kept < CANDIDATES[-1]) == is_covered).all()
    tokens = draw_truncated(probs, every, torch.rand(64), CANDIDATES[-1])
    assert ((tokens != NOT_COVERED) == is_covered).all()


def test_equal_logits_are_kept_in_the_order_of_their_ids() -> None:
    """Of bfloat16 logits many are equal, also at the boundaries of top-k and of the candidates."""
    logits = torch.zeros(1, 5000, dtype=torch.bfloat16)
    logits[0, 4000:] = 1.0
    for top_k in (1, 50, 127, 128, 1000, 1023):
        tokens = set()
        for index in range(400):
            seq = make_seq(SamplingParams(top_k=top_k), (index + 0.5) / 400)
            tokens |= set(Sampler().choose(logits, [seq])[0])
        want = [*range(4000, 5000), *range(4000)][:top_k]
        assert tokens <= set(want)
        assert len(tokens) == min(top_k, 400)


@pytest.mark.parametrize("params", [{"top_p": 0.0}, {"min_p": 1.0}, {"min_p": 1.5}, {"top_k": 1}])
@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_the_most_likely_token_is_always_kept(params: dict[str, Any], vocabulary: int) -> None:
    logits = torch.linspace(0, 5, vocabulary)[None]
    assert Sampler().choose(logits, [make_seq(SamplingParams(**params), 0.99)])[0] == [vocabulary - 1]


def test_a_top_p_of_one_keeps_tokens_after_a_sum_that_is_rounded_up() -> None:
    probs = torch.full((1, 5000), 2.0**-30)
    probs[0, 7] = 1.0
    params = [SamplingParams(top_p=1.0, min_p=1e-12)]
    assert draw_truncated(probs, params, torch.tensor([1.0 - 2.0**-24]), 5000)[0] > 4000


def test_the_vocabulary_is_not_sorted_if_candidates_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "sort", lambda *_, **__: pytest.fail("sorted"))
    logits = torch.randn(3, 20_000) * 8
    seqs = [make_seq(SamplingParams(**params), 0.3) for params in ({"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1})]
    assert min(Sampler().choose(logits, seqs)[0]) >= 0


@pytest.mark.parametrize(
    ("params", "is_flat", "want"),
    [
        ({"top_k": 50}, True, 128),
        ({"top_k": 127}, False, 128),
        ({"top_k": 128}, False, 1024),
        ({"top_k": 1023}, True, 1024),
        ({"top_k": 1024}, False, 9000),
        ({"top_k": 9000}, False, 1024),
        ({"top_p": 0.9}, False, 1024),
        ({"top_p": 0.9}, True, 9000),
        ({"min_p": 0.1, "top_k": 10**9}, True, 9000),
    ],
)
def test_the_number_of_candidates_follows_from_the_parameters(
    params: dict[str, Any], is_flat: bool, want: int
) -> None:
    assert num_candidates(SamplingParams(**params), 9000, is_flat=is_flat) == want
    assert num_candidates(SamplingParams(**params), 100, is_flat=is_flat) <= 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_result_depends_on_the_slices(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 3000) * 4
    every: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"top_k": 9},
        {"top_k": 500, "min_p": 0.01, "repetition_penalty": 1.3},
        {"top_p": 0.999, "temperature": 3.0, "frequency_penalty": 0.5, "logit_bias": {5: 3.0}},
    ]

    def choose() -> Any:
        seqs = [
            make_sequence("s", [1, 2, 3], SamplingParams(seed=seed, logprobs=seed % 3 or None, **params))
            for seed, params in enumerate(every * 2)
        ]
        return Sampler((4,)).choose(logits.to(dtype), seqs)

    want = choose()
    for rows in (1, 2, 5):
        monkeypatch.setattr(slices, "SLICE_BYTES", rows * 4 * 3000)
        assert choose() == want
