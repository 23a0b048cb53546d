"""The engine probes an upload before it is published; an upload that fails leaves no files."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from server.api.prompts.probing import MAX_TASKS, NEW_TOKENS, PROBE_TEXT
from server.config import Settings
from server.errors import EngineDeadError, NotFiniteError, RequestFailedError, WaitTimeoutError
from tests.support.api_fixtures import CountingStore, MakeApp, UploadParts
from tests.support.byte_tokenizer import BOS, ByteTokenizer
from tests.support.fake_engine import CONTEXT, FakeEngine
from tests.support.in_process import ready
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

OVERFLOW = NotFiniteError("the model computed a value that is not finite for this text")


def files_under(settings: Settings) -> list[Path]:
    kept = Path(settings.store.location)
    return [path for folder in ("blobs", "staging") for path in (kept / folder).rglob("*") if path.is_file()]


async def test_an_upload_is_probed_with_a_short_text(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    response = await client.post("/v1/prompts", **upload_parts())
    assert response.status_code == 201
    ((source, text, max_tokens, salt, max_wait),) = engine.probed
    assert (source.digest, source.num_virtual_tokens, source.task_id) == (response.json()["digest"], 4, None)
    assert (text, max_tokens, salt, max_wait) == ([BOS, *PROBE_TEXT.encode()], NEW_TOKENS, "", None)
    assert "staging" in source.path  # no blob is stored yet


async def test_an_upload_that_fails_the_probe_is_refused_and_leaves_no_files(
    client: httpx.AsyncClient, engine: FakeEngine, settings: Settings, store: CountingStore, upload_parts: UploadParts
) -> None:
    before = files_under(settings)
    engine.probe_failures = {None: OVERFLOW}
    response = await client.post("/v1/prompts", **upload_parts())
    error = response.json()["error"]
    message = (
        "the base model cannot compute with this soft prompt: "
        "the model computed a value that is not finite for this text"
    )
    assert (response.status_code, error["code"], error["message"]) == (400, "invalid_prompt", message)
    assert error["details"] == [
        {
            "code": "not_finite_in_model",
            "message": message,
            "file": "adapter_model.safetensors",
            "field": "prompt_embeddings",
        }
    ]
    assert (await client.get("/v1/prompts/sentiment")).status_code == 404
    assert (await client.get("/v1/prompts")).json()["data"] == []
    assert files_under(settings) == before
    assert store.leased == []
    engine.probe_failures = {}
    assert (await client.post("/v1/prompts", **upload_parts())).json()["version"] == 1


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (EngineDeadError("the engine process ended"), 503, "engine_dead"),
        (WaitTimeoutError("the request waited 2 seconds"), 503, "overloaded_waiting"),
        (RequestFailedError("it cannot be read"), 500, "request_failed"),
    ],
)
async def test_an_upload_that_cannot_be_probed_is_not_published(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    settings: Settings,
    upload_parts: UploadParts,
    failure: Exception,
    status: int,
    code: str,
) -> None:
    before = files_under(settings)
    engine.probe_failures = {None: failure}
    response = await client.post("/v1/prompts", **upload_parts())
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert (await client.get("/v1/prompts/sentiment")).status_code == 404
    assert files_under(settings) == before


async def test_uploads_are_503_while_the_engine_restarts(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    engine.outage = "the engine process was killed by signal 9"
    response = await client.post("/v1/prompts", **upload_parts())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_restarting")
    assert int(response.headers["retry-after"]) > 0
    engine.outage = None
    assert (await client.post("/v1/prompts", **upload_parts())).status_code == 201


@pytest.mark.parametrize(("room", "num_text", "num_new"), [(2, 1, 1), (3, 1, 2), (9, 7, 2)])
async def test_a_long_soft_prompt_is_probed_with_a_text_that_fits(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts, room: int, num_text: int, num_new: int
) -> None:
    response = await client.post("/v1/prompts", **upload_parts(rows=CONTEXT - room))
    assert response.status_code == 201
    ((_, text, max_tokens, _, _),) = engine.probed
    assert (len(text), max_tokens) == (num_text, num_new)


async def test_each_task_of_a_multitask_prompt_is_probed(
    client: httpx.AsyncClient, engine: FakeEngine, other_parts: UploadParts
) -> None:
    parts = other_parts("tasks")
    engine.probe_failures = {2: OVERFLOW}
    response = await client.post("/v1/prompts", **parts)
    assert response.status_code == 400
    assert "task 2 of this soft prompt" in response.json()["error"]["message"]
    assert [source.task_id for source, *_ in engine.probed] == [0, 1, 2]


async def test_the_number_of_probed_tasks_is_limited(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, other_parts: UploadParts
) -> None:
    monkeypatch.setattr("server.api.prompts.probing.MAX_TASKS", 2)
    assert MAX_TASKS > 2
    assert (await client.post("/v1/prompts", **other_parts("tasks"))).status_code == 201
    assert [source.task_id for source, *_ in engine.probed] == [0, 1]


async def test_a_probe_takes_a_permit_and_has_the_wait_limit_of_requests(
    make_app: MakeApp, settings: Settings, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    engine.step_seconds = 0.05
    settings = replace(
        settings,
        engine=replace(settings.engine, max_num_seqs=1),
        http=replace(settings.http, max_waiting=0, max_wait_seconds=7.0),
    )
    app = make_app(settings)
    async with ready(app) as client:
        assert (await client.post("/v1/prompts", **upload_parts())).status_code == 201
        assert engine.probed[0][-1] == 7.0
        engine.stall_after = 1
        busy = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
        await until(lambda: engine.in_flight)
        response = await client.post("/v1/prompts", **upload_parts("other"))
        assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
        engine.stall_after = None
        assert (await busy).status_code == 200


@pytest.mark.parametrize(("found", "tried"), [([5, 999, 6], [5, 6]), ([999], [0])])
async def test_the_probe_omits_tokens_without_a_row(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    tokenizer: ByteTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    upload_parts: UploadParts,
    found: list[int],
    tried: list[int],
) -> None:
    async def encode(texts: list[str], **_: object) -> list[list[int]]:
        return [list(found) for _ in texts]

    monkeypatch.setattr(tokenizer, "encode", encode)
    assert (await client.post("/v1/prompts", **upload_parts())).status_code == 201
    ((_, text, *_),) = engine.probed
    assert text == tried
