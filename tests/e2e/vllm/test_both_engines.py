"""One API, two engines: the same requests get the same answers, or a refusal that names engine and capability."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from server.demo.tour import HELDOUT_DIRECTORY, MODEL_DIRECTORY
from tests.support.engine.adapters import randomise, targets_of
from tests.support.serving import BASE, adapter, serving, upload
from tests.support.vllm import needs_vllm, serving_vllm
from tests.support.waiting import seconds_until

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

TASKS = ("intent", "sentiment", "dates", "extract")
TEXT = "when can you deliver the blue lamp?"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
LABELS = ["\npositive", "\nnegative"]
SCHEMA = {
    "type": "object",
    "properties": {"urgent": {"type": "boolean"}, "order": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["urgent", "order"],
    "additionalProperties": False,
}
VARIABLE = {"id", "created", "system_fingerprint", "cached_tokens", "prompt_tokens_details", "timings"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """A server of each engine, native first, with the embedded soft prompts."""
    folder = tmp_path_factory.mktemp("engines")
    limits = ("--max-num-seqs", "40", "--max-num-batched-tokens", "64", "--max-model-len", "512")
    with ExitStack() as stack:
        native, _ = stack.enter_context(serving(folder / "native", "--dtype", "float32", *limits))
        adapters = ("--max-loras", "2", "--max-adapter-rank", "8")
        other, _ = stack.enter_context(serving_vllm(folder / "vllm", "--vllm-metrics", *adapters, *limits))
        for client in (native, other):
            for task in TASKS:
                response = upload(client, task, *adapter(task))
                assert response.status_code == 201, response.text
        yield native, other


def constant(value: Any) -> Any:
    """An answer without what differs from one request to the next; floats are compared in part."""
    if isinstance(value, dict):
        return {key: constant(item) for key, item in value.items() if key not in VARIABLE}
    if isinstance(value, list):
        return [constant(item) for item in value]
    return pytest.approx(value, abs=2e-4) if isinstance(value, float) else value


def check_equal(engines: tuple[httpx.Client, httpx.Client], path: str, body: dict[str, Any]) -> Any:
    """Both answers are equal; returns vLLM's."""
    native, other = (client.post(path, json=body) for client in engines)
    assert (native.status_code, other.status_code) == (200, 200), (native.text, other.text)
    assert other.json().keys() == native.json().keys()
    got = {key: item for key, item in other.json().items() if key not in VARIABLE}
    want = constant(native.json())
    assert _strip(got) == want
    return other.json()


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strip(item) for key, item in value.items() if key not in VARIABLE}
    return [_strip(item) for item in value] if isinstance(value, list) else value


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several_texts": {"prompt": [TEXT, "I love it", "x"]},
    "stop_string": {"stop": ["e"]},
    "stop_string_kept": {"stop": ["e"], "include_stop_str_in_output": True},
    "stop_token": {"stop_token_ids": [30, 40, 50]},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 60},
    "min_tokens": {"min_tokens": 12},
    "repetition_penalty": {"repetition_penalty": 1.3, "ignore_eos": True},
    "less_than_no_repetition_penalty": {"repetition_penalty": 0.7, "ignore_eos": True},
    "presence_penalty": {"presence_penalty": 1.5, "ignore_eos": True},
    "frequency_penalty": {"frequency_penalty": 1.5, "ignore_eos": True},
    "min_p_and_top_k": {"min_p": 0.9, "top_k": 1, "temperature": 1.0, "seed": 5},
    "logit_bias": {"logit_bias": {"25": 60.0, "26": -100.0}, "ignore_eos": True},
    "logprobs": {"logprobs": 5},
    "logprobs_of_the_token_alone": {"logprobs": 0},
    "token_ids": {"return_token_ids": True},
    "choice": {"structured_outputs": {"choice": ["refund", "delivery", "other"]}},
    "regex": {"structured_outputs": {"regex": "[0-9]{3}-[a-z]{2}"}},
    "json_schema": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 60},
    "grammar": {"structured_outputs": {"grammar": 'start: "yes" | "no" "!"'}},
    "regex_at_its_limit": {"structured_outputs": {"regex": "[0-9]{3}"}, "max_tokens": 3},
    "no_new_tokens": {"max_tokens": 0, "echo": True},
}


