"""Several soft prompts answer one request in one batch, and the batch can be watched meanwhile."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx

from tests.support.demo_server import TASKS
from tests.support.waiting import wait_until

TEXT = "The strap of the bag felt flimsy, so I sent it back on the 3rd of May."
NUM_TOKENS = 96


def body_of(model: str | list[str], **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": TEXT, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return body | fields


def batch_of(client: httpx.Client) -> dict[str, Any]:
    batch: dict[str, Any] = client.get("/v1/engine").json()
    return batch


def test_four_soft_prompts_share_their_steps_and_are_seen_in_one_batch(demo_server: httpx.Client) -> None:
    apart = {
        task: demo_server.post("/v1/completions", json=body_of(task)).json()["choices"][0]["text"] for task in TASKS
    }
    texts: dict[str, str] = defaultdict(str)
    steps: dict[str, list[int]] = defaultdict(list)
    timings: dict[str, dict[str, Any]] = {}
    batches: list[dict[str, Any]] = []
    fields = {"ensemble": "each", "stream": True, "return_timings": True}
    with demo_server.stream("POST", "/v1/completions", json=body_of(list(TASKS), **fields)) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            (choice,) = chunk["choices"]
            name = choice["model"].removesuffix("@1")
            texts[name] += choice["text"]
            steps[name].append(chunk["step"])
            if "timings" in choice:
                timings[name] = choice["timings"]
            if not batches and len(steps) == len(TASKS):
                batches.append(batch_of(demo_server))
    assert texts == apart
    shared = set.intersection(*(set(own) for own in steps.values()))
    assert len(shared) >= 0.9 * NUM_TOKENS
    for name, own in steps.items():
        assert (timings[name]["first_step"], timings[name]["last_step"]) == (own[0], own[-1])
    (batch,) = batches
    rows = [row for row in batch["rows"] if row["phase"] != "waiting"]
    assert {row["name"] for row in rows} == {f"{task}@1" for task in TASKS}
    resident = [batch["soft_prompts"][row["soft_prompt"]] for row in rows]
    assert [one["name"] for one in resident] == [row["name"] for row in rows]
    assert all((one["users"], one["state"]) == (1, "used") for one in resident), "each prompt's blocks are there once"
    wait_until(lambda: batch_of(demo_server)["rows"] == [])


def test_a_closed_stream_leaves_nothing_in_the_batch(demo_server: httpx.Client) -> None:
    request = body_of(list(TASKS), ensemble="each", stream=True, max_tokens=600)
    with demo_server.stream("POST", "/v1/completions", json=request) as response:
        lines = response.iter_lines()  # held: to drop it closes the connection
        next(lines)
        wait_until(lambda: batch_of(demo_server)["rows"])  # the first picture may be older than the request
    wait_until(lambda: batch_of(demo_server)["rows"] == [])
