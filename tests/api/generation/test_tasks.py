"""Multitask prompts in requests, and prompts that are not for generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.support.api_fixtures import CountingStore, WaitUntil
from tests.support.fake_engine import FakeEngine
from tests.support.presence import present

pytestmark = pytest.mark.anyio

PATHS = ("/v1/completions", "/v1/chat/completions")


async def ask(client: httpx.AsyncClient, path: str = PATHS[0], **fields: Any) -> httpx.Response:
    text: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "abc"}
    return await client.post(path, json={"model": "sentiment"} | text | fields)


@pytest.fixture
def record(store: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace these fields in the version of every lease."""
    lease = store.lease_for_request

    def change(**fields: Any) -> None:
        def leased(*arguments: Any) -> Any:
            found = lease(*arguments)
            return replace(found, version=replace(found.version, **fields))

        monkeypatch.setattr(store, "lease_for_request", leased)

    return change


@pytest.mark.parametrize("path", PATHS)
async def test_the_task_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str, record: Callable[..., None], path: str
) -> None:
    record(num_tasks=3)
    for task_id in (0, 2):
        response = await ask(client, path, task_id=task_id)
        assert response.status_code == 200, response.text
    first, second = (present(request.soft_prompt) for request in engine.requests)
    assert (first.task_id, second.task_id) == (0, 2)
    assert first.digest == second.digest
    assert first.identity != second.identity


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("task_id", "message"),
    [(None, "a task is required"), (3, "task 3 does not exist")],
)
async def test_a_multitask_prompt_needs_one_of_its_tasks(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    sentiment: str,
    record: Callable[..., None],
    eventually: WaitUntil,
    path: str,
    task_id: int | None,
    message: str,
) -> None:
    record(num_tasks=3)
    response = await ask(client, path, task_id=task_id)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", "task_id")
    assert message in error["message"]
    assert "the tasks 0 to 2" in error["message"]
    assert engine.requests == []
    eventually(lambda: len(store.leased) == len(store.released) == 1)


@pytest.mark.parametrize(
    ("model", "named"), [("sentiment", "the soft prompt sentiment@1"), ("tiny", "the base model")]
)
async def test_task_ids_are_refused_for_other_soft_prompts(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    sentiment: str,
    eventually: WaitUntil,
    model: str,
    named: str,
) -> None:
    response = await ask(client, model=model, task_id=0)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "task_id")
    assert f"{named} is not one" in error["message"]
    assert engine.requests == []
    eventually(lambda: len(store.leased) == len(store.released))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param"), [({}, "model"), ({"model": "tiny", "prompt_id": "sentiment@1"}, "prompt_id")]
)
async def test_a_soft_prompt_with_a_head_cannot_generate(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    sentiment: str,
    record: Callable[..., None],
    eventually: WaitUntil,
    path: str,
    fields: dict[str, Any],
    param: str,
) -> None:
    record(task_type="SEQ_CLS", num_labels=2)
    response = await ask(client, path, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert "sentiment@1 was trained for SEQ_CLS, not for generation" in error["message"]
    assert engine.requests == []
    eventually(lambda: len(store.leased) == len(store.released) == 1)


async def test_a_version_shows_its_tasks_and_labels(client: httpx.AsyncClient, sentiment: str) -> None:
    version = (await client.get("/v1/prompts/sentiment/versions/1")).json()
    assert (version["num_tasks"], version["num_labels"]) == (None, None)
