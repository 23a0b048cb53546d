"""The LiteLLM proxy between OpenAI's client and a whole server, with both ways to name a soft prompt."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.documents import example
from tests.clients.running import ClientEnvironment, heldout
from tests.support.processes import free_port, server_process

_START_SECONDS = 120.0

# The document's name, and the soft prompt that it stands for.
NAMES = {"dates": "dates", "intent": "intent", "prelude/extract": "extract", "prelude/sentiment@1": "sentiment"}


@pytest.fixture(scope="module")
def proxy(
    server: str, python_clients: ClientEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("litellm")
    config = folder / "litellm.yaml"
    config.write_text(example("LiteLLM proxy", "yaml", server))
    port = free_port()
    key = f"sk-{secrets.token_hex(32)}"
    command = [python_clients.command("litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    environment = {**python_clients.variables, "LITELLM_MASTER_KEY": key}
    with (
        server_process(
            command,
            f"{url}/health/readiness",
            log=folder / "log",
            seconds=_START_SECONDS,
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
        ),
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize(("model", "task"), NAMES.items())
def test_the_proxy_passes_answers_through(proxy: openai.OpenAI, model: str, task: str) -> None:
    pair = heldout(task)[0]
    ask: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 40}
    messages: Any = [{"role": "user", "content": pair["input"]}]
    completion: Any = proxy.completions.create(**ask, prompt=pair["input"])
    assert completion.choices[0].text.strip() == pair["output"]
    chat: Any = proxy.chat.completions.create(**ask, messages=messages)
    assert chat.choices[0].message.content.strip() == pair["output"]
    assert chat.usage.completion_tokens == completion.usage.completion_tokens
    stream = proxy.chat.completions.create(
        **ask, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks: list[Any] = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens


def test_the_proxys_list_of_models_has_the_servers_limits(proxy: openai.OpenAI) -> None:
    models: dict[str, Any] = {model.id: model for model in proxy.models.list()}
    assert models.keys() >= {"dates", "intent"}
    assert models["dates"].max_input_tokens == 1024


def test_the_proxy_passes_errors_through(proxy: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'nothing' does not exist"):
        proxy.completions.create(model="prelude/nothing", prompt="x")
    with pytest.raises(openai.BadRequestError, match="min_p"):
        proxy.completions.create(model="dates", prompt="x", extra_body={"min_p": 7})
