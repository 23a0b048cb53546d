"""The manifest for KubeRay: what would fail only on a cluster."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.cluster.config import ClusterConfig, read_config
from server.cluster.replica.arguments import INGRESS_APP, app_name
from tests.docker.tools import DOCKER

MANIFEST = DOCKER / "kubernetes" / "kuberay" / "rayservice.yaml"
ROOT = DOCKER.parent


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture
def config(found: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    """The configuration, with the storage that a Secret gives."""
    monkeypatch.setenv("PRELUDE_STORE", "s3://bucket")
    monkeypatch.setenv("PRELUDE_CATALOG", "postgresql://h/d")
    path = tmp_path / "cluster.yaml"
    path.write_text(found["ConfigMap"]["data"]["cluster.yaml"])
    return read_config(path)


def pods(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cluster = found["RayService"]["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_applications_are_those_that_the_ingress_looks_for(
    found: dict[str, dict[str, Any]], config: ClusterConfig
) -> None:
    applications = yaml.safe_load(found["RayService"]["spec"]["serveConfigV2"])["applications"]
    expected = {app_name(base.name): {"base": base.name} for base in config.bases} | {INGRESS_APP: {}}
    path = "/etc/prelude/cluster.yaml"
    assert {one["name"]: one["args"] for one in applications} == {
        name: {"config": path, **more} for name, more in expected.items()
    }
    functions = set()
    for one in applications:
        module, name = one["import_path"].split(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        functions.add(name)
        assert one["route_prefix"] is None, "Ray's own proxies must not lead to replicas"
    assert functions == {"base", "ingress"}


def test_the_service_leads_to_the_ingress(found: dict[str, dict[str, Any]], config: ClusterConfig) -> None:
    (port,) = found["Service"]["spec"]["ports"]
    assert port["targetPort"] == config.port
    selector = found["Service"]["spec"]["selector"]
    groups = found["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (group,) = [group for group in groups if selector.items() <= group["template"]["metadata"]["labels"].items()]
    assert str(config.ingress_resource) in group["rayStartParams"]["resources"]
    assert group["replicas"] == config.ingresses


def test_every_pod_has_what_the_configuration_names(found: dict[str, dict[str, Any]], config: ClusterConfig) -> None:
    files = [config.api_key_file, config.ingress_secret_file, config.session_secret_file, config.directory]
    for pod in pods(found):
        (container,) = pod["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["spec"]["volumes"]}
        for file in files:
            assert any(str(file).startswith(path) for path in mounts.values()), f"no volume has {file}"
        assert pod["spec"]["terminationGracePeriodSeconds"] > config.drain_seconds + 60
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_the_versions_of_ray_agree(found: dict[str, dict[str, Any]]) -> None:
    (extra,) = [
        requirement
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
            "cluster"
        ]
        if requirement.startswith("ray")
    ]
    cluster = found["RayService"]["spec"]["rayClusterConfig"]
    assert extra == f"ray[serve]=={cluster['rayVersion']}"
    assert cluster["authOptions"] == {"mode": "token"}
