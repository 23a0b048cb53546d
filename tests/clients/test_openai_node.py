"""OpenAI's own npm package against a whole server, its soft prompt named either way."""

from __future__ import annotations

import pytest

from tests.clients.documents import example, expected_output
from tests.clients.running import ClientEnvironment, heldout
from tests.support.serving import BASE

PAIR = heldout("extract")[0]


def test_documented_example(server: str, node_clients: ClientEnvironment) -> None:
    program = example("openai for JavaScript", "js", server)
    assert node_clients.run(program).splitlines() == expected_output(program)


@pytest.mark.parametrize("named", [{"model": "extract"}, {"model": BASE, "prompt_id": "extract"}], ids=" ".join)
def test_completions_chats_and_streams(server: str, node_clients: ClientEnvironment, named: dict[str, str]) -> None:
    told = node_clients.json("openai_node.mjs", f"{server}/v1", named, PAIR["input"])
    assert told["completion"].strip() == PAIR["output"]
    assert told["completionStream"] == told["chat"] == told["chatStream"] == told["completion"]
    assert told["chatChunks"] > 5
    assert told["usage"]["completion_tokens"] == told["streamedUsage"]["completion_tokens"]
    assert told["virtualTokens"] == 20
    assert BASE in told["models"]


def test_errors(server: str, node_clients: ClientEnvironment) -> None:
    told = node_clients.json("openai_node_errors.mjs", f"{server}/v1", BASE)
    assert told["model"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"}
    assert told["prompt"] == {
        "name": "NotFoundError",
        "status": 404,
        "code": "prompt_not_found",
        "param": "prompt_id",
    }
    assert told["field"] == {"name": "BadRequestError", "status": 400, "code": "invalid_request", "param": "top_p"}
