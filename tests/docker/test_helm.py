"""The Helm chart: it renders what the plain manifests say, and valid objects for all values."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.cluster.config import read_config
from server.cluster.replica.arguments import INGRESS_APP, app_name
from tests.docker.tools import DOCKER, ROOT, run, tool

CHART_PATH = "docker/helm/prelude"
CHART = ROOT / CHART_PATH
VALUES = sorted(path.stem for path in (CHART / "values").glob("*.yaml"))
MANIFESTS = DOCKER / "kubernetes"
STORAGE = {"storage": {"secret": "prelude-storage"}}
RAY: dict[str, Any] = {**STORAGE, "ray": {"enabled": True, "config": {"bases": [{"name": "base", "model": "m"}]}}}

Objects = dict[str, dict[str, Any]]


def by_name(text: str) -> Objects:
    """Objects by kind and name."""
    found = [document for document in yaml.safe_load_all(text) if document]
    named = {f"{document['kind']}/{document['metadata']['name']}": document for document in found}
    assert len(named) == len(found)
    return named


def template(*files: str, values: dict[str, Any] | None = None, release: str = "prelude") -> Objects:
    """What the chart renders."""
    arguments = [argument for name in files for argument in ("--values", str(CHART / "values" / f"{name}.yaml"))]
    arguments += ["--values", "-"] if values is not None else []
    return by_name(run("helm", "template", release, CHART, *arguments, text=json.dumps(values or {})))


def fault(values: dict[str, Any]) -> str:
    """Why the chart refuses values."""
    done = subprocess.run(
        [tool("helm"), "template", "prelude", str(CHART), "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


def comparable(value: Any) -> Any:
    """An object without what means nothing: the order of named entries, the layout of YAML in strings.

    Helm's own annotations are left out, too: plain manifests have none.
    """
    if isinstance(value, dict):
        made = {name: comparable(one) for name, one in value.items()}
        annotations = made.get("annotations", {})
        for name in [name for name in annotations if name.startswith("helm.sh/")]:
            del annotations[name]
        return {name: one for name, one in made.items() if (name, one) != ("annotations", {})}
    if isinstance(value, list):
        made_list = [comparable(one) for one in value]
        for key in ("mountPath", "name"):
            if made_list and all(isinstance(one, dict) and key in one for one in made_list):
                return sorted(made_list, key=lambda one: str(one[key]))
        return made_list
    if isinstance(value, str) and "\n" in value:
        return comparable(yaml.safe_load(value))
    return value


def plain(name: str) -> Objects:
    """The project's manifests without Helm."""
    if name == "kuberay":
        return by_name((MANIFESTS / "kuberay" / "rayservice.yaml").read_text())
    return by_name(run("kubectl", "kustomize", MANIFESTS / name))


@pytest.mark.parametrize("name", ["base", *VALUES])
def test_the_chart_renders_the_plain_manifests(name: str) -> None:
    rendered = template(*([] if name == "base" else [name]))
    expected = plain(name)
    assert rendered.keys() == expected.keys()
    for key, found in rendered.items():
        assert comparable(found) == comparable(expected[key]), key


def test_every_plain_manifest_has_its_values() -> None:
    assert ["base", *VALUES] == sorted(path.name for path in MANIFESTS.iterdir())


def test_the_comparison_sees_differences() -> None:
    one = {"env": [{"name": "a", "value": "1"}, {"name": "b", "value": "2"}], "text": "a: 1\nb: 2\n"}
    assert comparable(one) == comparable({"text": "b: 2\na: 1\n", "env": one["env"][::-1]})
    for other in (
        {**one, "text": "a: 1\nb: 3\n"},
        {**one, "env": one["env"][:1]},
        {**one, "annotations": {"x": "y"}},
        {**one, "args": []},
    ):
        assert comparable(one) != comparable(other)


