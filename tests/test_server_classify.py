"""A whole server classifies: by labels as well as the soft prompt answers, and beside streams."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from server.demo.tour import HELDOUT_DIRECTORY
from tests.serving import adapter, serving, upload

LABELS = ["\npositive", "\nnegative"]
"""As the embedded soft prompts' answers begin."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tmp_path_factory.mktemp("server"), "--dtype", "float32") as (client, _):
        upload(client, "sentiment", *adapter("sentiment")).raise_for_status()
        yield client


def heldout() -> list[dict[str, str]]:
    return [json.loads(line) for line in (HELDOUT_DIRECTORY / "sentiment.jsonl").read_text().splitlines()]


def test_scored_labels_are_as_accurate_as_answers(client: httpx.Client) -> None:
    pairs = heldout()
    body = {"model": "sentiment", "input": [pair["input"] for pair in pairs], "labels": LABELS}
    data = client.post("/v1/classify", json=body).json()["data"]
    right = sum(item["label"].strip() == pair["output"] for item, pair in zip(data, pairs, strict=True))
    assert right / len(pairs) >= 0.95


def test_a_label_scores_what_echo_tells(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json={"prompt": heldout()[0]["input"]}).json()["tokens"] * 3
    label = client.post("/tokenize", json={"prompt": "\npositive"}).json()["tokens"]
    body = {"model": "sentiment", "input": ids, "labels": LABELS}
    scored = client.post("/v1/classify", json=body)
    assert scored.json()["usage"]["prompt_tokens"] == len(ids)
    echo = {"model": "sentiment", "prompt": ids + label, "echo": True, "logprobs": 0, "max_tokens": 0}
    logprobs = client.post("/v1/completions", json=echo).json()["choices"][0]["logprobs"]["token_logprobs"]
    want = sum(logprobs[len(ids) :])
    assert scored.json()["data"][0]["logprobs"]["\npositive"] == pytest.approx(want, abs=1e-4)
    again = client.post("/v1/classify", json=body).json()["usage"]["prompt_tokens_details"]
    assert again["cached_tokens"] > len(ids) - 32