@pytest.mark.parametrize("model", [BASE, "intent", "dates"])
@pytest.mark.parametrize("name", FIELDS)
def test_completions(engines: tuple[httpx.Client, httpx.Client], name: str, model: str) -> None:
    check_equal(engines, "/v1/completions", {"model": model, "prompt": TEXT, **GREEDY, **FIELDS[name]})


@pytest.mark.parametrize("model", [BASE, *TASKS])
def test_chat(engines: tuple[httpx.Client, httpx.Client], model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": TEXT}], **GREEDY}
    check_equal(engines, "/v1/chat/completions", body)
    check_equal(engines, "/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 3})


FUNCTIONS = {
    "find_order": {
        "type": "object",
        "properties": {"order": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["order"],
    },
    "cancel": {"type": "object", "properties": {"now": {"type": "boolean"}}, "required": ["now"]},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": fields}} for name, fields in FUNCTIONS.items()]
FORCED = {"any": "required", "one": {"type": "function", "function": {"name": "cancel"}}}


@pytest.mark.parametrize("choice", FORCED)
@pytest.mark.parametrize("model", [BASE, "intent", "dates"])
def test_forced_tool_calls(engines: tuple[httpx.Client, httpx.Client], model: str, choice: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": TEXT}], "tools": TOOLS, **GREEDY}
    body |= {"tool_choice": FORCED[choice], "max_tokens": 100}
    (answer,) = check_equal(engines, "/v1/chat/completions", body)["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] in (FUNCTIONS if choice == "any" else {"cancel"})
    assert json.loads(call["function"]["arguments"]).keys() == set(FUNCTIONS[call["function"]["name"]]["required"])


def lora(folder: Path, seed: int, **more: Any) -> tuple[bytes, bytes]:
    """The files of a LoRA with random weights."""
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY)
    base.config._name_or_path = base.name_or_path = ""
    torch.manual_seed(seed)
    targets = targets_of(base)["attention"]
    model = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=targets, **more))
    randomise(model)
    model.save_pretrained(str(folder))
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def test_adapters_alone_and_with_soft_prompts(engines: tuple[httpx.Client, httpx.Client], tmp_path: Path) -> None:
    """A name's next version answers with its own weights at once, with texts and soft prompts that are cached."""
    texts = set()
    for seed in range(2):
        files = lora(tmp_path / str(seed), seed)
        for client in engines:
            response = upload(client, "style", *files, allow_other_base="true")
            assert response.status_code == 201, response.text
            version = response.json()["version"]
            client.put("/v1/prompts/style/aliases/latest", json={"version": version}).raise_for_status()
        for model in ("style", "intent+style", "dates+style", BASE, "intent"):
            body = {"model": model, "prompt": TEXT, **GREEDY, "logprobs": 2}
            answer = check_equal(engines, "/v1/completions", body)
            texts.add((model, answer["choices"][0]["text"]))
    assert len({text for model, text in texts if model == "style"}) == 2
    assert len({text for model, text in texts if model == BASE}) == 1


def test_an_adapter_that_vllm_does_not_apply_is_refused_at_upload(
    engines: tuple[httpx.Client, httpx.Client], tmp_path: Path
) -> None:
    files = lora(tmp_path, 0, use_dora=True)
    native, other = (upload(client, "dora", *files, allow_other_base="true") for client in engines)
    assert native.status_code == 201, native.text
    engines[0].delete("/v1/prompts/dora").raise_for_status()
    assert other.status_code == 400
    (fault,) = other.json()["error"]["details"]
    assert fault["code"] == "unsupported_variant"
    assert "DoRA" in fault["message"]


@pytest.mark.parametrize("model", [BASE, "sentiment", "dates"])
def test_scores_of_a_text_twice(engines: tuple[httpx.Client, httpx.Client], model: str) -> None:
    """The second time, soft prompt and text are in the prefix cache."""
    body = {"model": model, "prompt": TEXT * 4, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 2}
    for _ in range(2):
        native, other = (client.post("/v1/completions", json=body).json() for client in engines)
        got, want = (answer["choices"][0]["logprobs"] for answer in (other, native))
        assert got["tokens"] == want["tokens"]
        # A text's first token follows a virtual one, whose logits vLLM has computed for another request.
        assert got["token_logprobs"][0] is None
        assert got["token_logprobs"][1:] == pytest.approx(want["token_logprobs"][1:], abs=2e-4)
        for mine, theirs in zip(got["top_logprobs"][1:], want["top_logprobs"][1:], strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)


def test_labels_are_scored(engines: tuple[httpx.Client, httpx.Client]) -> None:
    pairs = [json.loads(line) for line in (HELDOUT_DIRECTORY / "sentiment.jsonl").read_text().splitlines()][:20]
    body = {"model": "sentiment", "input": [pair["input"] for pair in pairs], "labels": LABELS}
    check_equal(engines, "/v1/classify", body)
    check_equal(engines, "/v1/classify", body | {"model": ["sentiment", "intent"], "ensemble": "vote"})


@pytest.mark.parametrize("model", [BASE, "intent", "dates"])
def test_streams(engines: tuple[httpx.Client, httpx.Client], model: str) -> None:
    body = {"model": model, "prompt": TEXT, **GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    texts, usages = [], []
    for client in engines:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        events = [json.loads(line) for line in lines]
        texts.append("".join(choice["text"] for event in events for choice in event["choices"]))
        usages.append(_strip(events[-1]["usage"]))
    assert texts[0] == texts[1]
    assert usages[0] == usages[1]


def test_choices_are_repeatable_by_seed_and_differ(engines: tuple[httpx.Client, httpx.Client]) -> None:
    _, client = engines
    body = {"model": "dates", "prompt": TEXT, "n": 4, "seed": 7, "temperature": 1.5, "max_tokens": 12}

    def texts(**fields: object) -> list[str]:
        answer = client.post("/v1/completions", json=body | fields).json()
        return [choice["text"] for choice in answer["choices"]]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first
    assert texts(seed=8) != first
    assert texts(seed=None) != texts(seed=None)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"structured_outputs": {"regex": "[0-9"}}, "regex"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "missing"),
    ],
)
def test_a_constraint_that_cannot_be_compiled_is_a_clients_error(
    engines: tuple[httpx.Client, httpx.Client], body: dict[str, Any], word: str
) -> None:
    responses = [client.post("/v1/completions", json={"model": BASE, "prompt": TEXT, **body}) for client in engines]
    codes = [(response.status_code, response.json()["error"]["code"]) for response in responses]
    assert codes[0] == codes[1]
    assert codes[1][0] == 400
    assert word in responses[1].json()["error"]["message"]


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "unsupported_by_engine"
    message: str = error["message"]
    assert "engine vllm" in message
    return message