COMBINATIONS = [
    {"gpus": gpus, "replicas": replicas, "serviceMonitor": monitor, "sharedMemory": memory, **storage}
    for gpus, (replicas, storage), monitor, memory in itertools.product(
        (0, 1, 4), ((1, {}), (0, {}), (1, STORAGE), (3, STORAGE)), (True, False), ("", "8Gi")
    )
] + [
    {**RAY, "gpus": gpus, "serviceMonitor": monitor, "ray": {**RAY["ray"], "workers": workers}}
    for gpus, monitor, workers in itertools.product(
        (0, 2), (True, False), ({"min": 0, "max": 1}, {"min": 2, "max": 8})
    )
]
EXTRAS = {
    "image": {"pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "registry"}],
    "environment": {"PRELUDE_PIN": "a,b", "PRELUDE_MAX_WAITING": 100, "PRELUDE_OPEN_METRICS": True},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "models": {"className": "fast"},
    "service": {"type": "LoadBalancer", "port": 8000},
}


def check_objects(found: Objects) -> None:
    """Check objects by the schemas of Kubernetes; of a RayService, its pods."""
    schemas = pytest.importorskip("kubernetes_validate", reason="make chart-tools installs the schemas")
    for name, document in found.items():
        kind = document["kind"]
        if kind == "RayService":
            cluster = document["spec"]["rayClusterConfig"]
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {}, **group["template"]} for group in groups]
        else:
            pods = []
        for one in pods or [document]:
            if kind == "ServiceMonitor":  # of an operator: no schema, but it has one form only
                assert document["spec"].keys() == {"selector", "endpoints"}
            else:
                schemas.validate(one, "1.35", strict=True)
        for pod in [*pods, document["spec"]["template"]] if kind == "Deployment" else pods:
            (container,) = pod["spec"]["containers"]
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}, name
            claims = [volume["persistentVolumeClaim"] for volume in pod["spec"]["volumes"] if len(volume) != 2]
            assert claims == [], "a volume has a name and one source"


@pytest.mark.parametrize("values", COMBINATIONS, ids=lambda values: json.dumps(values)[:60])
def test_all_values_give_valid_objects(values: dict[str, Any]) -> None:
    found = template(values={**values, **EXTRAS}, release="other")
    check_objects(found)
    assert all(document["metadata"]["name"].startswith("other") for document in found.values())
    kinds = {document["kind"] for document in found.values()}
    is_ray = "ray" in values
    assert ("ServiceMonitor" in kinds) == values["serviceMonitor"]
    assert ("RayService" in kinds) == is_ray
    assert ("Deployment" in kinds) != is_ray
    assert ("PersistentVolumeClaim" in kinds) == ("storage" not in values)


@pytest.mark.parametrize("name", ["base", *VALUES])
def test_the_values_that_are_shipped_give_valid_objects(name: str) -> None:
    check_objects(template(*([] if name == "base" else [name])))


def test_invalid_objects_are_seen() -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="make chart-tools installs the schemas")
    found = template()
    found["Deployment/prelude"]["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(schemas.ValidationError):
        check_objects(found)


def test_labels_tell_two_releases_apart() -> None:
    for values in ({}, RAY):
        one, other = template(values=values, release="a"), template(values=values, release="b")
        assert not one.keys() & other.keys()
        assert one["Service/a"]["spec"]["selector"] != other["Service/b"]["spec"]["selector"]


def test_the_store_outlives_the_release() -> None:
    found = template()
    annotations = found["PersistentVolumeClaim/prelude-store"]["metadata"]["annotations"]
    assert annotations == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in found["PersistentVolumeClaim/prelude-models"]["metadata"]


def test_settings_reach_the_server() -> None:
    values = {"environment": {"PRELUDE_PIN": "a,b", "PRELUDE_MAX_WAITING": 100}, "drainSeconds": 300, "replicas": 1}
    spec = template(values=values)["Deployment/prelude"]["spec"]["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"]}
    assert (environment["PRELUDE_PIN"], environment["PRELUDE_MAX_WAITING"]) == ("a,b", "100")
    assert environment["PRELUDE_DRAIN_SECONDS"] == "300"
    assert spec["terminationGracePeriodSeconds"] == 330


