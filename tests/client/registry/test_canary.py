"""``prelude canary``: it starts and ends rollouts, and promotes or does not by its rules."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.client.registry import canary
from tests.client.conftest import Get, Ok, Prelude
from tests.support.fake_engine import FakeEngine
from tests.support.live_server import LiveServer

pytestmark = pytest.mark.slow

NAME = ("canary", "sentiment", "--to", "1")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "PAUSE_SECONDS", 0.02)


@contextmanager
def load(live: LiveServer, model: str = "sentiment@1") -> Iterator[None]:
    """Requests during a block."""
    done = threading.Event()

    def send() -> None:
        with httpx.Client(base_url=live.url) as client:
            while not done.is_set():
                client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def after(seconds: float, work: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def test_a_rollout_starts_changes_and_ends(ok: Ok, get: Get, two: None) -> None:
    assert ok(*NAME) == "version 1 answers 5% of sentiment@latest\n"
    assert get("/sentiment")["rollouts"] == {"latest": {"canaries": {"1": 5.0}, "shadow": None}}
    assert "latest=2 (5% 1)" in ok("show", "sentiment")
    assert "latest=2 (5% 1)" in ok("list")
    ok(*NAME, "--percent", "50", "--reason", "it holds")
    assert get("/sentiment/history")["data"][0]["reason"] == "it holds"
    assert ok(*NAME, "--shadow", "--percent", "10") == "version 1 gets copies 10% of sentiment@latest\n"
    assert get("/sentiment")["rollouts"] == {"latest": {"canaries": {}, "shadow": {"version": 1, "percent": 10.0}}}
    assert "latest=2 (shadow 1)" in ok("show", "sentiment")
    assert ok(*NAME, "--percent", "0") == "version 2 answers all of sentiment@latest\n"
    assert get("/sentiment")["rollouts"] == {}


def test_wrong_usage_changes_nothing(prelude: Prelude, get: Get, two: None) -> None:
    for arguments, status in (
        (["--promote-if", "faster"], 2),
        (["--promote-if", "errors<=101%"], 2),
        (["--promote-if", "errors<=1%", "--promote-if", "errors<=2%"], 2),
        (["--promote-if", "better"], 2),
        (["--significant", "0.05"], 2),
        (["--promote-if", "errors<=1%", "--shadow"], 2),
        (["--promote-if", "errors<=1%", "--percent", "0"], 2),
        (["--for", "soon"], 2),
        (["--alias", "stable"], 3),
    ):
        result = prelude(*NAME, *arguments)
        assert result.exit_code == status, (arguments, result.output)
    assert prelude("canary", "sentiment", "--to", "7").exit_code == 3
    assert prelude("canary", "sentiment", "--to", "2").exit_code == 4  # the alias's own
    assert get("/sentiment")["rollouts"] == {}


def test_it_is_promoted_if_few_requests_fail(live: LiveServer, prelude: Prelude, get: Get, two: None) -> None:
    with load(live):
        result = prelude(*NAME, "--promote-if", "errors<=1%", "--requests", "20", "--json")
    assert result.exit_code == 0, result.output
    reply = json.loads(result.stdout)
    assert (reply["version"], reply["promoted"], reply["why_not"]) == (1, True, None)
    prompt = get("/sentiment")
    assert (prompt["aliases"], prompt["rollouts"]) == ({"latest": 1}, {})


def test_it_ends_if_requests_fail(
    live: LiveServer, prelude: Prelude, get: Get, two: None, engine: FakeEngine
) -> None:
    engine.failure = RuntimeError("broken")
    with load(live):
        result = prelude(*NAME, "--promote-if", "errors<=50%", "--requests", "10", "--for", "1m")
    assert result.exit_code == 1
    assert "sentiment@latest is version 2 again" in result.stdout
    assert "failed, more than 50%" in result.stdout
    prompt = get("/sentiment")
    assert (prompt["aliases"], prompt["rollouts"]) == ({"latest": 2}, {})


def test_it_ends_without_enough_requests(prelude: Prelude, get: Get, two: None) -> None:
    result = prelude(*NAME, "--promote-if", "errors<=1%", "--for", "1s")
    assert result.exit_code == 1
    assert "got 0 requests in time, fewer than 100" in result.stdout
    assert get("/sentiment")["rollouts"] == {}


def test_the_change_of_somebody_else_stays(live: LiveServer, prelude: Prelude, get: Get, two: None) -> None:
    put = f"{live.url}/v1/prompts/sentiment/aliases/latest"
    timer = after(0.5, lambda: httpx.put(put, json={"version": 2}))
    result = prelude(*NAME, "--promote-if", "errors<=1%", "--for", "1m")
    timer.join()
    assert result.exit_code == 5
    assert "sentiment@latest was changed meanwhile" in result.stderr
    assert get("/sentiment")["aliases"] == {"latest": 2}


def test_a_version_that_is_not_better_is_not_promoted(
    prelude: Prelude, get: Get, two: None, tmp_path: Path, engine: FakeEngine
) -> None:
    engine.reply = "good"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"text {row}", "completion": "good"}) + "\n" for row in range(3)))
    result = prelude(*NAME, "--promote-if", "better", "--data", str(data))
    assert result.exit_code == 1, result.output
    assert "is not better" in result.stdout
    prompt = get("/sentiment")
    assert (prompt["aliases"], prompt["rollouts"]) == ({"latest": 2}, {})
