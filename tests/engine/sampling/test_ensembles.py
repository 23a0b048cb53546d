"""Ensembles: each token is the argmax of the mean of the distributions of PEFT's models."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.llm_engine import LLMEngine
from server.engine.sampling.ensembles import merge_ensembles
from server.engine.scheduling.sequence import Sequence
from server.engine.types import ErrorCode, FinishReason, GenerateRequest, Member, SamplingParams, SoftPromptSource
from tests.support.engine.harness import (
    CONFIGS,
    Family,
    add,
    check_logprobs,
    failure_of,
    greedy,
    random_text,
    run,
    tokens,
)
from tests.support.engine.sequences import make_sequence
from tests.support.presence import present

pytestmark = pytest.mark.slow

MAX_TOKENS = 10
TEXT = random_text(random.Random(8), 24, 24)
MEMBERS: dict[str, tuple[str | None, ...]] = {
    "embeddings": ("prompt_tuning_20", "p_tuning_7", "prompt_tuning_8"),
    "mixed": ("prefix_13", None, "p_tuning_7"),
    "key_values": ("prefix_projected_16", "prefix_13"),
}
Ensembles = dict[str, tuple[tuple[str | None, ...], list[int], list[int], torch.Tensor]]
"""Ensembles with their answers: id -> (members, text, tokens, logprobs)."""
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "small_blocks": {"block_size": 4, "max_num_batched_tokens": 13, "max_num_seqs": 7},
    "few_blocks": {"block_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 12, "kv_cache_memory": 160_000},
    "no_prefix_cache": {"enable_prefix_caching": False},
}


def expected(family: Family, members: tuple[str | None, ...], text: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the logarithms [tokens, vocabulary] of the mean distributions."""
    new: list[int] = []
    rows: list[torch.Tensor] = []
    while len(new) < MAX_TOKENS:
        every = [family.expected_logprobs(member, [*text, *new, 0])[-1] for member in members]
        rows.append(torch.stack(every).exp().mean(dim=0).log())
        new.append(int(rows[-1].argmax()))
    return new, torch.stack(rows)


@pytest.fixture(scope="module")
def wanted(make_family: Callable[[str], Family]) -> Callable[[str], Ensembles]:
    """Ensembles of a family with their answers."""
    made: dict[str, Ensembles] = {}

    def make(name: str) -> Ensembles:
        if name not in made:
            rng, family = random.Random(name), make_family(name)
            made[name] = {
                f"{key}{index}": (members, text, *expected(family, members, text))
                for key, members in MEMBERS.items()
                for index in range(2)
                for text in [TEXT[: 17 * index] + random_text(rng, 1, 30)]
            }
        return made[name]

    return make


def sources(family: Family, members: tuple[str | None, ...]) -> dict[str, Any]:
    """The fields of a GenerateRequest that name members."""
    first, *others = (family.soft_prompts[member] if member else None for member in members)
    return {"soft_prompt": first, "others": tuple(others)}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_ensemble_equals_the_mean_of_peft(
    name: str,
    settings: str,
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    wanted: Callable[[str], Ensembles],
) -> None:
    family, ensembles = make_family(name), wanted(name)
    engine = make_engine(family, **SETTINGS[settings])
    alone = {key: family.expected(key, TEXT, MAX_TOKENS) for key in ("p_tuning_7", "prefix_13")}
    for key in alone:
        add(engine, key, TEXT, greedy(MAX_TOKENS), soft_prompt=family.soft_prompts[key])
    order = list(ensembles)
    random.Random(settings).shuffle(order)
    for request_id in order:
        members, text, _, _ = ensembles[request_id]
        add(engine, request_id, text, greedy(MAX_TOKENS, logprobs=3), **sources(family, members))
    outputs = run(engine)
    assert {key: tokens(outputs[key]) for key in alone} == alone
    for request_id, (_, _, want, logprobs) in ensembles.items():
        own = outputs[request_id]
        assert tokens(own) == want, request_id
        assert own[-1].finish_reason is FinishReason.LENGTH
        check_logprobs([entry for output in own for entry in present(output.logprobs)], want, logprobs, num_top=3)
    assert set(outputs) == {*ensembles, *alone}
    assert engine.stats.num_used_blocks == 0


