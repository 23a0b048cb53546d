"""The values of a checkpoint's generation_config.json have the effect that they have in PEFT's generate."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LogitsProcessorList
from transformers.generation import logits_process as processors

from server.engine import messages
from server.engine.generation_defaults import NO_RULES, GenerationDefaults, TokenRules
from server.engine.llm_engine import LLMEngine
from server.engine.model.generation_config import CheckpointGeneration, read_generation_config
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.ngrams import NgramIndex
from server.engine.types import SamplingParams
from server.errors import EngineStartError
from tests.support.engine.harness import (
    PEFT_CONFIGS,
    SHAPE,
    VOCABULARY,
    Family,
    add,
    greedy,
    make_family,
    random_text,
    run,
    tokens,
)
from tests.support.engine.sequences import make_sequence

pytestmark = pytest.mark.slow

EOS = 7
NUM_NEW = 24
TEXT = random_text(random.Random(3), 20, 20)
KINDS = ("prompt_tuning_8", "prefix_13", None)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A Llama with an end-of-sequence token, whose generation_config.json the tests write."""
    config = LlamaConfig(**SHAPE | {"eos_token_id": EOS})
    own = {key: PEFT_CONFIGS[key] for key in KINDS if key}
    return make_family("generation", tmp_path_factory.mktemp("generation"), own, config=config)


@pytest.fixture
def write(family: Family) -> Iterator[Callable[[dict[str, object]], None]]:
    path = family.path / "generation_config.json"
    before = path.read_text()

    def write(values: dict[str, object]) -> None:
        path.write_text(json.dumps({"eos_token_id": EOS} | values))

    yield write
    path.write_text(before)


def peft_tokens(family: Family, kind: str | None, text: list[int]) -> list[int]:
    """Greedy tokens of PEFT's model, loaded from the disk."""
    model = AutoModelForCausalLM.from_pretrained(family.path).eval()
    if kind is not None:
        model = PeftModel.from_pretrained(model, family.peft_folders[kind]).eval()
    ids = torch.tensor([text])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False
        )
    tokens: list[int] = output[0, len(text) :].tolist()
    return tokens


