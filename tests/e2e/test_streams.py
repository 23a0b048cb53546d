"""A whole server with clients that disconnect, and clients that do not read."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.serving import adapter, serving, upload
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[httpx.Client, int]]:
    flags = ["--dtype", "float32", "--max-num-seqs", "64", "--head-timeout", "3", "--retention-days", "0"]
    with serving(folder, *flags) as (client, process):
        yield client, process.pid


def value(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^prelude_{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_two_hundred_random_disconnects_release_everything(served: tuple[httpx.Client, int], folder: Path) -> None:
    client, _ = served
    upload(client, "dates", *adapter("dates")).raise_for_status()
    rng = random.Random(1)

    async def one(http: httpx.AsyncClient) -> None:
        body = {"model": "dates", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": rng.random() < 0.8}
        try:
            async with asyncio.timeout(rng.uniform(0, 3)), http.stream("POST", "/v1/completions", json=body) as reply:
                async for _ in reply.aiter_raw():
                    pass
        except (TimeoutError, httpx.TransportError):
            pass

    async def crowd() -> None:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as http:
            await asyncio.gather(*(one(http) for _ in range(200)))

    asyncio.run(crowd())
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
    wait_until(lambda: all(value(client, name) == 0 for name in names), 1.0)
    # A remaining lease would keep the deleted files.
    assert any(path.is_file() for path in (folder / "store" / "blobs").rglob("*"))
    assert client.delete("/v1/prompts/dates").status_code == 200
    wait_until(lambda: not any(path.is_file() for path in (folder / "store" / "blobs").rglob("*")), 1.0)


def test_five_hundred_silent_clients_delay_no_other_request(served: tuple[httpx.Client, int]) -> None:
    client, pid = served
    address = (client.base_url.host, client.base_url.port)
    question = {"prompt": "y", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    right = client.post("/v1/completions", json=question).json()["choices"][0]["text"]
    process = psutil.Process(pid)
    before = process.memory_info().rss
    num_files = process.num_fds()
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(500)]
        for connection in silent[::2]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert client.post("/v1/completions", json=question).json()["choices"][0]["text"] == right
        assert process.memory_info().rss - before < 50 * 2**20
        answers = [connection.recv(4096) for connection in silent]
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers[::2])
    assert set(answers[1::2]) == {b""}
    assert client.post("/v1/completions", json=question).json()["choices"][0]["text"] == right
    wait_until(lambda: process.num_fds() <= num_files + 5, 5)


def test_a_client_that_does_not_read_delays_no_other_request(served: tuple[httpx.Client, int]) -> None:
    client, pid = served
    body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 8, "logprobs": 20}
    encoded = json.dumps(body).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n"
    ended = 'requests_total{outcome="length",prompt="-",version="-"}'
    num_ended = value(client, ended)
    before = psutil.Process(pid).memory_info().rss
    with socket.create_connection((client.base_url.host, client.base_url.port)) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.sendall(request % len(encoded) + encoded)
        wait_until(lambda: value(client, "num_requests_running") == 8)
        answer = client.post("/v1/completions", json={"prompt": "y", "max_tokens": 20, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 20
        # The unread answer is still generated to its end.
        wait_until(lambda: value(client, "num_requests_running") == 0, 60)
        assert value(client, "kv_cache_usage_ratio") == 0
        assert psutil.Process(pid).memory_info().rss - before < 100 * 2**20
        assert value(client, ended) == num_ended + 1, "the silent client's request did not finish"
