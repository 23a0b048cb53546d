"""The OpenAPI document against a whole server: its examples run, and generated cases cause no server error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from scripts.fuzz_api import fuzz
from tests.support.serving import adapter, serving, upload

CASES = 150


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
    num_run = 0
    for path, operations in document["paths"].items():
        for method, operation in sorted(operations.items(), key=lambda item: item[0] == "delete"):
            if method == "delete":
                continue  # they would delete the other examples' soft prompts
            parameters = operation.get("parameters", [])
            url = path.format(**{one["name"]: one["example"] for one in parameters if one["in"] == "path"})
            content = operation.get("requestBody", {}).get("content", {})
            if content and "application/json" not in content:
                continue  # a multipart upload, like the fixture's
            body = {"json": content["application/json"]["example"]} if content else {}
            if path.endswith("/restore"):
                removed = client.delete(f"/v1/prompts/sentiment/versions/{body['json']['version']}?force=true")
                assert removed.is_success, removed.text
            response = client.request(method, url, **body)
            assert response.is_success, (method, url, response.text)
            check_body(document, operation, response)
            num_run += 1
    assert num_run >= 20
    streamed = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert client.post("/v1/completions", json=streamed | {"stream": True}).text.endswith("data: [DONE]\n\n")


def check_body(document: dict[str, Any], operation: dict[str, Any], response: httpx.Response) -> None:
    media_type = response.headers["content-type"].partition(";")[0]
    schema = operation["responses"][str(response.status_code)]["content"][media_type]["schema"]
    if media_type == "application/json":
        jsonschema.validate(response.json(), schema | {"components": document["components"]})


def test_cases_generated_from_the_schemas_cause_no_server_error(client: httpx.Client) -> None:
    report = fuzz(str(client.base_url).rstrip("/"), cases=CASES, seed=7, phases="examples,fuzzing")
    assert report.failures == [], report.log
    assert report.num_cases >= CASES
