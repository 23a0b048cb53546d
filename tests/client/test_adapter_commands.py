"""The commands with adapters and pairs, against a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Data, Ok, Prelude
from tests.support.adapter_fixtures import AdapterFolder
from tests.support.api_fixtures import PeftDirectory
from tests.support.fake_engine import MODULES, FakeEngine

pytestmark = pytest.mark.slow


@pytest.fixture
def pushed(ok: Ok, peft_directory: PeftDirectory, adapter_directory: AdapterFolder) -> None:
    """The soft prompt ``tone``, the adapters ``triage`` and ``style``, and ``custom``, trained over ``triage@1``."""
    ok("push", str(peft_directory("tone")), "--id", "tone")
    for seed, name in enumerate(("triage", "style")):
        ok("push", str(adapter_directory(name, seed=seed)), "--id", name)
    ok("push", str(peft_directory("custom", seed=5)), "--id", "custom", "--over", "triage@1")


def test_adapters_are_listed_shown_and_inspected(ok: Ok, data: Data, prelude: Prelude, pushed: None) -> None:
    lines = ok("list").splitlines()
    assert [line.split()[0] for line in lines] == ["name", "custom", "style", "tone", "triage"]
    assert lines[4].split()[:7] == ["triage", "1", "1", "latest=1", "LORA", "2", str(size_of(data, "triage"))]
    assert [prompt["id"] for prompt in data("list", "--kind", "adapter")["data"]] == ["style", "triage"]
    assert [prompt["id"] for prompt in data("list", "--kind", "soft_prompt")["data"]] == ["custom", "tone"]
    assert prelude("list", "--kind", "lora").exit_code == 2
    shown = ok("show", "triage@1")
    for text in ("rank", "modules     4", "parameters  128", "targets     q_proj v_proj"):
        assert " ".join(text.split()) in " ".join(shown.split())
    assert "virtual tokens" not in shown
    assert "over triage@1" in " ".join(ok("show", "custom@1").split())
    assert "LORA" in ok("show", "triage")
    table = ok("inspect", "triage").splitlines()
    assert any(line.startswith("module") and "share of the weight's norm" in line for line in table)
    assert [line.split()[0] for line in table[-len(MODULES) :]] == list(MODULES)
    assert "norm of the vocabulary" in ok("inspect", "tone")


def size_of(data: Data, name: str) -> int:
    size: int = data("show", f"{name}@1")["size"]
    return size


def test_an_adapter_in_use_is_not_removed(ok: Ok, prelude: Prelude, pushed: None) -> None:
    refused = prelude("rm", "triage", "--yes")
    assert refused.exit_code == 5
    assert "trained over" in refused.stderr
    ok("rm", "custom")
    ok("rm", "triage")


def test_over_must_name_an_adapter(prelude: Prelude, pushed: None, peft_directory: PeftDirectory) -> None:
    for over in ("tone@1", "none@1", "triage"):
        refused = prelude("push", str(peft_directory("other", seed=9)), "--id", "other", "--over", over)
        assert refused.exit_code == 4
        assert "over: " in refused.stderr


def run(prelude: Prelude, tmp_path: Path, rows: list[dict[str, Any]], *arguments: str) -> list[dict[str, Any]]:
    """Run rows in bulk; returns the written ones."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name, *more = arguments
    result = prelude("run", name, str(source), str(output), "--restart", *more)
    assert result.exit_code in (0, 4), result.output
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (["triage"], "triage@1"),
        (["tone+triage"], "tone@1+triage@1"),
        (["triage@1+tone"], "tone@1+triage@1"),
        (["tone", "--adapter", "style@latest"], "tone@1+style@1"),
        (["tiny", "--adapter", "style"], "style@1"),
        (["custom"], "custom@1+triage@1"),
    ],
)
def test_bulk_runs_name_adapters_and_pairs(
    prelude: Prelude, pushed: None, tmp_path: Path, arguments: list[str], model: str
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}]
    written = run(prelude, tmp_path, rows, *arguments)
    assert [row["response"]["model"] for row in written] == [model] * 2


def test_rows_may_name_an_adapter(prelude: Prelude, pushed: None, tmp_path: Path) -> None:
    rows = [
        {"text": "a"},
        {"text": "b", "adapter_id": "triage"},
        {"text": "c", "prompt_id": "tone", "adapter_id": "style"},
        {"text": "d", "adapter_id": "tone"},
    ]
    written = run(prelude, tmp_path, rows, "tiny")
    assert [row["response"]["model"] for row in written[:3]] == ["tiny", "triage@1", "tone@1+style@1"]
    assert "is not an adapter" in written[3]["error"]["message"]
    refused = prelude(
        "run", "tiny", str(tmp_path / "in.jsonl"), str(tmp_path / "x"), "--options", '{"adapter_id": "a"}'
    )
    assert refused.exit_code == 2


def test_pairs_are_evaluated(prelude: Prelude, engine: FakeEngine, pushed: None, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"t{index}", "completion": "hello world"}) + "\n" for index in range(4))
    )
    result = prelude("eval", "tone", "--adapter", "triage", "--against", "style", "--data", str(path), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["model"], report["against"]["model"]) == ("tone@1+triage@1", "style@1")
    found = {(request.soft_prompt is not None, request.adapter is not None) for request in engine.requests}
    assert found == {(True, True), (False, True)}
