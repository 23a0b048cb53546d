"""Two bases behind one ingress with API keys, their soft prompts on S3; the second base stops when it is idle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import boto3
import httpx
import pytest

from server.api.keys.key_file import describe_key
from server.demo.tour import MODEL_DIRECTORY
from tests.cluster.running import MARKS, Cluster, ask, logs, text
from tests.prompt_store.databases import postgres_url
from tests.prompt_store.s3_server import BUCKET, Server, s3_server
from tests.support.processes import free_port
from tests.support.serving import BASE, adapter, upload
from tests.support.waiting import wait_until

pytestmark = MARKS

SECOND = "second"
START_SECONDS = 120.0
ROOT_KEY, READER_KEY, ACME_KEY, LATER_KEY = (
    f"{name}-{'0123456789abcdef' * 2}" for name in ("root", "read", "acme", "late")
)


@dataclass
class Guarded:
    """A cluster with keys; its client has all scopes."""

    cluster: Cluster
    s3: Server

    @property
    def client(self) -> httpx.Client:
        return self.cluster.client

    def with_key(self, key: str | None) -> httpx.Client:
        """A client with another key, or none."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.client.base_url, timeout=120, headers=headers)

    def objects(self) -> list[str]:
        """Names of the objects in the bucket."""
        s3 = boto3.client(
            "s3",
            endpoint_url=self.s3.environment["AWS_ENDPOINT"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",  # noqa: S106
            region_name="us-east-1",
        )
        found = s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        s3.close()
        return [one["Key"] for one in found]


def key_entry(key: str, name: str, tenant: str, *scopes: str) -> str:
    hashed = f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    return describe_key(hashed, tenant=tenant, scopes=scopes, name=name) + "\n"


KEYS = (
    key_entry(ROOT_KEY, "root", "ops", "generate", "prompts:read", "prompts:write", "admin")
    + key_entry(READER_KEY, "reader", "ops", "generate", "prompts:read")
    + key_entry(ACME_KEY, "acme", "acme", "generate", "prompts:read", "prompts:write")
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("two-bases")
    keys = folder / "keys.toml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    with postgres_url() as first, postgres_url() as second, s3_server() as s3:
        flags = {"kv-cache-memory": "64MiB", "dtype": "float32", "num-threads": 1}
        common = {"model": str(MODEL_DIRECTORY), "flags": flags, "environment": s3.environment}
        bases = [
            {"name": BASE, "store": f"s3://{BUCKET}/first", "catalog": first, **common},
            {
                "name": SECOND,
                "store": f"s3://{BUCKET}/second",
                "catalog": second,
                "replicas": {"min": 0, "max": 2, "up_seconds": 1, "down_seconds": 3},
                **common,
            },
        ]
        config = {"port": free_port(), "drain_seconds": 20, "api_key_file": str(keys), "bases": bases}
        with httpx.Client(
            base_url=f"http://127.0.0.1:{config['port']}",
            timeout=180,
            headers={"authorization": f"Bearer {ROOT_KEY}"},
        ) as client:
            cluster = Cluster(client, folder, config)
            with cluster.up():
                wait_until(lambda: len(cluster.replicas()) == 1, 60)
                yield Guarded(cluster, s3)


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_the_ingress_refuses_unknown_keys(guarded: Guarded) -> None:
    with guarded.with_key("wrong") as wrong, guarded.with_key(None) as none:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/v1/cluster")):
            refused = wrong.request(method, path, json={} if method == "POST" else None)
            assert error_of(refused) == (401, "invalid_api_key")
            assert "x-prelude-replica" not in refused.headers, "no replica has seen it"
            assert error_of(none.request(method, path, json={"model": BASE})) == (401, "invalid_api_key")
        assert {none.get(path).status_code for path in ("/live", "/ready")} == {200}


def test_a_key_without_the_scope_is_refused(guarded: Guarded) -> None:
    with guarded.with_key(READER_KEY) as reader:
        assert ask(reader, BASE).status_code == 200
        assert error_of(upload(reader, "x", *adapter("intent"))) == (403, "insufficient_scope")
        for path in ("/v1/cluster", "/metrics"):
            assert error_of(reader.get(path)) == (403, "insufficient_scope")


def test_a_replica_knows_whose_key_it_is(guarded: Guarded) -> None:
    for key, name, tenant in ((ROOT_KEY, "root", "ops"), (ACME_KEY, "acme", "acme")):
        with guarded.with_key(key) as client:
            me = client.get("/v1/me").json()
            assert (me["name"], me["tenant"]) == (name, tenant)


def test_replicas_refuse_direct_requests_even_with_a_valid_key(guarded: Guarded) -> None:
    bases = guarded.client.get("/v1/cluster").json()["bases"]
    urls = [replica["url"] for base in bases for replica in base["replicas"]]
    assert urls
    for url in urls:
        for headers in ({}, {"authorization": f"Bearer {ROOT_KEY}"}, {"x-prelude-ingress": "forged"}):
            for path in ("/v1/models", "/ready", "/metrics"):
                assert error_of(httpx.get(url + path, headers=headers)) == (403, "not_from_ingress")


def test_uploads_lie_on_s3_and_belong_to_one_base(guarded: Guarded) -> None:
    assert upload(guarded.client, "weather", *adapter("intent")).status_code == 201
    with guarded.with_key(ROOT_KEY) as to_second:
        to_second.headers["x-prelude-base"] = SECOND
        config, weights = adapter("sentiment")
        config = json.dumps(json.loads(config) | {"base_model_name_or_path": SECOND}).encode()
        response = upload(to_second, "mood", config, weights)
        assert response.status_code == 201, response.text
    names = guarded.objects()
    assert {name.split("/")[0] for name in names} == {"first", "second"}
    assert text(ask(guarded.client, "weather")) == "weather"
    answers = {name: ask(guarded.client, name) for name in ("weather", "mood", BASE, SECOND)}
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 200)
    replicas = {name: answer.headers["x-prelude-replica"].rsplit("-", 1)[0] for name, answer in answers.items()}
    assert replicas == {"weather": BASE, "mood": SECOND, BASE: BASE, SECOND: SECOND}
    cards = [card["id"] for card in guarded.client.get("/v1/models").json()["data"]]
    assert cards == [BASE, SECOND, "weather", "mood"]
    assert error_of(ask(guarded.client, "missing")) == (404, "model_not_found")


def test_tenants_are_apart(guarded: Guarded) -> None:
    with guarded.with_key(ACME_KEY) as acme, guarded.with_key(READER_KEY) as other:
        assert upload(acme, "secret", *adapter("intent")).status_code == 201
        assert text(ask(acme, "secret")) == "weather"
        assert error_of(ask(other, "secret")) == (404, "model_not_found")
        assert "secret" not in [card["id"] for card in other.get("/v1/models").json()["data"]]


def test_a_changed_key_file_is_taken_by_ingress_and_replicas(guarded: Guarded) -> None:
    path = guarded.cluster.folder / "keys.toml"
    with guarded.with_key(LATER_KEY) as later:
        assert ask(later, BASE).status_code == 401
        path.write_text(KEYS + key_entry(LATER_KEY, "later", "ops", "generate"))
        wait_until(lambda: ask(later, BASE).status_code == 200, 15, pause=0.2)
        path.write_text(KEYS)
        wait_until(lambda: ask(later, BASE).status_code == 401, 15, pause=0.2)
    assert ask(guarded.client, BASE).status_code == 200


def test_an_idle_base_stops_and_the_next_requests_start_it(guarded: Guarded) -> None:
    wait_until(lambda: guarded.cluster.replicas(SECOND) == [], 120, pause=0.5)
    assert guarded.cluster.replicas() == [f"{BASE}-0"]
    assert guarded.client.get("/ready").status_code == 200
    cards = guarded.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards[:2]] == [BASE, SECOND]
    assert "mood" not in [card["id"] for card in cards]
    assert guarded.cluster.replicas(SECOND) == [], "a list starts no base"
    # What concerns the other base goes on while this one starts.
    with ThreadPoolExecutor(5) as pool:
        started = [pool.submit(ask, guarded.client, name) for name in (SECOND, "mood", SECOND, "mood")]
        assert ask(guarded.client, BASE).status_code == 200
        assert not any(one.done() for one in started)
        answers = [one.result() for one in started]
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers] + [
        logs(guarded.cluster.folder)
    ]
    assert guarded.cluster.replicas(SECOND) != []
    wait_until(lambda: guarded.cluster.replicas(SECOND) == [], START_SECONDS, pause=0.5)


