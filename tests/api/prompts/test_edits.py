"""Corrections of versions, uploads of known bytes, owners, and the history, over HTTP."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest

from tests.api.classification.test_classify import classifier_parts
from tests.support.api_fixtures import UploadParts
from tests.support.keyed import bearer, key_entry
from tests.support.log_records import fields_of

pytestmark = pytest.mark.anyio

ADMIN = ("generate", "prompts:read", "prompts:write", "admin")
KEYS = "".join(
    [
        key_entry("a").replace("[[keys]]\n", '[[keys]]\nname = "ci"\n'),
        key_entry("reader", tenant="a", scopes=["prompts:read"]),
        key_entry("b"),
        key_entry("root", tenant="", scopes=ADMIN).replace("[[keys]]\n", '[[keys]]\nname = "ops"\n'),
    ]
)
VERSION = "/v1/prompts/p/versions/1"


@pytest.fixture
async def p(client: httpx.AsyncClient, upload_parts: UploadParts) -> dict[str, Any]:
    """The record of ``p@1`` of tenant a."""
    fields = {"description": "old", "tags": "x,y", "metadata": json.dumps({"a": 1, "b": 2})}
    response = await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("p", **fields))
    assert response.status_code == 201
    body: dict[str, Any] = response.json()
    assert (body["changed"], body["warnings"], body["owner"]) == ([], [], "a")
    return body


async def history(client: httpx.AsyncClient, key: str = "a", **params: Any) -> list[dict[str, Any]]:
    response = await client.get("/v1/history", headers=bearer(key), params=params)
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


async def test_a_patch_changes_what_it_names(client: httpx.AsyncClient, p: dict[str, Any]) -> None:
    body = {"description": "new", "tags": ["z"], "metadata": {"a": None, "c": [1]}, "reason": "typo"}
    response = await client.patch(VERSION, json=body, headers=bearer("a"))
    edited = response.json()
    assert response.status_code == 200
    assert edited["changed"] == ["description", "metadata", "tags"]
    assert (edited["description"], edited["tags"], edited["metadata"]) == ("new", ["z"], {"b": 2, "c": [1]})
    assert (edited["digest"], edited["files"]) == (p["digest"], p["files"])
    assert (await client.get(VERSION, headers=bearer("a"))).json()["description"] == "new"
    entry = (await history(client))[0]
    assert (entry["action"], entry["prompt_id"], entry["version"], entry["reason"]) == ("edit", "p", 1, "typo")
    assert (entry["actor"], entry["actor_name"]) == (p["created_by"], "ci")
    assert entry["details"]["description"] == {"from": "old", "to": "new"}
    again = await client.patch(VERSION, json=body, headers=bearer("a"))
    assert (again.status_code, again.json()["changed"]) == (200, [])
    unchanged = await client.patch(VERSION, json={"description": None, "other": 1}, headers=bearer("a"))
    assert unchanged.json()["changed"] == []
    emptied = await client.patch(VERSION, json={"description": "", "tags": []}, headers=bearer("a"))
    assert (emptied.json()["description"], emptied.json()["tags"]) == ("", [])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"description": "x" * 5000}, "description"),
        ({"description": "a\0"}, "description"),
        ({"tags": ["Not a tag"]}, "tags"),
        ({"tags": "x"}, "tags"),
        ({"tags": ["x"] * 33}, "tags"),
        ({"metadata": []}, "metadata"),
        ({"labels": ["a", "b"]}, "labels"),
        ({"labels": [""]}, "labels"),
        ({"reason": "x" * 2000}, "reason"),
        ({"reason": "a\nb"}, "reason"),
    ],
)
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, p: dict[str, Any], body: dict[str, Any], param: str
) -> None:
    response = await client.patch(VERSION, json=body, headers=bearer("a"))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
    assert (await client.get(VERSION, headers=bearer("a"))).json()["tags"] == ["x", "y"]


async def test_metadata_may_not_be_nested_too_deeply(client: httpx.AsyncClient, p: dict[str, Any]) -> None:
    value: Any = 1
    for _ in range(40):
        value = [value]
    response = await client.patch(VERSION, json={"metadata": {"k": value}}, headers=bearer("a"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "metadata")


async def test_an_edit_needs_the_right_to_change(client: httpx.AsyncClient, p: dict[str, Any]) -> None:
    for key, status in (("reader", 403), ("b", 404), ("root", 404)):
        assert (await client.patch(VERSION, json={"tags": []}, headers=bearer(key))).status_code == status
    assert (await client.patch(VERSION, content="{}", headers=bearer("a"))).status_code == 415
    wrong = await client.patch("/v1/prompts/p/versions/2", json={"tags": []}, headers=bearer("a"))
    assert wrong.status_code == 404


async def test_known_bytes_with_other_fields_change_the_fields(
    client: httpx.AsyncClient, p: dict[str, Any], upload_parts: UploadParts
) -> None:
    same = await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("p"))
    assert (same.status_code, same.json()["changed"], same.json()["description"]) == (200, [], "old")
    fields = {"description": "new", "metadata": json.dumps({"a": 7}), "lineage": json.dumps({"training_run": "9"})}
    other = await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("p", **fields))
    assert (other.status_code, other.json()["version"]) == (200, 1)
    assert other.json()["changed"] == ["description", "lineage", "metadata"]
    found = (await client.get(VERSION, headers=bearer("a"))).json()
    assert (found["description"], found["metadata"], found["tags"]) == ("new", {"a": 7, "b": 2}, ["x", "y"])
    assert found["lineage"] == {"training_run": "9"}
    assert [entry["action"] for entry in await history(client)] == ["edit", "promote", "publish"]


async def test_unknown_labels_are_reported_until_they_are_set(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/prompts", headers=bearer("a"), **classifier_parts("topics"))
    (warning,) = response.json()["warnings"]
    assert "the head's 3 labels are unknown" in warning
    assert "prelude edit topics@1 --labels" in warning
    url = "/v1/prompts/topics/versions/1"
    wrong = await client.patch(url, json={"labels": ["a", "b"]}, headers=bearer("a"))
    assert wrong.json()["error"]["message"] == "labels: the head has 3 labels, not 2"
    edited = await client.patch(url, json={"labels": ["a", "b", "c"]}, headers=bearer("a"))
    assert edited.json()["metadata"] == {"labels": ["a", "b", "c"]}
    body = {"model": "topics", "input": "x"}
    classified = (await client.post("/v1/classify", json=body, headers=bearer("a"))).json()
    assert classified["data"][0]["probabilities"].keys() == {"a", "b", "c"}
    again = await client.post("/v1/prompts", headers=bearer("a"), **classifier_parts("topics"))
    assert again.json()["warnings"] == []
    named = classifier_parts("named", config={"id2label": {"0": "a", "1": "b", "2": "c"}})
    assert (await client.post("/v1/prompts", headers=bearer("a"), **named)).json()["warnings"] == []


async def test_an_owner_is_changed_by_admins_only(client: httpx.AsyncClient, p: dict[str, Any]) -> None:
    for key in ("a", "b", "reader"):
        assert (await client.patch("/v1/prompts/p", json={"owner": "b"}, headers=bearer(key))).status_code == 403
    hidden = await client.patch("/v1/prompts/p", json={"owner": "b"}, headers=bearer("root"))
    assert hidden.status_code == 404
    url = "/v1/prompts/p?all_tenants=true"
    for body in ({}, {"owner": "b", "shared": True}, {"shared": False}, {"owner": "No"}):
        assert (await client.patch(url, json=body, headers=bearer("root"))).status_code == 400
    moved = await client.patch(url, json={"owner": "b", "reason": "left"}, headers=bearer("root"))
    assert (moved.status_code, moved.json()["latest"]["owner"]) == (200, "b")
    assert (await client.get("/v1/prompts/p", headers=bearer("a"))).status_code == 404
    assert (await client.get("/v1/prompts/p", headers=bearer("b"))).status_code == 200
    entry = (await history(client, "b"))[0]
    assert (entry["action"], entry["actor_name"], entry["reason"]) == ("change_owner", "ops", "left")
    assert entry["details"] == {"from": "a", "to": "b"}
    assert await history(client, "a") == []
    shared = await client.patch(url, json={"shared": True}, headers=bearer("root"))
    assert shared.json()["latest"]["shared"]
    assert (await client.get("/v1/prompts/p", headers=bearer("a"))).status_code == 200


async def test_all_tenants_are_for_admins_and_leave_a_trace(client: httpx.AsyncClient, p: dict[str, Any]) -> None:
    paths = [
        "/v1/prompts",
        "/v1/prompts/p",
        "/v1/prompts/p/versions",
        VERSION,
        "/v1/prompts/p/history",
        "/v1/history",
    ]
    paths += [f"{VERSION}/files/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]
    for path in paths:
        refused = await client.get(path, params={"all_tenants": "true"}, headers=bearer("a"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        without = await client.get(path, headers=bearer("root"))
        assert without.status_code == (404 if "/p" in path.removeprefix("/v1/prompts") else 200), path
        shown = await client.get(path, params={"all_tenants": "true"}, headers=bearer("root"))
        assert shown.status_code == 200, path
    read = [entry for entry in await history(client) if entry["action"] == "read_across_tenants"]
    assert {entry["details"]["read"] for entry in read} == {
        "prompt",
        "versions",
        "version",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {entry["actor_name"] for entry in read} == {"ops"}
    (listed,) = [entry for entry in await history(client, "root") if entry["prompt_id"] is None]
    assert listed["details"] == {"read": "list", "tenants": ["a"]}
    body = {"model": "p", "prompt": "x"}
    used = await client.post("/v1/completions?all_tenants=true", json=body, headers=bearer("root"))
    assert used.status_code == 404
    deleted = await client.delete("/v1/prompts/p?all_tenants=true&reason=unused", headers=bearer("root"))
    assert deleted.status_code == 200
    entry = (await history(client))[0]
    assert (entry["action"], entry["actor_name"], entry["reason"]) == ("delete_prompt", "ops", "unused")
    restored = await client.post("/v1/prompts/p/restore?all_tenants=true", headers=bearer("root"))
    assert restored.status_code == 200


async def test_the_history_of_all_names_can_be_filtered_and_paged(
    client: httpx.AsyncClient, p: dict[str, Any], upload_parts: UploadParts
) -> None:
    await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("q", seed=1))
    url = "/v1/prompts/p/aliases/prod"
    await client.put(url, json={"version": 1, "reason": "go"}, headers=bearer("a"))
    await client.put(url, json={"version": 1}, headers=bearer("a"))
    every = await history(client)
    assert [entry["prompt_id"] for entry in every] == ["p", "q", "q", "p", "p"]
    assert every[0]["reason"] == "go"
    assert [entry["action"] for entry in await history(client, action="publish")] == ["publish", "publish"]
    assert len(await history(client, actor="ci")) == len(await history(client, actor=p["created_by"])) == 5
    assert await history(client, actor="other") == []
    assert len(await history(client, prompt_id="q")) == 2
    assert await history(client, since=2**39) == []
    assert await history(client, until=1) == []
    page = (await client.get("/v1/history?limit=2", headers=bearer("a"))).json()
    rest = await history(client, before=page["last_id"])
    assert page["has_more"]
    assert page["data"] + rest == every
    assert await history(client, "b") == []
    for params in ({"action": "guess"}, {"since": -1}, {"prompt_id": "No"}):
        response = await client.get("/v1/history", params=params, headers=bearer("a"))
        assert response.status_code == 400


async def test_reasons_are_checked_everywhere(client: httpx.AsyncClient, p: dict[str, Any]) -> None:
    long = "x" * 2000
    answers = [
        await client.put("/v1/prompts/p/aliases/x", json={"version": 1, "reason": long}, headers=bearer("a")),
        await client.post("/v1/prompts/p/aliases/latest/rollback", json={"reason": long}, headers=bearer("a")),
        await client.delete("/v1/prompts/p", params={"reason": long}, headers=bearer("a")),
        await client.delete(VERSION, params={"reason": long}, headers=bearer("a")),
        await client.delete("/v1/prompts/p/aliases/latest", params={"reason": long}, headers=bearer("a")),
    ]
    assert [answer.status_code for answer in answers] == [400] * len(answers)
    assert {answer.json()["error"]["param"] for answer in answers} == {"reason"}


async def test_log_lines_of_changes_name_what_was_changed_and_by_whom(
    client: httpx.AsyncClient, upload_parts: UploadParts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("p", alias="canary"))
    promoted = {"version": 1, "reason": "go"}
    await client.put("/v1/prompts/p/aliases/prod", json=promoted, headers=bearer("a"))
    await client.delete("/v1/prompts/p/aliases/prod", headers=bearer("a"))
    await client.delete("/v1/prompts/p", headers=bearer("a"))
    lines = [record for record in caplog.records if "change" in fields_of(record)]
    found = [fields_of(line) for line in lines]
    assert [(one["change"], one["prompt"], one.get("version"), one.get("alias")) for one in found] == [
        ("publish", "p", 1, "canary"),
        ("promote", "p", 1, "prod"),
        ("delete_alias", "p", None, "prod"),
        ("delete_prompt", "p", None, None),
    ]
    assert {one["key_name"] for one in found} == {"ci"}
    assert all(one["key"].startswith("key-") for one in found)
    assert found[1]["reason"] == "go"
    assert lines[0].getMessage().endswith(f": publish p@1, alias canary by ci ({found[0]['key']})")


async def test_a_format_is_corrected(client: httpx.AsyncClient, p: dict[str, Any]) -> None:
    assert p["format"] is None
    edited = (await client.patch(VERSION, json={"format": "raw"}, headers=bearer("a"))).json()
    assert (edited["format"]["type"], edited["changed"]) == ("raw", ["format"])
    other = await client.patch(VERSION, json={"format": {"type": "chat", "system": "Be kind."}}, headers=bearer("a"))
    assert (other.json()["format"]["type"], other.json()["format"]["system"]) == ("chat", "Be kind.")
    assert (await history(client))[0]["details"]["format"]["from"] == {"type": "raw"}
    for wrong in ("xml", {"type": "template"}, {"type": "template", "template": "{{ text.a }}{% for"}, 7):
        response = await client.patch(VERSION, json={"format": wrong}, headers=bearer("a"))
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("format")
