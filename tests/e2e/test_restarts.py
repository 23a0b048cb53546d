"""A server whose engine process is killed, stopped or unable to restart, tested over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.demo.tour import HELDOUT_DIRECTORY, MODEL_DIRECTORY
from tests.support.processes import engine_of, metric
from tests.support.serving import BASE, adapter, serving, upload
from tests.support.waiting import wait_until

FLAGS = ("--dtype", "float32", "--num-threads", "1")


def value(client: httpx.Client, name: str) -> float:
    return metric(client.get("/metrics").text, name)


def stream(client: httpx.Client, model: str, begun: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """Status and events of a stream without an end token; ``begun`` gets its model when the status arrives."""
    body = {"model": model, "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        begun.append(model)
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        return response.status_code, [json.loads(line) for line in lines if line != "[DONE]"]


def test_an_engine_killed_under_load_restarts_with_correct_answers(tmp_path: Path) -> None:
    pair = json.loads((HELDOUT_DIRECTORY / "intent.jsonl").read_text().splitlines()[0])
    question = {"model": "intent", "prompt": pair["input"], "temperature": 0, "max_tokens": 40}
    counters = ("prelude_generation_tokens_total", "prelude_prompt_tokens_total", "prelude_engine_steps_total")
    with serving(tmp_path, *FLAGS, "--pin", "intent") as (client, process), ThreadPoolExecutor(8) as pool:
        assert upload(client, "intent", *adapter("intent")).status_code == 201
        right = client.post("/v1/completions", json=question).json()["choices"][0]["text"]
        assert right.strip() == pair["output"]
        engine = engine_of(psutil.Process(process.pid))
        begun: list[str] = []
        streams = [pool.submit(stream, client, model, begun) for model in [BASE, "intent"] * 4]
        wait_until(lambda: value(client, "prelude_num_requests_running") == 8, 60)
        # A stream that fails before its first token has an error status.
        wait_until(lambda: len(begun) == 8, 60)
        before = [value(client, name) for name in counters]
        os.kill(engine.pid, signal.SIGKILL)
        for status, events in (future.result() for future in streams):
            assert status == 200
            assert [event["error"]["code"] for event in events if "error" in event] == ["engine_dead"]
            assert "error" in events[-1]
        wait_until(lambda: "SIGKILL" in client.get("/ready").text, 60)
        refused = client.get("/ready")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
        refused = client.post("/v1/completions", json=question)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
        assert int(refused.headers["retry-after"]) > 0
        assert client.get("/live").status_code == 200
        meanwhile = [value(client, name) for name in counters]
        wait_until(lambda: client.get("/ready").status_code == 200, 60)
        assert all(old <= new for old, new in zip(before, meanwhile, strict=True))
        assert value(client, 'prelude_soft_prompt_resident{tier="host"}') == 1
        assert value(client, 'prelude_soft_prompt_resident{tier="device"}') == 1
        assert client.post("/v1/completions", json=question).json()["choices"][0]["text"] == right
        assert all(value(client, name) > old for name, old in zip(counters, meanwhile, strict=True))
        assert value(client, "prelude_engine_restarts_total") == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


FAILING = """#!{python}
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
import torch

from server.engine.model.model_runner import ModelRunner
from server.engine.process import engine_process

trigger, queue = Path({trigger!r}), ModelRunner.launch

def launch(*arguments):
    if trigger.exists():
        trigger.unlink()
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return queue(*arguments)

