"""``prelude rm`` and ``prelude restore`` against a real server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.client.conftest import Data, Get, Ok, Prelude
from tests.support.api_fixtures import PeftDirectory

pytestmark = pytest.mark.slow


def test_remove_asks_for_confirmation_on_a_terminal(
    prelude: Prelude, ok: Ok, two: None, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("promote", "sentiment", "1", "--alias", "stable")
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    for target, what in (
        ("sentiment", "This deletes sentiment with 2 versions and the aliases latest, stable. Continue?"),
        ("sentiment@2", "This deletes sentiment@2 and the alias latest. Continue?"),
        ("sentiment@1", "This deletes sentiment@1 and the alias stable. Continue?"),
    ):
        for answer in ("n\n", ""):
            refused = prelude("rm", target, input=answer)
            assert refused.exit_code == 1
            assert what in refused.stderr
    assert get("/sentiment")["num_versions"] == 2
    assert prelude("rm", "sentiment@2", input="y\n").exit_code == 0
    assert get("/sentiment")["aliases"] == {"stable": 1}
    last = prelude("rm", "sentiment", input="y\n")
    assert "This deletes sentiment with 1 version and the alias stable. Continue?" in last.stderr
    assert last.exit_code == 0
    assert get("")["data"] == []
    assert prelude("rm", "sentiment", input="y\n").exit_code == 3


def test_remove_needs_no_confirmation_with_yes(data: Data, two: None) -> None:
    one, all_ = data("rm", "sentiment@1"), data("rm", "sentiment", "--yes")
    until = one.pop("restorable_until"), all_.pop("restorable_until")
    assert all(0 < when - time.time() - 7 * 86400 + 60 < 120 for when in until)
    assert one == {
        "id": "sentiment@1",
        "object": "prompt.version",
        "deleted": True,
        "versions": [1],
        "aliases": {},
        "ended_rollouts": [],
    }
    assert all_ == {
        "id": "sentiment",
        "object": "prompt",
        "deleted": True,
        "versions": [2],
        "aliases": {"latest": 2},
        "ended_rollouts": [],
    }


def test_a_name_with_versions_is_removed_only_with_yes(prelude: Prelude, two: None, get: Get) -> None:
    refused = prelude("rm", "sentiment")
    assert (refused.exit_code, refused.stdout) == (5, "")
    assert "has 2 versions and the alias latest" in refused.stderr
    assert json.loads(prelude("rm", "sentiment", "--json").stdout)["error"]["code"] == "in_use"
    assert get("/sentiment")["num_versions"] == 2
    assert prelude("rm", "sentiment", "--yes").exit_code == 0


def test_restore_brings_versions_and_aliases_back(ok: Ok, data: Data, get: Get, prelude: Prelude, two: None) -> None:
    before = get("/sentiment")
    ok("rm", "sentiment", "--yes")
    assert prelude("show", "sentiment").exit_code == 3
    assert ok("restore", "sentiment") == "restored sentiment@1 sentiment@2\naliases: latest=2\n"
    assert get("/sentiment") == before
    ok("rm", "sentiment@2", "--yes")
    ok("promote", "sentiment", "1")
    assert ok("restore", "sentiment@2") == ("restored sentiment@2\nnot moved, because they exist again: latest=1\n")
    assert prelude("restore", "sentiment@2").exit_code == 5
    assert prelude("restore", "sentiment").exit_code == 3
    assert prelude("restore", "sentiment@stable").exit_code == 2
    ok("rm", "sentiment@2")
    assert data("restore", "sentiment")["versions"] == [2]


def test_a_name_without_latest_says_which_aliases_it_has(
    ok: Ok, prelude: Prelude, peft_directory: PeftDirectory, tmp_path: Path
) -> None:
    ok("push", str(peft_directory("x")), "--id", "x", "--alias", "canary")
    for command in (["pull", "x", str(tmp_path / "to")], ["warm", "x"], ["inspect", "x"], ["show", "x@latest"]):
        refused = prelude(*command)
        assert refused.exit_code == 3
        assert "has no alias 'latest': its aliases are canary=1" in refused.stderr
    ok("promote", "x", "1", "--alias", "stable")
    assert "canary=1, stable=1" in prelude("warm", "x").stderr


def test_remove_says_which_rollouts_end(
    prelude: Prelude, ok: Ok, two: None, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("canary", "sentiment", "--to", "1")
    refused = prelude("rm", "sentiment@1")
    assert refused.exit_code == 5
    assert "is in the rollout of the alias latest" in refused.stderr
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    done = prelude("rm", "sentiment@1", input="y\n")
    assert "This deletes sentiment@1 and ends the rollout of latest. Continue?" in done.stderr
    assert "ended the rollout of latest" in done.stdout
    assert get("/sentiment")["rollouts"] == {}