PLAIN_WORDS = [[5], [9, 11], [EOS], [30, 31, 32]]
CONFIGS: dict[str, dict[str, object]] = {
    "repetition_penalty": {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.7, "top_k": 20},
    "ngrams_of_1": {"no_repeat_ngram_size": 1},
    "ngrams_of_2": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": list(range(0, VOCABULARY, 2)), "begin_suppress_tokens": [1, 3, 5, 9, 11]},
    "bad_words": {"bad_words_ids": PLAIN_WORDS + [[token] for token in range(60, 90)]},
    "biases": {"sequence_bias": [[[token], 4.0] for token in range(40, 60)] + [[[45, 50], -9.0], [[50, 45], 9.5]]},
    "min_length": {"min_length": 35, "sequence_bias": [[[EOS], 50.0]]},
    "min_new_tokens": {"min_new_tokens": 9, "min_length": 22, "sequence_bias": [[[EOS], 50.0]]},
    "forced_end": {"forced_eos_token_id": [12, 4], "repetition_penalty": 1.2},
    "several": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": list(range(20, 60)),
        "bad_words_ids": [[70], [71, 72]],
        "sequence_bias": [[[90], 2.5]],
        "min_new_tokens": 12,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_peft(
    name: str,
    family: Family,
    write: Callable[[dict[str, object]], None],
    make_engine: Callable[..., LLMEngine],
) -> None:
    """In one batch with other requests, with soft prompts of both kinds and without."""
    plain = {kind: family.expected(kind, TEXT, NUM_NEW) for kind in KINDS}
    write(CONFIGS[name])
    engine = make_engine(family, block_size=8)
    frame = messages.encode_frame(messages.Ready(engine.model))
    assert messages.from_engine_decoder.decode(frame[4:]) == messages.Ready(engine.model)
    own = engine.model.generation_defaults
    for kind in KINDS:
        params = greedy(NUM_NEW, repetition_penalty=own.repetition_penalty or 1.0, min_tokens=own.min_tokens or 0)
        add(engine, str(kind), TEXT, params, soft_prompt=family.source(kind))
    outputs = run(engine)
    want = {str(kind): peft_tokens(family, kind, TEXT) for kind in KINDS}
    assert {key: tokens(outputs[key]) for key in want} == want
    assert any(want[str(kind)] != plain[kind] for kind in KINDS)


def test_a_text_of_one_token_begins_with_the_forced_token(
    family: Family, write: Callable[[dict[str, object]], None], make_engine: Callable[..., LLMEngine]
) -> None:
    write({"forced_bos_token_id": 33, "begin_suppress_tokens": list(range(100, 197))})
    engine = make_engine(family)
    for name, text in (("one", TEXT[:1]), ("two", TEXT[:2])):
        add(engine, name, text, greedy(NUM_NEW))
    outputs = run(engine)
    assert tokens(outputs["one"]) == peft_tokens(family, None, TEXT[:1])
    assert tokens(outputs["two"]) == peft_tokens(family, None, TEXT[:2])
    assert tokens(outputs["one"])[0] == 33


def test_none_disables_all_values_except_the_end_of_sequence(
    family: Family, write: Callable[[dict[str, object]], None], make_engine: Callable[..., LLMEngine]
) -> None:
    write({})
    want = peft_tokens(family, None, TEXT)
    write({"no_repeat_ngram_size": 1, "repetition_penalty": 3.0, "temperature": 0.1, "eos_token_id": [EOS, want[4]]})
    engine = make_engine(family, generation_config="none")
    assert engine.model.generation_defaults == GenerationDefaults()
    assert engine.model.eos_token_ids == (EOS, want[4])
    add(engine, "r", TEXT, greedy(NUM_NEW))
    assert tokens(run(engine)["r"]) == want[: want.index(want[4]) + 1]


def test_the_log_lists_applied_and_ignored_values(
    family: Family,
    write: Callable[[dict[str, object]], None],
    make_engine: Callable[..., LLMEngine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write({"repetition_penalty": 1.1, "typical_p": 0.9, "suppress_tokens": [4], "num_beams": 4, "chat_format": "raw"})
    with caplog.at_level(logging.INFO, logger="server.engine.model.generation_config"):
        make_engine(family)
    applied, ignored = (record.getMessage() for record in caplog.records if "generation_config" in record.name)
    assert applied.endswith(": repetition_penalty=1.1, suppress_tokens=[4]")
    assert ignored.endswith(": chat_format='raw', num_beams=4, typical_p=0.9")


def test_a_file_that_transformers_cannot_read_ends_the_start_with_a_message(
    family: Family, write: Callable[[dict[str, object]], None], make_engine: Callable[..., LLMEngine]
) -> None:
    write({"suppress_tokens": 5})
    with pytest.raises(EngineStartError, match="cannot load the model"):
        make_engine(family)


def read(**values: Any) -> CheckpointGeneration:
    return read_generation_config(
        GenerationConfig(**values), vocab_size=VOCABULARY, max_model_len=64, eos_token_ids=(EOS,)
    )


def test_a_value_with_a_request_field_becomes_a_default() -> None:
    found = read(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.05, max_new_tokens=9,
        min_new_tokens=2, stop_strings=["a", "b"],
    )  # fmt: skip
    assert found.defaults == GenerationDefaults(
        temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.05, max_tokens=9, min_tokens=2,
        stop=("a", "b"),
    )  # fmt: skip
    assert found.rules == NO_RULES
    assert not found.ignored
    assert "do_sample" not in found.applied


def test_a_checkpoint_that_does_not_sample_is_greedy() -> None:
    found = read(do_sample=False, temperature=0.7)
    assert found.defaults == GenerationDefaults(temperature=0.0)
    assert (found.applied, found.ignored) == ({"do_sample": False}, {})
    assert read(temperature=0.7).defaults.temperature == 0.7
    assert read().defaults == GenerationDefaults()
    assert read_generation_config(None, vocab_size=9, max_model_len=9, eos_token_ids=()).rules == NO_RULES


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.5),
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2.5),
        ("min_p", True),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("no_repeat_ngram_size", -1),
        ("min_length", 2.0),
        ("max_length", 63),
        ("suppress_tokens", ["a"]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [[VOCABULARY]]),
        ("sequence_bias", [[[5], "x"]]),
        ("sequence_bias", [[[5]]]),
        ("sequence_bias", [[[], 1.0]]),
        ("forced_bos_token_id", VOCABULARY),
        ("forced_eos_token_id", [-1]),
        ("stop_strings", [""]),
        ("stop_strings", ["a"] * 17),
        ("typical_p", 0.5),
        ("eta_cutoff", 0.1),
        ("guidance_scale", 1.5),
        ("num_beams", 2),
        ("penalty_alpha", 0.6),
        ("exponential_decay_length_penalty", [5, 1.2]),
        ("max_time", 3.0),
    ],
)
def test_a_value_that_cannot_be_applied_is_reported_and_ignored(name: str, value: object) -> None:
    found = read(**{name: value})
    assert found.ignored.keys() == {name}
    assert (found.defaults, found.rules, found.applied) == (GenerationDefaults(), NO_RULES, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 64),
        ("min_length", 0),
        ("no_repeat_ngram_size", 0),
        ("bad_words_ids", [[EOS]]),
        ("suppress_tokens", []),
        ("typical_p", 1.0),
        ("num_beams", 1),
        ("length_penalty", 2.0),
        ("use_cache", False),
        ("pad_token_id", 3),
    ],
)
def test_a_value_without_effect_is_not_reported(name: str, value: object) -> None:
    found = read(**{name: value})
    assert (found.defaults, found.rules, found.ignored) == (GenerationDefaults(), NO_RULES, {})


