"""OpenAI's npm package against a whole server, with both ways to name a soft prompt."""

from __future__ import annotations

import pytest

from tests.clients.documents import example, expected_output
from tests.clients.running import ClientEnvironment, heldout
from tests.support.serving import BASE

PAIR = heldout("extract")[0]


def test_the_documented_example_runs(server: str, node_clients: ClientEnvironment) -> None:
    program = example("openai for JavaScript", "js", server)
    assert node_clients.run(program).splitlines() == expected_output(program)


@pytest.mark.parametrize("named", [{"model": "extract"}, {"model": BASE, "prompt_id": "extract"}], ids=" ".join)
def test_completions_chats_and_streams_agree(
    server: str, node_clients: ClientEnvironment, named: dict[str, str]
) -> None:
    results = node_clients.json("openai_node.mjs", f"{server}/v1", named, PAIR["input"])
    assert results["completion"].strip() == PAIR["output"]
    assert results["completionStream"] == results["chat"] == results["chatStream"] == results["completion"]
    assert results["chatChunks"] > 5
    assert results["usage"]["completion_tokens"] == results["streamedUsage"]["completion_tokens"]
    assert results["virtualTokens"] == 20
    assert BASE in results["models"]


def test_errors_have_the_clients_classes(server: str, node_clients: ClientEnvironment) -> None:
    results = node_clients.json("openai_node_errors.mjs", f"{server}/v1", BASE)
    assert results["model"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"}
    assert results["prompt"] == {
        "name": "NotFoundError",
        "status": 404,
        "code": "prompt_not_found",
        "param": "prompt_id",
    }
    assert results["field"] == {"name": "BadRequestError", "status": 400, "code": "invalid_request", "param": "top_p"}
