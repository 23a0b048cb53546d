"""Ensembles of soft prompts: combination, refusals and released resources."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from server.api.inference.ensemble import MAX_MEMBERS, decide, elect
from server.engine.types import GenerateRequest, Logprobs, Member, TokenEvent
from server.errors import EngineDeadError
from server.logs import FIELDS
from tests.api.classification.test_classify import classifier_parts
from tests.support.api_fixtures import CountingStore, UploadParts, WaitUntil
from tests.support.fake_engine import CONTEXT, FakeEngine
from tests.support.live_server import LiveServer
from tests.support.presence import present
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

LABELS = ["x", "y", "z"]
Speak = Callable[..., None]


@pytest.fixture
async def three(client: httpx.AsyncClient, upload_parts: UploadParts) -> list[str]:
    """Soft prompts of 4, 5 and 6 virtual tokens; the engine of ``speaking`` distinguishes them by these numbers."""
    names = ["a", "b", "c"]
    for rows, name in enumerate(names, 4):
        (await client.post("/v1/prompts", **upload_parts(name, seed=rows, rows=rows))).raise_for_status()
    return names


@pytest.fixture
def speaking(app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Speak:
    """Make the engine answer with a text, label scores or logits that depend on the number of virtual tokens."""

    def speak(
        texts: dict[int, str] | None = None,
        scores: dict[int, dict[str, float]] | None = None,
        logits: dict[int, list[float]] | None = None,
        sure: dict[int, float] | None = None,
    ) -> None:
        app.state.services.admission.capacity = 32
        generate = engine.generate

        async def answer(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
            rows = request.soft_prompt.num_virtual_tokens if request.soft_prompt else 0
            if texts is not None:
                engine.reply = texts[rows]
            async for event in generate(request):
                if scores is not None:
                    label = bytes(request.prompt_token_ids[request.params.prompt_logprobs_start :]).decode()
                    event = msgspec.structs.replace(event, prompt_logprobs=[Logprobs(scores[rows][label], [])])
                if logits is not None:
                    event = msgspec.structs.replace(event, class_logits=logits[rows])
                if sure is not None and event.logprobs is not None:
                    event = msgspec.structs.replace(
                        event, logprobs=[Logprobs(sure[rows], []) for _ in event.logprobs]
                    )
                yield event

        monkeypatch.setattr(engine, "generate", answer)

    return speak


SCORES = {
    4: {"x": 0.0, "y": -0.1, "z": -9.0},
    5: {"x": 0.0, "y": -0.1, "z": -9.0},
    6: {"x": -9.0, "y": 0.0, "z": -9.0},
}
"""Two members slightly prefer x, one strongly prefers y: the vote is x, the mean y."""


@pytest.mark.parametrize(("how", "label"), [("vote", "x"), (None, "x"), ("mean", "y")])
async def test_labels_are_chosen_by_vote_or_by_mean(
    client: httpx.AsyncClient, three: list[str], speaking: Speak, how: str | None, label: str
) -> None:
    speaking(scores=SCORES)
    alone = [
        (await client.post("/v1/classify", json={"model": name, "input": "i", "labels": LABELS})).json()["data"][0]
        for name in three
    ]
    body = {"model": three, "input": ["i", "j"], "labels": LABELS, "ensemble": how}
    response = await client.post("/v1/classify", json=body)
    reply = response.json()
    assert response.status_code == 200, reply
    assert response.headers["x-prelude-prompt"] == "a@1,b@1,c@1"
    assert reply["model"] == "a,b,c"
    assert [item["index"] for item in reply["data"]] == [0, 1]
    first = reply["data"][0]
    means = {name: sum(item["probabilities"][name] for item in alone) / 3 for name in LABELS}
    assert first["label"] == label
    assert first["probability"] == pytest.approx(means[label])
    assert first["probabilities"] == pytest.approx(means)
    assert first["probs"] == pytest.approx(list(means.values()))
    assert first["votes"] == {"x": 2, "y": 1, "z": 0}
    assert first["members"] == [
        {"model": f"{name}@1", "label": item["label"], "probability": pytest.approx(item["probability"])}
        for name, item in zip(three, alone, strict=True)
    ]
    assert "logprobs" not in first
    usage = reply["usage"]
    assert usage["prompt_tokens"] == 2 * 2 * 3
    assert usage["prompt_tokens_details"]["virtual_tokens"] == 2 * (4 + 5 + 6)


async def test_members_are_given_by_prompt_ids_or_model_names(
    client: httpx.AsyncClient, three: list[str], speaking: Speak
) -> None:
    speaking(scores=SCORES | {0: SCORES[6]})
    for fields, model in (({"model": "tiny"}, "tiny"), ({}, "tiny")):
        body = {**fields, "prompt_ids": ["a", "c@latest"], "input": "i", "labels": LABELS}
        reply = (await client.post("/v1/classify", json=body)).json()
        assert reply["model"] == model
        assert [member["model"] for member in reply["data"][0]["members"]] == ["a@1", "c@1"]
    body = {"model": ["tiny", "tiny:a", "b@1"], "input": "i", "labels": LABELS}
    reply = (await client.post("/v1/classify", json=body)).json()
    assert [member["model"] for member in reply["data"][0]["members"]] == ["tiny", "a@1", "b@1"]


async def test_heads_are_combined_by_label_name(client: httpx.AsyncClient, speaking: Speak) -> None:
    for name, labels in (("one", ["u", "v", "w"]), ("two", ["w", "u", "v"]), ("odd", ["u", "v", "q"])):
        parts = classifier_parts(name, metadata=json.dumps({"labels": labels}))
        (await client.post("/v1/prompts", **parts)).raise_for_status()
    speaking(logits={4: [5.0, 0.0, 0.0]})
    reply = (await client.post("/v1/classify", json={"model": ["one", "two"], "input": "i"})).json()
    (item,) = reply["data"]
    assert item["votes"] == {"u": 1, "v": 0, "w": 1}
    assert item["label"] == "u"
    assert item["probabilities"]["u"] == pytest.approx(item["probabilities"]["w"])
    assert "logits" not in item
    error = (await client.post("/v1/classify", json={"model": ["one", "odd"], "input": "i"})).json()["error"]
    assert (error["param"], "same labels" in error["message"]) == ("model", True)


async def test_heads_and_scored_labels_cannot_be_combined(
    client: httpx.AsyncClient, engine: FakeEngine, three: list[str]
) -> None:
    (await client.post("/v1/prompts", **classifier_parts("topics"))).raise_for_status()
    for labels in (None, LABELS):
        body = {"prompt_ids": ["topics", "a"], "input": "i", "labels": labels}
        error = (await client.post("/v1/classify", json=body)).json()["error"]
        assert (error["param"], "must all have a head" in error["message"]) == ("prompt_ids", True)
    assert engine.requests == []


async def test_the_most_frequent_text_wins(client: httpx.AsyncClient, three: list[str], speaking: Speak) -> None:
    speaking(texts={4: "no", 5: "yes", 6: "yes"})
    body = {"model": three, "prompt": ["p", "qq"], "ensemble": "vote", "max_tokens": 8}
    response = await client.post("/v1/completions", json=body)
    reply = response.json()
    assert response.status_code == 200, reply
    assert response.headers["x-prelude-prompt"] == "a@1,b@1,c@1"
    assert reply["model"] == "a,b,c"
    first, second = reply["choices"]
    assert (first["index"], first["text"], first["finish_reason"], first["logprobs"]) == (0, "yes", "stop", None)
    assert second["index"] == 1
    assert first["votes"] == {"no": 1, "yes": 2}
    assert [(member["model"], member["text"]) for member in first["members"]] == [
        ("a@1", "no"),
        ("b@1", "yes"),
        ("c@1", "yes"),
    ]
    usage = reply["usage"]
    assert usage["prompt_tokens"] == 3 * (2 + 3)
    assert usage["completion_tokens"] == 2 * (3 + 4 + 4)
    assert usage["prompt_tokens_details"]["virtual_tokens"] == 2 * (4 + 5 + 6)


@pytest.mark.parametrize(
    ("sure", "text"),
    [({4: -1.0, 5: -2.0}, "one"), ({4: -2.0, 5: -1.0}, "two"), ({4: -1.0, 5: -1.0}, "one")],
)
async def test_a_tie_goes_to_the_more_confident_text(
    client: httpx.AsyncClient, three: list[str], speaking: Speak, sure: dict[int, float], text: str
) -> None:
    speaking(texts={4: "one", 5: "two"}, sure=sure)
    body = {"prompt_ids": ["a", "b"], "prompt": "p", "logprobs": 0, "return_token_ids": True}
    (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["text"] == text
    assert [member["logprob"] for member in choice["members"]] == list(sure.values())
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]) == 4


async def test_mean_mode_generates_one_text(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, store: CountingStore, three: list[str]
) -> None:
    app.state.services.admission.capacity = 32
    body = {"model": three, "prompt": ["p", "qq"], "ensemble": "mean", "max_tokens": 30, "n": 2, "logprobs": 0}
    response = await client.post("/v1/completions", json=body)
    reply = response.json()
    assert response.status_code == 200, reply
    assert response.headers["x-prelude-prompt"] == "a@1,b@1,c@1"
    assert reply["model"] == "a,b,c"
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in reply["choices"]} == {"hello world"}
    assert all(len(choice["logprobs"]["tokens"]) == 12 for choice in reply["choices"])
    assert not {"votes", "members"} & set(reply["choices"][0])
    usage = reply["usage"]
    assert usage["prompt_tokens"] == 3 * (2 + 3)
    assert usage["completion_tokens"] == 4 * 12
    assert usage["prompt_tokens_details"]["virtual_tokens"] == 2 * (4 + 5 + 6)
    assert len(engine.requests) == 4
    for request in engine.requests:
        members = [request.soft_prompt, *(one.soft_prompt for one in request.others)]
        assert [present(member).num_virtual_tokens for member in members] == [4, 5, 6]
    await client.get("/v1/prompts")
    await until(lambda: len(store.leased) == len(store.released) == 3)


async def test_mean_mode_supports_streams_echo_and_the_base_as_a_member(
    client: httpx.AsyncClient, engine: FakeEngine, three: list[str]
) -> None:
    body = {"model": ["b", "tiny"], "prompt": "p", "ensemble": "mean", "echo": True}
    assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "phello world"
    request = engine.requests[0]
    assert (present(request.soft_prompt).num_virtual_tokens, request.others) == (5, (Member(),))
    response = await client.post("/v1/completions", json=body | {"stream": True})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "phello world"
    assert response.headers["x-prelude-prompt"] == "b@1"


def test_each_member_in_mean_mode_takes_a_permit(
    live: LiveServer, engine: FakeEngine, upload_parts: UploadParts, eventually: WaitUntil
) -> None:
    for rows, name in ((4, "a"), (5, "b"), (6, "c")):
        httpx.post(f"{live.url}/v1/prompts", **upload_parts(name, rows=rows, seed=rows)).raise_for_status()
    admission = live.server._services.admission
    engine.stall_after = 2
    body = {"model": ["a", "b", "c"], "prompt": ["p", "q"], "ensemble": "mean", "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # closed, it would close the response
        next(lines)
        assert admission.num_in_use == 6
        late = httpx.post(f"{live.url}/v1/completions", json=body | {"prompt": "p", "stream": False})
        assert (late.status_code, late.json()["error"]["code"]) == (429, "overloaded")
    eventually(lambda: admission.num_in_use == 0 and engine.in_flight == 0)
    assert {ending for _, ending in engine.ended} == {"abort"}
    text = httpx.get(f"{live.url}/metrics").text
    for name in "abc":
        assert f'prelude_requests_total{{outcome="abort",prompt="{name}",version="1"}} 1.0' in text


async def test_unsupported_options_of_mean_mode_are_refused(
    client: httpx.AsyncClient,
    app: FastAPI,
    engine: FakeEngine,
    store: CountingStore,
    three: list[str],
    upload_parts: UploadParts,
) -> None:
    body = {"model": three, "prompt": "p", "ensemble": "mean"}
    (await client.post("/v1/prompts", **classifier_parts("topics"))).raise_for_status()
    (await client.post("/v1/prompts", **upload_parts("d", seed=7, rows=4))).raise_for_status()
    (await client.post("/v1/prompts", **upload_parts("e", seed=8, rows=4))).raise_for_status()
    room = CONTEXT - 6 - 2
    assert (await client.post("/v1/completions", json=body | {"max_tokens": room})).status_code == 200
    num_asked = len(engine.requests)
    for fields, param, what in (
        ({"model": [*three, "topics"]}, "model", "not for generation"),
        ({"model": [*three, "d", "e"]}, "model", "5 is more than the 4 sequences that run at once"),
        ({"prompt_ids": ["a", "b", "a@latest"], "model": "tiny"}, "prompt_ids", "named twice"),
        ({"max_tokens": room + 1}, "max_tokens", "6 virtual tokens"),
        ({"prompt": ["p"] * 3}, "prompt", "9 sequences"),
        ({"prompt": ["p"] * 2, "n": 2}, "n", "12 sequences"),
    ):
        response = await client.post("/v1/completions", json=body | fields)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), error
        assert what in error["message"]
    assert len(engine.requests) == num_asked
    await client.get("/v1/prompts")
    await until(lambda: len(store.leased) == len(store.released))
    assert app.state.services.admission.num_in_use == 0


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": []}, "model"),
        ({"model": ["a"]}, "model"),
        ({"model": ["a", "a"]}, "model"),
        ({"model": ["a", 1]}, "model"),
        ({"model": {"a": 1}}, "model"),
        ({"model": ["a", "\ud800"]}, "model[1]"),
        ({"model": [f"a{index}" for index in range(MAX_MEMBERS + 1)]}, "model"),
        ({"prompt_ids": ["a"]}, "prompt_ids"),
        ({"prompt_ids": "a"}, "prompt_ids"),
        ({"prompt_ids": ["a", "No"]}, "prompt_ids"),
        ({"prompt_ids": ["a", "b"], "model": "c"}, "prompt_ids"),
        ({"prompt_ids": ["a", "b"], "model": ["a", "b"]}, "prompt_ids"),
        ({"prompt_ids": ["a", "b"], "prompt_id": "c"}, "prompt_id"),
        ({"model": ["a", "b"], "prompt_id": "c"}, "prompt_id"),
        ({"model": ["a", "a@1"]}, "model"),
        ({"prompt_ids": ["a", "b", "a@latest"]}, "prompt_ids"),
        ({"model": ["a", "b"], "ensemble": "median"}, "ensemble"),
        ({"model": "a", "ensemble": "vote"}, "ensemble"),
        ({"ensemble": "mean"}, "ensemble"),
        ({"model": ["a", "b"], "task_id": 1}, "task_id"),
        ({"model": ["a", "b", "c"], "input": ["1", "2"], "prompt": ["1", "2", "3"]}, ("input", "prompt")),
    ],
)
async def test_errors_name_the_bad_field(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    app: FastAPI,
    store: CountingStore,
    three: list[str],
    path: str,
    fields: dict[str, Any],
    param: str | tuple[str, str],
) -> None:
    body = {"input": "i", "labels": ["x", "y"]} if path == "/v1/classify" else {"prompt": "i"}
    if isinstance(param, tuple):
        param = param[path != "/v1/classify"]
    response = await client.post(
        path, content=json.dumps(body | fields), headers={"content-type": "application/json"}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert engine.requests == []
    assert app.state.services.admission.num_in_use == 0
    await client.get("/v1/prompts")
    await until(lambda: len(store.leased) == len(store.released))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"ensemble": "mean", "echo": True, "logprobs": 0}, "echo"),
    ],
)
async def test_options_for_one_soft_prompt_are_refused_for_ensembles(
    client: httpx.AsyncClient, engine: FakeEngine, three: list[str], fields: dict[str, Any], param: str
) -> None:
    response = await client.post("/v1/completions", json={"model": three, "prompt": "i"} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert engine.requests == []


async def test_chat_refuses_ensembles(client: httpx.AsyncClient, three: list[str]) -> None:
    messages = [{"role": "user", "content": "i"}]
    for fields in ({"model": three}, {"prompt_ids": three, "ensemble": "mean"}, {"model": "a", "ensemble": "vote"}):
        response = await client.post("/v1/chat/completions", json=fields | {"messages": messages})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "ensemble")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ["a", "gone"]}, "model"),
        ({"prompt_ids": ["a", "gone"]}, "prompt_ids"),
        ({"model": ["a", "b@9"]}, "model"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions"])
async def test_the_error_names_the_missing_member(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    app: FastAPI,
    store: CountingStore,
    three: list[str],
    path: str,
    fields: dict[str, Any],
    param: str,
) -> None:
    body = {"input": "i", "labels": LABELS, "prompt": "i"} | fields
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (404, param)
    assert ("gone" if "gone" in str(fields) else "b") in error["message"]
    await client.get("/v1/prompts")
    await until(lambda: len(store.leased) == len(store.released) > 0)
    assert app.state.services.admission.num_in_use == 0
    assert engine.requests == []


@pytest.mark.parametrize(
    ("path", "how"), [("/v1/classify", "vote"), ("/v1/completions", "vote"), ("/v1/completions", "mean")]
)
async def test_one_failure_fails_the_request_and_releases_everything(
    client: httpx.AsyncClient,
    app: FastAPI,
    engine: FakeEngine,
    store: CountingStore,
    three: list[str],
    path: str,
    how: str,
) -> None:
    engine.failure = EngineDeadError("it died")
    body = {"model": three, "input": "i", "labels": ["x"], "prompt": "i", "ensemble": how}
    assert (await client.post(path, json=body)).status_code == 503
    await client.get("/v1/prompts")
    await until(lambda: len(store.leased) == len(store.released) == 3)
    assert app.state.services.admission.num_in_use == 0
    assert engine.in_flight == 0


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions"])
async def test_a_full_server_admits_no_member(
    client: httpx.AsyncClient, app: FastAPI, store: CountingStore, three: list[str], path: str
) -> None:
    body = {"model": three, "input": "i", "labels": ["x"], "prompt": "i"}
    with app.state.services.admission.permits(6):
        response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
    assert app.state.services.admission.num_in_use == 0
    await client.get("/v1/prompts")
    assert store.leased == []


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions"])
def test_a_disconnect_aborts_all_members(
    live: LiveServer, engine: FakeEngine, upload_parts: UploadParts, eventually: WaitUntil, path: str
) -> None:
    for rows, name in ((4, "a"), (5, "b")):
        httpx.post(f"{live.url}/v1/prompts", **upload_parts(name, rows=rows, seed=rows)).raise_for_status()
    engine.step_seconds = 30.0
    body = {"model": ["a", "b"], "input": "i", "labels": ["x"], "prompt": "i"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}{path}", json=body, timeout=0.3)
    eventually(lambda: len(engine.requests) == 2 and engine.in_flight == 0)
    assert {ending for _, ending in engine.ended} == {"abort"}


@pytest.mark.parametrize(("how", "num_new"), [("vote", 6), ("mean", 2)])
async def test_an_ensemble_counts_as_one_request_of_a_key(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, three: list[str], how: str, num_new: int
) -> None:
    from server.api.keys.callers import ANYBODY
    from server.api.keys.limits import KeyLimiter, Limits

    limiter = KeyLimiter(Limits(requests_per_minute=1, max_concurrency=1, tokens_per_minute=1000), clock=lambda: 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.api.inference.entry.caller_of", lambda _: replace(ANYBODY, limiter=limiter))
        body = {"model": three, "prompt": "i", "max_tokens": 2, "ensemble": how}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert (await client.post("/v1/completions", json=body)).status_code == 429
    assert limiter.num_running == 0
    assert limiter.headers["x-ratelimit-remaining-tokens"] == str(1000 - 3 * 2 - num_new)


probabilities = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)


@given(rows=st.lists(probabilities, min_size=1, max_size=7))
def test_decisions_match_plain_counting(rows: list[list[float]]) -> None:
    mean, vote = decide(rows, "mean"), decide(rows, "vote")
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert mean.probabilities == vote.probabilities == pytest.approx(means)
    assert mean.probabilities[mean.best] == max(mean.probabilities)
    favourites = [row.index(max(row)) for row in rows]
    assert vote.votes == mean.votes == [favourites.count(index) for index in range(3)]
    assert vote.votes[vote.best] == max(vote.votes)
    rivals = [vote.probabilities[index] for index in range(3) if vote.votes[index] == max(vote.votes)]
    assert vote.probabilities[vote.best] == max(rivals)


@given(pairs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(-5, 0)), min_size=1, max_size=8))
def test_elections_match_plain_counting(pairs: list[tuple[str, int]]) -> None:
    texts, likelihoods = [text for text, _ in pairs], [float(value) for _, value in pairs]
    index, votes = elect(texts, likelihoods)
    assert votes == {text: texts.count(text) for text in texts}
    assert votes[texts[index]] == max(votes.values())
    assert texts.index(texts[index]) == index


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions"])
async def test_an_ensemble_is_one_log_line_and_one_count_per_member(
    client: httpx.AsyncClient, three: list[str], caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with caplog.at_level("INFO", logger="server.api.inference.request_record"):
        body = {"model": three, "input": "i", "labels": ["x"], "prompt": "i"}
        usage = (await client.post(path, json=body)).json()["usage"]
    (line,) = [
        getattr(record, FIELDS) for record in caplog.records if record.name == "server.api.inference.request_record"
    ]
    assert (line["model"], line["prompt"], line["outcome"]) == ("a,b,c", "a@1,b@1,c@1", "stop")
    assert line["prompt_tokens"] == usage["prompt_tokens"] == 6
    assert line["virtual_tokens"] == 4 + 5 + 6
    assert "version" not in line
    text = (await client.get("/metrics")).text
    for name in three:
        assert f'prelude_requests_total{{outcome="stop",prompt="{name}",version="1"}} 1.0' in text