def test_what_the_engine_cannot_do_is_refused_by_name(
    engines: tuple[httpx.Client, httpx.Client], tmp_path: Path
) -> None:
    native, client = engines
    body = {"model": ["sentiment", "intent"], "prompt": TEXT, "ensemble": "mean", "max_tokens": 2}
    assert native.post("/v1/completions", json=body).status_code == 200
    assert "mean_ensembles" in refusal(client.post("/v1/completions", json=body))
    assert "mean_ensembles" in refusal(client.post("/v1/completions", json=body | {"stream": True}))
    assert native.get("/v1/prompts/intent/inspect").status_code == 200
    assert "inspection" in refusal(client.get("/v1/prompts/intent/inspect"))
    config, weights = with_a_head(tmp_path)
    assert "classification_heads" in refusal(upload(client, "head", config, weights, allow_other_base="true"))


def with_a_head(folder: Path) -> tuple[bytes, bytes]:
    """The files of a soft prompt that was trained to classify."""
    base = AutoModelForSequenceClassification.from_pretrained(MODEL_DIRECTORY, num_labels=3)
    base.config._name_or_path = base.name_or_path = ""
    config = PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=4)
    model: PeftModel = get_peft_model(base, config)
    model.save_pretrained(str(folder))
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def test_the_model_is_described(engines: tuple[httpx.Client, httpx.Client]) -> None:
    native, other = (client.get("/v1/models").json()["data"] for client in engines)
    assert [model["id"] for model in native] == [model["id"] for model in other]
    assert {model["max_model_len"] for model in other if "max_model_len" in model} <= {512}


