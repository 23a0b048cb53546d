"""Soft prompts that cannot be loaded, cold ones, many of them, and requests that end early, on one engine of vLLM."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prompt_store.types import ROWS_TENSOR
from server.engine.types import AdapterSource, Member, SamplingParams, SoftPromptSource
from server.errors import RequestFailedError, RequestRefusedError, UnsupportedByEngineError, WaitTimeoutError
from tests.support.engine.harness import Family, greedy, random_text
from tests.support.vllm import make_vllm_family, needs_vllm, questions
from tests.support.vllm_engine import MAX_TOKENS, Engine, copy_of, expected

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


KEYS = ("prompt_tuning_20", "p_tuning_7", "prefix_13", "prefix_projected_16")
BUDGET = 400_000
"""Host memory of about 16 of the largest soft prompts."""
ADAPTER = AdapterSource(digest="a", path="/a", config_path="/c", num_parameters=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(make_vllm_family("gemma3", tmp_path_factory.mktemp("family"), KEYS), BUDGET)
    yield engine
    engine.close()


def damaged(source: SoftPromptSource, folder: Path, how: str) -> SoftPromptSource:
    copied = copy_of(source, folder, f"{source.digest}-{how}")
    path = Path(copied.path)
    rows = load_file(path)[ROWS_TENSOR]
    if how == "missing":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(random.Random(0).randbytes(500))
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "count":
        save_file({ROWS_TENSOR: rows[:-1].contiguous()}, path)
    elif how == "shape":
        save_file({ROWS_TENSOR: rows[:, :-1].contiguous()}, path)
    elif how == "name":
        save_file({"other": rows}, path)
    else:
        rows[1, 2] = torch.nan
        save_file({ROWS_TENSOR: rows}, path)
    return copied


FAULTS = {
    "missing": "cannot be read",
    "garbage": "cannot be read",
    "cut": "cannot be read",
    "count": "has shape",
    "shape": "has shape",
    "name": "cannot be read",
    "nan": "not finite",
}


@pytest.mark.parametrize("key", ["prompt_tuning_20", "prefix_13"])
def test_each_fault_of_a_file_fails_its_request_with_the_reason_among_14_others(
    engine: Engine, tmp_path: Path, key: str
) -> None:
    source = engine.family.soft_prompts[key]
    asked = questions(engine.family, 14)

    async def together() -> tuple[list[Any], list[list[int]]]:
        bad = [engine.ask(damaged(source, tmp_path, how), [1, 2, 3]) for how in FAULTS]
        found = asyncio.gather(*bad, return_exceptions=True)
        return await asyncio.gather(found, engine.ask_all(asked))

    errors, answers = engine.run(together())
    assert answers == expected(engine.family, asked)
    for (how, words), error in zip(FAULTS.items(), errors, strict=True):
        assert isinstance(error, RequestFailedError), (how, error)
        assert words in error.message, how
    engine.check(asked[:5])


def test_200_faults_in_a_row_leave_nothing_behind(engine: Engine, tmp_path: Path) -> None:
    sources = [engine.family.soft_prompts[key] for key in ("prompt_tuning_20", "prefix_13")]
    missing = [damaged(source, tmp_path, "missing") for source in sources]

    async def fail() -> None:
        for index in range(200):
            with pytest.raises(RequestFailedError):
                await engine.ask(missing[index % 2], [index % 100])

    engine.run(fail())
    engine.check(questions(engine.family, 5))


def test_a_file_that_is_repaired_is_read_again(engine: Engine, tmp_path: Path) -> None:
    for key in ("prompt_tuning_20", "prefix_13"):
        source = engine.family.soft_prompts[key]
        bad = damaged(source, tmp_path, "missing")
        with pytest.raises(RequestFailedError):
            engine.run(engine.ask(bad, [5, 6]))
        Path(bad.path).write_bytes(Path(source.path).read_bytes())
        assert engine.run(engine.ask(bad, [5, 6])) == engine.family.expected(key, [5, 6], MAX_TOKENS)


@pytest.mark.parametrize("key", ["prompt_tuning_20", "prefix_13"])
def test_64_requests_for_a_cold_soft_prompt_load_it_once(engine: Engine, tmp_path: Path, key: str) -> None:
    source = copy_of(engine.family.soft_prompts[key], tmp_path, f"cold-{key}")
    text = random_text(random.Random(3), 9, 9)
    before = engine.engine.stats.host.loads

    async def ask() -> list[list[int]]:
        return await asyncio.gather(*(engine.ask(source, text, salt=str(index % 3)) for index in range(64)))

    assert engine.run(ask()) == [engine.family.expected(key, text, MAX_TOKENS)] * 64
    assert engine.engine.stats.host.loads == before + 1


def copies(family: Family, folder: Path, name: str, count: int) -> list[tuple[str, SoftPromptSource]]:
    """Copies of each soft prompt, as cold as new uploads."""
    sources = family.soft_prompts
    return [(key, copy_of(sources[key], folder, f"{name}{index}-{key}")) for index in range(count) for key in KEYS]


def use_many(engine: Engine, folder: Path, name: str) -> None:
    """Use 240 cold soft prompts once, 24 at a time; the answers are right, and most are evicted."""
    many, text = copies(engine.family, folder, name, 60), random_text(random.Random(4), 5, 5)
    want = {key: engine.family.expected(key, text, MAX_TOKENS) for key in KEYS}

    async def ask() -> list[list[int]]:
        gate = asyncio.Semaphore(24)

        async def one(source: SoftPromptSource) -> list[int]:
            async with gate:
                return await engine.ask(source, text)

        return await asyncio.gather(*(one(source) for _, source in many))

    before = engine.engine.stats.host.evictions
    assert engine.run(ask()) == [want[key] for key, _ in many]
    assert engine.engine.stats.host.evictions > before + 100


def test_many_soft_prompts_over_a_small_budget_are_right_and_evicted(engine: Engine, tmp_path: Path) -> None:
    use_many(engine, tmp_path, "many")
    engine.check(questions(engine.family, 8))
    # Computed ones stay beyond the budget until their first use.
    assert engine.engine.stats.host.resident_bytes < 4 * BUDGET


def test_pins_survive_what_evicts_others(engine: Engine, tmp_path: Path) -> None:
    pinned = [copy_of(engine.family.soft_prompts[key], tmp_path, f"pinned-{key}") for key in KEYS]

    async def pin() -> None:
        for source in pinned:
            engine.engine.pin(source)
        await asyncio.gather(*(engine.ask(source, [3]) for source in pinned))

    engine.run(pin())
    use_many(engine, tmp_path, "others")
    before = engine.engine.stats.host.loads
    for source in pinned:
        Path(source.path).unlink()
    for key, source in zip(KEYS, pinned, strict=True):
        assert engine.run(engine.ask(source, [3, 4])) == engine.family.expected(key, [3, 4], MAX_TOKENS)
    assert engine.engine.stats.host.loads == before

    async def unpin() -> None:
        for source in pinned:
            engine.engine.unpin(source)
        await engine.ask(None, [1])

    engine.run(unpin())


def test_requests_aborted_at_every_moment_leave_no_block(engine: Engine, tmp_path: Path) -> None:
    family, rng = engine.family, random.Random(6)
    cold = [source for _, source in copies(family, tmp_path, "aborted", 12)]
    asked = questions(family, 10)

    async def storm() -> list[list[int]]:
        kept = asyncio.ensure_future(engine.ask_all(asked))
        short = [
            engine.ask(source, random_text(rng, 1, 40), stop_after=index % 5) for index, source in enumerate(cold)
        ]
        await asyncio.gather(*short)
        return await kept

    assert engine.run(storm()) == expected(family, asked)
    engine.check(asked)


def test_a_request_that_does_not_start_in_time_is_failed(engine: Engine) -> None:
    async def crowd() -> list[Any]:
        long = greedy(150, ignore_eos=True)
        busy = [asyncio.ensure_future(engine.ask(None, [index], params=long)) for index in range(64)]
        await asyncio.sleep(0.2)
        late = engine.ask(engine.family.soft_prompts["prefix_13"], [1, 2], timeout=0.05, priority=100)
        found = await asyncio.gather(late, return_exceptions=True)
        return [*found, await asyncio.gather(*busy)]

    late, busy = engine.run(crowd())
    assert isinstance(late, WaitTimeoutError)
    assert [len(tokens) for tokens in busy] == [150] * 64
    assert engine.engine.stats.num_timeouts == 1


def test_cached_blocks_are_kept_apart_by_soft_prompt_and_tenant(engine: Engine, tmp_path: Path) -> None:
    """A soft prompt's positions look like a text that repeats its first token; each has its own tokens."""
    key, family = "prompt_tuning_20", engine.family
    text = [5, *random_text(random.Random(8), 80, 80)]
    like_it = [5] * 20 + text
    reversed_rows = copy_of(family.soft_prompts[key], tmp_path, "reversed")
    rows = load_file(reversed_rows.path)[ROWS_TENSOR]
    save_file({ROWS_TENSOR: rows.flip(0).contiguous()}, reversed_rows.path)
    alone = engine.run(engine.ask(reversed_rows, text, salt="alone"))
    # Otherwise a mix-up would not be seen.
    answers = [alone, family.expected(key, text, MAX_TOKENS), family.expected(None, like_it, MAX_TOKENS)]
    assert len(set(map(tuple, answers))) == 3
    for _ in range(2):
        assert engine.run(engine.ask(family.soft_prompts[key], text)) == family.expected(key, text, MAX_TOKENS)
        assert engine.run(engine.ask(None, like_it)) == family.expected(None, like_it, MAX_TOKENS)
        assert engine.run(engine.ask(reversed_rows, text)) == alone
    hits = engine.engine.stats.prefix_cache_hits
    assert engine.run(engine.ask(family.soft_prompts[key], text, salt="b")) == family.expected(key, text, MAX_TOKENS)
    assert engine.engine.stats.prefix_cache_hits == hits
    engine.run(engine.ask(family.soft_prompts[key], text, salt="b"))
    assert engine.engine.stats.prefix_cache_hits > hits


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"params": greedy(1, logit_bias={197: 1.0})}, RequestRefusedError),
        ({"params": greedy(300)}, RequestRefusedError),
        ({"params": SamplingParams(max_tokens=1, temperature=9.0)}, RequestRefusedError),
        ({"params": greedy(0, classify=True)}, UnsupportedByEngineError),
        ({"others": (Member(),)}, UnsupportedByEngineError),
        ({"adapter": ADAPTER}, UnsupportedByEngineError),
    ],
)
def test_what_can_never_be_served_is_refused(engine: Engine, more: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        engine.run(engine.ask(None, [1], **more))


def test_a_token_that_does_not_exist_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestRefusedError, match="token id 197"):
        engine.run(engine.ask(None, [197]))
