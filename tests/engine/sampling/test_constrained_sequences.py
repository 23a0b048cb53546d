"""Sequences with constraints, in batches with sequences without."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

from server.engine.llm_engine import LLMEngine
from server.engine.sampling import grammars as structured
from server.engine.sampling.grammar_check import NO_WAY_ON
from server.engine.sampling.grammars import Matcher
from server.engine.sampling.sampler import NO_TOKEN, Sampler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import (
    ErrorCode,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    SoftPromptSource,
    TokenEvent,
)
from tests.support.engine.grammars import END_ID, compiled, constraint, make_compiler, save_tokenizer
from tests.support.engine.harness import (
    SHAPE,
    VOCABULARY,
    Family,
    add,
    failure_of,
    greedy,
    make_family,
    random_text,
    run,
    tokens,
)
from tests.support.engine.sequences import make_sequence
from tests.support.presence import present

pytestmark = pytest.mark.slow

TEXT = random_text(random.Random(5), 24, 24)
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -99, "maximum": 99},
        "b": {"type": "array", "items": {"enum": ["x", True]}, "maxItems": 3},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
BOMB = '{"type": "integer", "multipleOf": 49999999}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A Llama with an end-of-sequence token and a tokenizer."""
    folder = tmp_path_factory.mktemp("constrained")
    family = make_family("constrained", folder, config=LlamaConfig(**SHAPE | {"eos_token_id": END_ID}))
    save_tokenizer(family.path)
    return family


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A Llama without an end-of-sequence token, with a tokenizer."""
    family = make_family("endless", tmp_path_factory.mktemp("endless"), {}, config=LlamaConfig(**SHAPE))
    save_tokenizer(family.path)
    return family


@pytest.fixture(scope="module")
def tokenizer(model: Family) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(model.path)
    return tokenizer


def run_all(engine: LLMEngine) -> dict[str, list[TokenEvent]]:
    """Step until all sequences have ended, including those that wait for a grammar."""
    deadline = time.monotonic() + 60
    outputs = run(engine)
    assert time.monotonic() < deadline
    return outputs


def text_of(tokenizer: PreTrainedTokenizerFast, outputs: list[TokenEvent]) -> str:
    return str(tokenizer.decode(tokens(outputs), skip_special_tokens=True))


def test_constraints_hold_in_a_mixed_batch_and_touch_no_neighbour(
    model: Family, make_engine: Callable[..., LLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make_engine(model, block_size=4, max_num_batched_tokens=48, max_num_seqs=24)
    names = [None, *model.soft_prompts]
    for index, name in enumerate(names):
        source = model.soft_prompts[name] if name else None
        add(engine, f"free {name}", TEXT[index:], greedy(12, ignore_eos=True), soft_prompt=source)
        for kind, text in (
            ("regex", "(?:[a-c]{3}-)+"),
            ("choice", '["yes", "no"]'),
            ("json_schema", json.dumps(SCHEMA)),
        ):
            params = greedy(120, constraint=constraint(kind, text))
            add(engine, f"{kind} {name}", TEXT[index:], params, soft_prompt=source)
    outputs = run_all(engine)
    for index, name in enumerate(names):
        assert tokens(outputs[f"free {name}"]) == model.expected(name, TEXT[index:], 12)
        regex, choice, schema = (outputs[f"{kind} {name}"] for kind in ("regex", "choice", "json_schema"))
        assert re.match("(?:[a-c]{3}-)+", text_of(tokenizer, regex))
        assert text_of(tokenizer, choice) in {"yes", "no"}
        assert choice[-1].finish_reason is FinishReason.STOP
        if schema[-1].finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(text_of(tokenizer, schema)), SCHEMA)
        assert {output.finish_reason for output in regex[:-1]} == {None}


def test_the_greedy_token_is_the_likeliest_that_is_allowed(
    model: Family, make_engine: Callable[..., LLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make_engine(model)
    add(engine, "r", TEXT, greedy(20, constraint=constraint("regex", "[0-9]{20}"), logprobs=0))
    ids = list(TEXT)
    outputs = run_all(engine)["r"]
    digits = tokenizer.convert_tokens_to_ids([*"0123456789", "12"])
    assert isinstance(digits, list)
    for output in outputs:
        with torch.no_grad():
            logits = model.model(torch.tensor([ids])).logits[0, -1]
        own = digits if len(text_of(tokenizer, outputs[:1])) < 19 else digits[:10]
        best = max(own, key=lambda token: logits[token].item())
        if len(tokenizer.decode(ids[len(TEXT) :])) < 19:
            assert output.token_ids == [best]
        # Logprobs are from the model's own logits, without the mask.
        want = torch.log_softmax(logits, -1)[output.token_ids[0]].item()
        assert present(output.logprobs)[0].logprob == pytest.approx(want, abs=1e-4)
        ids += output.token_ids
    assert re.fullmatch("[0-9]{20}", text_of(tokenizer, outputs))


def test_sampling_with_a_seed_does_not_depend_on_the_batch(
    model: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    params = SamplingParams(
        max_tokens=30,
        temperature=1.5,
        top_p=0.9,
        seed=4,
        constraint=constraint("regex", "(?:[a-f]+[0-9] )+"),
        min_tokens=4,
    )
    alone = make_engine(model)
    add(alone, "mine", TEXT, params)
    want = tokens(run_all(alone)["mine"])
    crowded = make_engine(model, block_size=4, max_num_batched_tokens=32, max_num_seqs=8)
    for index in range(6):
        other = constraint("regex", "[ab]*") if index % 2 else None
        add(crowded, f"other{index}", TEXT[index:], SamplingParams(max_tokens=20, constraint=other))
    add(crowded, "mine", TEXT, params)
    assert tokens(run_all(crowded)["mine"]) == want
    assert len(want) > 3


def test_preemption_leaves_matchers_as_they_are(
    model: Family, make_engine: Callable[..., LLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    params = [
        greedy(120, constraint=constraint("regex", f"(?:[ab]{{{index + 2}}} )*"), logit_bias={END_ID: -100.0})
        for index in range(4)
    ]
    roomy = make_engine(model, block_size=4)
    tight = make_engine(model, block_size=4, kv_cache_memory=150 * 1024)
    got = []
    for engine in (roomy, tight):
        for index, own in enumerate(params):
            add(engine, f"r{index}", TEXT[index:], own)
        outputs = run_all(engine)
        got.append([tokens(outputs[f"r{index}"]) for index in range(4)])
    assert tight.stats.num_preemptions > 0
    assert got[0] == got[1]
    for index, ids in enumerate(got[0]):
        assert re.match(f"(?:[ab]{{{index + 2}}} )+", str(tokenizer.decode(ids)))


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_complete_grammar_ends_the_sequence(
    model: Family,
    endless: Family,
    make_engine: Callable[..., LLMEngine],
    tokenizer: PreTrainedTokenizerFast,
    ignore_eos: bool,
) -> None:
    for family in (model, endless):
        engine = make_engine(family)
        # min_tokens exceeds the grammar's longest text; the grammar takes precedence.
        params = greedy(50, constraint=constraint("choice", '["true"]'), min_tokens=30, ignore_eos=ignore_eos)
        add(engine, "choice", TEXT, params)
        add(engine, "empty", TEXT, greedy(50, constraint=constraint("regex", "a{0}"), min_tokens=3))
        outputs = run_all(engine)
        assert text_of(tokenizer, outputs["choice"]) == "true"
        assert outputs["choice"][-1].finish_reason is FinishReason.STOP
        assert outputs["choice"][-1].stop_token_id is None
        (empty,) = outputs["empty"]
        assert empty.token_ids == ([END_ID] if family is model else [])
        assert empty.finish_reason is FinishReason.STOP
        assert empty.num_cached_tokens is not None
        assert engine.stats.num_used_blocks == 0


def test_the_end_of_sequence_ends_a_grammar_that_could_go_on(
    model: Family, make_engine: Callable[..., LLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make_engine(model)
    for ignore_eos in (False, True):
        for min_tokens in (0, 5):
            params = greedy(
                20,
                constraint=constraint("regex", "[a-z]*"),
                logit_bias={END_ID: 100.0},
                ignore_eos=ignore_eos,
                min_tokens=min_tokens,
            )
            add(engine, f"{ignore_eos} {min_tokens}", TEXT, params)
    outputs = run_all(engine)
    for name, own in outputs.items():
        # With ignore_eos, min_tokens does not exclude the end-of-sequence token, as without a constraint.
        assert len(tokens(own)) == (6 if name == "False 5" else 1)
        assert (own[-1].finish_reason, own[-1].stop_token_id) == (FinishReason.STOP, END_ID)


def test_stop_tokens_and_limits_end_it_early(
    model: Family, make_engine: Callable[..., LLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make_engine(model)
    (a,) = tokenizer.encode("a")
    add(engine, "stop", TEXT, greedy(20, constraint=constraint("regex", "a+b"), stop_token_ids=(a,)))
    add(engine, "length", TEXT, greedy(3, constraint=constraint("regex", "[0-9]{30}")))
    add(engine, "last", TEXT, greedy(1, constraint=constraint("regex", "a")))
    outputs = run_all(engine)
    assert outputs["stop"][-1].stop_token_id == a
    assert outputs["length"][-1].finish_reason is FinishReason.LENGTH
    assert len(tokens(outputs["length"])) == 3
    assert outputs["last"][-1].finish_reason is FinishReason.STOP


def test_a_constraint_holds_for_an_ensemble(
    model: Family, make_engine: Callable[..., LLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make_engine(model)
    first, *others = model.soft_prompts.values()
    for kind, text in (("regex", "[a-c]{3}-[0-9]{4}"), ("choice", '["yes", "no"]')):
        params = greedy(20, constraint=constraint(kind, text), logprobs=0)
        add(engine, kind, TEXT, params, soft_prompt=first, others=[*others, None])
    outputs = run_all(engine)
    assert re.fullmatch("[a-c]{3}-[0-9]{4}", text_of(tokenizer, outputs["regex"]))
    assert text_of(tokenizer, outputs["choice"]) in {"yes", "no"}
    for own in outputs.values():
        assert own[-1].finish_reason is FinishReason.STOP
        assert all(entry.logprob < 0 for output in own for entry in output.logprobs or ())


def test_a_wrong_constraint_fails_its_requests_alone(model: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(model)
    source = model.soft_prompts["prefix_13"]
    for index in range(2):
        add(engine, f"wrong{index}", TEXT, greedy(5, constraint=constraint("regex", "(a")), soft_prompt=source)
    add(engine, "right", TEXT, greedy(5, ignore_eos=True), soft_prompt=source)
    outputs = run_all(engine)
    for index in range(2):
        (output,) = outputs[f"wrong{index}"]
        assert failure_of(output).code is ErrorCode.CONSTRAINT
        assert "unclosed group" in failure_of(output).message
    assert tokens(outputs["right"]) == model.expected("prefix_13", TEXT, 5)
    assert engine.soft_prompts.stats.resident == 1
    engine.soft_prompts.acquire(source)
    engine.soft_prompts.release(source)  # the last reference


def test_a_grammar_that_fails_on_the_way_fails_its_request_alone(
    model: Family, endless: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    for family in (model, endless):
        engine = make_engine(family)
        add(engine, "free", TEXT, greedy(30, ignore_eos=True))
        add(engine, "stuck", TEXT, greedy(30, constraint=constraint("regex", "abé")))
        add(engine, "large", TEXT, greedy(30, constraint=constraint("regex", "(([a-z]{1,20}){1,20}){1,20}")))
        outputs = run_all(engine)
        assert failure_of(outputs["stuck"][-1]).code is ErrorCode.CONSTRAINT
        assert failure_of(outputs["stuck"][-1]).message == NO_WAY_ON
        assert failure_of(outputs["large"][-1]).code is ErrorCode.CONSTRAINT
        assert "too many" in failure_of(outputs["large"][-1]).message
        assert outputs["free"][-1].finish_reason is FinishReason.LENGTH
        # The next sequence with this grammar gets a new automaton.
        add(engine, "again", TEXT, greedy(1, constraint=constraint("regex", "(([a-z]{1,20}){1,20}){1,20}")))
        assert run_all(engine)["again"][-1].finish_reason is FinishReason.LENGTH


def test_waiting_for_a_grammar_and_a_file_both(
    model: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[bool] = []
    engine = make_engine(model)
    monkeypatch.setattr(engine._grammars._quick.jobs, "_on_ended", lambda: woken.append(True))
    take_compiled = engine._grammars.take_compiled
    with monkeypatch.context() as patch:
        patch.setattr(engine._grammars, "take_compiled", list)
        params = greedy(5, constraint=constraint("choice", '["yes"]'))
        for name, timeout in (("ends", None), ("aborted", None), ("late", 0.05)):
            add(engine, name, TEXT, params, soft_prompt=model.soft_prompts["p_tuning_7"], timeout=timeout)
        again = GenerateRequest(request_id="ends", prompt_token_ids=TEXT, params=params)
        assert failure_of(engine.add(again)[0]).message == "request id 'ends' is in use"
        assert not engine.has_work
        assert engine.stats.num_waiting == 3
        assert 0 <= present(engine.idle_seconds) <= 0.05
        assert [output.finish_reason for output in engine.abort("aborted")] == [FinishReason.ABORT]
        time.sleep(0.06)
        (late,) = engine.step()
        assert (late.request_id, failure_of(late).code) == ("late", ErrorCode.WAIT_TIMEOUT)
        assert engine.idle_seconds is None
        deadline = time.monotonic() + 30
        while not woken or not engine.soft_prompts.stats.loads:
            assert time.monotonic() < deadline
            engine.step()
        assert engine.num_unfinished == 1
    assert engine._grammars.take_compiled == take_compiled
    assert run_all(engine)["ends"][-1].finish_reason is FinishReason.STOP
    # The grammar is compiled, so the next sequence does not wait.
    add(engine, "next", TEXT, params, soft_prompt=model.soft_prompts["p_tuning_7"])
    assert engine.has_work


def test_a_soft_prompt_that_cannot_be_read_ends_what_waits_for_a_grammar_besides(
    model: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    engine = make_engine(model)
    missing = SoftPromptSource(digest="no", num_virtual_tokens=4, is_key_values=False, path=str(tmp_path / "no"))
    for kind, text in (("regex", "a"), ("regex", "(")):
        add(engine, text, TEXT, greedy(5, constraint=constraint(kind, text)), soft_prompt=missing)
    outputs = run_all(engine)
    codes = {failure_of(own[-1]).code for own in outputs.values()}
    assert codes <= {ErrorCode.FAILED, ErrorCode.CONSTRAINT}
    assert failure_of(outputs["a"][-1]).code is ErrorCode.FAILED
    save_file({"prompt_embeddings": torch.ones(4, 48)}, tmp_path / "no")
    add(engine, "mended", TEXT, greedy(5, constraint=constraint("regex", "a")), soft_prompt=missing)
    assert run_all(engine)["mended"][-1].finish_reason is FinishReason.STOP


def test_a_tenant_with_too_many_grammars_has_to_wait_and_others_have_not(
    model: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "MAX_WAITING", 1)
    engine = make_engine(model)
    source = model.soft_prompts["prefix_13"]
    bomb = constraint("json_schema", BOMB)
    with monkeypatch.context() as patch:
        patch.setattr(engine._grammars, "_enqueue", lambda *_: None)
        add(engine, "first", TEXT, greedy(5, constraint=bomb), salt="a")
        add(engine, "same", TEXT, greedy(5, constraint=bomb), salt="a")
        request = GenerateRequest(
            request_id="second",
            prompt_token_ids=TEXT,
            params=greedy(5, constraint=constraint("regex", "b")),
            soft_prompt=source,
            salt="a",
        )
        (refused,) = engine.add(request)
        assert failure_of(refused).code is ErrorCode.WAIT_TIMEOUT
        assert "1 different structures" in failure_of(refused).message
    add(engine, "other", TEXT, greedy(5, constraint=constraint("regex", "b")), salt="b")
    assert engine.abort("first")
    assert bomb in engine._grammars._compiling  # another sequence waits for it
    assert engine.abort("same")
    assert bomb not in engine._grammars._compiling
    assert run_all(engine)["other"][-1].finish_reason is FinishReason.STOP


def test_a_grammar_that_takes_too_long_fails_its_request_alone(
    model: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(structured, "SLOW_SECONDS", 0.05)
    engine = make_engine(model)
    add(engine, "bomb", TEXT, greedy(5, constraint=constraint("json_schema", BOMB)))
    add(engine, "right", TEXT, greedy(5, constraint=constraint("choice", '["yes"]')))
    outputs = run_all(engine)
    assert failure_of(outputs["bomb"][-1]) == structured.TOO_SLOW
    assert outputs["right"][-1].finish_reason is FinishReason.STOP
    monkeypatch.setattr(structured, "MAX_WAITING_SLOW", 0)
    add(engine, "again", TEXT, greedy(5, constraint=constraint("json_schema", BOMB + " ")))
    again = run_all(engine)["again"][-1]
    assert failure_of(again) == structured.TOO_MANY_SLOW
    assert structured.TOO_MANY_SLOW.code is ErrorCode.WAIT_TIMEOUT


def test_a_grammar_whose_masks_take_too_long_fails_its_request_alone(
    model: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of the mask grows with each token, and llguidance has no limit for it."""
    want = run_all_of(make_engine(model), [("free", greedy(30, ignore_eos=True))])["free"]
    monkeypatch.setattr(structured, "BURST_SECONDS", 0.02)
    monkeypatch.setattr(structured, "TOKEN_SECONDS", 0.0)
    monkeypatch.setattr(structured, "METERED_SECONDS", 0.0)
    ambiguous = constraint("grammar", 'start: s\ns: s s s | s s | "a" | ""')
    costly = greedy(150, constraint=ambiguous, logit_bias={END_ID: -100.0})
    requests = [(name, costly) for name in ("costly", "costly too")] + [("free", greedy(30, ignore_eos=True))]
    outputs = run_all_of(make_engine(model), requests)
    for name in ("costly", "costly too"):
        assert failure_of(outputs[name][-1]).code is ErrorCode.CONSTRAINT
        assert failure_of(outputs[name][-1]).message == structured.TOO_COSTLY
    assert tokens(outputs["free"]) == tokens(want)


