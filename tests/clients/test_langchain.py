"""langchain-openai against a whole server, with both ways to name a soft prompt."""

from __future__ import annotations

import pytest

from tests.clients.documents import example, expected_output
from tests.clients.running import ClientEnvironment, heldout
from tests.support.serving import BASE

PAIRS = heldout("extract")[:6]
BY_MODEL = {"model": "extract"}
BY_PROMPT_ID = {"model": BASE, "extra_body": {"prompt_id": "extract"}}


def test_the_documented_example_runs(server: str, python_clients: ClientEnvironment) -> None:
    program = example("LangChain", "python", server)
    assert python_clients.run(program).splitlines() == expected_output(program)


@pytest.mark.parametrize("named", [BY_MODEL, BY_PROMPT_ID], ids=["model", "prompt_id"])
def test_every_way_to_invoke_gives_the_same_answers(
    server: str, python_clients: ClientEnvironment, named: dict[str, object]
) -> None:
    texts, want = ([pair[key] for pair in PAIRS] for key in ("input", "output"))
    results = python_clients.json("langchain_client.py", f"{server}/v1", named, texts)
    for way in ("invoke", "batch", "async_batch", "stream", "async_stream", "completions"):
        assert [text.strip() for text in results[way]] == want, way
    usage = results["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert results["streamed_usage"] == usage
    assert results["num_logprobs"] == usage["output_tokens"]
