"""A GPU server equals PEFT, with Triton's kernels launched one by one and replayed from CUDA graphs."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable

import pytest
import torch

from server.config import EngineSettings
from server.engine.attention.backend import SDPABackend
from server.engine.attention.transfers import queue_to_host
from server.engine.cuda.triton_attention import TritonBackend
from server.engine.llm_engine import LLMEngine
from server.engine.model.platform import CUDAPlatform
from server.engine.sampling import sampler
from tests.support.engine.harness import Family, add, greedy, random_text, run, tokens
from tests.support.engine.mixed_batch import EVERY, MAX_TOKENS, answers, check_mixed_batch, make
from tests.support.presence import present

EXPERTS = {"gpt_oss", "mixtral", "qwen3_moe"}
"""Float32 experts of these families may synchronise with the device, and then their steps are not recorded."""


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def of(name: str) -> Family:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


@pytest.mark.parametrize("is_eager", [True, False], ids=["launched", "replayed"])
@pytest.mark.parametrize("name", EVERY)
def test_mixed_batch_equals_peft(
    name: str, is_eager: bool, family_of: Callable[[str], Family], make_engine: Callable[..., LLMEngine]
) -> None:
    family = family_of(name)
    engine = check_mixed_batch(
        name,
        family,
        lambda: make_engine(family, device="cuda", enforce_eager=is_eager, max_num_seqs=12),
        turns=3,
    )
    assert isinstance(engine.runner.backend, TritonBackend)
    assert (engine.runner._graphs is None) == is_eager or name in EXPERTS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3", "gpt_oss"])
def test_half_precision_is_close_to_peft(
    name: str, dtype: str, family_of: Callable[[str], Family], make_engine: Callable[..., LLMEngine]
) -> None:
    family = family_of(name)
    engine = make_engine(family, device="cuda", dtype=dtype)  # it compares its logits with the model's at the start
    text = random_text(random.Random(name), 40, 40)
    for key in [*family.soft_prompts, None]:
        params = greedy(1, prompt_logprobs=0)
        add(engine, str(key), text, params, soft_prompt=family.source(key))
    outputs = run(engine)
    for key in [*family.soft_prompts, None]:
        (output,) = outputs[str(key)]
        want = family.expected_logprobs(key, text)  # in float32
        pairs = [
            (entry.logprob, row[token].item())
            for entry, token, row in zip(present(output.prompt_logprobs), text, want, strict=True)
            if entry is not None
        ]
        differences = torch.tensor([abs(got - expected) for got, expected in pairs])
        assert differences.median() < 0.1, key


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_batch_size_is_replayed_correctly(
    name: str, family_of: Callable[[str], Family], make_engine: Callable[..., LLMEngine]
) -> None:
    family, rng = family_of(name), random.Random(3)
    engine = make_engine(family, device="cuda", max_num_seqs=33, enable_prefix_caching=False)
    text = random_text(rng, 20, 20)
    want = family.expected(None, text, 33)
    for count in (33, 17, 9, 5, 2, 1):  # requests that end one by one leave batches of every size
        requests = {f"{count}-{index}": (None, text) for index in range(count)}
        for index, request_id in enumerate(requests):
            add(engine, request_id, text, greedy(33 - index))
        got = {request_id: tokens(outputs) for request_id, outputs in run(engine).items()}
        assert got == {f"{count}-{index}": want[: 33 - index] for index in range(count)}


def test_few_sequences_with_long_contexts_equal_peft(
    family_of: Callable[[str], Family], make_engine: Callable[..., LLMEngine]
) -> None:
    """Keys are divided among programs; most of the text is shared, with several soft prompts."""
    family, rng = family_of("long"), random.Random(4)
    engine = make_engine(family, device="cuda", kv_cache_memory=2**27, max_num_batched_tokens=512)
    shared = random_text(rng, 3000, 3000)
    requests = {str(key): (key, shared + random_text(rng, 1, 400)) for key in [*family.soft_prompts, None]}
    want = {request_id: family.expected(*request, MAX_TOKENS) for request_id, request in requests.items()}
    assert answers(engine, family, requests, MAX_TOKENS) == want
    again = {f"{request_id} again": request for request_id, request in requests.items()}
    assert list(answers(engine, family, again, MAX_TOKENS).values()) == list(want.values())


@pytest.mark.parametrize("is_eager", [True, False], ids=["launched", "replayed"])
def test_a_step_waits_for_the_device_once(
    is_eager: bool,
    family_of: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for the copy of its tokens, and the next step is planned before. Nothing else synchronises."""
    done: list[str] = []
    engine = make_engine(family_of("llama"), device="cuda", enforce_eager=is_eager)
    for index in range(6):
        add(engine, str(index), [1, 2, 3, index], greedy(12, logprobs=2 if index % 2 else None))
    for _ in range(3):
        engine.step()
    plan_ahead = engine.scheduler.plan_ahead

    def plan_and_note() -> None:
        done.append("planned")
        plan_ahead()

    monkeypatch.setattr(engine.scheduler, "plan_ahead", plan_and_note)
    monkeypatch.setattr(sampler, "queue_to_host", noted(done))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.step(lambda: done.append("meanwhile"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    begun = ["meanwhile", "queued"] if is_eager else ["queued", "meanwhile"]
    assert done == [*begun, "planned", "waited"]
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert waits == []


def noted(done: list[str]) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]]:
    """``queue_to_host`` that records when a copy is queued and when it is awaited."""

    def queue(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        done.append("queued")
        copy = queue_to_host(tensor)

        def wait() -> torch.Tensor:
            done.append("waited")
            return copy()

        return wait

    return queue


def test_a_copy_to_the_host_waits_for_no_later_work() -> None:
    numbers = torch.arange(5, device="cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    copy = queue_to_host(numbers)
    for _ in range(300):
        busy = torch.tanh(busy @ busy)
    later = torch.cuda.Event()  # type: ignore[no-untyped-call]
    later.record()
    numbers.zero_()
    assert copy().tolist() == [0, 1, 2, 3, 4]
    assert not later.query()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()


def test_memory_is_allocated_at_the_start_and_freed_at_the_end(family_of: Callable[[str], Family]) -> None:
    family, rng = family_of("llama"), random.Random(5)
    settings = EngineSettings(model=str(family.path), dtype="float32", device="cuda", kv_cache_memory=2**24)
    requests: dict[str, tuple[str | None, list[int]]] = {
        str(index): (None, random_text(rng, 30, 60)) for index in range(32)
    }

    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def serve() -> None:
        engine = LLMEngine(settings)
        answers(engine, family, requests, MAX_TOKENS)
        settled = allocated()
        for turn in range(5):
            answers(engine, family, {f"{turn}-{key}": request for key, request in requests.items()}, MAX_TOKENS)
        assert allocated() <= settled + 2**20
        engine.close()

    serve()  # the first engine of a process leaves what the libraries keep, such as workspaces of products
    before = allocated()
    serve()
    assert allocated() <= before + 2**20


def test_torch_s_attention_replaces_kernels_that_fail(
    family_of: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(TritonBackend):
        def attend(self, *_: object) -> torch.Tensor:
            raise RuntimeError("out of shared memory")

    platform = CUDAPlatform()
    platform.backends = (Failing, SDPABackend)
    family = family_of("mistral")
    engine = make_engine(family, platform)
    assert type(engine.runner.backend) is SDPABackend
    assert "using torch's attention for this model" in caplog.text
    assert answers(engine, family, {"one": (None, [1, 2, 3])}, 5) == {"one": family.expected(None, [1, 2, 3], 5)}
