"""The soft-prompt loader: dtypes, tasks, refused files, and the memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.types import SoftPromptSource
from tests.support.waiting import wait_until

WIDTH, ROWS, TASKS, RANKS = 8, 5, 3, 2

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Write tensors and load them; returns the rows, or the loader's error."""
    loaders = []

    def run(tensors: dict[str, torch.Tensor], task_id: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
        loader = SoftPromptLoader(
            head_width=8, embedding_width=WIDTH, key_values_width=4 * WIDTH, dtype=dtype, budget_bytes=1 << 20
        )
        loaders.append(loader)
        path = tmp_path / f"{len(loaders)}.safetensors"
        save_file(tensors, path)
        source = SoftPromptSource(
            digest="d", num_virtual_tokens=ROWS, is_key_values=False, path=str(path), task_id=task_id
        )
        assert not loader.acquire(source)
        ((identity, error),) = wait_loaded(loader, 1)
        assert identity == source.identity
        return error if error is not None else loader.rows(source)

    yield run
    for loader in loaders:
        loader.close()


def multitask(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "prompt_embeddings": (ROWS, WIDTH),
        "prefix_task_cols": (TASKS, ROWS, RANKS),
        "prefix_task_rows": (TASKS, RANKS, WIDTH),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("serving", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tasks_are_multiplied_in_float32_and_then_rounded(
    load: Load, saved: torch.dtype, serving: torch.dtype
) -> None:
    tensors = multitask(saved)
    rows, cols, task_rows = (tensor.float() for tensor in tensors.values())
    for task_id in range(TASKS):
        # A batched product, as in PEFT: the product of two matrices may differ in the last bit.
        want = (rows * torch.matmul(cols[[task_id]], task_rows[[task_id]])[0]).to(serving)
        found = load(tensors, task_id, serving)
        assert found.dtype == serving
        assert torch.equal(found, want)


def test_float64_passes_through_float32(load: Load) -> None:
    # Rounded directly to bfloat16 it would go up; rounded to float32 first it is a tie, which goes to even: down.
    value = 1 + 2**-8 + 2**-40
    rows = torch.full((ROWS, WIDTH), value, dtype=torch.float64)
    assert torch.equal(load({"prompt_embeddings": rows}, None, torch.bfloat16), torch.ones(ROWS, WIDTH).bfloat16())
    assert torch.equal(load({"prompt_embeddings": rows}), rows.float())


@pytest.mark.parametrize("task_id", [TASKS, TASKS + 10])
def test_a_missing_task_is_an_error(load: Load, task_id: int) -> None:
    assert f"has no task {task_id}" in str(load(multitask(), task_id))


def test_a_task_id_is_required_for_multitask_prompts_only(load: Load) -> None:
    wanted = "a multitask prompt needs a task id, and no other prompt takes one"
    assert wanted in str(load(multitask()))
    assert wanted in str(load({"prompt_embeddings": torch.ones(ROWS, WIDTH)}, 0))


def test_a_head_is_not_part_of_the_rows(load: Load) -> None:
    rows = torch.rand(ROWS, WIDTH)
    assert torch.equal(load({"prompt_embeddings": rows, "base_model.score.weight": torch.ones(2, WIDTH)}), rows)


@pytest.fixture
def make_loader(tmp_path: Path) -> Iterator[Callable[[int], SoftPromptLoader]]:
    made: list[SoftPromptLoader] = []

    def make(budget_bytes: int) -> SoftPromptLoader:
        loader = SoftPromptLoader(
            head_width=8,
            embedding_width=WIDTH,
            key_values_width=4 * WIDTH,
            dtype=torch.float32,
            budget_bytes=budget_bytes,
        )
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[[str], SoftPromptSource]:
    def make(digest: str) -> SoftPromptSource:
        path = tmp_path / f"{digest}.safetensors"
        save_file({"prompt_embeddings": torch.ones(ROWS, WIDTH)}, path)
        return SoftPromptSource(digest=digest, num_virtual_tokens=ROWS, is_key_values=False, path=str(path))

    return make


def wait_loaded(loader: SoftPromptLoader, count: int) -> list[tuple[str, str | None]]:
    ended: list[tuple[str, str | None]] = []

    def are_loaded() -> bool:
        ended.extend(loader.take_loaded())
        return len(ended) >= count

    wait_until(are_loaded)
    return ended


SIZE = ROWS * WIDTH * 4


def test_the_budget_and_its_numbers(
    make_loader: Callable[[int], SoftPromptLoader], make_source: Callable[[str], SoftPromptSource]
) -> None:
    loader = make_loader(2 * SIZE)
    assert loader.stats.loads == 0
    sources = [make_source(name) for name in "abc"]
    for source in sources:
        assert not loader.acquire(source)
    assert not loader.acquire(sources[0])  # a soft prompt that is being read is a hit
    assert list(loader.digests) == []
    wait_loaded(loader, 3)
    assert list(loader.digests) == ["a", "b", "c"]
    loader.release(sources[1])
    assert list(loader.digests) == ["a", "c", "b"], "what is used comes first"
    loader.acquire(sources[1])
    for source in (*sources, sources[0]):
        loader.release(source)
    assert list(loader.digests) == ["a", "c"]
    stats = loader.stats
    assert (stats.hits, stats.misses, stats.loads, stats.evictions) == (2, 3, 3, 1)
    assert (stats.resident, stats.resident_bytes) == (2, 2 * SIZE)
    assert stats.load_seconds.sum > 0
    assert loader.acquire(sources[2])
    assert not loader.acquire(sources[1])
    assert (loader.stats.hits, loader.stats.misses) == (3, 4)


def test_a_pin_outlasts_the_budget(
    make_loader: Callable[[int], SoftPromptLoader], make_source: Callable[[str], SoftPromptSource]
) -> None:
    loader = make_loader(0)
    source = make_source("a")
    loader.pin(source)
    loader.pin(source)
    wait_loaded(loader, 1)
    assert loader.acquire(source)
    loader.release(source)
    assert (loader.stats.resident, loader.stats.resident_bytes) == (1, SIZE)
    loader.unpin(source)
    assert (loader.stats.resident, loader.stats.resident_bytes, loader.stats.evictions) == (0, 0, 1)
    loader.unpin(source)
    assert (loader.stats.misses, loader.stats.loads) == (0, 1)


def test_a_pin_of_a_file_that_cannot_be_read_ends(
    make_loader: Callable[[int], SoftPromptLoader], make_source: Callable[[str], SoftPromptSource]
) -> None:
    loader = make_loader(0)
    source = make_source("a")
    Path(source.path).unlink()
    loader.pin(source)
    ((identity, error),) = wait_loaded(loader, 1)
    assert identity == "a"
    assert "cannot be read" in str(error)
    loader.unpin(source)
    assert (loader.stats.resident, loader.stats.loads) == (0, 0)


def test_unpinned_while_it_is_read(
    make_loader: Callable[[int], SoftPromptLoader], make_source: Callable[[str], SoftPromptSource]
) -> None:
    loader = make_loader(0)
    source = make_source("a")
    loader.pin(source)
    loader.unpin(source)
    assert wait_loaded(loader, 1) == [("a", None)]
    assert loader.stats.resident == 0
