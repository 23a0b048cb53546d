"""A whole server as a user starts it: ``prelude serve`` with the embedded model, tested over HTTP."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.demo import EMBEDDED
from server.demo.tour import HELDOUT_DIRECTORY, MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from tests.support.demo_server import TASKS
from tests.support.presence import present
from tests.support.processes import PRELUDE
from tests.support.serving import BASE, adapter, upload
from tests.support.waiting import wait_until


def heldout(task: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HELDOUT_DIRECTORY / f"{task}.jsonl").read_text().splitlines()]


def complete(client: httpx.Client, model: str, prompt: object, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 40, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("task", TASKS)
def test_soft_prompts_raise_the_held_out_accuracy(demo_server: httpx.Client, task: str) -> None:
    pairs = heldout(task)
    assert len(pairs) >= 100

    def accuracy(model: str) -> float:
        choices: list[dict[str, Any]] = complete(demo_server, model, [pair["input"] for pair in pairs])["choices"]
        answers = [choice["text"].strip() for choice in sorted(choices, key=lambda choice: choice["index"])]
        return [answer == pair["output"] for answer, pair in zip(answers, pairs, strict=True)].count(True) / len(
            pairs
        )

    assert accuracy(task) >= 0.95
    assert accuracy(BASE) <= 0.2


def test_the_adapter_and_the_soft_prompt_over_it_answer(demo_server: httpx.Client) -> None:
    for folder, fields in (
        (EMBEDDED.adapters / "fields", {}),
        (EMBEDDED.pairs / "fields/date-field", {"over": "fields@1"}),
    ):
        config, weights = (folder / name for name in ("adapter_config.json", "adapter_model.safetensors"))
        response = upload(demo_server, folder.name, config.read_bytes(), weights.read_bytes(), **fields)
        assert response.status_code == 201, response.text
    for name in ("fields", "date-field"):
        pairs = heldout(name)[:50]
        choices = complete(demo_server, name, [pair["input"] for pair in pairs])["choices"]
        answers = [choice["text"].strip() for choice in sorted(choices, key=lambda choice: choice["index"])]
        right = [answer == pair["output"] for answer, pair in zip(answers, pairs, strict=True)].count(True)
        assert right >= 43, name  # of 50; date-field has 0.94 of all
    for name in ("date-field", "fields"):
        demo_server.delete(f"/v1/prompts/{name}").raise_for_status()


@pytest.mark.anyio
async def test_concurrent_mixed_requests_equal_peft(demo_server: httpx.Client) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
    questions = [(task, heldout(task)[index]["input"]) for index in range(3) for task in (*TASKS[:4],)]
    questions += [(BASE, text) for _, text in questions[:4]]

    async def ask(http: httpx.AsyncClient, model: str, text: str) -> dict[str, Any]:
        body = {"model": model, "prompt": text, "temperature": 0, "max_tokens": 16, "return_token_ids": True}
        answer: dict[str, Any] = (await http.post("/v1/completions", json={**body, "ignore_eos": True})).json()
        return answer

    async with httpx.AsyncClient(base_url=demo_server.base_url, timeout=120) as http:
        answers = await asyncio.gather(*(ask(http, model, text) for model, text in questions))
    for (model, text), answer in zip(questions, answers, strict=True):
        base = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
        peft: Any = base if model == BASE else PeftModel.from_pretrained(base, SOFT_PROMPTS_DIRECTORY / model)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        base.generation_config.eos_token_id = None
        want = peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=1
        )
        (choice,) = answer["choices"]
        assert choice["token_ids"] == want[0, ids.shape[1] :].tolist(), (model, text)
        assert choice["prompt_token_ids"] == ids[0].tolist()


def test_usage_counts_text_virtual_and_cached_tokens(demo_server: httpx.Client) -> None:
    ids = [7] * 40
    for cached in (False, True):
        usage = complete(demo_server, "extract", ids, max_tokens=3, ignore_eos=True)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (40, 3, 43)
        assert usage["prompt_tokens_details"]["virtual_tokens"] == 20
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == cached


def test_chat_and_completions_give_the_same_answer(demo_server: httpx.Client) -> None:
    pair = heldout("dates")[0]
    body = {"model": "dates", "messages": [{"role": "user", "content": pair["input"]}], "temperature": 0}
    message = demo_server.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"].strip() == pair["output"]


def test_a_new_version_changes_answers_and_the_old_one_stays(demo_server: httpx.Client) -> None:
    text = heldout("intent")[0]
    assert upload(demo_server, "swap", *adapter("intent")).json()["version"] == 1
    before = complete(demo_server, "swap", text["input"])["choices"][0]["text"]
    assert before.strip() == text["output"]
    config, weights = adapter("sentiment")
    assert upload(demo_server, "swap", config, weights).json()["version"] == 2
    after = complete(demo_server, "swap", text["input"])["choices"][0]["text"]
    assert after.strip() in {"positive", "negative"}
    assert complete(demo_server, "swap@1", text["input"])["choices"][0]["text"] == before
    assert complete(demo_server, f"{BASE}:swap@1", text["input"])["choices"][0]["text"] == before
    assert complete(demo_server, BASE, text["input"], prompt_id="swap@1")["choices"][0]["text"] == before
    again = upload(demo_server, "swap", *adapter("intent"))
    assert (again.status_code, again.json()["version"]) == (200, 1)
    assert demo_server.delete("/v1/prompts/swap?force=true").status_code == 200
    response = demo_server.post("/v1/completions", json={"model": "swap", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_streams_keep_their_version_while_others_are_promoted(demo_server: httpx.Client) -> None:
    text = heldout("intent")[0]["input"]
    body = {"prompt": text, "temperature": 0, "max_tokens": 300, "ignore_eos": True}
    for task in ("intent", "sentiment"):
        assert upload(demo_server, "moving", *adapter(task)).status_code == 201
    whole = {
        version: demo_server.post("/v1/completions", json={**body, "model": f"moving@{version}"}).json()["choices"][0]
        for version in (1, 2)
    }
    assert whole[1]["text"] != whole[2]["text"]
    for version, other in ((1, 2), (2, 1)):
        demo_server.put("/v1/prompts/moving/aliases/latest", json={"version": version})
        with demo_server.stream(
            "POST", "/v1/completions", json={**body, "model": "moving", "stream": True}
        ) as response:
            lines = response.iter_lines()
            events = [next(lines)]
            assert demo_server.put("/v1/prompts/moving/aliases/latest", json={"version": other}).status_code == 200
            after = demo_server.post("/v1/completions", json={**body, "model": "moving", "max_tokens": 1})
            assert after.headers["x-prelude-prompt"] == f"moving@{other}"
            events += lines
            assert response.headers["x-prelude-prompt"] == f"moving@{version}"
        payloads = [line.removeprefix("data: ") for line in events if line.startswith("data: {")]
        assert "".join(json.loads(payload)["choices"][0]["text"] for payload in payloads) == whole[version]["text"]
    demo_server.delete("/v1/prompts/moving?force=true").raise_for_status()


def changed(task: str, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    tensors = load_file(SOFT_PROMPTS_DIRECTORY / task / "adapter_model.safetensors")
    return save({"prompt_embeddings": change(tensors["prompt_embeddings"]).contiguous()})


def with_nan(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.clone()
    rows[1, 5] = float("nan")
    return rows


@pytest.mark.parametrize(
    ("task", "make_weights", "reason"),
    [
        ("sentiment", lambda: changed("sentiment", lambda rows: rows[:, :128]), r"128.*192"),
        ("extract", lambda: changed("extract", lambda rows: rows[:, : 4 * 128]), r"4 layers.*6 layers|4.*6 layers"),
        ("sentiment", lambda: changed("sentiment", with_nan), r"NaN"),
        (
            "extract",
            lambda: changed("extract", lambda rows: rows.sign() * 3e38),
            r"base model cannot compute.*not finite",
        ),
        ("sentiment", lambda: adapter("sentiment")[1][:-100], r"safetensors"),
        ("sentiment", lambda: pickle.dumps({"prompt_embeddings": [1.0]}), r"pickle"),
    ],
    ids=["hidden size", "layer count", "nan", "overflow", "truncated", "pickled"],
)
def test_bad_files_are_refused_with_the_reason(
    demo_server: httpx.Client, task: str, make_weights: Callable[[], bytes], reason: str
) -> None:
    response = upload(demo_server, "bad", adapter(task)[0], make_weights())
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["details"]
    assert re.search(reason, error["message"]), error["message"]
    assert demo_server.get("/v1/prompts/bad").status_code == 404
    pair = heldout("dates")[1]
    assert complete(demo_server, "dates", pair["input"])["choices"][0]["text"].strip() == pair["output"]


def test_missing_names_and_too_long_prompts_are_refused(demo_server: httpx.Client) -> None:
    response = demo_server.post("/v1/completions", json={"model": "nothing", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    response = demo_server.post("/v1/completions", json={"model": BASE, "prompt_id": "nothing", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "prompt_not_found")
    response = demo_server.post("/v1/completions", json={"model": "extract", "prompt": [5] * 1010, "max_tokens": 4})
    message = response.json()["error"]["message"]
    assert response.status_code == 400
    assert all(number in message for number in ("1024", "20 virtual", "1010")), message


def test_disconnects_release_everything(demo_server: httpx.Client) -> None:
    body = {"model": "dates", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
    for _ in range(5):
        with demo_server.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())

    def value(name: str) -> float:
        return float(present(re.search(rf"^{name} (\S+)$", demo_server.get("/metrics").text, re.MULTILINE))[1])

    wait_until(lambda: value("prelude_num_requests_running") == 0, 5)
    assert value("prelude_num_requests_waiting") == 0


def test_the_demo_tours_and_exits() -> None:
    result = subprocess.run([*PRELUDE, "demo", "--exit"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert all(task in result.stdout for task in TASKS)
    found = re.search(r"(\d+) distinct soft prompts shared one forward pass", result.stdout)
    assert int(present(found)[1]) == 5
    assert "Uploaded date-field@1 over fields@1" in result.stdout
    assert "curl http://127.0.0.1" in result.stdout


def test_demo_files_are_small() -> None:
    folders = (MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY, EMBEDDED.adapters, EMBEDDED.pairs)
    total = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert total < 10_000_000