ModelRunner.launch = launch
sys.argv = sys.argv[2:]  # after the script's name and -m
engine_process.main()
"""
"""Replaces Python in the command of an engine process. Its next step after the trigger exists fails once."""


def test_a_device_error_ends_the_process_and_the_next_one_serves(tmp_path: Path) -> None:
    trigger, engine = tmp_path / "trigger", tmp_path / "engine.py"
    root = str(Path(__file__).parents[2])
    engine.write_text(FAILING.format(python=sys.executable, root=root, trigger=str(trigger)))
    engine.chmod(0o700)
    start = f"import sys; sys.executable = {str(engine)!r}; from server.cli import main; main()"
    question = {"model": BASE, "prompt": "x", "temperature": 0, "max_tokens": 8}
    with (
        serving(tmp_path, *FLAGS, program=[sys.executable, "-c", start]) as (client, process),
        ThreadPoolExecutor(4) as pool,
    ):
        right = client.post("/v1/completions", json=question).json()["choices"][0]["text"]
        failed = engine_of(psutil.Process(process.pid))
        begun: list[str] = []
        streams = [pool.submit(stream, client, BASE, begun) for _ in range(4)]
        wait_until(lambda: len(begun) == 4, 60)
        trigger.touch()
        for status, events in (future.result() for future in streams):
            assert status == 200
            assert [event["error"]["code"] for event in events if "error" in event] == ["engine_dead"]
            assert "error" in events[-1]
        wait_until(lambda: "ended with status 3: the device failed" in client.get("/ready").text, 60)
        refused = client.get("/ready")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
        wait_until(lambda: client.get("/ready").status_code == 200, 60)
        assert client.post("/v1/completions", json=question).json()["choices"][0]["text"] == right
        assert engine_of(psutil.Process(process.pid)) != failed
        assert value(client, "prelude_engine_restarts_total") == 1
    log = (tmp_path / "log").read_text()
    assert "AcceleratorError: CUDA error: an illegal memory access was encountered" in log
    assert "ended with status 3: the device failed; 4 requests fail" in log


def test_a_stalled_engine_is_replaced_and_a_failed_start_is_reported(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIRECTORY, model)
    with serving(tmp_path, *FLAGS, "--step-timeout", "1", model=model) as (client, process):
        engine = engine_of(psutil.Process(process.pid))
        os.kill(engine.pid, signal.SIGSTOP)
        reply = client.post("/v1/completions", json={"model": BASE, "prompt": "x"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")
        assert value(client, "prelude_engine_step_timeouts_total") == 1
        wait_until(lambda: client.get("/ready").status_code == 200, 60)
        assert client.post("/v1/completions", json={"model": BASE, "prompt": "x"}).status_code == 200
        model.rename(tmp_path / "gone")
        engine_of(psutil.Process(process.pid)).kill()
        wait_until(lambda: "cannot start again: cannot load the model" in client.get("/ready").text, 60)
        (tmp_path / "gone").rename(model)
        wait_until(lambda: client.get("/ready").status_code == 200, 60)
        assert client.post("/v1/completions", json={"model": BASE, "prompt": "x"}).status_code == 200
        model.rename(tmp_path / "gone")
        engine_of(psutil.Process(process.pid)).kill()
        wait_until(lambda: client.get("/ready").status_code == 503, 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    log = (tmp_path / "log").read_text()
    assert "has taken more than 1 s (--step-timeout)" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_the_drain(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, *FLAGS, "--drain-seconds", "60") as (client, process), ThreadPoolExecutor(64) as pool:
        engine = engine_of(psutil.Process(process.pid))
        streams = [pool.submit(stream, client, BASE, []) for _ in range(64)]
        wait_until(lambda: value(client, "prelude_num_requests_running") == 64, 60)
        process.send_signal(number)
        wait_until(lambda: client.get("/ready").status_code == 503, 60)
        assert process.poll() is None
        process.send_signal(number)
        # Within a third of the drain, to allow for a busy machine.
        assert process.wait(timeout=20) == 0
        engine.wait(timeout=5)
        for future in streams:
            try:
                _, events = future.result()
            except httpx.RemoteProtocolError:  # the connection was closed before the stream's end
                continue
            assert events[-1]["error"]["code"] == "engine_not_ready"
    assert "Traceback" not in (tmp_path / "log").read_text()