def run_all_of(engine: LLMEngine, requests: list[tuple[str, SamplingParams]]) -> dict[str, list[TokenEvent]]:
    for name, params in requests:
        add(engine, name, TEXT, params)
    return run_all(engine)


def test_nobody_who_asks_for_nothing_pays(
    model: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    add(engine, "free", TEXT, greedy(3))
    run_all(engine)
    assert engine._grammars._vocabulary is None
    assert "_executor" not in engine.runner.sampler._masks.__dict__


def masked_seq(matcher: Matcher, prompt: list[int], **params: Any) -> Sequence:
    seq = make_sequence("s", prompt, SamplingParams(constraint=constraint("regex", "x"), **params))
    seq.matcher = matcher
    return seq


def test_the_mask_acts_after_penalties_and_bias_and_before_the_cuts(model: Family) -> None:
    compiler = make_compiler(model.path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model.path)
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    logits = torch.zeros(1, VOCABULARY)
    logits[0, c] = 50.0  # the most likely token, which is not allowed
    logits[0, a] = 3.0
    sampler = Sampler((END_ID,))

    def choose(**params: Any) -> int:
        matcher = compiled(compiler, constraint("regex", "[ab]"))
        return sampler.choose(logits, [masked_seq(matcher, [a], **params)])[0][0]

    assert choose(temperature=0.0) == a
    assert choose(temperature=0.0, repetition_penalty=4.0, logit_bias={b: 1.0}) == b
    assert choose(temperature=0.0, logit_bias={c: 100.0, b: 4.0}) == b
    # Of the remaining tokens, only the first passes these.
    assert choose(temperature=1.0, top_k=1, seed=1) == a
    assert choose(temperature=1.0, top_p=0.01, seed=1) == a
    assert choose(temperature=1.0, min_p=1.0, seed=1) == a
    assert {choose(temperature=2.0, logit_bias={b: 3.0}, seed=seed) for seed in range(40)} == {a, b}
    logits[0, [a, b]] = float("-inf")
    assert choose(temperature=0.0) == NO_TOKEN
    assert choose(temperature=1.0, top_p=0.5, seed=1) == NO_TOKEN
    compiler.close()
