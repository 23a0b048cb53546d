from __future__ import annotations

from typing import Any

import pytest
import torch

from server.engine.sampling.sampler import NOT_FINITE, Sampler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import SamplingParams
from tests.support.engine.sequences import make_sequence


def seq(**params: Any) -> Sequence:
    return make_sequence("s", [0], SamplingParams(**params))


def frequencies(logits: list[float], draws: int = 4000, **params: Any) -> torch.Tensor:
    rows = [seq(seed=index, **params) for index in range(draws)]
    tokens = Sampler().choose(torch.tensor([logits]).expand(draws, -1), rows)[0]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / draws


def test_greedy_takes_the_first_maximum() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]], dtype=torch.bfloat16)
    assert Sampler().choose(logits, [seq(temperature=0.0)] * 2)[0] == [1, 0]


def test_random_choice_follows_the_probabilities() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    want = torch.softmax(torch.tensor(logits), -1)
    assert torch.allclose(frequencies(logits), want, atol=0.03)


def test_temperature_flattens_and_sharpens() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    want = torch.softmax(torch.tensor(logits) / 2.0, -1)
    assert torch.allclose(frequencies(logits, temperature=2.0), want, atol=0.03)
    assert frequencies(logits, draws=50, temperature=1e-30)[2] == 1.0


def test_top_k_and_top_p_exclude_the_other_tokens() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]  # probabilities 0.087, 0.237, 0.644, 0.032
    assert frequencies(logits, top_k=2)[[0, 3]].sum() == 0
    assert frequencies(logits, top_p=0.65)[[0, 3]].sum() == 0
    assert frequencies(logits, top_p=0.65)[1] > 0.2  # the token that crosses the threshold is kept
    assert frequencies(logits, top_p=0.01)[2] == 1.0
    assert frequencies(logits, top_k=2, top_p=0.7)[2] == 1.0  # after top-k, token 2 has 0.731


def test_top_k_larger_than_the_vocabulary_keeps_all() -> None:
    assert torch.allclose(frequencies([0.0, 1.0], top_k=99), torch.softmax(torch.tensor([0.0, 1.0]), -1), atol=0.03)


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
def test_the_tokens_of_a_seed_do_not_depend_on_the_batch(params: dict[str, object]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 50)

    def tokens(neighbours: list[Sequence], row: int) -> list[int]:
        mine = seq(seed=7, **params)
        rows = [*neighbours[:row], mine, *neighbours[row:]]
        steps = [
            torch.cat([logits[5:6] if i == row else logits[i : i + 1] for i in range(len(rows))]) for _ in range(6)
        ]
        return [Sampler().choose(step, rows)[0][row] for step in steps]

    alone = tokens([], 0)
    assert len(set(alone)) > 1
    others = [seq(), seq(top_k=3), seq(temperature=0.0), seq(top_p=0.5), seq(seed=7)]
    assert tokens(others, 2) == alone


def test_rows_that_are_not_finite_are_reported_and_others_are_not_affected() -> None:
    logits = torch.zeros(3, 4)
    logits[:, 2] = 1.0
    logits[0, 0] = float("nan")
    logits[1, 1] = float("inf")
    assert Sampler().choose(logits, [seq(temperature=0.0), seq(top_k=1), seq(top_k=1)])[0] == [
        NOT_FINITE,
        NOT_FINITE,
        2,
    ]


def test_minus_infinity_is_never_drawn() -> None:
    assert frequencies([0.0, float("-inf"), 0.0])[1] == 0
