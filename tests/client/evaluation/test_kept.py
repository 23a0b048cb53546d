"""``prelude eval --record`` and promotions by a kept evaluation."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.client.evaluation.test_evaluation_commands import (
    Data,
    Judging,
    Prelude,
    aliases,
    data,
    judging,
    prelude,
    quick,
    versions,
)
from tests.support.fake_engine import FakeEngine
from tests.support.live_server import LiveServer

__all__ = ["data", "judging", "prelude", "quick", "versions"]


def kept(live: LiveServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{live.url}/v1/evaluations").json()["data"]
    return found


def recorded(prelude: Prelude, path: object, model: str) -> str:
    result = prelude("eval", model, "--data", str(path), "--record", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["recorded"]
    return str(found)


def test_a_comparison_is_recorded_with_both_models(
    prelude: Prelude, versions: None, data: Data, judging: Judging, live: LiveServer
) -> None:
    judging({4: 4, 5: 1, 0: 0})
    path = data()
    result = prelude("eval", "sentiment@2", "--data", str(path), "--against", "sentiment@1", "--record", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    second, first = kept(live)
    assert report["recorded"] == [first["id"], second["id"]]
    assert [(one["model"], one["dataset"], one["source"]) for one in (first, second)] == [
        ("sentiment@2", "test.jsonl", "client"),
        ("sentiment@1", "test.jsonl", "client"),
    ]
    assert first["dataset_digest"] == report["dataset_digest"]
    assert first["scores"]["accuracy"] == report["accuracy"]
    comparison = httpx.get(f"{live.url}/v1/evaluations/{first['id']}/comparison?to={second['id']}").json()
    assert {key: comparison[key] for key in report["comparison"] if key != "confidence"} == {
        key: value for key, value in report["comparison"].items() if key != "confidence"
    }
    whole = httpx.get(f"{live.url}/v1/evaluations/{first['id']}").json()
    assert whole["scores"]["labels"] == report["labels"]
    assert whole["scores"]["confusion"] == report["confusion"]
    text = prelude("eval", "tiny", "--data", str(path), "--record", "--keep-texts").stdout
    assert f"recorded as {kept(live)[0]['id']}: tiny" in text
    rows = httpx.get(f"{live.url}/v1/evaluations/{kept(live)[0]['id']}/rows").json()["data"]
    assert rows[0]["text"] == "t0"


def test_a_refused_record_does_not_lose_the_scores(
    prelude: Prelude, versions: None, data: Data, monkeypatch: pytest.MonkeyPatch, live: LiveServer
) -> None:
    monkeypatch.setattr("prompt_store.jobs.evaluations.MAX_TENANT_BYTES", 0)
    result = prelude("eval", "sentiment", "--data", str(data()), "--record", "--json")
    assert json.loads(result.stdout)["recorded"] == []
    assert "was not recorded" in result.stderr
    assert result.exit_code != 0
    monkeypatch.setattr("server.client.evaluation.kept.MAX_ROWS", 5)
    result = prelude("eval", "sentiment", "--data", str(data()), "--record")
    assert "at most 5 rows, and the data has 10" in result.stderr
    assert result.exit_code != 0
    assert prelude("eval", "sentiment", "--data", str(data()), "--keep-texts").exit_code == 2


def test_a_version_is_promoted_if_it_is_better_than_a_kept_evaluation(
    prelude: Prelude, versions: None, data: Data, judging: Judging, live: LiveServer, engine: FakeEngine
) -> None:
    judging({4: 4, 5: 1, 0: 0})
    path = data()
    old = recorded(prelude, path, "sentiment@1")
    assert prelude("promote", "sentiment", "1").exit_code == 0
    promote = ("promote", "sentiment", "2", "--if-better-than", old)
    result = prelude(*promote)
    assert (result.exit_code, "has no completed evaluation" in result.stderr) == (3, True), result.output
    new = recorded(prelude, path, "sentiment@2")
    num_requests = len(engine.requests)
    result = prelude(*promote, "--significant", "0.01")
    assert (result.exit_code, "not significant" in result.stderr) == (1, True), result.output
    assert aliases(live)["latest"] == 1
    result = prelude(*promote, "--json")
    assert (result.exit_code, aliases(live)["latest"]) == (0, 2), result.output
    evaluation = json.loads(result.stdout)["evaluation"]
    assert (evaluation["first"]["id"], evaluation["second"]["id"]) == (new, old)
    assert len(engine.requests) == num_requests, "nothing is asked again"
    result = prelude("promote", "sentiment", "1", "--if-better-than", new)
    assert (result.exit_code, "is not better" in result.stderr, aliases(live)["latest"]) == (1, True, 2)
    result = prelude("promote", "sentiment", "1", "--if-better-than", old)
    assert (result.exit_code, "nothing to compare" in result.stderr) == (1, True)


def test_with_data_the_version_is_scored_now_and_kept(
    prelude: Prelude, versions: None, data: Data, judging: Judging, live: LiveServer
) -> None:
    judging({4: 4, 5: 1, 0: 0})
    path = data()
    old = recorded(prelude, path, "sentiment@1")
    prelude("promote", "sentiment", "1")
    result = prelude("promote", "sentiment", "2", "--if-better-than", old, "--data", str(path))
    assert (result.exit_code, aliases(live)["latest"]) == (0, 2), result.output
    assert [one["model"] for one in kept(live)] == ["sentiment@2", "sentiment@1"]
    result = prelude("promote", "sentiment", "2", "--if-better-than", old, "--data", str(data(8)))
    assert (result.exit_code != 0, "its SHA-256 is another" in result.stderr) == (True, True)
    result = prelude("promote", "sentiment", "2", "--if-better-than", "eval-" + "0" * 32)
    assert (result.exit_code, "does not exist" in result.stderr) == (3, True)
