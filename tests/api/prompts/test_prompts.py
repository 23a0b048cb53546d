from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import Settings
from tests.support.api_fixtures import CountingStore, UploadParts

pytestmark = pytest.mark.anyio


async def upload(client: httpx.AsyncClient, parts: dict[str, Any]) -> httpx.Response:
    return await client.post("/v1/prompts", **parts)


async def test_an_upload_creates_a_version(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    fields = {"description": "of reviews", "tags": ["a", "b,c"], "metadata": json.dumps({"f1": 0.9})}
    response = await upload(client, upload_parts("sentiment", **fields))
    body = response.json()
    assert response.status_code == 201
    assert (body["id"], body["version"], body["object"]) == ("sentiment", 1, "prompt.version")
    assert (body["peft_type"], body["task_type"]) == ("PROMPT_TUNING", "CAUSAL_LM")
    assert (body["num_virtual_tokens"], body["dtype"]) == (4, "F32")
    assert (body["description"], body["metadata"]) == ("of reviews", {"f1": 0.9})
    assert sorted(body["tags"]) == ["a", "b", "c"]
    assert sorted(file["filename"] for file in body["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert body["size"] == sum(file["size"] for file in body["files"])


async def test_the_same_bytes_are_the_same_version(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    first = await upload(client, upload_parts("sentiment"))
    again = await upload(client, upload_parts("sentiment"))
    other = await upload(client, upload_parts("sentiment", seed=1))
    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 201)
    assert again.json()["version"] == 1
    assert other.json()["version"] == 2


async def test_an_upload_can_set_an_alias(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    await upload(client, upload_parts("sentiment"))
    await upload(client, upload_parts("sentiment", seed=1, alias="canary"))
    prompt = (await client.get("/v1/prompts/sentiment")).json()
    assert prompt["aliases"] == {"latest": 1, "canary": 2}
    assert prompt["latest"]["version"] == 1
    assert prompt["num_versions"] == 2


async def test_all_errors_are_reported(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    parts = upload_parts("sentiment", width=9)
    response = await upload(client, parts)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] == "invalid_prompt"
    assert error["details"]
    assert set(error["details"][0]) == {"code", "message", "file", "field"}


def configured(parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An upload whose configuration has these fields; None removes one."""
    files = dict(file for _, file in parts["files"])
    config = json.loads(files["adapter_config.json"]) | changes
    files["adapter_config.json"] = json.dumps({key: value for key, value in config.items() if value is not None})
    return {**parts, "files": [("files", file) for file in files.items()]}


async def test_a_stated_base_overrides_the_file_and_is_recorded(
    client: httpx.AsyncClient, upload_parts: UploadParts
) -> None:
    changes = {"base_model_name_or_path": "org/large"}
    refused = await upload(client, configured(upload_parts("a"), **changes))
    (detail,) = refused.json()["error"]["details"]
    assert detail["code"] == "base_model_mismatch"
    assert "allow_other_base=true" in detail["message"]
    taken = await upload(client, configured(upload_parts("a", allow_other_base="true"), **changes))
    assert taken.status_code == 201
    assert taken.json()["overrides"] == {"allow_other_base": True}
    assert (await client.get("/v1/prompts/a/versions/1")).json()["overrides"] == {"allow_other_base": True}
    # A file that names the served base, or none, needs no override.
    same = await upload(client, upload_parts("b", allow_other_base="true"))
    assert same.json()["overrides"] == {}


async def test_a_stated_task_type_overrides_the_file_and_is_recorded(
    client: httpx.AsyncClient, upload_parts: UploadParts
) -> None:
    refused = await upload(client, configured(upload_parts("a"), task_type=None))
    (detail,) = refused.json()["error"]["details"]
    assert detail["code"] == "unsupported_task_type"
    assert "task_type=CAUSAL_LM" in detail["message"]
    taken = await upload(client, configured(upload_parts("a", task_type="CAUSAL_LM"), task_type=None))
    assert taken.status_code == 201
    assert (taken.json()["task_type"], taken.json()["overrides"]) == ("CAUSAL_LM", {"task_type": "CAUSAL_LM"})
    answer = await client.post("/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200
    contradicted = await upload(client, upload_parts("b", task_type="SEQ_CLS"))
    assert contradicted.json()["error"]["details"][0]["code"] == "task_type_conflict"


async def test_a_missing_file_is_refused(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    parts = upload_parts("sentiment")
    parts["files"] = parts["files"][:1]
    response = await upload(client, parts)
    assert response.status_code == 400
    assert response.json()["error"]["details"]


async def test_an_upload_without_files_is_refused(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    parts = upload_parts("sentiment")
    parts["files"] = [("note", ("x", b""))]
    assert (await upload(client, parts)).status_code == 400


def files_of(settings: Settings) -> list[Path]:
    return sorted(path for path in Path(settings.store.location).rglob("*") if "sqlite3" not in path.name)


@pytest.mark.parametrize(
    "filename",
    ["adapter_model.bin", "prompt.zip", "../adapter_config.json", "/etc/passwd", "ADAPTER_CONFIG.JSON", ""],
)
async def test_other_filenames_are_refused(
    client: httpx.AsyncClient, upload_parts: UploadParts, filename: str, settings: Settings
) -> None:
    parts = upload_parts("sentiment")
    parts["files"].append(("files", (filename or "x.pt", b"data")))
    before = files_of(settings)
    response = await upload(client, parts)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "files"
    assert files_of(settings) == before


async def test_a_repeated_file_is_refused(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    parts = upload_parts("sentiment")
    parts["files"] += parts["files"]
    response = await upload(client, parts)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "files")


async def test_a_file_in_another_field_is_refused(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    parts = upload_parts("sentiment")
    parts["files"].append(("evil", ("adapter_config.json", b"{}")))
    assert (await upload(client, parts)).json()["error"]["param"] == "files"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": "Bad Name"}, "id"),
        ({"id": ""}, "id"),
        ({"id": ["a", "b"]}, "id"),
        ({"alias": "7"}, "alias"),
        ({"alias": "Bad Alias"}, "alias"),
        ({"tags": "Bad Tag"}, "tags"),
        ({"tags": ",".join(f"t{i}" for i in range(40))}, "tags"),
        ({"allow_other_base": "1"}, "allow_other_base"),
        ({"task_type": "TOKEN_CLS"}, "task_type"),
        ({"task_type": ["CAUSAL_LM", "CAUSAL_LM"]}, "task_type"),
        ({"metadata": "{"}, "metadata"),
        ({"metadata": "[1]"}, "metadata"),
        ({"metadata": '{"a": NaN}'}, "metadata"),
        ({"description": "x" * 5000}, "description"),
        ({"description": "x" * 70_000}, "description"),
    ],
)
async def test_bad_fields_are_refused(
    client: httpx.AsyncClient, upload_parts: UploadParts, fields: dict[str, Any], param: str
) -> None:
    response = await upload(client, upload_parts("sentiment", **fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_the_id_is_required(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    parts = upload_parts("sentiment")
    del parts["data"]
    assert (await upload(client, parts)).json()["error"]["param"] == "id"


async def test_the_name_of_the_base_is_reserved(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    assert (await upload(client, upload_parts("tiny"))).status_code == 400


async def test_a_file_over_the_limit_is_413(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    response = await upload(client, upload_parts("sentiment", rows=4000))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"
    assert (await client.get("/v1/prompts")).json()["data"] == []


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data", "text/plain"])
async def test_an_upload_that_is_not_multipart_is_refused(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post("/v1/prompts", content=b"{}", headers={"content-type": content_type})
    assert response.status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"--b\r\nno colon\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="id"\r\n\r\nsentiment',
        b'--b\r\nContent-Disposition: form-data; name="id"\r\n\r\n\xff\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nx\r\n' * 70 + b"--b--\r\n",
    ],
)
async def test_malformed_multipart_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = await client.post("/v1/prompts", content=body, headers=headers)
    assert response.status_code == 400, response.text


async def test_lists_have_pages(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    for name in ("c", "a", "b"):
        await upload(client, upload_parts(name, tags="even" if name == "b" else "odd"))
    first = (await client.get("/v1/prompts?limit=2")).json()
    assert [prompt["id"] for prompt in first["data"]] == ["a", "b"]
    assert (first["has_more"], first["last_id"]) == (True, "b")
    second = (await client.get("/v1/prompts?limit=2&after=b")).json()
    assert ([prompt["id"] for prompt in second["data"]], second["has_more"]) == (["c"], False)
    tagged = (await client.get("/v1/prompts?tag=even")).json()
    assert [prompt["id"] for prompt in tagged["data"]] == ["b"]


@pytest.mark.parametrize("query", ["limit=0", "limit=9999", "limit=x", "after=Bad Name"])
async def test_bad_queries_are_refused(client: httpx.AsyncClient, query: str) -> None:
    response = await client.get(f"/v1/prompts?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


async def test_versions_are_listed(client: httpx.AsyncClient, upload_parts: UploadParts, sentiment: str) -> None:
    await upload(client, upload_parts("sentiment", seed=1))
    versions = (await client.get("/v1/prompts/sentiment/versions")).json()["data"]
    assert sorted(version["version"] for version in versions) == [1, 2]
    assert (await client.get("/v1/prompts/sentiment/versions/2")).json()["version"] == 2


async def test_files_are_returned_byte_for_byte(
    client: httpx.AsyncClient, upload_parts: UploadParts, sentiment: str
) -> None:
    parts = upload_parts("sentiment")
    for _, (filename, data) in parts["files"]:
        response = await client.get(f"/v1/prompts/sentiment/versions/1/files/{filename}")
        assert response.status_code == 200
        assert response.content == data
        assert response.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
        assert "attachment" in response.headers["content-disposition"]


async def test_a_byte_range_of_a_file_is_returned(
    client: httpx.AsyncClient, store: CountingStore, upload_parts: UploadParts, sentiment: str
) -> None:
    _, (_, weights) = upload_parts("sentiment")["files"][1]
    url = "/v1/prompts/sentiment/versions/1/files/adapter_model.safetensors"
    response = await client.get(url, headers={"range": "bytes=8-15"})
    assert (response.status_code, response.content) == (206, weights[8:16])
    assert len(store.leased) == 1


async def test_aliases_can_be_set_moved_and_deleted(
    client: httpx.AsyncClient, upload_parts: UploadParts, sentiment: str
) -> None:
    await upload(client, upload_parts("sentiment", seed=1))
    url = "/v1/prompts/sentiment/aliases/canary"
    reply = await client.put(url, json={"version": 1})
    assert reply.json() == {
        "object": "prompt.alias",
        "id": "sentiment",
        "alias": "canary",
        "version": 1,
        "rollout": None,
    }
    assert (await client.put(url, json={"version": 2, "expected_version": 1})).status_code == 200
    conflict = await client.put(url, json={"version": 1, "expected_version": 1})
    assert conflict.status_code == 409
    assert conflict.headers["x-should-retry"] == "false"
    assert conflict.json()["error"]["code"] == "conflict"
    assert (await client.get("/v1/prompts/sentiment")).json()["aliases"]["canary"] == 2
    assert (await client.delete(url)).json() == {"id": "sentiment@canary", "object": "prompt.alias", "deleted": True}
    assert (await client.delete(url)).status_code == 404


@pytest.mark.parametrize(
    ("alias", "body", "status"),
    [
        ("canary", {"version": 9}, 404),
        ("canary", {"version": 0}, 400),
        ("canary", {}, 400),
        ("12", {"version": 1}, 400),
        ("Bad", {"version": 1}, 400),
    ],
)
async def test_bad_aliases_are_refused(
    client: httpx.AsyncClient, sentiment: str, alias: str, body: dict[str, Any], status: int
) -> None:
    assert (await client.put(f"/v1/prompts/sentiment/aliases/{alias}", json=body)).status_code == status


async def test_a_version_can_be_deleted(client: httpx.AsyncClient, upload_parts: UploadParts, sentiment: str) -> None:
    await upload(client, upload_parts("sentiment", seed=1))
    reply = (await client.delete("/v1/prompts/sentiment/versions/1")).json()
    assert reply.pop("restorable_until") > 1_700_000_000
    assert reply == {
        "id": "sentiment@1",
        "object": "prompt.version",
        "deleted": True,
        "versions": [1],
        "aliases": {},
        "ended_rollouts": [],
    }
    assert (await client.get("/v1/prompts/sentiment/versions/1")).status_code == 404
    assert (await client.get("/v1/prompts/sentiment/versions/2")).status_code == 200


async def test_a_version_in_use_is_deleted_only_by_force(
    client: httpx.AsyncClient, upload_parts: UploadParts, sentiment: str
) -> None:
    await upload(client, upload_parts("sentiment", seed=1))
    url = "/v1/prompts/sentiment/versions/2"
    for query in ("", "?force=false"):
        refused = await client.delete(url + query)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
        assert "in use by the alias latest" in refused.json()["error"]["message"]
        assert refused.headers["x-should-retry"] == "false"
    assert (await client.delete(f"{url}?force=perhaps")).json()["error"]["param"] == "force"
    deleted = (await client.delete(f"{url}?force=true")).json()
    assert (deleted["versions"], deleted["aliases"]) == ([2], {"latest": 2})
    prompt = (await client.get("/v1/prompts/sentiment")).json()
    assert (prompt["aliases"], prompt["latest"]["version"]) == ({}, 1)  # no alias moves


async def test_a_soft_prompt_can_be_deleted(
    client: httpx.AsyncClient, upload_parts: UploadParts, sentiment: str
) -> None:
    reply = (await client.delete("/v1/prompts/sentiment")).json()
    assert reply.items() >= {"id": "sentiment", "object": "prompt", "deleted": True}.items()
    assert (reply["versions"], reply["aliases"]) == ([1], {"latest": 1})
    assert (await client.get("/v1/prompts")).json()["data"] == []
    for seed in (0, 1):
        await upload(client, upload_parts("sentiment", seed=seed))
    refused = await client.delete("/v1/prompts/sentiment")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    assert "has 2 versions and the alias latest" in refused.json()["error"]["message"]
    assert (await client.delete("/v1/prompts/sentiment?force=true")).json()["versions"] == [2, 3]


async def test_a_deletion_can_be_undone(client: httpx.AsyncClient, upload_parts: UploadParts, sentiment: str) -> None:
    url = "/v1/prompts/sentiment/restore"
    missing = await client.post(url)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "prompt_not_found")
    there = await client.post(url, json={"version": 1})
    assert (there.status_code, there.json()["error"]["code"]) == (409, "conflict")
    before = (await client.get("/v1/prompts/sentiment")).json()
    for body in (None, {}, {"version": 1}):
        await client.delete("/v1/prompts/sentiment")
        reply = await client.post(url, json=body)
        assert reply.json() == {
            "object": "prompt.restored",
            "id": "sentiment",
            "versions": [1],
            "aliases": {"latest": 1},
            "kept_aliases": {},
        }
        assert (await client.get("/v1/prompts/sentiment")).json() == before
    answer = await client.post("/v1/completions", json={"model": "sentiment", "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200
    await client.delete("/v1/prompts/sentiment")
    await upload(client, upload_parts("sentiment", seed=1))
    reply = await client.post(url)
    assert (reply.json()["aliases"], reply.json()["kept_aliases"]) == ({}, {"latest": 2})
    history = (await client.get("/v1/prompts/sentiment/history?limit=1")).json()["data"]
    assert (history[0]["action"], history[0]["version"]) == ("restore", 1)


@pytest.mark.parametrize("body", [{"version": 0}, {"version": "x"}, []])
async def test_bad_restorations_are_refused(client: httpx.AsyncClient, sentiment: str, body: Any) -> None:
    assert (await client.post("/v1/prompts/sentiment/restore", json=body)).status_code == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/prompts/no-such"),
        ("DELETE", "/v1/prompts/no-such"),
        ("GET", "/v1/prompts/no-such/versions"),
        ("GET", "/v1/prompts/sentiment/versions/9"),
        ("DELETE", "/v1/prompts/sentiment/versions/9"),
        ("GET", "/v1/prompts/sentiment/versions/9/files/adapter_config.json"),
        ("GET", "/v1/prompts/sentiment/versions/1/files/passwd"),
        ("DELETE", "/v1/prompts/sentiment/aliases/no-such"),
    ],
)
async def test_missing_names_are_404(client: httpx.AsyncClient, sentiment: str, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert response.status_code == 404, response.text
    assert response.json()["error"]["code"] in {"prompt_not_found", "not_found"}


@pytest.mark.parametrize("path", ["/v1/prompts/Bad", "/v1/prompts/sentiment/versions/x"])
async def test_malformed_paths_are_refused(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 400


async def test_soft_prompts_are_listed_as_models(client: httpx.AsyncClient, sentiment: str) -> None:
    base, prompt = (await client.get("/v1/models")).json()["data"]
    assert (base["id"], base["object"], base["owned_by"], base["max_model_len"]) == ("tiny", "model", "prelude", 256)
    assert (base["parent"], base["root"]) == (None, "tiny")
    assert (prompt["id"], prompt["parent"], prompt["root"]) == ("sentiment", "tiny", "tiny")
    assert prompt["created"] > 1_700_000_000
    assert (await client.get("/v1/models/tiny")).json() == base
    assert (await client.get("/v1/models/sentiment@1")).json() == prompt | {"id": "sentiment@1"}
    assert (await client.get("/v1/models/no-such")).json()["error"]["code"] == "model_not_found"


async def test_lists_are_searched_and_ordered(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    for seed, (name, text) in enumerate((("beta", "writes a Haiku"), ("alpha", ""))):
        parts = upload_parts(name, seed=seed, description=text)
        assert (await client.post("/v1/prompts", **parts)).status_code == 201

    async def listed(query: str) -> list[str]:
        response = await client.get(f"/v1/prompts?{query}")
        assert response.status_code == 200, response.text
        return [one["id"] for one in response.json()["data"]]

    assert await listed("q=haiku") == ["beta"]
    assert await listed("peft_type=PREFIX_TUNING") == []
    assert await listed("sort=created") == ["alpha", "beta"]
    assert await listed("sort=created&order=asc") == ["beta", "alpha"]
    assert await listed("order=desc") == ["beta", "alpha"]
    assert await listed("sort=updated&limit=1&after=alpha") == ["beta"]
    for query, param in (("sort=size", "sort"), ("order=up", "order"), ("sort=used&after=ghost", "after")):
        response = await client.get(f"/v1/prompts?{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
