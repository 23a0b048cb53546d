"""The Kubernetes manifests: mistakes that Kubernetes refuses, and mistakes that it accepts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from fastapi.routing import APIRoute

from server import app
from server.api import ops
from server.cli import FLAGS
from server.config import HttpSettings
from tests.docker.tools import DOCKER, run

MANIFESTS = DOCKER / "kubernetes"
BASE = MANIFESTS / "base"
OVERLAYS = sorted(path.parent.name for path in MANIFESTS.glob("*/kustomization.yaml"))
NAME = {"app.kubernetes.io/name": "prelude"}
ENGINE = {"llm-d.ai/engine-type": "prelude"}


def documents(text: str) -> dict[str, dict[str, Any]]:
    """Manifests by kind and name."""
    found = [document for document in yaml.safe_load_all(text) if document]
    by_name = {f"{document['kind']}/{document['metadata']['name']}": document for document in found}
    assert len(by_name) == len(found)
    return by_name


def base() -> dict[str, dict[str, Any]]:
    resources = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted(resources) == sorted({path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"})
    return documents("\n---\n".join((BASE / name).read_text() for name in resources))


def pod(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = found["Deployment/prelude"]["spec"]["template"]["spec"]
    return spec


def container(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    containers: list[dict[str, Any]] = pod(found)["containers"]
    (only,) = containers
    return only


def test_every_needed_resource_exists() -> None:
    kinds = [name.split("/")[0] for name in base()]
    expected = ["Deployment", "PersistentVolumeClaim", "PersistentVolumeClaim", "PodDisruptionBudget", "Service"]
    assert sorted(kinds) == sorted([*expected, "ServiceMonitor"])


def test_labels_and_selectors_match() -> None:
    found = base()
    assert all(document["metadata"]["labels"] == NAME for document in found.values())
    deployment = found["Deployment/prelude"]["spec"]
    assert deployment["template"]["metadata"]["labels"] == NAME | ENGINE
    assert found["Service/prelude"]["spec"]["selector"] == NAME
    for name in ("Deployment/prelude", "PodDisruptionBudget/prelude", "ServiceMonitor/prelude"):
        assert found[name]["spec"]["selector"] == {"matchLabels": NAME}


def test_an_endpoint_picker_finds_its_engine_by_the_pods_label() -> None:
    """The documented configuration has an entry for the label, and the metrics that the entry names exist."""
    text = (DOCKER.parent / "docs" / "operations.md").read_text()
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "engineConfigs" in block]
    plugins = {plugin["type"]: plugin["parameters"] for plugin in yaml.safe_load(block)["plugins"]}
    (engine,) = plugins["core-metrics-extractor"]["engineConfigs"]
    assert {"llm-d.ai/engine-type": engine.pop("name")} == ENGINE
    assert engine.keys() == {
        "queuedRequestsSpec",
        "runningRequestsSpec",
        "kvUsageSpec",
        "cacheBlockSizeSpec",
        "cacheNumBlocksSpec",
    }
    assert all(f"| `{spec}` |" in text for spec in engine)
    assert all(f"| `{name}` |" in text for name in engine.values())


def test_ports_match() -> None:
    found = base()
    assert container(found)["ports"] == [{"name": "http", "containerPort": HttpSettings().port}]
    (port,) = found["Service/prelude"]["spec"]["ports"]
    (endpoint,) = found["ServiceMonitor/prelude"]["spec"]["endpoints"]
    assert port["targetPort"] == "http"
    assert endpoint["port"] == port["name"]


def test_probes_use_existing_routes() -> None:
    paths = {route.path for route in ops.router.routes if isinstance(route, APIRoute)}
    probes = {name: container(base())[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "liveness": "/live",
        "readiness": "/ready",
    }
    assert {"/ready", "/live", "/metrics"} <= paths
    startup = container(base())["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


def test_running_requests_may_finish() -> None:
    found = base()
    environment = {entry["name"]: entry["value"] for entry in container(found)["env"]}
    drain = float(environment["PRELUDE_DRAIN_SECONDS"])
    command = container(found)["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    before = float(command[1])
    probe = container(found)["readinessProbe"]
    assert before >= probe["periodSeconds"] * probe["failureThreshold"]
    engine_stop = 10
    assert pod(found)["terminationGracePeriodSeconds"] >= before + drain + app._CLOSE_SECONDS + engine_stop


def test_containers_have_minimal_rights() -> None:
    found = base()
    assert pod(found)["securityContext"]["runAsNonRoot"] is True
    assert pod(found)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(found)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(found)["automountServiceAccountToken"] is False


def test_no_service_link_becomes_a_setting() -> None:
    """For a Service named prelude, Kubernetes sets PRELUDE_PORT=tcp://... in pods: a variable of a flag."""
    assert any(flag.variable == "PRELUDE_PORT" for flag in FLAGS)
    assert pod(base())["enableServiceLinks"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_complete_manifests(overlay: str) -> None:
    found = documents(run("kubectl", "kustomize", MANIFESTS / overlay))
    volumes = {volume["name"]: volume for volume in pod(found)["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(found)["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    for volume in volumes.values():
        assert len(volume) == 2, "a volume has a name and one source"
    claims = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
    kept = {name.split("/")[1] for name in found if name.startswith("PersistentVolumeClaim/")}
    assert {claim["claimName"] for claim in claims} == kept
    variables = {entry["name"] for entry in container(found)["env"]}
    assert variables <= {flag.variable for flag in FLAGS}
    expected = {
        "base": ("prelude:cpu", 1),
        "gpu": ("prelude:cuda", 1),
        "replicas": ("prelude:cpu", 2),
        "vllm": ("prelude:vllm", 1),
    }
    assert (container(found)["image"], found["Deployment/prelude"]["spec"]["replicas"]) == expected[overlay]
    if overlay == "gpu":
        assert container(found)["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert container(found)["resources"]["limits"]["memory"] == "8Gi"


def test_vllm_has_as_many_gpus_as_shares_of_the_model_and_memory_between_them() -> None:
    found = documents(run("kubectl", "kustomize", MANIFESTS / "vllm"))
    environment = {entry["name"]: entry["value"] for entry in container(found)["env"]}
    limits = container(found)["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == environment["PRELUDE_TENSOR_PARALLEL_SIZE"]
    assert container(found)["resources"]["requests"]["memory"] == limits["memory"]
    (mounted,) = [mount for mount in container(found)["volumeMounts"] if mount["mountPath"] == "/dev/shm"]  # noqa: S108
    (volume,) = [volume for volume in pod(found)["volumes"] if volume["name"] == mounted["name"]]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
