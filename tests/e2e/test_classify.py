"""Classification by a whole server: label scores are as accurate as answers, and ensembles match their members."""

from __future__ import annotations

import json
import math

import httpx
import pytest

from server.demo.tour import HELDOUT_DIRECTORY
from tests.support.serving import BASE, adapter, upload

HOW = ("vote", "mean")

LABELS = ["\npositive", "\nnegative"]
"""The beginnings of the embedded soft prompts' answers."""


def heldout() -> list[dict[str, str]]:
    return [json.loads(line) for line in (HELDOUT_DIRECTORY / "sentiment.jsonl").read_text().splitlines()]


def test_scored_labels_are_as_accurate_as_answers(demo_server: httpx.Client) -> None:
    pairs = heldout()
    body = {"model": "sentiment", "input": [pair["input"] for pair in pairs], "labels": LABELS}
    data = demo_server.post("/v1/classify", json=body).json()["data"]
    right = sum(item["label"].strip() == pair["output"] for item, pair in zip(data, pairs, strict=True))
    assert right / len(pairs) >= 0.95


def test_label_scores_equal_echoed_logprobs(demo_server: httpx.Client) -> None:
    ids = demo_server.post("/tokenize", json={"prompt": heldout()[0]["input"]}).json()["tokens"] * 3
    label = demo_server.post("/tokenize", json={"prompt": "\npositive"}).json()["tokens"]
    body = {"model": "sentiment", "input": ids, "labels": LABELS}
    scored = demo_server.post("/v1/classify", json=body)
    assert scored.json()["usage"]["prompt_tokens"] == len(ids)
    echo = {"model": "sentiment", "prompt": ids + label, "echo": True, "logprobs": 0, "max_tokens": 0}
    logprobs = demo_server.post("/v1/completions", json=echo).json()["choices"][0]["logprobs"]["token_logprobs"]
    want = sum(logprobs[len(ids) :])
    assert scored.json()["data"][0]["logprobs"]["\npositive"] == pytest.approx(want, abs=1e-4)
    again = demo_server.post("/v1/classify", json=body).json()["usage"]["prompt_tokens_details"]
    assert again["cached_tokens"] > len(ids) - 32


def test_an_ensemble_combines_the_separate_results_of_its_members(demo_server: httpx.Client) -> None:
    members = ["sentiment", "intent", "dates"]
    texts = [pair["input"] for pair in heldout()[:8]]
    body = {"input": texts, "labels": LABELS}
    apart = [demo_server.post("/v1/classify", json=body | {"model": name}).json() for name in members]
    together = {
        how: demo_server.post("/v1/classify", json=body | {"model": members, "ensemble": how}).json() for how in HOW
    }
    for index in range(len(texts)):
        alone = [reply["data"][index] for reply in apart]
        means = {label: sum(item["probabilities"][label] for item in alone) / 3 for label in LABELS}
        votes = {label: sum(item["label"] == label for item in alone) for label in LABELS}
        for how, item in ((how, together[how]["data"][index]) for how in HOW):
            assert item["probabilities"] == pytest.approx(means, abs=1e-5)
            assert item["votes"] == votes
            assert item["label"] == max(LABELS, key=(means if how == "mean" else votes).__getitem__)
    assert together["vote"]["usage"]["prompt_tokens"] == sum(reply["usage"]["prompt_tokens"] for reply in apart)


def test_an_ensemble_returns_the_majority_text(demo_server: httpx.Client) -> None:
    config, weights = adapter("sentiment")
    upload(demo_server, "again", config, weights, description="the same once more").raise_for_status()
    text = heldout()[0]["input"]
    ask = {"prompt": text, "max_tokens": 6, "temperature": 0, "stop": ["\n\n"]}
    apart = [
        demo_server.post("/v1/completions", json=ask | {"model": name}).json()["choices"][0]["text"]
        for name in ("sentiment", "again", BASE)
    ]
    assert apart[0] == apart[1] != apart[2]
    body = ask | {"model": [BASE, "sentiment", "again"]}
    reply = demo_server.post("/v1/completions", json=body).json()
    (choice,) = reply["choices"]
    assert choice["text"] == apart[0]
    assert choice["votes"] == {apart[0]: 2, apart[2]: 1}
    assert [member["model"] for member in choice["members"]] == [BASE, "sentiment@1", "again@1"]


def test_an_ensemble_generates_from_the_mean_of_its_members(demo_server: httpx.Client) -> None:
    """Each token's probability is the members' mean, and the streamed text is the same."""
    for name in ("sentiment", "intent"):
        upload(demo_server, name, *adapter(name)).raise_for_status()
    members = ["sentiment", "intent", BASE]
    text = demo_server.post("/tokenize", json={"prompt": heldout()[0]["input"]}).json()["tokens"]
    body = {"model": members, "ensemble": "mean", "prompt": text, "max_tokens": 6, "temperature": 0}
    (choice,) = demo_server.post("/v1/completions", json=body | {"logprobs": 0, "return_token_ids": True}).json()[
        "choices"
    ]
    new = choice["token_ids"]
    assert len(new) > 1
    echo = {"prompt": text + new, "echo": True, "logprobs": 0, "max_tokens": 0}
    apart = [
        demo_server.post("/v1/completions", json=echo | {"model": name}).json()["choices"][0]["logprobs"][
            "token_logprobs"
        ]
        for name in members
    ]
    means = [sum(math.exp(own[len(text) + i]) for own in apart) / len(members) for i in range(len(new))]
    assert [math.exp(value) for value in choice["logprobs"]["token_logprobs"]] == pytest.approx(means, rel=1e-3)
    with demo_server.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