def test_too_long_a_text_is_refused_alike(engines: tuple[httpx.Client, httpx.Client]) -> None:
    body = {"model": "dates", "prompt": [7] * 505, "max_tokens": 20}
    native, other = (client.post("/v1/completions", json=body) for client in engines)
    assert (native.status_code, native.json()["error"]["code"]) == (other.status_code, other.json()["error"]["code"])
    assert other.status_code == 400


def test_metrics_count_what_has_been_served(engines: tuple[httpx.Client, httpx.Client]) -> None:
    _, client = engines
    check_equal(engines, "/v1/completions", {"model": "intent", "prompt": TEXT, **GREEDY})
    lines = client.get("/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    seconds_until(lambda: "vllm:generation_tokens_total{" in client.get("/metrics").text, 10)
    assert "vllm:" not in engines[0].get("/metrics").text
    for name in ("generation_tokens", "prompt_tokens", "virtual_tokens", "engine_steps"):
        assert values[f"prelude_{name}_total"] > 0
    assert values["prelude_step_seconds_count"] > 0
    assert values['prelude_soft_prompt_resident{tier="host"}'] >= 2


NUM_STREAMS = 32
NUM_CHANGES = 20
STREAMED = {"prompt": TEXT, **GREEDY, "ignore_eos": True, "return_token_ids": True}


@pytest.mark.anyio
async def test_new_versions_are_promoted_under_32_streams(engines: tuple[httpx.Client, httpx.Client]) -> None:
    """Each stream has all tokens, and those of the version that its header names."""
    _, client = engines
    of_task = {}
    for task in TASKS:
        answer = client.post("/v1/completions", json={"model": task, **STREAMED}).json()
        of_task[task] = answer["choices"][0]["token_ids"]
    assert len({tuple(answer) for answer in of_task.values()}) == len(TASKS)
    assert upload(client, "moving", *adapter(TASKS[0])).status_code == 201
    found: list[tuple[int, list[int]]] = []
    is_done = anyio.Event()
    async with (
        httpx.AsyncClient(base_url=client.base_url, timeout=240) as http,
        anyio.create_task_group() as group,
    ):
        for _ in range(NUM_STREAMS):
            group.start_soon(_stream, http, found, is_done)
        await anyio.sleep(2)
        versions = {1: TASKS[0]}
        for number in range(1, NUM_CHANGES):
            task = TASKS[number % len(TASKS)]
            config, weights = adapter(task)
            version = await _upload(http, config, weights)
            versions[version] = task
            reply = await http.put("/v1/prompts/moving/aliases/latest", json={"version": version})
            assert reply.status_code == 200, reply.text
            answer = await http.post("/v1/completions", json={"model": "moving", **STREAMED})
            assert answer.headers["x-prelude-prompt"] == f"moving@{version}"
            assert answer.json()["choices"][0]["token_ids"] == of_task[task]
        is_done.set()
    assert len(found) >= 2 * NUM_STREAMS
    assert {version for version, _ in found} > {1}
    wrong = [(version, answer) for version, answer in found if answer != of_task[versions[version]]]
    assert wrong == []
    client.delete("/v1/prompts/moving", params={"force": True}).raise_for_status()


async def _stream(http: httpx.AsyncClient, found: list[tuple[int, list[int]]], is_done: anyio.Event) -> None:
    while not is_done.is_set():
        answer: list[int] = []
        async with http.stream(
            "POST", "/v1/completions", json={"model": "moving", "stream": True, **STREAMED}
        ) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    answer += event["choices"][0]["token_ids"]
        found.append((int(response.headers["x-prelude-prompt"].rpartition("@")[2]), answer))


async def _upload(http: httpx.AsyncClient, config: bytes, weights: bytes) -> int:
    files = [("files", ("adapter_config.json", config)), ("files", ("adapter_model.safetensors", weights))]
    reply = await http.post("/v1/prompts", data={"id": "moving", "alias": "candidate"}, files=files)
    assert reply.status_code in (200, 201), reply.text
    return int(reply.json()["version"])
