"""``/v1/classify`` over a scripted engine: results, names, limits and released resources."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import exp
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from safetensors.numpy import save

from server.api.classification.classification import MAX_LABEL_TOKENS
from server.api.classification.routes import MAX_LABELS
from server.api.soft_prompts.head_labels import head_label_names
from server.continuations import Context
from server.errors import EngineDeadError, RequestFailedError
from tests.support.api_fixtures import CountingStore, UploadParts
from tests.support.byte_tokenizer import BOS, ByteTokenizer
from tests.support.fake_engine import BASE, WIDTH, FakeEngine
from tests.support.live_server import LiveServer
from tests.support.presence import present

pytestmark = pytest.mark.anyio

LABELS = [" good", " bad"]


def classifier_parts(name: str = "topics", *, num_labels: int = 3, **fields: Any) -> dict[str, Any]:
    """Arguments for an httpx POST that uploads a soft prompt with a head."""
    config = {
        "base_model_name_or_path": BASE,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 4,
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_CLS",
        **fields.pop("config", {}),
    }
    tensors = {
        "prompt_embeddings": np.ones((4, WIDTH), np.float32),
        "base_model.score.weight": np.ones((num_labels, WIDTH), np.float32),
    }
    files = [("adapter_config.json", json.dumps(config)), ("adapter_model.safetensors", save(tensors))]
    return {"data": {"id": name, **fields}, "files": [("files", file) for file in files]}


@pytest.fixture
async def topics(client: httpx.AsyncClient) -> str:
    """The name of a soft prompt with a head of three labels."""
    (await client.post("/v1/prompts", **classifier_parts())).raise_for_status()
    return "topics"


async def test_labels_are_scored_as_continuations(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str
) -> None:
    response = await client.post("/v1/classify", json={"model": sentiment, "input": "ab", "labels": LABELS})
    body = response.json()
    assert response.status_code == 200, body
    assert response.headers["x-prelude-prompt"] == "sentiment@1"
    assert body.pop("id").startswith("classify-")
    assert body.pop("created")
    logprobs = {label: -sum(label.encode()) / 512 for label in LABELS}
    total = sum(exp(value) for value in logprobs.values())
    probs = {label: exp(value) / total for label, value in logprobs.items()}
    assert body == {
        "object": "list",
        "model": "sentiment",
        "data": [
            {
                "index": 0,
                "label": " bad",
                "probability": pytest.approx(probs[" bad"]),
                "num_classes": 2,
                "probs": pytest.approx([probs[" good"], probs[" bad"]]),
                "probabilities": pytest.approx(probs),
                "logprobs": pytest.approx(logprobs),
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 0,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 2, "virtual_tokens": 4},
        },
    }
    assert [request.prompt_token_ids for request in engine.requests] == [
        [BOS, *b"ab", *label.encode()] for label in LABELS
    ]
    assert {request.params.prompt_logprobs_start for request in engine.requests} == {3}


async def test_each_input_gets_a_result_and_token_ids_are_accepted(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    fields = {"input": ["a", "bc"], "labels": ["x", "y", "z"], "add_special_tokens": False}
    body = (await client.post("/v1/classify", json=fields)).json()
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert [item["label"] for item in body["data"]] == ["x", "x"]
    assert body["model"] == "tiny"
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4, "virtual_tokens": 0}
    assert len(engine.requests) == 6
    for tokens in ([97], [[97]]):
        again = (await client.post("/v1/classify", json=fields | {"input": tokens})).json()
        assert again["data"] == body["data"][:1]


async def test_a_head_classifies_without_labels(client: httpx.AsyncClient, engine: FakeEngine, topics: str) -> None:
    response = await client.post("/v1/classify", json={"model": "tiny", "prompt_id": topics, "input": "a"})
    (item,) = response.json()["data"]
    assert item["logits"] == {"LABEL_0": -4, "LABEL_1": -2, "LABEL_2": 0}
    assert (item["label"], item["num_classes"]) == ("LABEL_2", 3)
    assert item["probability"] == pytest.approx(1 / (1 + exp(-2) + exp(-4))) == item["probs"][2]
    assert sum(item["probs"]) == pytest.approx(1)
    assert "logprobs" not in item
    (request,) = engine.requests
    assert request.params.classify
    assert present(request.soft_prompt).num_labels == 3


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"metadata": json.dumps({"labels": ["sport", "art", "news"]})}, ["sport", "art", "news"]),
        ({"metadata": json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}})}, ["a", "b", "c"]),
        ({"config": {"id2label": {"0": "x", "1": "y", "2": "z"}}}, ["x", "y", "z"]),
        ({"metadata": json.dumps({"labels": ["too", "few"]})}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
async def test_head_labels_are_named_by_metadata_or_configuration(
    client: httpx.AsyncClient, fields: dict[str, Any], names: list[str]
) -> None:
    assert (await client.post("/v1/prompts", **classifier_parts(**fields))).status_code == 201
    (item,) = (await client.post("/v1/classify", json={"model": "topics", "input": "a"})).json()["data"]
    assert list(item["logits"]) == names


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"labels": ["a"]},
        {"labels": ["a", "a"]},
        {"labels": ["a", ""]},
        {"labels": ["a", 1]},
        {"labels": "ab"},
        {"id2label": {"0": "a"}},
        {"id2label": ["a", "b"]},
        {"labels": ["a", [1]]},
    ],
)
def test_unusable_label_names_are_ignored(source: dict[str, Any]) -> None:
    assert head_label_names(source, 2) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "labels"),
        ({"labels": []}, "labels"),
        ({"labels": ["a", "a"]}, "labels"),
        ({"labels": ["a", ""]}, "labels"),
        ({"labels": "a"}, "labels"),
        ({"labels": [["a"]]}, "labels"),
        ({"labels": [{"a": 1}]}, "labels"),
        ({"labels": [str(index) for index in range(MAX_LABELS + 1)]}, "labels"),
        ({"labels": ["a" * (MAX_LABEL_TOKENS + 1)]}, "labels"),
        ({"labels": ["a" * 1025]}, "labels"),
        ({"labels": ["a", "b", "c"], "input": ["x", "y", "z"]}, "input"),
        ({"labels": ["a"], "input": []}, "input"),
        ({"labels": ["a"], "input": ["a", ""]}, "input"),
        ({"labels": ["a"], "input": [[]]}, "input"),
        ({"labels": ["a"], "input": [258]}, "input"),
        ({"labels": ["a"], "input": {"text": "a"}}, "input"),
        ({"labels": ["a"], "input": None}, "input"),
        ({"labels": ["a"], "input": "x" * 255}, "input"),
        ({"labels": ["a"], "task_id": 0}, "task_id"),
        ({"labels": ["a"], "priority": 101}, "priority"),
        ({"labels": ["a"], "timeout": 0}, "timeout"),
        ({"labels": ["a"], "prompt_id": "No"}, "prompt_id"),
    ],
)
async def test_errors_name_the_bad_field(
    client: httpx.AsyncClient, engine: FakeEngine, store: CountingStore, fields: dict[str, Any], param: str
) -> None:
    response = await client.post("/v1/classify", json={"input": "a"} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert engine.requests == []


async def test_the_context_limit_counts_prompt_input_and_label(client: httpx.AsyncClient, sentiment: str) -> None:
    fields = {"model": sentiment, "labels": ["abc"], "add_special_tokens": False}
    assert (await client.post("/v1/classify", json=fields | {"input": "x" * 249})).status_code == 200
    error = (await client.post("/v1/classify", json=fields | {"input": "x" * 250})).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert all(number in error["message"] for number in ("256", "4 virtual", "250 text", "3 of"))


async def test_labels_and_heads_exclude_each_other(
    client: httpx.AsyncClient, engine: FakeEngine, topics: str, sentiment: str
) -> None:
    for model, labels in ((topics, ["a"]), (sentiment, None), ("tiny", None)):
        response = await client.post("/v1/classify", json={"model": model, "input": "a", "labels": labels})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "labels")
    assert engine.requests == []
    assert (await client.post("/v1/completions", json={"model": topics, "prompt": "a"})).status_code == 400


async def test_labels_with_the_same_tokens_are_refused(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tokenizer.encode_labels

    async def folded(
        context: Context, labels: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[list[int], list[list[int]]]:
        folded_labels = [text.lower().strip("?") for text in labels]
        return await encode(context, folded_labels, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode_labels", folded)
    for labels, words in ((["A", "a"], "same tokens"), (["?"], "no tokens")):
        error = (await client.post("/v1/classify", json={"input": "x", "labels": labels})).json()["error"]
        assert error["param"] == "labels"
        assert words in error["message"]


async def test_each_label_is_tokenised_after_each_input(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def continued(
        context: Context, labels: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[list[int], list[list[int]]]:
        assert (context.text, add_special_tokens) == (
            tokenizer.decode(context.token_ids, skip_special_tokens=True),
            True,
        )
        return context.token_ids[:-1], [[*context.token_ids[-1:], *label.encode()] for label in labels]

    monkeypatch.setattr(tokenizer, "encode_labels", continued)
    body = (await client.post("/v1/classify", json={"input": ["ab", "c"], "labels": ["x", "yz"]})).json()
    assert [request.prompt_token_ids for request in engine.requests] == [
        [BOS, *text] for text in (b"abx", b"abyz", b"cx", b"cyz")
    ]
    assert [request.params.prompt_logprobs_start for request in engine.requests] == [2, 2, 1, 1]
    assert body["usage"]["prompt_tokens"] == 3


async def test_no_label_is_tokenised_after_a_refused_input(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_arguments: object, **_options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(tokenizer, "encode_labels", never)
    for text, labels in (([2**40], ["x"]), ("", ["x"]), (["a"] * 4, ["x", "y", "z"])):
        fields = {"input": text, "labels": labels, "add_special_tokens": False}
        response = await client.post("/v1/classify", json=fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "input")


async def test_a_multitask_prompt_needs_a_task_id(
    client: httpx.AsyncClient, engine: FakeEngine, other_parts: UploadParts
) -> None:
    assert (await client.post("/v1/prompts", **other_parts("many"))).status_code == 201
    fields = {"model": "many", "input": "a", "labels": ["x"]}
    assert (await client.post("/v1/classify", json=fields)).json()["error"]["param"] == "task_id"
    assert (await client.post("/v1/classify", json=fields | {"task_id": 2})).status_code == 200
    assert present(engine.requests[0].soft_prompt).task_id == 2


@pytest.mark.parametrize(
    ("failure", "status"), [(RequestFailedError("it broke"), 500), (EngineDeadError("it died"), 503)]
)
async def test_one_failure_fails_the_request_and_releases_everything(
    client: httpx.AsyncClient,
    app: FastAPI,
    engine: FakeEngine,
    store: CountingStore,
    sentiment: str,
    failure: Exception,
    status: int,
) -> None:
    engine.failure = failure
    response = await client.post("/v1/classify", json={"model": sentiment, "input": ["a", "b"], "labels": LABELS})
    assert response.status_code == status
    services = app.state.services
    assert services.admission.num_in_use == 0
    assert engine.in_flight == 0
    text = (await client.get("/metrics")).text
    assert 'prelude_requests_total{outcome="error",prompt="sentiment",version="1"} 1.0' in text
    await client.get("/v1/prompts")
    assert len(store.leased) == len(store.released)


async def test_classification_is_counted_like_other_requests(client: httpx.AsyncClient, topics: str) -> None:
    await client.post("/v1/classify", json={"model": topics, "input": "a"})
    text = (await client.get("/metrics")).text
    assert 'prelude_requests_total{outcome="stop",prompt="topics",version="1"} 1.0' in text
    assert "prelude_e2e_request_latency_seconds_count 1.0" in text


async def test_a_full_server_refuses_with_429(client: httpx.AsyncClient, app: FastAPI) -> None:
    services = app.state.services
    with services.admission.permits(7):
        response = await client.post("/v1/classify", json={"input": "a", "labels": LABELS})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")


def test_a_disconnect_aborts_the_sequences(
    live: LiveServer, engine: FakeEngine, eventually: Callable[..., None]
) -> None:
    engine.step_seconds = 30.0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/classify", json={"input": "a", "labels": LABELS}, timeout=0.3)
    eventually(lambda: len(engine.requests) == 2 and engine.in_flight == 0)
    assert {ending for _, ending in engine.ended} == {"abort"}
