"""The OpenAPI document against a whole server: its examples run, and generated cases cause no server error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from scripts.fuzz_api import fuzz
from tests.support.serving import adapter, serving, upload

CASES = 150

NOT_HERE = {
    "/v1/load_lora_adapter": "only with --adapter-dir",
    "/v1/unload_lora_adapter": "only with --adapter-dir",
    "/console/session": "logs in with a key, and this server has none",
    "/v1/events": "a stream that does not end",
}
"""Paths whose examples do not run here, and why."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(
        tmp_path_factory.mktemp("server"), "--dtype", "float32", "--max-num-seqs", "64", "--max-model-len", "64"
    ) as (client, _):
        for task in ("sentiment", "dates"):
            upload(client, task, *adapter(task), alias="latest").raise_for_status()
        upload(client, "sentiment", *adapter("dates")).raise_for_status()  # so that a rollback has a target
        yield client


def test_the_documents_examples_run(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    ids = upload_batch(client) | report_jobs(client)
    num_run = 0
    for path, operations in document["paths"].items():
        for method, operation in sorted(operations.items(), key=lambda item: item[0] == "delete"):
            if path in NOT_HERE:
                continue
            if method == "delete":
                continue  # they would delete the other examples' soft prompts
            parameters = operation.get("parameters", [])
            url = path.format(**{one["name"]: one["example"] for one in parameters if one["in"] == "path"} | ids)
            content = operation.get("requestBody", {}).get("content", {})
            if content and "application/json" not in content:
                continue  # a multipart upload, like the fixture's
            body: dict[str, Any] = {"json": content["application/json"]["example"]} if content else {}
            body["params"] = {"to": "1"} if path.endswith("/diff") else {}
            if path.endswith("/comparison"):
                body["params"] = {"to": ids["evaluation_id"]}
            if path == "/v1/batches" and "json" in body:
                body["json"] = body["json"] | {"input_file_id": ids["file_id"]}
            if path.endswith("/restore"):
                removed = client.delete(f"/v1/prompts/sentiment/versions/{body['json']['version']}?force=true")
                assert removed.is_success, removed.text
            response = client.request(method, url, **body)
            assert response.is_success, (method, url, response.text)
            if response.status_code != 204:
                check_body(document, operation, response)
            num_run += 1
    assert num_run >= 20
    streamed = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert client.post("/v1/completions", json=streamed | {"stream": True}).text.endswith("data: [DONE]\n\n")


def upload_batch(client: httpx.Client) -> dict[str, str]:
    """A file and a batch of it, by the names of the path's parameters."""
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 1}}
    files = {"file": ("rows.jsonl", json.dumps(row).encode() + b"\n")}
    file_id = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
    fields = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    return {"file_id": file_id, "batch_id": client.post("/v1/batches", json=fields).json()["id"]}


def report_jobs(client: httpx.Client) -> dict[str, str]:
    """An evaluation and a training run, by the names of the path's parameters."""
    row = {"line": 1, "expected": "positive", "answer": "negative"}
    body = {"model": "sentiment", "rows": [row], "metric": "accuracy", "dataset_digest": "0" * 64}
    evaluation_id = client.post("/v1/evaluations", json=body).json()["id"]
    run_id = "run-" + "0" * 32
    run = {"prompt_id": "sentiment", "method": "lora", "status": "running", "started_at": 1}
    client.put(f"/v1/runs/{run_id}", json=run).raise_for_status()
    return {"evaluation_id": evaluation_id, "run_id": run_id}


def check_body(document: dict[str, Any], operation: dict[str, Any], response: httpx.Response) -> None:
    media_type = response.headers["content-type"].partition(";")[0]
    schema = operation["responses"][str(response.status_code)]["content"][media_type]["schema"]
    if media_type == "application/json":
        jsonschema.validate(response.json(), schema | {"components": document["components"]})


def test_cases_generated_from_the_schemas_cause_no_server_error(client: httpx.Client) -> None:
    report = fuzz(str(client.base_url).rstrip("/"), cases=CASES, seed=7, phases="examples,fuzzing")
    assert report.failures == [], report.log
    assert report.num_cases >= CASES
