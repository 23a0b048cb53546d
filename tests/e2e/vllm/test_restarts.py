"""Processes of vLLM's engine that are killed under load: the same answers afterwards, and no process is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from server.engine.shared_memory import mapped_segments
from tests.e2e.test_restarts import stream, value
from tests.support.serving import BASE, adapter, upload
from tests.support.vllm import adapter_of, needs_vllm, serving_vllm
from tests.support.waiting import wait_until

pytestmark = [needs_vllm, pytest.mark.timeout(900)]

QUESTION = {"prompt": "when can you deliver the blue lamp?", "temperature": 0, "max_tokens": 12}


def core(server: psutil.Process) -> psutil.Process:
    (found,) = [child for child in adapter_of(server).children() if "EngineCore" in child.name()]
    return found


def last_worker(server: psutil.Process) -> psutil.Process:
    return [child for child in core(server).children() if "Worker" in child.name()][-1]


def texts(client: httpx.Client) -> list[str]:
    answers = [
        client.post("/v1/completions", json={"model": model, **QUESTION}) for model in (BASE, "intent", "dates")
    ]
    return [answer.json()["choices"][0]["text"] for answer in answers]


def test_killed_processes_are_replaced(tmp_path: Path) -> None:
    flags = ("--tensor-parallel-size", "2", "--max-num-seqs", "32", "--pin", "intent", "--max-model-len", "1024")
    with serving_vllm(tmp_path, *flags) as (client, process), ThreadPoolExecutor(20) as pool:
        for task in ("intent", "dates"):
            assert upload(client, task, *adapter(task)).status_code == 201
        server = psutil.Process(process.pid)
        right = texts(client)
        # The end of a worker ends vLLM's core, too.
        victims: list[Callable[[psutil.Process], psutil.Process]] = [adapter_of, last_worker]
        for index, victim in enumerate(victims):
            before = adapter_of(server)
            group = [before, *before.children(recursive=True)]
            memory = mapped_segments(before.pid)
            assert memory
            begun: list[str] = []
            streams = [pool.submit(stream, client, model, begun) for model in [BASE, "intent", "dates", BASE] * 5]
            wait_until(lambda begun=begun: len(begun) == 20, 120)  # type: ignore[misc]
            os.kill(victim(server).pid, signal.SIGKILL)
            for status, events in (future.result() for future in streams):
                assert status == 200
                assert [event["error"]["code"] for event in events if "error" in event] == ["engine_dead"]
            refused = client.post("/v1/completions", json={"model": BASE, **QUESTION})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
            _, alive = psutil.wait_procs(group, timeout=10)
            assert alive == []
            wait_until(lambda memory=memory: not any(segment.exists() for segment in memory))  # type: ignore[misc]
            wait_until(lambda: client.get("/ready").status_code == 200, 240)
            assert value(client, "prelude_engine_restarts_total") == index + 1
            assert texts(client) == right
            assert value(client, "prelude_kv_cache_usage_ratio") == 0
        # The pinned one is held again.
        assert value(client, 'prelude_soft_prompt_resident{tier="host"}') >= 1
        last = adapter_of(server)
        group = [last, *last.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert psutil.wait_procs(group, timeout=10)[1] == []
