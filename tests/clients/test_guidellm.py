"""GuideLLM's load against a whole server: every request gets a complete answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.documents import command
from tests.clients.running import ClientEnvironment
from tests.support.serving import BASE

NUM_TOKENS = {"prompt": 64, "output": 32}


@pytest.mark.parametrize(
    ("named", "seconds"),
    [("model=sentiment", 30), (f"model={BASE},extras.body.prompt_id=sentiment,request_format=/v1/completions", 10)],
    ids=["chats by model", "completions by prompt_id"],
)
def test_every_request_under_load_is_answered(
    server: str, python_clients: ClientEnvironment, tmp_path: Path, named: str, seconds: int
) -> None:
    report = tmp_path / "report.json"
    program, *arguments = command("GuideLLM", server)
    for documented, wanted in {"model=sentiment": named, "seconds=30": f"seconds={seconds}"}.items():
        arguments = [argument.replace(documented, wanted) for argument in arguments]
    arguments = [argument.replace("report.json", str(report)) for argument in arguments]
    python_clients.call([python_clients.command(program), *arguments, "--disable-progress"])

    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["errored"] == 0
    assert totals["incomplete"] <= 4  # requests that were running at the end
    assert totals["successful"] > 4
    for request in benchmark["requests"]["successful"]:
        assert request["input_metrics"]["text_tokens"] == NUM_TOKENS["prompt"]
        assert request["output_metrics"]["text_tokens"] == NUM_TOKENS["output"]
