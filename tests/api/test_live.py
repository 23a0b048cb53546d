"""Tests that need a real server: disconnects, late errors, drains and OpenAI's client."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.config import Settings
from server.engine.types import FinishReason
from server.errors import (
    EngineDeadError,
    EngineStartError,
    RequestFailedError,
    RequestRefusedError,
    UnsupportedByEngineError,
)
from tests.support.api_fixtures import CountingStore, Serve, UploadParts, WaitUntil
from tests.support.fake_engine import FakeEngine
from tests.support.live_server import LiveServer

BODY: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 20}
URL = "/v1/completions"


@pytest.fixture
def sdk(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client_completes(sdk: openai.OpenAI) -> None:
    answer: Any = sdk.completions.create(model="tiny", prompt="abc", max_tokens=20)
    assert answer.choices[0].text == "hello world"
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_openais_client_streams_a_completion(sdk: openai.OpenAI) -> None:
    stream = sdk.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    pieces: list[Any] = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces[:-1] if piece.choices[0].index == 1) == "hello world"
    assert pieces[-1].usage.completion_tokens == 24


def test_openais_client_chats(sdk: openai.OpenAI) -> None:
    answer: Any = sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].finish_reason == "stop"


def test_openais_client_streams_a_chat(sdk: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with sdk.chat.completions.stream(model="tiny", messages=messages) as stream:
        stream.until_done()
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].finish_reason == "stop"


def test_openais_client_reads_logprobs(sdk: openai.OpenAI) -> None:
    answer: Any = sdk.completions.create(model="tiny", prompt="abc", max_tokens=20, logprobs=2, echo=True, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[1].logprobs
    assert logprobs.tokens[:5] == ["<s>", "a", "b", "c", "h"]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[4]["h"] == logprobs.token_logprobs[4]
    assert logprobs.text_offset[4] == 3
    messages: Any = [{"role": "user", "content": "hi"}]
    with sdk.chat.completions.stream(model="tiny", messages=messages, logprobs=True, top_logprobs=2) as stream:
        stream.until_done()
        final: Any = stream.get_final_completion()
    content = final.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == "hello world</s>"
    assert content[0].top_logprobs[0].logprob == content[0].logprob
    assert bytes(content[0].bytes) == b"h"


def test_openais_client_lists_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").owned_by == "prelude"


def test_openais_client_raises_its_error_classes(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        sdk.completions.create(model="no-such", prompt="abc")
    assert not_found.value.code == "model_not_found"
    assert not_found.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.completions.create(model="tiny", prompt="abc", temperature=9)
    assert bad.value.param == "temperature"


def test_openais_client_raises_a_late_error(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 3, RequestFailedError("out of blocks")
    pieces: list[str] = []
    with pytest.raises(openai.APIError, match="out of blocks"):
        pieces.extend(
            piece.choices[0].text for piece in sdk.completions.create(model="tiny", prompt="abc", stream=True)
        )
    assert "".join(pieces) == "hel"


@pytest.mark.parametrize("stall_after", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["abc", ["a", "b", "c"]])
def test_a_disconnect_aborts_and_releases_everything(
    live: LiveServer,
    engine: FakeEngine,
    store: CountingStore,
    upload_parts: UploadParts,
    eventually: WaitUntil,
    stall_after: int,
    stream: bool,
    prompt: str | list[str],
) -> None:
    httpx.post(f"{live.url}/v1/prompts", **upload_parts("sentiment")).raise_for_status()
    engine.stall_after = stall_after
    num = len(prompt) if isinstance(prompt, list) else 1
    services = live.server._services
    timeout = httpx.Timeout(5, read=0.2)
    body = BODY | {"model": "sentiment", "prompt": prompt, "stream": stream}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", live.url + URL, json=body, timeout=timeout) as response,
    ):
        for _ in response.iter_bytes():
            pass
    eventually(lambda: len(engine.ended) == num)
    assert [ending for _, ending in engine.ended] == ["abort"] * num
    eventually(lambda: len(store.released) == 1)
    assert store.leased == store.released
    eventually(lambda: services.admission.num_in_use == 0)
    metrics = httpx.get(f"{live.url}/metrics").text
    assert 'prelude_requests_total{outcome="abort",prompt="sentiment",version="1"} 1.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (RequestFailedError("out of blocks"), 500, "request_failed"),
        (RequestRefusedError("it needs 9 blocks"), 400, "request_refused"),
        (UnsupportedByEngineError("engine vllm does not support it"), 400, "unsupported_by_engine"),
        (EngineDeadError("the engine process ended"), 503, "engine_dead"),
        (ZeroDivisionError("a secret"), 500, "internal_error"),
    ],
)
def test_an_early_error_is_an_ordinary_response(
    live: LiveServer,
    engine: FakeEngine,
    store: CountingStore,
    stream: bool,
    failure: Exception,
    status: int,
    code: str,
) -> None:
    engine.fail_after, engine.failure = 0, failure
    response = httpx.post(live.url + URL, json=BODY | {"stream": stream, "prompt": ["a", "b"]})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert "secret" not in error["message"]
    assert ("retry-after" in response.headers) == (status == 503)
    assert live.server._services.admission.num_in_use == 0


@pytest.mark.parametrize("failure", [EngineDeadError("it ended"), ZeroDivisionError("a secret")])
def test_a_late_error_is_one_event(live: LiveServer, engine: FakeEngine, failure: Exception) -> None:
    engine.fail_after, engine.failure = 3, failure
    response = httpx.post(live.url + URL, json=BODY | {"stream": True})
    assert response.status_code == 200
    events = [event.removeprefix("data: ") for event in response.text.removesuffix("\n\n").split("\n\n")]
    assert len(events) == 4
    error = json.loads(events[-1])["error"]
    assert error["code"] in {"engine_dead", "internal_error"}
    assert "secret" not in response.text
    assert "[DONE]" not in response.text
    metrics = httpx.get(f"{live.url}/metrics").text
    assert 'prelude_requests_total{outcome="error",prompt="-",version="-"} 1.0' in metrics
    assert f'prelude_request_errors_total{{code="{error["code"]}"}} 1.0' in metrics


def test_one_failing_sequence_ends_the_others(live: LiveServer, engine: FakeEngine, eventually: WaitUntil) -> None:
    engine.fail_after, engine.failure = 2, RequestFailedError("out of blocks")
    assert httpx.post(live.url + URL, json=BODY | {"prompt": ["a", "b", "c"]}).status_code == 500
    eventually(lambda: engine.in_flight == 0)


def test_an_overloaded_server_is_429(live: LiveServer, engine: FakeEngine, eventually: WaitUntil) -> None:
    engine.stall_after = 0
    services = live.server._services
    threads = [
        threading.Thread(target=httpx.post, args=(live.url + URL,), kwargs={"json": BODY | {"prompt": ["a"] * 4}})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: services.admission.num_in_use == 8)
    response = httpx.post(live.url + URL, json=BODY)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "overloaded"
    engine.stall_after = None
    for thread in threads:
        thread.join()
    assert httpx.post(live.url + URL, json=BODY).status_code == 200


def test_the_server_is_not_ready_while_loading(serve: Serve, engine: FakeEngine, upload_parts: UploadParts) -> None:
    engine.start_gate.clear()
    live = serve(wait=False)
    assert httpx.get(f"{live.url}/live").json() == {"status": "live"}
    for path in ("/ready", "/health", "/v1/models"):
        response = httpx.get(live.url + path)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert "still being loaded" in response.json()["error"]["message"]
    assert httpx.post(live.url + URL, json=BODY).status_code == 503
    assert httpx.post(f"{live.url}/v1/prompts", **upload_parts()).status_code == 503
    assert httpx.get(f"{live.url}/v1/prompts").json()["data"] == []
    assert "prelude_num_requests_running 0.0" in httpx.get(f"{live.url}/metrics").text
    engine.start_gate.set()
    live.wait_until_ready()
    assert httpx.post(live.url + URL, json=BODY).status_code == 200


def test_an_engine_that_cannot_start_ends_the_server(serve: Serve, engine: FakeEngine) -> None:
    engine.start_failure = EngineStartError("no such model")
    live = serve(wait=False)
    live.thread.join(10)
    assert not live.thread.is_alive()
    assert str(live.server._services.lifecycle.failure) == "no such model"
    assert engine.stopped


def test_a_dead_engine_is_503(live: LiveServer, engine: FakeEngine) -> None:
    engine.alive = False
    response = httpx.get(f"{live.url}/ready")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"
    assert httpx.post(live.url + URL, json=BODY).json()["error"]["code"] == "engine_dead"
    assert httpx.get(f"{live.url}/live").status_code == 200


def test_drain_lets_streams_finish_and_refuses_new_work(
    live: LiveServer, engine: FakeEngine, eventually: WaitUntil
) -> None:
    engine.stall_after = 3
    texts: list[str] = []
    stream = threading.Thread(
        target=lambda: texts.append(httpx.post(live.url + URL, json=BODY | {"stream": True}).text)
    )
    stream.start()
    eventually(lambda: engine.in_flight == 1)
    live.server.should_exit = True
    eventually(lambda: httpx.get(f"{live.url}/ready").status_code == 503)
    assert "shutting down" in httpx.get(f"{live.url}/ready").json()["error"]["message"]
    assert httpx.post(live.url + URL, json=BODY).status_code == 503
    engine.stall_after = None
    stream.join()
    live.thread.join(10)
    assert not live.thread.is_alive()
    assert texts[0].endswith("data: [DONE]\n\n")
    assert engine.stopped


def test_a_drain_ends_requests_that_take_too_long(serve: Serve, engine: FakeEngine, eventually: WaitUntil) -> None:
    live = serve(drain_seconds=0.1)
    engine.stall_after = 3
    texts: list[str] = []
    stream = threading.Thread(
        target=lambda: texts.append(httpx.post(live.url + URL, json=BODY | {"stream": True}).text)
    )
    stream.start()
    eventually(lambda: engine.in_flight == 1)
    live.server.should_exit = True
    stream.join()
    live.thread.join(10)
    assert (
        "shutting down" in json.loads(texts[0].strip().split("\n\n")[-1].removeprefix("data: "))["error"]["message"]
    )
    assert FinishReason.ABORT.value not in texts[0]


def test_a_streamed_upload_over_the_limit_is_413(live: LiveServer, store: CountingStore) -> None:
    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="id"\r\n\r\nbig\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
        for _ in range(40):
            yield b"x" * 65536
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = httpx.post(f"{live.url}/v1/prompts", content=body(), headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"
    assert store.totals().num_prompts == 0


def test_an_upload_declared_over_the_limit_is_refused_unread(live: LiveServer) -> None:
    with closing(http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=5)) as connection:
        connection.putrequest("POST", "/v1/prompts")
        connection.putheader("content-type", "multipart/form-data; boundary=b")
        connection.putheader("content-length", "999999999")
        connection.endheaders()
        assert connection.getresponse().status == 413


def test_an_interrupted_upload_leaves_no_files(
    live: LiveServer, settings: Settings, store: CountingStore, eventually: WaitUntil
) -> None:
    staging = Path(settings.store.location) / "staging"

    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
        yield b"x" * 1000
        raise InterruptedError

    headers = {"content-type": "multipart/form-data; boundary=b"}
    with pytest.raises(InterruptedError):
        httpx.post(f"{live.url}/v1/prompts", content=body(), headers=headers)
    eventually(lambda: not any(staging.glob("*/*/")))
    assert store.totals().num_prompts == 0


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_client_that_sends_too_much_can_read_the_refusal(live: LiveServer, is_declared: bool) -> None:
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    content = body if is_declared else iter([body[:5_000_000], body[5_000_000:]])
    response = httpx.post(f"{live.url}{URL}", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
