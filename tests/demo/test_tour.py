"""The demo's tour over a scripted engine: its output and its exit status."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from server.api.services import Lifecycle
from server.config import Settings
from server.demo import Exhibit, tour
from server.engine.types import Capability
from server.errors import ConfigurationError, EngineStartError, RequestFailedError
from tests.support.adapter_fixtures import AdapterFolder
from tests.support.api_fixtures import MakeApp, PeftDirectory, WaitUntil
from tests.support.fake_engine import FakeEngine

KEEP_COMMAND = "prelude demo --store DIRECTORY"


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
    monkeypatch.setattr(tour, "EMBEDDED", Exhibit(tmp_path, KEEP_COMMAND))
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
    assert "The store is temporary" not in text
    assert "prelude train" not in text
    assert len(engine.requests) == 10
    assert sum(request.soft_prompt is None for request in engine.requests) == 2
    assert all(request.params.is_greedy and request.params.max_tokens == 32 for request in engine.requests)
    assert engine.stopped


def test_the_start_is_shown(settings: Settings, console: Console) -> None:
    assert tour.run(settings, any_port=True, exit_after=True, console=console, is_temporary=True) == 0
    before, _, after = shown(console).partition("The store is temporary")
    assert before.startswith("Ready after ")
    assert f"no soft prompts and adapters yet, in {settings.store.location}" in before
    assert len(before.splitlines()) <= 8
    assert KEEP_COMMAND in after.splitlines()[0]


def test_a_long_start_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lifecycle = Lifecycle()
    answers = iter([503, 503, 503])

    def get(client: httpx.Client, url: str) -> httpx.Response:
        status = next(answers, 200)
        if status == 200:
            lifecycle.serve()
        return httpx.Response(status)

    monkeypatch.setattr(tour, "_ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(tour, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(httpx.Client, "get", get)
    tour._wait_until_ready("http://127.0.0.1:9", threading.current_thread(), lifecycle)
    assert next(answers, None) is None


def test_a_loaded_server_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(client: httpx.Client, url: str) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(tour, "_ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(tour, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(httpx.Client, "get", get)
    lifecycle = Lifecycle()
    lifecycle.serve()
    with pytest.raises(tour.TourError, match="does not answer 0 s after it was loaded: no answer"):
        tour._wait_until_ready("http://127.0.0.1:9", threading.current_thread(), lifecycle)


@pytest.fixture
def adapter_and_pair(
    demo_files: None, tmp_path: Path, adapter_directory: AdapterFolder, peft_directory: PeftDirectory
) -> None:
    """The adapter ``tone``, and the soft prompt ``polite`` over it."""
    (tmp_path / "adapters").mkdir()
    adapter_directory("tone").rename(tmp_path / "adapters" / "tone")
    (tmp_path / "pairs" / "tone").mkdir(parents=True)
    peft_directory("polite", seed=7).rename(tmp_path / "pairs" / "tone" / "polite")
    for name in ("tone", "polite"):
        text = (tmp_path / "heldout" / "dates.jsonl").read_text()
        (tmp_path / "heldout" / f"{name}.jsonl").write_text(text.replace("dates", name))


def test_the_tour_shows_an_adapter_and_a_pair(
    settings: Settings, console: Console, engine: FakeEngine, adapter_and_pair: None
) -> None:
    assert tour.run(settings, any_port=True, exit_after=True, console=console) == 0
    text = shown(console)
    assert "Uploaded tone@1: LORA, rank 2, 4 modules" in text
    assert "Uploaded polite@1 over tone@1: PROMPT_TUNING, 4 virtual tokens" in text
    assert "# the adapter tone" in text
    assert "# a pair: the soft prompt polite, with the adapter tone@1" in text
    pairs = [
        request for request in engine.requests if request.adapter is not None and request.soft_prompt is not None
    ]
    alone = [request for request in engine.requests if request.adapter is not None and request.soft_prompt is None]
    assert (len(pairs) % 4, len(alone) % 4) == (0, 0)
    assert pairs
    assert alone


def test_a_server_without_adapters_shows_the_rest(
    settings: Settings, console: Console, engine: FakeEngine, adapter_and_pair: None
) -> None:
    engine.capabilities = tuple(one for one in Capability if one is not Capability.ADAPTERS)
    assert tour.run(settings, any_port=True, exit_after=True, console=console) == 0
    text = shown(console)
    assert "The adapter tone is left out: " in text
    assert "serves no LoRA" in text
    assert "polite" not in text
    assert "8 of 8 answers" in text


def copied(text: str) -> list[str]:
    """The commands in what was printed, as somebody copies them."""
    blocks = text.split("Try, in another terminal:")[1].split("\n\n")
    return [command for block in blocks if (command := block.strip()).startswith("#")]


def test_the_commands_survive_a_copy_from_a_narrow_terminal(
    settings: Settings, engine: FakeEngine, eventually: WaitUntil, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=80)
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for name in ("soft_prompts", "heldout"):
        (tmp_path / name).rename(long / name)
    monkeypatch.setattr(tour, "EMBEDDED", Exhibit(long, KEEP_COMMAND))
    answers: list[str] = []

    def interrupt() -> None:
        eventually(lambda: "Ctrl-C stops" in shown(console))
        try:
            for command in copied(shown(console).split("\nServing at")[0]):
                fast = command.replace("curl ", "curl --silent --show-error --fail-with-body ")
                done = subprocess.run(["bash", "-c", fast], check=False, capture_output=True, text=True, timeout=60)
                answers.append(done.stdout if done.returncode == 0 else f"FAILED {done.stdout} {done.stderr}")
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert tour.run(settings, any_port=True, exit_after=False, console=console) == 0
    thread.join()
    assert not [answer for answer in answers if answer.startswith("FAILED")]
    objects = ["text_completion", "text_completion", "text_completion", "text_completion", "list", "prompt.version"]
    for answer, name in zip(answers, objects, strict=False):
        assert f'"object":"{name}"' in answer
    assert '"id":"my-colours"' in answers[-1]
    lines = [line for command in copied(shown(console)) for line in command.splitlines()]
    assert all(len(line) < 80 or str(long) in line for line in lines)
    assert engine.requests[-2].soft_prompt is not None


def test_the_tour_runs_with_keys(settings: Settings, console: Console, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k1\n")
    (tmp_path / "examples").mkdir()
    settings = replace(settings, http=replace(settings.http, api_key_file=keys))
    assert tour.run(settings, any_port=True, exit_after=True, console=console) == 0
    assert "Bearer KEY" in shown(console)
    assert "--api-key KEY" in shown(console).split("prelude train")[1]
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
