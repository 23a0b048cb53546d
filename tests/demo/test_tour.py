"""The demo's tour over a scripted engine: its output and its exit status."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from server.config import Settings
from server.demo import tour
from server.errors import ConfigurationError, EngineStartError, RequestFailedError
from tests.support.api_fixtures import MakeApp, PeftDirectory, WaitUntil
from tests.support.fake_engine import FakeEngine


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def demo_files(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    peft_directory: PeftDirectory,
    make_app: MakeApp,
    engine: FakeEngine,
) -> None:
    """Two soft prompts and their held-out inputs, served by the scripted engine."""
    prompts, heldout = tmp_path / "soft_prompts", tmp_path / "heldout"
    prompts.mkdir()
    heldout.mkdir()
    for seed, name in enumerate(["colours", "dates"]):
        peft_directory(name, seed=seed).rename(prompts / name)
        pairs = [{"input": f"{name} [{i}]", "output": "hello world"} for i in range(6)]
        (heldout / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    monkeypatch.setattr(tour, "SOFT_PROMPTS_DIRECTORY", prompts)
    monkeypatch.setattr(tour, "HELDOUT_DIRECTORY", heldout)
    monkeypatch.setattr(tour, "create_app", make_app)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, engine=replace(settings.engine, max_num_seqs=64))


def test_the_tour_shows_every_step(settings: Settings, console: Console, engine: FakeEngine) -> None:
    assert tour.run(settings, any_port=True, exit_after=True, console=console) == 0
    text = shown(console)
    assert "Uploaded colours@1: PROMPT_TUNING, 4 virtual tokens" in text
    assert "8 of 8 answers" in text
    assert "3 distinct soft prompts shared one forward pass" in text
    assert "dates [3]" in text
    assert text.count("curl") >= 6
    assert len(engine.requests) == 10
    assert sum(request.soft_prompt is None for request in engine.requests) == 2
    assert all(request.params.is_greedy and request.params.max_tokens == 32 for request in engine.requests)
    assert engine.stopped


def test_the_tour_runs_with_keys(settings: Settings, console: Console, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k1\n")
    settings = replace(settings, http=replace(settings.http, api_key_file=keys))
    assert tour.run(settings, any_port=True, exit_after=True, console=console) == 0
    assert "Bearer KEY" in shown(console)
    assert "k1" not in shown(console)


def test_a_failing_request_is_status_1(settings: Settings, console: Console, engine: FakeEngine) -> None:
    engine.failure = RequestFailedError("out of blocks")
    assert tour.run(settings, any_port=True, exit_after=True, console=console) == 1
    assert "out of blocks" in shown(console)


def test_an_engine_that_cannot_start_is_status_1(settings: Settings, console: Console, engine: FakeEngine) -> None:
    engine.start_failure = EngineStartError("no such model")
    with pytest.raises(EngineStartError, match="no such model"):
        tour.run(settings, any_port=True, exit_after=True, console=console)


def test_a_port_in_use_is_an_error_unless_any_port_will_do(settings: Settings, console: Console) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = replace(settings, http=replace(settings.http, port=taken.getsockname()[1]))
        with pytest.raises(ConfigurationError, match="cannot be bound"):
            tour.run(settings, any_port=False, exit_after=True, console=console)
        assert tour.run(settings, any_port=True, exit_after=True, console=console) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_serves_until_a_signal(
    settings: Settings, console: Console, engine: FakeEngine, eventually: WaitUntil, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def interrupt() -> None:
        eventually(lambda: "Ctrl-C stops" in shown(console))
        url = shown(console).rsplit("Serving at ", 1)[1].split(". ")[0].strip()
        assert httpx.get(f"{url}/ready").is_success
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert tour.run(settings, any_port=True, exit_after=False, console=console) == 0
    thread.join()
    assert engine.stopped
    assert signal.getsignal(number) == before


def test_the_store_directory_is_temporary_or_configured(tmp_path: Path) -> None:
    with tour.store_directory(str(tmp_path)) as chosen:
        assert chosen == str(tmp_path)
    with tour.store_directory(None) as fresh:
        assert Path(fresh).is_dir()
    assert not Path(fresh).exists()
