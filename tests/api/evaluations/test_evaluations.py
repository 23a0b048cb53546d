"""``/v1/evaluations``: rows answered here or recorded, comparison, events, tenants, faults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import Settings
from tests.support.api_fixtures import MakeApp, UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.in_process import ready
from tests.support.keyed import bearer, key_entry, locked
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

PATH = "/v1/evaluations"
LABELLED = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": "x"}]
GENERATED = [{"prompt": letter, "completion": letter} for letter in "abc"]
DIGEST = "0" * 64


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


async def create(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": "tiny"} | body)
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    return found


async def record(client: httpx.AsyncClient, answers: str, **body: Any) -> dict[str, Any]:
    """Record one answer a letter; ``!`` is an error. The labels are those of ``LABELLED``."""
    rows = [
        {"line": line, "expected": row["label"], **({"error": "too long"} if answer == "!" else {"answer": answer})}
        for line, (row, answer) in enumerate(zip(LABELLED, answers, strict=True), 1)
    ]
    return await create(client, rows=rows, metric="accuracy", dataset_digest=DIGEST, **body)


def ended(client: httpx.AsyncClient, found: dict[str, Any]) -> Callable[[], Any]:
    async def check() -> bool:
        found.update((await client.get(f"{PATH}/{found['id']}")).json())
        return found["status"] in ("completed", "failed", "cancelled")

    return check


async def rows_of(client: httpx.AsyncClient, found: dict[str, Any], **params: Any) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = (await client.get(f"{PATH}/{found['id']}/rows", params=params)).json()["data"]
    return data


async def test_labelled_rows_are_answered_here_in_the_batch_tier(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str
) -> None:
    data = lines(LABELLED)
    found = await create(client, model="sentiment", data=data, dataset="test.jsonl", name="nightly")
    assert (found["status"], found["model"], found["source"]) == ("queued", "sentiment@1", "server")
    assert found["dataset_digest"] == hashlib.sha256(data.encode()).hexdigest()
    assert found["settings"]["separator"] == "\n"
    await until(ended(client, found))
    assert found["status"] == "completed"
    assert found["rows"] == {"total": 3, "answered": 3, "right": found["rows"]["right"], "errors": 0}
    scores = found["scores"]
    assert scores["accuracy"] == found["rows"]["right"] / 3
    assert scores["interval"][0] < scores["accuracy"] < scores["interval"][1]
    assert scores["confusion"]["labels"] == ["x", "y", "(other)"]
    assert sum(map(sum, scores["confusion"]["counts"])) == 3
    assert all(request.is_batch for request in engine.requests)
    rows = await rows_of(client, found)
    assert [(row["line"], row["expected"], row["text"]) for row in rows] == [
        (1, "x", None),
        (2, "y", None),
        (3, "x", None),
    ]
    assert {row["answer"] for row in rows} <= {"x", "y"}


@pytest.mark.parametrize(
    ("row", "other"),
    [
        ({"prompt": "hi", "completion": "hello"}, {"prompt": "hi", "completion": "bye"}),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye"}]},
        ),
    ],
)
async def test_generated_answers_are_compared_and_kept_only_if_asked(
    client: httpx.AsyncClient, engine: FakeEngine, row: dict[str, Any], other: dict[str, Any]
) -> None:
    engine.reply = "hello"
    data = lines([row, other])
    for keeps in (False, True):
        found = await create(client, data=data, keep_texts=keeps, max_tokens=5, stop=["!"])
        await until(ended(client, found))
        assert (found["metric"], found["scores"]["accuracy"], found["scores"]["labels"]) == ("exact_match", 0.5, None)
        right, wrong = await rows_of(client, found)
        assert (right["outcome"], wrong["outcome"]) == ("right", "wrong")
        kept = ("hello", "bye", json.dumps(row)) if keeps else (None, None, None)
        assert (wrong["answer"], wrong["expected"], right["text"]) == kept
    params = engine.requests[-1].params
    assert (params.max_tokens, params.temperature) == (5, 0.0)


async def test_recorded_rows_get_their_scores_from_the_server(client: httpx.AsyncClient) -> None:
    found = await record(client, "xx!", text_prompt="Which?", dataset="a\nb")
    assert (found["status"], found["source"], found["dataset"]) == ("completed", "client", "a b")
    assert found["rows"] == {"total": 3, "answered": 3, "right": 1, "errors": 1}
    assert found["scores"]["confusion"]["counts"] == [[1, 0, 1], [1, 0, 0]]
    assert found["settings"]["text_prompt"] == "Which?"
    (row,) = await rows_of(client, found, outcome="error")
    assert (row["line"], row["error"]) == (3, "too long")
    rows = [{"line": 1, "right": True, "text": "secret", "answer": "secret"}, {"line": 2, "right": False}]
    found = await create(client, rows=rows, metric="exact_match", dataset_digest=DIGEST)
    assert found["scores"]["accuracy"] == 0.5
    assert "secret" not in json.dumps(await rows_of(client, found))


async def test_two_evaluations_are_compared_row_by_row(client: httpx.AsyncClient) -> None:
    first, second = await record(client, "xyx"), await record(client, "yx!")
    path = f"{PATH}/{first['id']}/comparison"
    found = (await client.get(path, params={"to": second["id"]})).json()
    counts = [found[name] for name in ("rows", "both_right", "only_first", "only_second", "both_wrong")]
    assert counts == [3, 0, 3, 0, 0]
    assert (found["difference"], found["p_value"], found["has_more"]) == (1.0, 0.25, False)
    assert found["first"]["scores"]["labels"]["x"]["f1"] == 1.0
    assert [(row["line"], row["right"], row["first_answer"], row["second_answer"]) for row in found["data"]] == [
        (1, "first", "x", "y"),
        (2, "first", "y", "x"),
        (3, "first", "x", None),
    ]
    page = (await client.get(path, params={"to": second["id"], "limit": 1, "after": 0})).json()
    assert ([row["row"] for row in page["data"]], page["has_more"], page["last_row"]) == ([1], True, 1)
    found = (await client.get(path, params={"to": second["id"], "right": "second"})).json()
    assert (found["data"], found["only_first"]) == ([], 3)
    other = await create(client, rows=[{"line": 1, "right": True}], metric="exact_match", dataset_digest="1" * 64)
    refused = await client.get(path, params={"to": other["id"]})
    assert (refused.status_code, "other data" in refused.text) == (400, True)
    assert (await client.get(path, params={"to": "eval-0"})).status_code == 404


async def test_a_running_one_is_streamed_and_cancelled(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stall_after = 1
    found = await create(client, data=lines(GENERATED))

    async def is_running() -> bool:
        return bool((await client.get(f"{PATH}/{found['id']}")).json()["status"] == "in_progress")

    await until(is_running)
    refused = await client.delete(f"{PATH}/{found['id']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    waiting = await create(client, data=lines(GENERATED))
    assert (await client.post(f"{PATH}/{waiting['id']}/cancel")).json()["status"] == "cancelled"
    other = await record(client, "xyx")
    comparison = await client.get(f"{PATH}/{other['id']}/comparison", params={"to": found["id"]})
    assert (comparison.status_code, "not completed" in comparison.text) == (400, True)
    assert (await client.post(f"{PATH}/{found['id']}/cancel")).json()["status"] == "cancelling"
    stream = await client.get(f"{PATH}/{found['id']}/events")
    frames = [json.loads(frame.split("data: ")[1]) for frame in stream.text.strip().split("\n\n")]
    assert frames[-1]["status"] == "cancelled"
    assert all(row["text"] is None for row in await rows_of(client, found))
    await until(lambda: engine.in_flight == 0)
    assert (await client.delete(f"{PATH}/{found['id']}")).json()["deleted"] is True
    assert (await client.get(f"{PATH}/{found['id']}")).status_code == 404


async def test_one_goes_on_after_a_restart(make_app: MakeApp, settings: Settings, engine: FakeEngine) -> None:
    engine.stall_after = 1
    async with ready(make_app(settings)) as client:
        found = await create(client, data=lines(GENERATED))
        await until(lambda: bool(engine.requests))
    engine.draining, engine.stall_after = False, None
    async with ready(make_app(settings)) as client:
        await until(ended(client, found))
        assert (found["status"], found["rows"]["answered"]) == ("completed", 3)


async def test_a_row_that_fails_is_an_error_and_a_missing_model_ends_it(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    found = await create(
        client, data=lines([{"prompt": "a" * 300, "completion": "x"}, {"prompt": "a", "completion": "x"}])
    )
    await until(ended(client, found))
    assert (found["status"], found["rows"]["errors"]) == ("completed", 1)
    assert "256" in (await rows_of(client, found, outcome="error"))[0]["error"]
    (await client.post("/v1/prompts", **upload_parts("gone"))).raise_for_status()
    engine.stall_after = 1
    blocking = await create(client, data=lines(GENERATED))
    await until(lambda: engine.in_flight > 0)
    found = await create(client, model="gone", data=lines(LABELLED))
    (await client.delete("/v1/prompts/gone")).raise_for_status()
    await client.post(f"{PATH}/{blocking['id']}/cancel")
    await until(ended(client, found))
    assert (found["status"], "does not exist" in found["error"]) == ("failed", True)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"data": "{}"}, 400, "line 1: not one of the formats"),
        ({"data": ""}, 400, "has no rows"),
        ({"data": lines([LABELLED[0], {"prompt": "a", "completion": "b"}])}, 400, "line 2: has the format"),
        ({"data": lines([{"text": "a", "label": "x" * 600}])}, 400, "more than 512 characters"),
        ({"data": lines(LABELLED), "rows": [{"line": 1}]}, 400, "either data or rows"),
        ({}, 400, "either data or rows"),
        ({"data": lines(LABELLED), "metric": "accuracy"}, 400, "follows from data"),
        ({"rows": [{"line": 1, "right": True}]}, 400, "metric: must be given with rows"),
        ({"rows": [{"line": 1}], "metric": "exact_match"}, 400, "dataset_digest: must be given with rows"),
        ({"rows": [{"line": 1}], "metric": "exact_match", "dataset_digest": DIGEST}, 400, "either right or error"),
        ({"rows": [{"line": 1}], "metric": "accuracy", "dataset_digest": DIGEST}, 400, "expected must be a label"),
        (
            {"rows": [{"line": 1, "expected": "x"}], "metric": "accuracy", "dataset_digest": DIGEST},
            400,
            "answer must be a label",
        ),
        (
            {
                "rows": [{"line": 1, "expected": "x", "answer": "y", "right": True}],
                "metric": "accuracy",
                "dataset_digest": DIGEST,
            },
            400,
            "does not follow",
        ),
        (
            {
                "rows": [{"line": 1, "expected": "x", "answer": "y", "error": "?"}],
                "metric": "accuracy",
                "dataset_digest": DIGEST,
            },
            400,
            "has an error",
        ),
        ({"data": lines(LABELLED), "model": "ghost"}, 404, "ghost"),
        ({"data": lines(LABELLED), "max_tokens": 0}, 400, "max_tokens"),
    ],
)
async def test_faults_are_refused_with_their_place(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, message: str
) -> None:
    response = await client.post(PATH, json={"model": "tiny"} | body)
    assert (response.status_code, message in response.text) == (status, True), response.text
    assert (await client.get(PATH)).json()["data"] == []


async def test_the_number_of_rows_and_of_waiting_ones_is_bounded(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.stall_after = 1
    monkeypatch.setattr("server.api.evaluations.creation.MAX_ROWS", 2)
    response = await client.post(PATH, json={"model": "tiny", "data": lines(GENERATED)})
    assert (response.status_code, "3 rows, of at most 2" in response.text) == (400, True)
    monkeypatch.setattr("prompt_store.jobs.evaluations.MAX_WAITING", 1)
    found = await create(client, data=lines(GENERATED[:2]))
    response = await client.post(PATH, json={"model": "tiny", "data": lines(GENERATED[:2])})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_jobs")
    await client.post(f"{PATH}/{found['id']}/cancel")


async def test_lists_are_filtered(client: httpx.AsyncClient, sentiment: str) -> None:
    ids = [(await record(client, "xyx", model=model))["id"] for model in ("tiny", "sentiment", "sentiment@1")]
    page = (await client.get(PATH, params={"limit": 2})).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
    assert page["data"][0]["scores"]["confusion"] is None
    rest = (await client.get(PATH, params={"after": page["last_id"]})).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    wanted: list[tuple[dict[str, Any], int]] = [
        ({"prompt_id": "sentiment", "version": 1}, 2),
        ({"model": "tiny"}, 1),
        ({"dataset_digest": "1" * 64}, 0),
        ({"status": "completed"}, 3),
    ]
    for params, count in wanted:
        assert len((await client.get(PATH, params=params)).json()["data"]) == count, params
    for params in ({"after": "eval-0"}, {"status": "done"}, {"dataset_digest": "x"}, {"prompt_id": "A B"}):
        assert (await client.get(PATH, params=params)).status_code == 400, params


TENANT_KEYS = "".join(
    [
        key_entry("a1", tenant="a"),
        key_entry("b1", tenant="b"),
        key_entry("reader", tenant="a", scopes=["prompts:read"]),
        key_entry("writer", tenant="a", scopes=["prompts:write"]),
    ]
)


async def test_tenants_and_scopes(make_app: MakeApp, settings: Settings, engine: FakeEngine, tmp_path: Path) -> None:
    async with ready(locked(make_app, settings, tmp_path / "keys.toml", TENANT_KEYS)) as client:
        client.headers.update(bearer("a1"))
        found = await create(client, data=lines(LABELLED))
        await until(ended(client, found))
        assert engine.requests[-1].salt == "a"
        assert found["created_by"].startswith("key-")
        one = f"{PATH}/{found['id']}"
        reads = [one, f"{one}/rows", f"{one}/events", f"{one}/comparison?to={found['id']}"]
        for path in reads:
            assert (await client.get(path, headers=bearer("b1"))).status_code == 404, path
            assert (await client.get(path, headers=bearer("reader"))).status_code == 200, path
            assert (await client.get(path, headers=bearer("writer"))).status_code == 403, path
        assert (await client.get(PATH, headers=bearer("b1"))).json()["data"] == []
        for key, status in (("b1", 404), ("reader", 403), ("writer", 403)):
            assert (await client.post(f"{one}/cancel", headers=bearer(key))).status_code == status
            assert (await client.delete(one, headers=bearer(key))).status_code == status


async def test_one_of_a_revoked_key_fails(
    make_app: MakeApp, settings: Settings, engine: FakeEngine, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    engine.stall_after = 1
    async with ready(locked(make_app, settings, path, TENANT_KEYS)) as client:
        client.headers.update(bearer("a1"))
        found = await create(client, data=lines(GENERATED))
        await until(lambda: bool(engine.requests))
    engine.draining, engine.stall_after = False, None
    async with ready(locked(make_app, settings, path, TENANT_KEYS.replace('"a1"', '"a3"'))) as client:
        client.headers.update(bearer("a3"))
        await until(ended(client, found))
        assert (found["status"], "not valid any more" in found["error"]) == ("failed", True)
