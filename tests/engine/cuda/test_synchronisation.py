"""In a decode step only the copy of the tokens waits for the device.

The tests need no GPU. A model that does not wait runs in a mode where operations that return a number to Python fail,
and on the device "meta", where tensors have no content and cannot be combined with the host's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from server.engine.attention.backend import ATTENTION, set_attention
from server.engine.generation_defaults import TokenRules
from server.engine.sampling.sampler import FLAT_TOKENS, Sampler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import SamplingParams
from tests.support.engine.fake_cuda import waits
from tests.support.engine.families import FAMILIES
from tests.support.engine.harness import CONFIGS, MORE_CONFIGS, VOCABULARY
from tests.support.engine.sequences import make_sequence
from tests.support.presence import present

EVERY = CONFIGS | MORE_CONFIGS | FAMILIES
META = torch.device("meta")


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        assert not waits(function, arguments), function
        return function(*arguments, **(named or {}))


@pytest.fixture
def attention() -> Iterator[str]:
    """``ATTENTION`` that returns its queries, and checks that transformers makes no mask for it."""

    def attend(
        _module: object, query: torch.Tensor, _key: object, _value: object, mask: object, **_: object
    ) -> tuple[torch.Tensor, None]:
        assert mask is None
        return query.transpose(1, 2).contiguous(), None

    set_attention(attend)
    yield ATTENTION
    set_attention(None)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_computes_decodes_without_waiting(name: str, device: str, attention: str) -> None:
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16  # as GPUs serve it
        model = AutoModelForCausalLM.from_config(EVERY[name](), dtype=dtype).eval()
        model.set_attn_implementation(attention)
        ids, positions = torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long)
    with torch.inference_mode(), NoWaiting():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert logits.shape == (1, 6, VOCABULARY)


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {},
    "cut": {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "biased": {"logit_bias": {3: 2.0, 5: -1.0}, "min_tokens": 4},
}


def make_seqs(names: list[str], **params: Any) -> list[Sequence]:
    return [
        make_sequence(str(index), [1, 2, 3], SamplingParams(max_tokens=9, **PARAMS[name], **params))
        for index, name in enumerate(names)
    ]


def tokens_of(sampler: Sampler, logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    return sampler._tokens(logits, sampler._rows(logits, seqs))


@pytest.mark.parametrize("names", [[name] for name in PARAMS] + [list(PARAMS) * 2])
def test_tokens_are_chosen_without_waiting(names: list[str]) -> None:
    sampler = Sampler((0,))
    for vocabulary in (VOCABULARY, 3000):  # the second one is larger than the number of candidates
        tokens = tokens_of(sampler, torch.zeros(len(names), vocabulary, device=META), make_seqs(names))
        assert (tokens.device, tokens.shape) == (META, (len(names),))
        with NoWaiting():
            tokens_of(sampler, torch.randn(len(names), vocabulary), make_seqs(names))


def test_the_checkpoints_rules_are_applied_without_waiting() -> None:
    rules = TokenRules(
        sequence_bias=(((3,), 1.0), ((2, 3, 4), -1.0)),
        no_repeat_ngram_size=2,
        bad_words=((5,), (3, 6)),
        min_length=9,
        forced_eos_token_ids=(1,),
        suppress_tokens=(7,),
        begin_suppress_tokens=(8,),
    )
    seqs = [*make_seqs(list(PARAMS)), make_sequence("last", [1], SamplingParams(max_tokens=1))]
    sampler = Sampler((0,), rules)
    assert tokens_of(sampler, torch.zeros(len(seqs), VOCABULARY, device=META), seqs).device == META
    with NoWaiting():
        tokens = tokens_of(sampler, torch.randn(len(seqs), VOCABULARY), seqs)
    assert tokens[-1] == 1


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the tensors that are copied to the host."""
    shapes = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        shapes.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    return shapes


def test_tokens_and_logprobs_are_copied_once(copies: list[torch.Size]) -> None:
    seqs = make_seqs(list(PARAMS), logprobs=3)
    with NoWaiting():
        tokens, logprobs = Sampler((0,)).choose(torch.randn(len(seqs), VOCABULARY), seqs)
    assert len(copies) == 1
    assert len(tokens) == len(logprobs) == len(seqs)
    assert all(len(present(entry).top) == 3 for entry in logprobs)


def test_rows_that_keep_more_tokens_than_candidates_take_a_second_copy(copies: list[torch.Size]) -> None:
    """Once for all such rows; their sequences then sort for some tokens, and try candidates again."""
    flat, peaked = torch.zeros(3000), torch.arange(3000.0)
    logits = torch.stack([flat, peaked, flat, flat])
    every: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 1000, "top_p": 0.9}]
    params = [SamplingParams(max_tokens=99, seed=7, logprobs=1, **own) for own in every]
    seqs = [make_sequence(str(index), [1], own) for index, own in enumerate(params)]
    counts = []
    for _ in range(FLAT_TOKENS + 2):
        with NoWaiting():
            tokens, logprobs = Sampler().choose(logits, seqs)
        assert tokens[1] == 2999
        assert min(tokens) >= 0
        assert [present(entry).logprob for entry in logprobs] == pytest.approx(
            torch.log_softmax(logits, -1)[range(4), tokens]
        )
        for seq, token in zip(seqs, tokens, strict=True):
            seq.token_ids.append(token)
        counts.append(len(copies))
        copies.clear()
    assert counts == [2, *[1] * FLAT_TOKENS, 2]
