"""Chat clients of others against a soft prompt on raw text, on a server whose chat template marks each turn.

The soft prompt is trained by PEFT's own code and published by ``prelude push``, which records the format ``raw``.
Then every chat has to answer what a completion of the same text answers.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.raw_prompt import TASK, train_raw_prompt, write_chat_model
from tests.clients.running import ClientEnvironment, heldout
from tests.support.processes import PRELUDE
from tests.support.serving import BASE, serving

NAME, UNFORMATTED = "raw-text", "unformatted"
PAIRS = heldout(TASK)[:6]
TEXTS = [pair["input"] for pair in PAIRS]
NAMED: list[dict[str, Any]] = [{"model": NAME}, {"model": BASE, "extra_body": {"prompt_id": NAME}}]
by_either_name = pytest.mark.parametrize("named", NAMED, ids=["model", "prompt_id"])


@pytest.fixture(scope="module")
def raw_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with the soft prompt under two names; the second version has no format."""
    folder = tmp_path_factory.mktemp("raw-prompt")
    model = write_chat_model(folder / "chat-model")
    adapter = train_raw_prompt(model, folder / "training")
    with serving(folder / "server", "--dtype", "float32", model=model) as (client, _):
        for name, more in ((NAME, []), (UNFORMATTED, ["--format", "unknown"])):
            push(client, adapter, "--id", name, *more)
        yield client


def push(client: httpx.Client, adapter: Path, *options: str) -> None:
    command = [*PRELUDE, "push", str(adapter), "--url", str(client.base_url).rstrip("/"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def completions(raw_server: httpx.Client) -> list[str]:
    """The answers of ``/v1/completions`` to the texts."""
    body = {"model": NAME, "prompt": TEXTS, "temperature": 0, "max_tokens": 40}
    choices = raw_server.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [choice["text"] for choice in choices]


def v1(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/") + "/v1"


def test_the_soft_prompt_is_trained_and_the_template_would_change_its_answers(
    raw_server: httpx.Client, completions: list[str]
) -> None:
    assert [text.strip() for text in completions] == [pair["output"] for pair in PAIRS]
    assert raw_server.get(f"/v1/prompts/{NAME}/versions/1").json()["format"]["type"] == "raw"
    answers = []
    for text in TEXTS:
        body = {"model": UNFORMATTED, "messages": [{"role": "user", "content": text}], "temperature": 0}
        reply = raw_server.post("/v1/chat/completions", json=body | {"max_tokens": 40}).raise_for_status().json()
        answers.append(reply["choices"][0]["message"]["content"])
    assert answers != completions


@by_either_name
def test_chatopenai_answers_what_completions_answer(
    raw_server: httpx.Client, completions: list[str], python_clients: ClientEnvironment, named: dict[str, Any]
) -> None:
    results = python_clients.json("langchain_client.py", v1(raw_server), named, TEXTS)
    for way in ("invoke", "batch", "async_batch", "stream", "async_stream", "completions"):
        assert results[way] == completions, way


@by_either_name
def test_litellm_answers_what_completions_answer(
    raw_server: httpx.Client, completions: list[str], python_clients: ClientEnvironment, named: dict[str, Any]
) -> None:
    results = python_clients.json("litellm_client.py", v1(raw_server), named, TEXTS)
    for way in ("chat", "chat_stream", "completions"):
        assert results[way] == completions, way


@by_either_name
def test_openai_node_answers_what_completions_answer(
    raw_server: httpx.Client, completions: list[str], node_clients: ClientEnvironment, named: dict[str, Any]
) -> None:
    fields = json.dumps({"model": named["model"], **named.get("extra_body", {})})
    for text, want in zip(TEXTS[:3], completions, strict=False):
        results = node_clients.json("openai_node.mjs", v1(raw_server), fields, text)
        assert [results[way] for way in ("chat", "chatStream", "completion", "completionStream")] == [want] * 4
