"""OpenAI's Python client against a whole server, with both ways to name a soft prompt."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.clients.documents import example, expected_output
from tests.clients.running import TASKS, heldout
from tests.support.presence import present
from tests.support.serving import BASE, serving

WAYS: list[Callable[[str], dict[str, Any]]] = [
    lambda task: {"model": task},
    lambda task: {"model": BASE, "extra_body": {"prompt_id": task}},
]
by_either_name = pytest.mark.parametrize("named", WAYS, ids=["model", "prompt_id"])


@pytest.fixture
def sdk(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_sdk(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_the_documented_example_runs(server: str) -> None:
    program = example("openai for Python", "python", server)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program, "docs/clients.md", "exec"), {})  # noqa: S102 - this project's document
    assert printed.getvalue().splitlines() == expected_output(program)


@by_either_name
@pytest.mark.parametrize("task", TASKS)
def test_a_completion_equals_the_held_out_output(sdk: openai.OpenAI, named: Callable[..., Any], task: str) -> None:
    pair = heldout(task)[0]
    answer: Any = sdk.completions.create(**named(task), prompt=pair["input"], temperature=0, max_tokens=40)
    assert answer.choices[0].text.strip() == pair["output"]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == named(task)["model"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@by_either_name
def test_chat_accepts_null_for_every_optional_field(sdk: openai.OpenAI, named: Callable[..., Any]) -> None:
    pair = heldout("extract")[0]
    nothing: dict[str, Any] = dict.fromkeys(
        ["frequency_penalty", "logit_bias", "logprobs", "n", "presence_penalty", "response_format"]
    )
    nothing |= dict.fromkeys(["seed", "stop", "stream", "tool_choice", "tools", "top_logprobs", "top_p", "user"])
    answer: Any = sdk.chat.completions.create(
        **named("extract"), messages=user(pair["input"]), temperature=0, **nothing
    )
    assert answer.choices[0].message.content.strip() == pair["output"]


@by_either_name
def test_streams_add_up_to_the_answer(sdk: openai.OpenAI, named: Callable[..., Any]) -> None:
    text = heldout("extract")[1]["input"]
    ask = {**named("extract"), "temperature": 0, "max_tokens": 40}
    whole: Any = sdk.completions.create(**ask, prompt=text)
    chunks: list[Any] = list(
        sdk.completions.create(**ask, prompt=text, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

    with sdk.chat.completions.stream(**ask, messages=user(text)) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
        final = events.get_final_completion()
    chat = sdk.chat.completions.create(**ask, messages=user(text))
    assert "".join(deltas) == final.choices[0].message.content == chat.choices[0].message.content


@pytest.mark.anyio
async def test_concurrent_async_requests_for_all_soft_prompts_are_answered(async_sdk: openai.AsyncOpenAI) -> None:
    asked = [(task, named, pair) for task in TASKS for pair in heldout(task)[:4] for named in WAYS]
    answers = await asyncio.gather(
        *(
            async_sdk.chat.completions.create(**named(task), messages=user(pair["input"]), temperature=0)
            for task, named, pair in asked
        )
    )
    got = [str(answer.choices[0].message.content).strip() for answer in answers]
    assert got == [pair["output"] for _, _, pair in asked]


@pytest.mark.anyio
async def test_an_async_stream_can_be_closed_early(async_sdk: openai.AsyncOpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "dates",
        "temperature": 0,
        "max_tokens": 900,
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    async with await async_sdk.chat.completions.create(**ask, messages=user("20 Jul 2007.")) as stream:
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    answer: Any = await async_sdk.completions.create(model="dates", prompt="20 Jul 2007.", temperature=0)
    assert answer.choices[0].text.strip() == "2007-07-20"


def test_chat_logprobs_are_returned(sdk: openai.OpenAI) -> None:
    pair = heldout("sentiment")[0]
    answer: Any = sdk.chat.completions.create(
        model="sentiment", messages=user(pair["input"]), temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
    assert b"".join(bytes(token.bytes) for token in content).decode().startswith(answer.choices[0].message.content)


def test_models_are_listed_with_their_parent(sdk: openai.OpenAI) -> None:
    models: dict[str, Any] = {model.id: model for model in sdk.models.list()}
    assert models.keys() == {BASE, *TASKS}
    assert models["dates"].parent == BASE  # a field that OpenAI lacks; its client keeps it
    assert sdk.models.retrieve("dates@1").id == "dates@1"


def test_errors_have_the_clients_classes(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        sdk.completions.create(model="nothing", prompt="x")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as no_prompt:
        sdk.completions.create(model=BASE, prompt="x", extra_body={"prompt_id": "nothing"})
    assert (no_prompt.value.code, no_prompt.value.param) == ("prompt_not_found", "prompt_id")
    for field, value in {"temperature": 3, "top_p": "high", "messages": [], "max_tokens": -1}.items():
        body: dict[str, Any] = {"model": "dates", "messages": user("x"), field: value}
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.chat.completions.create(**body)
        assert refused.value.param == field
        assert field in refused.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.embeddings.create(model=BASE, input="x")
    assert (unknown.value.code, unknown.value.type) == ("not_found", "invalid_request_error")


def test_refused_requests_are_retried_until_served(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-num-seqs", "1", "--max-waiting", "1") as (client, _):
        url = f"{client.base_url}/v1"

        async def ask_all() -> list[openai.types.Completion]:
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=50) as sdk:
                ask: dict[str, Any] = {"model": BASE, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
                return await asyncio.gather(*(sdk.completions.create(**ask, prompt=f"{i}") for i in range(4)))

        assert [present(answer.usage).completion_tokens for answer in asyncio.run(ask_all())] == [30] * 4
        refused = client.get("/metrics").text
    assert 'prelude_request_errors_total{code="overloaded"}' in refused