def test_a_base_that_cannot_start_says_why_and_can_be_removed(guarded: Guarded) -> None:
    cluster = guarded.cluster
    bases = cluster.config["bases"]
    assert isinstance(bases, list)
    empty = cluster.folder / "empty"
    empty.mkdir()
    with postgres_url() as catalog:
        cluster.config["bases"] = [*bases, {**bases[0], "name": "broken", "model": str(empty), "catalog": catalog}]
        failed = cluster.run("up")
        assert failed.returncode == 1
        assert "broken could not be deployed: broken-0 ended with status" in failed.stderr.splitlines()[-1]
        assert f"{empty} has no config.json" in failed.stderr.splitlines()[-1]
        found = {one["name"]: one["status"] for one in json.loads(cluster.run("status", "--json").stdout)}
        assert found == {BASE: "RUNNING", SECOND: "RUNNING", "ingress": "RUNNING", "broken": "DEPLOY_FAILED"}
        assert ask(guarded.client, BASE).status_code == 200
        cluster.config["bases"] = bases
        mended = cluster.run("up")
        assert (mended.returncode, "removing prelude-base-broken" in mended.stderr) == (0, True), mended.stderr
        found = {one["name"]: one["status"] for one in json.loads(cluster.run("status", "--json").stdout)}
        assert found == {BASE: "RUNNING", SECOND: "RUNNING", "ingress": "RUNNING"}
        assert ask(guarded.client, BASE).status_code == 200