def test_a_cluster_of_two_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = [
        {"name": name, "model": name, "catalog": f"postgresql://h/{name}", "replicas": {"min": 0, "max": 2}}
        for name in ("small", "large")
    ]
    config = {"bases": bases, "ingresses": 2, "log_format": "text", "port": 1, "host": "::"}
    found = template(values={**RAY, "drainSeconds": 45, "ray": {**RAY["ray"], "config": config}}, release="many")
    path = tmp_path / "cluster.yaml"
    path.write_text(found["ConfigMap/many-cluster"]["data"]["cluster.yaml"])
    monkeypatch.setenv("PRELUDE_STORE", "s3://bucket")
    read = read_config(path)
    assert [base.name for base in read.bases] == ["small", "large"]
    assert (read.port, read.host, read.log_format, read.drain_seconds) == (8080, "0.0.0.0", "text", 45.0)  # noqa: S104
    spec = found["RayService/many"]["spec"]
    applications = [one["name"] for one in yaml.safe_load(spec["serveConfigV2"])["applications"]]
    assert applications == [app_name("small"), app_name("large"), INGRESS_APP]
    (ingress,) = [group for group in spec["rayClusterConfig"]["workerGroupSpecs"] if group["groupName"] == "ingress"]
    assert (ingress["replicas"], ingress["minReplicas"], ingress["maxReplicas"]) == (2, 2, 2)
    assert ingress["template"]["metadata"]["labels"] == found["Service/many"]["spec"]["selector"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicas": 2}, "more than one replica needs storage.secret"),
        ({"ray": {"enabled": True}}, "storage.secret: replicas share"),
        ({**STORAGE, "ray": {"enabled": True}}, "ray.config.bases: name at least one base"),
        ({"relicas": 2}, "additional properties 'relicas' not allowed"),
        ({"memory": "8"}, "/memory"),
        ({"environment": {"A B": "x"}}, "A B"),
    ],
)
def test_the_chart_refuses_what_would_fail_later(values: dict[str, Any], words: str) -> None:
    assert words in fault(values)


def test_helm_finds_no_fault_in_the_chart() -> None:
    for name in VALUES:
        run("helm", "lint", "--strict", CHART, "--values", CHART / "values" / f"{name}.yaml")


def test_the_schema_knows_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def check(known: dict[str, Any], found: dict[str, Any]) -> None:
        assert known["additionalProperties"] is False
        assert known["properties"].keys() - {"global"} == found.keys()
        for name, value in found.items():
            if isinstance(value, dict) and value:
                check(known["properties"][name], value)

    check(schema, values)


def test_the_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]
    ray = yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"]
    assert f"ray[serve]=={ray}" in project["optional-dependencies"]["cluster"]


def test_the_documented_commands_render() -> None:
    text = (ROOT / "docs" / "operations.md").read_text() + (ROOT / "docs" / "cluster.md").read_text()
    commands = re.findall(r"^helm (?:install|upgrade) .*?(?<!\\)$", text, re.MULTILINE | re.DOTALL)
    assert len(commands) == 3
    for command in commands:
        _, _, *arguments = shlex.split(command.replace("\\\n", " "))
        found = by_name(run("helm", "template", *(part.replace(CHART_PATH, str(CHART)) for part in arguments)))
        if "ray.workers.max=8" in command:
            (group,) = [
                group
                for group in found["RayService/prelude"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
                if group["groupName"] == "replicas"
            ]
            (base,) = yaml.safe_load(found["ConfigMap/prelude-cluster"]["data"]["cluster.yaml"])["bases"]
            assert (group["maxReplicas"], base["replicas"]) == (8, {"min": 1, "max": 8, "sequences": 64})
    assert set(re.findall(r"values/(\w+)\.yaml", text)) == set(VALUES)
