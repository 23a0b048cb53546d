"""Two replicas of the demo behind an ingress, on a Ray of their own."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from server.demo.tour import MODEL_DIRECTORY
from tests.cluster.running import MARKS, Cluster, ask, logs, text
from tests.prompt_store.databases import postgres_url
from tests.support.processes import free_port
from tests.support.serving import BASE, adapter, upload
from tests.support.waiting import seconds_until, wait_until

pytestmark = MARKS

NAMES = (f"{BASE}-0", f"{BASE}-1")
ANSWERS = {"intent": "weather", "sentiment": "positive"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with postgres_url() as url:
        flags = {"kv-cache-memory": "64MiB", "dtype": "float32", "num-threads": 1}
        base = {"name": BASE, "model": str(MODEL_DIRECTORY), "store": str(folder / "store"), "catalog": url}
        config = {"port": free_port(), "drain_seconds": 20, "bases": [{**base, "replicas": 2, "flags": flags}]}
        with httpx.Client(base_url=f"http://127.0.0.1:{config['port']}", timeout=120) as client:
            made = Cluster(client, folder, config)
            with made.up():
                wait_until(lambda: len(made.replicas()) == 2, 60)
                for task in ANSWERS:
                    assert upload(client, task, *adapter(task)).status_code == 201
                yield made


@dataclass
class Load:
    """Requests that are sent all the time, and what failed of them."""

    number: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def load(cluster: Cluster, model: str = "intent", threads: int = 3) -> Iterator[Load]:
    seen, is_over = Load(), threading.Event()

    def send() -> None:
        while not is_over.is_set():
            try:
                response = ask(cluster.client, model)
                seen.number += 1
                if response.status_code != 200:
                    seen.failures.append(response.text)
            except httpx.HTTPError as error:
                seen.failures.append(repr(error))

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(send)
        try:
            wait_until(lambda: seen.number >= threads, 60)
            yield seen
        finally:
            is_over.set()


def test_status_names_what_runs(cluster: Cluster) -> None:
    found = cluster.run("status", "--json")
    assert found.returncode == 0, found.stderr
    assert {one["name"]: one["status"] for one in json.loads(found.stdout)} == {BASE: "RUNNING", "ingress": "RUNNING"}


def test_an_upload_is_served_by_both_replicas(cluster: Cluster) -> None:
    for name in NAMES:
        response = ask(cluster.client, "intent", name)
        assert (text(response), response.headers["x-prelude-replica"]) == ("weather", name)
    models = [card["id"] for card in cluster.client.get("/v1/models").json()["data"]]
    assert models == [BASE, "intent", "sentiment"]


def test_requests_go_where_their_soft_prompt_is(cluster: Cluster) -> None:
    for model in ANSWERS:
        replicas = {ask(cluster.client, model).headers["x-prelude-replica"] for _ in range(8)}
        assert len(replicas) == 1
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda index: ask(cluster.client, ("intent", BASE)[index % 2]), range(64)))
    assert {answer.status_code for answer in answers} == {200}
    assert {text(answer) for answer in answers[::2]} == {"weather"}


def test_a_replica_refuses_what_the_ingress_has_not_signed(cluster: Cluster) -> None:
    for replica in cluster.client.get("/v1/cluster").json()["bases"][0]["replicas"]:
        response = httpx.get(replica["url"] + "/v1/models")
        assert (response.status_code, response.json()["error"]["code"]) == (403, "not_from_ingress")


def test_metrics_and_logs_name_the_replicas(cluster: Cluster) -> None:
    metrics = cluster.client.get("/metrics").text
    assert all(f'prelude_num_requests_running{{replica="{name}"' in metrics for name in NAMES)
    for name in NAMES:
        lines = (cluster.folder / "prelude-cluster" / "logs" / f"{name}.log").read_text().splitlines()
        assert any(f" INFO {name} " in line for line in lines)


def test_a_promotion_under_load_fails_no_request(cluster: Cluster) -> None:
    assert upload(cluster.client, "task", *adapter("intent")).status_code == 201
    assert upload(cluster.client, "task", *adapter("sentiment")).status_code == 201
    with load(cluster, "task") as seen:
        for version in (1, 2, 1):
            body = {"version": version}
            assert cluster.client.put("/v1/prompts/task/aliases/latest", json=body).status_code == 200
            served = f"task@{version}"
            for name in NAMES:

                def is_served(name: str = name, served: str = served) -> bool:
                    return ask(cluster.client, "task", name).headers["x-prelude-prompt"] == served

                assert seconds_until(is_served, 5.0) < 5.0
    assert seen.failures == []


def test_streams_of_a_killed_replica_end_with_one_error_each(cluster: Cluster) -> None:
    victim = NAMES[0]
    process = cluster.server(victim)
    ready = threading.Barrier(17, timeout=120)

    def stream(replica: str) -> list[str]:
        body = {"model": BASE, "prompt": "Once", "max_tokens": 200, "stream": True, "ignore_eos": True}
        lines: list[str] = []
        with cluster.client.stream(
            "POST", "/v1/completions", json=body, headers={"x-prelude-replica": replica}
        ) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if not lines:
                    ready.wait()
                lines += [line] if line else []
        return lines

    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream, NAMES[index % 2]) for index in range(16)]
        ready.wait()
        os.kill(process.pid, signal.SIGKILL)
        for index, future in enumerate(streams):
            lines = future.result()
            errors = [line for line in lines if '"error"' in line]
            if index % 2:
                assert errors == []
                assert lines[-1] == "data: [DONE]"
            else:
                assert len(errors) == 1
                assert lines[-1] == errors[0]
                assert json.loads(errors[0].removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert {ask(cluster.client, "intent").status_code for _ in range(8)} == {200}
    wait_until(lambda: is_new(cluster, victim, process.pid), 240, pause=0.5)
    wait_until(lambda: ask(cluster.client, "intent", victim).status_code == 200, 60, pause=0.5)


def is_new(cluster: Cluster, name: str, old: int) -> bool:
    try:
        return cluster.server(name).pid != old and name in cluster.replicas()
    except ValueError:
        return False


def test_a_change_of_the_flags_under_load_fails_no_request(cluster: Cluster) -> None:
    before = {name: cluster.server(name).pid for name in NAMES}
    bases = cluster.config["bases"]
    assert isinstance(bases, list)
    bases[0]["flags"] |= {"max-num-seqs": 32}
    with load(cluster) as seen:
        changed = cluster.run("up")
        assert changed.returncode == 0, changed.stderr + logs(cluster.folder)
        wait_until(lambda: sorted(cluster.replicas()) == list(NAMES), 60)
    assert seen.failures == []
    after = {name: cluster.server(name).pid for name in NAMES}
    assert not set(before.values()) & set(after.values())
    assert cluster.client.get("/v1/server").json()["limits"]["max_num_seqs"] == 32


def test_replicas_come_and_go_with_the_load(cluster: Cluster) -> None:
    bases = cluster.config["bases"]
    assert isinstance(bases, list)
    bases[0]["replicas"] = {"min": 1, "max": 3, "sequences": 2, "up_seconds": 1, "down_seconds": 4}
    changed = cluster.run("up")
    assert changed.returncode == 0, changed.stderr + logs(cluster.folder)
    wait_until(lambda: len(cluster.replicas()) == 1, 120, pause=0.5)
    with load(cluster, threads=1) as lasting:
        with load(cluster, BASE, threads=12) as seen:
            wait_until(lambda: len(cluster.replicas()) == 3, 180, pause=0.5)
        wait_until(lambda: len(cluster.replicas()) == 1, 120, pause=0.5)
    assert seen.failures == lasting.failures == []