def test_an_ensemble_is_preempted_and_resumed_as_one(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    answers = []
    for num_blocks in (200, 45):
        engine = make_engine(llama, block_size=4, max_model_len=100, kv_cache_memory=num_blocks * 2340)
        for name, members in (("e", ("prefix_13", None)), ("f", ("p_tuning_7", "prompt_tuning_8"))):
            add(engine, name, TEXT[:3], greedy(50), **sources(llama, members))
        outputs = run(engine)
        answers.append({name: tokens(own) for name, own in outputs.items()})
        assert (engine.stats.num_preemptions > 0) == (num_blocks == 45)
        assert all(len(own) == 50 for own in answers[-1].values())
    assert answers[0] == answers[1]


def test_the_mean_is_of_probabilities_and_not_of_their_logarithms(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    members = MEMBERS["embeddings"]
    engine = make_engine(llama)
    by_mean, by_logarithms = {}, {}
    for length in range(1, 12):
        text = TEXT[:length]
        every = torch.stack([llama.expected_logprobs(member, [*text, 0])[-1] for member in members])
        by_mean[f"e{length}"] = [int(every.exp().mean(dim=0).argmax())]
        by_logarithms[f"e{length}"] = [int(every.mean(dim=0).argmax())]
        add(engine, f"e{length}", text, greedy(1), **sources(llama, members))
    assert by_mean != by_logarithms, "these texts cannot tell one from the other"
    assert {name: tokens(outputs) for name, outputs in run(engine).items()} == by_mean


def test_an_ensemble_of_one_soft_prompt_twice_equals_the_soft_prompt(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama)
    add(engine, "twice", TEXT, greedy(9), **sources(llama, ("p_tuning_7", "p_tuning_7")))
    assert tokens(run(engine)["twice"]) == llama.expected("p_tuning_7", TEXT, 9)


def test_a_seed_gives_an_ensemble_the_same_tokens_in_every_batch(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.3, top_p=0.95, seed=11)
    alone = make_engine(llama)
    add(alone, "mine", TEXT, params, **sources(llama, MEMBERS["mixed"]))
    want = tokens(run(alone)["mine"])
    crowded = make_engine(llama, block_size=4, max_num_batched_tokens=32, max_num_seqs=8)
    for index, source in enumerate(llama.soft_prompts.values()):
        add(crowded, f"other{index}", TEXT[index:], SamplingParams(max_tokens=20), soft_prompt=source)
    add(crowded, "mine", TEXT, params, **sources(llama, MEMBERS["mixed"]))
    assert tokens(run(crowded)["mine"]) == want
    assert len(set(want)) > 3


def test_parameters_are_applied_to_the_mean(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    members = sources(llama, MEMBERS["embeddings"])
    want, _ = expected(llama, MEMBERS["embeddings"], TEXT)
    stop = want[3]
    add(engine, "stop", TEXT, greedy(MAX_TOKENS, stop_token_ids=(stop,)), **members)
    add(engine, "bias", TEXT, greedy(3, logit_bias={77: 100.0}), **members)
    # Beside the biased token, the probability of all others is 0 in float32.
    add(engine, "forced", TEXT, greedy(2, logit_bias=dict.fromkeys(range(100), -200.0)), **members)
    outputs = run(engine)
    assert tokens(outputs["stop"]) == want[: want.index(stop) + 1]
    assert outputs["stop"][-1].stop_token_id == stop
    assert tokens(outputs["bias"]) == [77, 77, 77]
    assert all(token >= 100 for token in tokens(outputs["forced"]))


def test_a_cached_text_counts_for_every_member(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, block_size=4)
    for name in ("first", "again"):
        add(engine, name, TEXT, greedy(2), **sources(llama, ("prompt_tuning_20", "prompt_tuning_8")))
        (first, *_) = run(engine)[name]
        assert first.num_cached_tokens == (2 * ((len(TEXT) - 1) // 4 * 4) if name == "again" else 0)
    assert engine.stats.prompt_tokens == 4 * len(TEXT)
    assert engine.stats.virtual_tokens == 2 * 28
    assert engine.stats.generation_tokens == 4


def test_abort_and_deadline_in_every_state(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, max_num_seqs=3)
    members = sources(llama, MEMBERS["embeddings"])
    add(engine, "loading", TEXT, greedy(9), **members)
    assert [output.finish_reason for output in engine.abort("loading")] == [FinishReason.ABORT]
    add(engine, "running", TEXT, greedy(9), **members)
    while not engine.scheduler.running:
        engine.step()
    add(engine, "waiting", TEXT, greedy(9), **members)
    add(engine, "late", TEXT, greedy(9), timeout=0.01, **members)
    assert engine.stats.num_running == 3
    assert engine.stats.num_waiting == 2
    time.sleep(0.02)
    late = [output for output in engine.step() if output.request_id == "late"]
    assert [failure_of(output).code for output in late] == [ErrorCode.WAIT_TIMEOUT]
    for name in ("running", "waiting"):
        assert [output.finish_reason for output in engine.abort(name)] == [FinishReason.ABORT]
    assert engine.num_unfinished == 0
    assert engine.stats.num_used_blocks == 0
    assert engine.soft_prompts.stats.resident == 3
    monkeypatch.setattr(engine.soft_prompts, "_budget", 0)
    add(engine, "last", TEXT, greedy(1), **members)
    run(engine)
    assert engine.soft_prompts.stats.resident == 0, "a soft prompt is still referred to"


def test_a_failed_step_ends_an_ensemble_once(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama)
    add(engine, "e", TEXT, greedy(9), **sources(llama, MEMBERS["mixed"]))
    while not engine.scheduler.running:
        engine.step()

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", fail)
        (output,) = engine.step()
    assert output.request_id == "e"
    assert "RuntimeError: broken" in failure_of(output).message
    add(engine, "after", TEXT, greedy(2), **sources(llama, MEMBERS["mixed"]))
    assert len(tokens(run(engine)["after"])) == 2


@pytest.mark.parametrize("num_broken", [1, 2])
def test_a_member_that_cannot_be_read_releases_the_others(
    num_broken: int, llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    engine = make_engine(llama, soft_prompt_host_bytes=0)
    broken = [
        SoftPromptSource(digest=f"b{n}", num_virtual_tokens=4, is_key_values=False, path=str(tmp_path / f"{n}"))
        for n in range(num_broken)
    ]
    others = (llama.soft_prompts["p_tuning_7"], *broken[1:], None)
    add(engine, "e", TEXT, greedy(3), soft_prompt=broken[0], others=others)
    (output,) = run(engine)["e"]
    assert failure_of(output).code is ErrorCode.FAILED
    assert str(tmp_path) in failure_of(output).message or "read" in failure_of(output).message
    while engine.soft_prompts.stats.loads < 1:
        engine.step()
    assert engine.soft_prompts.stats.resident == 0, "the soft prompt beside it is still referred to"


@pytest.mark.parametrize(
    ("settings", "text", "params", "what"),
    [
        ({"max_num_seqs": 2}, TEXT, greedy(2), "an ensemble of 3 is more than the 2 sequences that may run at once"),
        ({}, [1] * 240, greedy(9), "20 virtual tokens, 240 text tokens and 9 new ones are more than the 256"),
        ({"kv_cache_memory": 200_000}, [1] * 200, greedy(9), "the 3 sequences of the ensemble need 46 key/value"),
        ({}, TEXT, greedy(2, prompt_logprobs=0), "score no text"),
        ({}, TEXT, greedy(1, classify=True), "score no text"),
    ],
    ids=["places", "context", "blocks", "prompt logprobs", "classify"],
)
def test_unsupported_parameters_of_an_ensemble_are_refused(
    settings: dict[str, object],
    text: list[int],
    params: SamplingParams,
    what: str,
    llama: Family,
    make_engine: Callable[..., LLMEngine],
) -> None:
    engine = make_engine(llama, **settings)
    first, *others = (Member(soft_prompt=llama.soft_prompts[name]) for name in MEMBERS["embeddings"] if name)
    request = GenerateRequest(
        request_id="e", prompt_token_ids=text, params=params, soft_prompt=first.soft_prompt, others=tuple(others)
    )
    (output,) = engine.add(request)
    assert failure_of(output).code is ErrorCode.REFUSED
    assert what in failure_of(output).message
    assert (engine.num_unfinished, engine.soft_prompts.stats.hits + engine.soft_prompts.stats.misses) == (0, 0)


def make_members(count: int) -> tuple[Sequence, ...]:
    return make_sequence("e", [1], SamplingParams(), others=(None,) * (count - 1)).members


def test_rows_of_an_ensemble_become_one() -> None:
    single, members = make_sequence("s", [1], SamplingParams()), make_members(2)
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, -300.0], [0.0, -300.0, -300.0]], dtype=torch.bfloat16)
    merged, leaders = merge_ensembles(logits, [single, *members])
    assert leaders == [single, members[0]]
    assert merged.dtype == torch.float32
    assert merged[0].tolist() == [1.0, 2.0, 3.0]
    assert merged[1, :2].exp().tolist() == pytest.approx([0.75, 0.25])
    assert merged[1, 2].item() == pytest.approx(-300.0, abs=1.5), "it is possible, if not in float32"
    alone = [single, make_sequence("t", [1], SamplingParams())]
    same, seqs = merge_ensembles(logits[:2], alone)
    assert same.data_ptr() == logits.data_ptr()
    assert seqs is alone


def test_a_value_that_is_not_finite_affects_its_ensemble_only() -> None:
    single, members = make_sequence("s", [1], SamplingParams()), make_members(2)
    logits = torch.zeros(3, 4)
    logits[2, 1] = torch.nan
    merged, _ = merge_ensembles(logits, [single, *members])
    assert merged[0].isfinite().all()
    assert merged[1].isnan().all()


def test_members_that_are_not_adjacent_are_an_error() -> None:
    first, second = make_members(2)
    other = make_sequence("s", [1], SamplingParams())
    with pytest.raises(AssertionError, match="do not sample together"):
        merge_ensembles(torch.zeros(3, 4), [first, other, second])