@settings(deadline=None)
@given(size=st.integers(1, 4), text=st.lists(st.integers(0, 3), max_size=30), data=st.data())
def test_ngrams_equal_a_brute_force_search(size: int, text: list[int], data: st.DataObject) -> None:
    index = NgramIndex(size)
    for length in sorted(data.draw(st.sets(st.integers(0, len(text)))) | {len(text)}):
        ids = text[:length]
        seen = {tuple(ids[start : start + size]) for start in range(length - size + 1)}
        want = {token for token in range(4) if tuple([*ids, token][-size:]) in seen} if length >= size else set()
        assert set(index.completing(ids)) == want


TOKENS = st.integers(0, 9)


@settings(deadline=None, max_examples=150)
@given(
    text=st.lists(TOKENS, min_size=1, max_size=6),
    new=st.lists(TOKENS, max_size=8),
    size=st.integers(0, 3),
    words=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=3, unique=True),
    biases=st.dictionaries(
        st.lists(TOKENS, min_size=1, max_size=3).map(tuple), st.floats(-9, 9, width=32), max_size=3
    ),
    never=st.lists(TOKENS, max_size=3),
    first=st.lists(TOKENS, max_size=3),
    penalty=st.sampled_from([0.7, 1.0, 1.6]),
    min_length=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_rules_equal_the_processors_of_transformers(
    text: list[int],
    new: list[int],
    size: int,
    words: list[tuple[int, ...]],
    biases: dict[tuple[int, ...], float],
    never: list[int],
    first: list[int],
    penalty: float,
    min_length: int,
    seed: int,
) -> None:
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed)) * 3
    chain = LogitsProcessorList()
    if biases:
        chain.append(processors.SequenceBiasLogitsProcessor([[list(ids), bias] for ids, bias in biases.items()]))
    if penalty != 1.0:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(penalty))
    if size:
        chain.append(processors.NoRepeatNGramLogitsProcessor(size))
    if words:
        chain.append(processors.NoBadWordsLogitsProcessor([list(word) for word in words]))
    if min_length:
        chain.append(processors.MinLengthLogitsProcessor(min_length, EOS))
    chain.append(processors.SuppressTokensLogitsProcessor(never))
    chain.append(processors.SuppressTokensAtBeginLogitsProcessor(first, len(text)))
    want = chain(torch.LongTensor([text + new]), logits.clone())
    rules = TokenRules(
        sequence_bias=tuple(biases.items()),
        no_repeat_ngram_size=size,
        bad_words=tuple(words),
        min_length=min_length,
        suppress_tokens=tuple(never),
        begin_suppress_tokens=tuple(first),
    )
    seq = make_sequence("s", text, SamplingParams(temperature=0.0, repetition_penalty=penalty))
    seq.token_ids += new
    got = Sampler((EOS,), rules)._adjust(logits.clone(), [seq], {})
    if want.amax() == -torch.inf:  # generate would take token 0; here the rules are not applied
        assert got.isfinite().all()
    else:
        assert torch.allclose(got, want, atol=1e-5)
