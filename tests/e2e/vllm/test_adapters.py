"""LoRA through vLLM: tokens equal PEFT's alone, with soft prompts and beside others; the rest is refused."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.types import AdapterSource, Capability, GenerateRequest, SamplingParams
from server.errors import RequestFailedError, RequestRefusedError, WaitTimeoutError
from tests.support.engine.adapters import Adapted, make_adapters
from tests.support.engine.harness import check_logprobs, greedy, random_text
from tests.support.vllm import make_vllm_family, needs_vllm
from tests.support.vllm_engine import MAX_TOKENS, Engine
from tests.support.waiting import until

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

SERVED = ("attention_4", "all_rslora")
REFUSED = ("bias", "dora", "ia3", "head_and_embeddings")
SOFT_PROMPTS = (None, "prompt_tuning_20", "p_tuning_7", "prefix_13")
MAX_LORAS = 2
Request = tuple[str | None, str | None, list[int]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    keys = [key for key in SOFT_PROMPTS if key is not None]
    family = make_vllm_family("llama", tmp_path_factory.mktemp("family"), keys)
    engine = Engine(family, 2**20, max_loras=MAX_LORAS, max_adapter_rank=20)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def adapted(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return make_adapters(engine.family, tmp_path_factory.mktemp("adapters"), SERVED + REFUSED)


def requests_of(seed: int, count: int) -> list[Request]:
    """Every adapter and none, with every soft prompt and none, in random order; many texts begin alike."""
    rng = random.Random(seed)
    every = [(kind, soft_prompt) for kind in (*SERVED, None) for soft_prompt in SOFT_PROMPTS]
    texts = [[7] * rng.randrange(40) + random_text(rng, 1, 12) for _ in range(count)]
    found = [(*every[index % len(every)], text) for index, text in enumerate(texts)]
    rng.shuffle(found)
    return found


async def ask(engine: Engine, adapted: Adapted, request: Request, **more: Any) -> list[int]:
    kind, soft_prompt, text = request
    source = None if kind is None else adapted.sources[kind]
    return await engine.ask(engine.family.source(soft_prompt), text, adapter=source, **more)


async def ask_all(engine: Engine, adapted: Adapted, requests: list[Request]) -> list[list[int]]:
    return await asyncio.gather(*(ask(engine, adapted, request) for request in requests))


def expected(adapted: Adapted, requests: list[Request]) -> list[list[int]]:
    return [adapted.expected(kind, text, MAX_TOKENS, soft_prompt) for kind, soft_prompt, text in requests]


def check_idle(engine: Engine) -> None:
    assert engine.engine.stats.restarts == 0
    assert engine.engine.stats.num_used_blocks == 0
    assert engine.engine.stats.adapters.resident <= MAX_LORAS


def test_a_mixed_batch_equals_peft_twice(engine: Engine, adapted: Adapted) -> None:
    assert Capability.ADAPTERS in engine.engine.model.capabilities
    requests = requests_of(1, 60)
    want = expected(adapted, requests)
    for _ in range(2):  # the second time, texts and soft prompts are in the prefix cache
        assert engine.run(ask_all(engine, adapted, requests)) == want
    stats = engine.engine.stats
    assert stats.max_batch_distinct_adapters == MAX_LORAS
    assert stats.adapters.resident == MAX_LORAS
    check_idle(engine)


def test_two_ranks_equal_peft(engine: Engine, adapted: Adapted) -> None:
    requests = requests_of(6, 24)
    parallel = Engine(engine.family, 2**20, max_loras=MAX_LORAS, max_adapter_rank=20, tensor_parallel_size=2)
    try:
        assert parallel.run(ask_all(parallel, adapted, requests)) == expected(adapted, requests)
        check_idle(parallel)
    finally:
        parallel.close()


def test_adapters_change_answers(adapted: Adapted) -> None:
    """Otherwise nothing here would show anything."""
    text = [5, 6, 7]
    answers = {tuple(adapted.expected(kind, text, MAX_TOKENS)) for kind in (*SERVED, None)}
    assert len(answers) == 3


def copies_of(source: AdapterSource, folder: Path, name: str, count: int) -> list[AdapterSource]:
    found = []
    for index in range(count):
        path = folder / f"{name}{index}.safetensors"
        shutil.copy(source.path, path)
        found.append(msgspec.structs.replace(source, digest=f"{name}{index}", path=str(path)))
    return found


def test_more_adapters_than_there_is_room_for_take_turns(engine: Engine, adapted: Adapted, tmp_path: Path) -> None:
    text = [3, 1, 4, 1, 5]
    many = [(kind, copy) for kind in SERVED for copy in copies_of(adapted.sources[kind], tmp_path, kind, 6)]
    bare = adapted.expected(None, text, MAX_TOKENS)
    want = {kind: adapted.expected(kind, text, MAX_TOKENS) for kind in SERVED}

    async def together() -> tuple[list[list[int]], list[list[int]]]:
        some = asyncio.gather(*(engine.ask(None, text, adapter=copy) for _, copy in many * 3))
        others = asyncio.gather(*(engine.ask(None, text) for _ in range(10)))
        return await some, await others

    before = engine.engine.stats.adapters.evictions
    answers, others = engine.run(together())
    assert answers == [want[kind] for kind, _ in many * 3]
    assert others == [bare] * 10
    assert engine.engine.stats.adapters.evictions >= before + 10
    check_idle(engine)


def test_other_bytes_under_an_old_name_are_never_the_old_ones(
    engine: Engine, adapted: Adapted, tmp_path: Path
) -> None:
    """The path stays the same, and so do texts and soft prompts; only the digest tells."""
    path, config = tmp_path / "adapter.safetensors", tmp_path / "adapter_config.json"
    text = [7] * 50
    for number, kind in enumerate(SERVED * 2):
        source = adapted.sources[kind]
        shutil.copy(source.path, path)
        shutil.copy(source.config_path, config)
        same_path = msgspec.structs.replace(
            source, digest=f"reload-{kind}-{number}", path=str(path), config_path=str(config)
        )
        for soft_prompt in SOFT_PROMPTS:
            answer = engine.run(engine.ask(engine.family.source(soft_prompt), text, adapter=same_path))
            assert answer == adapted.expected(kind, text, MAX_TOKENS, soft_prompt), (kind, soft_prompt)


def test_aborts_at_every_moment_leave_the_others_right(engine: Engine, adapted: Adapted, tmp_path: Path) -> None:
    rng = random.Random(4)
    kept = requests_of(2, 36)
    want = expected(adapted, kept)
    cold = copies_of(adapted.sources["all_rslora"], tmp_path, "cold", 8)

    async def storm() -> list[list[int]]:
        answers = asyncio.ensure_future(ask_all(engine, adapted, kept))
        short = []
        for index in range(60):
            source = engine.family.source(SOFT_PROMPTS[index % 4])
            adapter = None if index % 5 == 4 else cold[index % 8]
            text = random_text(rng, 1, 40)
            short.append(engine.ask(source, text, adapter=adapter, stop_after=index % 4))
        await asyncio.gather(*short)
        return await answers

    for _ in range(3):
        assert engine.run(storm()) == want
    assert engine.run(ask_all(engine, adapted, kept)) == want
    check_idle(engine)


@pytest.mark.parametrize("soft_prompt", [None, "prompt_tuning_20"])
@pytest.mark.parametrize("kind", [None, *SERVED])
def test_logprobs_of_a_text_with_an_adapter(
    engine: Engine, adapted: Adapted, kind: str | None, soft_prompt: str | None
) -> None:
    text = random_text(random.Random(9), 24, 24)
    answers: list[Any] = []

    async def score() -> None:
        beside = asyncio.gather(*(ask(engine, adapted, request) for request in requests_of(5, 12)))
        request = GenerateRequest(
            request_id="score",
            prompt_token_ids=text,
            params=greedy(1, prompt_logprobs=2),
            soft_prompt=engine.family.source(soft_prompt),
            adapter=None if kind is None else adapted.sources[kind],
        )
        async for event in engine.engine.generate(request):
            if event.prompt_logprobs is not None:
                answers.extend(event.prompt_logprobs)
        await beside

    engine.run(score())
    adapted.expected(kind, text, 1, soft_prompt)
    model = engine.family.model if kind is None else adapted.models[kind]
    if soft_prompt is not None:
        model = engine.family._peft_model(soft_prompt) if kind is None else adapted.pairs[kind, soft_prompt]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text])).logits[0]
    want = torch.log_softmax(logits.float(), -1)[-len(text) : -1]
    assert answers[0] is None
    check_logprobs(answers[1:], text[1:], want, num_top=2)
    check_idle(engine)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bias", "lora_A and lora_B alone"),
        ("dora", "lora_A and lora_B alone"),
        ("ia3", "lora_A and lora_B alone"),
        ("head_and_embeddings", "engine vllm adapts the linear layers of the decoder alone"),
    ],
)
def test_what_vllm_does_not_apply_is_refused(engine: Engine, adapted: Adapted, kind: str, words: str) -> None:
    async def together() -> tuple[Any, Any]:
        bad = ask(engine, adapted, (kind, None, [1, 2]))
        return await asyncio.gather(bad, ask_all(engine, adapted, requests_of(3, 12)), return_exceptions=True)

    error, answers = engine.run(together())
    assert isinstance(error, RequestRefusedError)
    assert words in error.message
    assert answers == expected(adapted, requests_of(3, 12))


def damaged(source: AdapterSource, folder: Path, how: str) -> AdapterSource:
    path = folder / f"{how}.safetensors"
    tensors = load_file(source.path)
    name = min(tensors)
    if how == "unknown module":
        tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)
        other = name.replace("lora_A", "lora_B")
        tensors[other.replace("layers.0", "layers.9")] = tensors.pop(other)
    elif how == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "missing":
        path.unlink()
    return msgspec.structs.replace(source, digest=how, path=str(path))


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("missing", RequestFailedError, "cannot be read"),
        ("cut", RequestFailedError, "cannot be read"),
        ("unknown module", RequestRefusedError, "no module of this base"),
        ("shape", RequestRefusedError, "features"),
    ],
)
def test_a_damaged_adapter_fails_its_requests_alone(
    engine: Engine, adapted: Adapted, tmp_path: Path, how: str, error: type[Exception], words: str
) -> None:
    bad = damaged(adapted.sources["attention_4"], tmp_path, how)

    async def together() -> list[Any]:
        wrong = [engine.ask(None, [1, 2], adapter=bad) for _ in range(3)]
        return await asyncio.gather(*wrong, ask_all(engine, adapted, requests_of(3, 12)), return_exceptions=True)

    *errors, answers = engine.run(together())
    assert all(isinstance(one, error) and words in str(one) for one in errors), errors
    assert answers == expected(adapted, requests_of(3, 12))
    check_idle(engine)


def test_a_rank_above_the_limit_is_refused(engine: Engine, adapted: Adapted, tmp_path: Path) -> None:
    source = adapted.sources["attention_4"]
    tensors = load_file(source.path)
    wide = {
        name: tensor.repeat(6, 1) if "lora_A" in name else tensor.repeat(1, 6) for name, tensor in tensors.items()
    }
    save_file({name: tensor.contiguous() for name, tensor in wide.items()}, tmp_path / "wide.safetensors")
    fields = msgspec.json.decode(Path(source.config_path).read_bytes()) | {"r": 24}
    (tmp_path / "wide.json").write_bytes(msgspec.json.encode(fields))
    bad = msgspec.structs.replace(
        source, digest="wide", path=str(tmp_path / "wide.safetensors"), config_path=str(tmp_path / "wide.json")
    )
    with pytest.raises(RequestRefusedError, match="rank 24"):
        engine.run(engine.ask(None, [1], adapter=bad))


def test_a_pinned_adapter_is_loaded_before_its_first_request(engine: Engine, adapted: Adapted) -> None:
    source = msgspec.structs.replace(adapted.sources["attention_4"], digest="pinned")

    async def pin() -> None:
        engine.engine.pin(source)
        while True:
            await engine.ask(None, [1], params=SamplingParams(max_tokens=1))
            if engine.engine.stats.adapters.misses > before:
                return

    before = engine.engine.stats.adapters.misses
    engine.run(pin())
    text = [9, 8, 7]
    assert engine.run(engine.ask(None, text, adapter=source)) == adapted.expected("attention_4", text, MAX_TOKENS)
    assert engine.engine.stats.adapters.misses == before + 1


def test_a_request_that_waits_for_a_place_is_counted_and_its_timeout_names_the_reason(
    engine: Engine, adapted: Adapted, tmp_path: Path
) -> None:
    one, two, other = copies_of(adapted.sources["attention_4"], tmp_path, "place", 3)
    long = greedy(200, ignore_eos=True)

    async def crowd() -> tuple[list[int], Any, list[list[int]]]:
        busy = [asyncio.ensure_future(engine.ask(None, [7], adapter=source, params=long)) for source in (one, two)]
        await until(lambda: engine.engine.stats.num_running == MAX_LORAS)
        waiting = asyncio.ensure_future(engine.ask(None, [5, 6], adapter=other))
        late = engine.ask(None, [5, 6], adapter=other, timeout=0.05)
        (error,) = await asyncio.gather(late, return_exceptions=True)
        assert not any(request.done() for request in (*busy, waiting)), "the time of this test is too short"
        assert (engine.engine.stats.num_running, engine.engine.stats.num_waiting) == (MAX_LORAS, 1)
        return await waiting, error, await asyncio.gather(*busy)

    answer, error, busy = engine.run(crowd())
    assert answer == adapted.expected("attention_4", [5, 6], MAX_TOKENS)
    assert isinstance(error, WaitTimeoutError)
    assert "waiting for a place for its adapter (--max-loras)" in error.message
    assert [len(tokens) for tokens in busy] == [200, 200]
    assert engine.engine.stats.num_waiting == 0
    check_idle(engine)
