"""What ``prelude cluster`` does with Ray: deploy what has changed, show it, end it."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve import Application

from server.cluster.config import Base, ClusterConfig
from server.cluster.local_ray import State, StateFile, is_running, start_ray, stop_ray
from server.cluster.replica.arguments import INGRESS_APP, app_name, secrets_of
from server.cluster.serving.application import base_application, ingress_application
from server.errors import ConfigurationError, EngineStartError

_MAX_CAUSE = 2000


@dataclass(frozen=True, slots=True)
class ApplicationStatus:
    """An application as Ray Serve sees it.

    Attributes:
        name: The base, or ``ingress``.
        status: Ray Serve's word, such as ``RUNNING``.
        replicas: Number of replicas by state.
        message: Why it is not running.
    """

    name: str
    status: str
    replicas: dict[str, int]
    message: str


def up(config: ClusterConfig, say: Callable[[str], None]) -> State:
    """Start a cluster, or bring a running one to another configuration, one replica after another.

    Raises:
        EngineStartError: If Ray, a base or the door does not start.
    """
    file = StateFile(config.directory)
    config.directory.mkdir(parents=True, exist_ok=True)
    secrets_of(config)
    state = file.read()
    if config.ray_address is None and (state is None or not is_running(state.pid)):
        say("starting Ray on loopback")
        state = start_ray(config.directory, _num_cpus(config))
        file.write(state)
    elif config.ray_address is not None and (state is None or state.address != config.ray_address):
        state = State(address=config.ray_address)
    if state is None:
        raise EngineStartError("Ray has no address")
    _connect(config, state)
    serve.start(proxy_location="Disabled" if config.ray_address is None else None)
    wanted = {app_name(one.name): _digest(config, one) for one in config.bases} | {INGRESS_APP: _digest(config, None)}
    for name in sorted(state.applications.keys() - wanted.keys()):
        say(f"removing {name}")
        serve.delete(name)
        del state.applications[name]
    applications: dict[str, Callable[[], Application]] = {
        app_name(one.name): partial(base_application, config, one) for one in config.bases
    }
    applications[INGRESS_APP] = lambda: ingress_application(config)
    for name, make in applications.items():
        if state.applications.get(name) != wanted[name]:
            state.applications[name] = ""  # if this fails, the next call deploys it again, or removes it
            state.port = config.port
            file.write(state)
            _deploy(name, make(), say)
            state.applications[name] = wanted[name]
            file.write(state)
    return state


def status(config: ClusterConfig) -> list[ApplicationStatus]:
    """The applications of a cluster; none if it does not run."""
    state = StateFile(config.directory).read()
    if state is None or (state.pid and not is_running(state.pid)):
        return []
    _connect(config, state)
    found = serve.status().applications
    return [_status_of(name, found[name]) for name in sorted(state.applications) if name in found]


def down(config: ClusterConfig, say: Callable[[str], None]) -> bool:
    """End a cluster: first the door, then the replicas, each after its running requests.

    Returns:
        Whether one was running.
    """
    file = StateFile(config.directory)
    state = file.read()
    if state is None:
        return False
    if not state.pid or is_running(state.pid):
        _connect(config, state)
        for name in [INGRESS_APP, *sorted(state.applications.keys() - {INGRESS_APP})]:
            if name in state.applications:
                say(f"ending {name}")
                serve.delete(name)
        if state.pid:
            serve.shutdown()
            ray.shutdown()
            stop_ray(state.pid)
    file.remove()
    return True


def _connect(config: ClusterConfig, state: State) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not ray.is_initialized():
        try:
            ray.init(
                address=state.address,
                namespace="prelude",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({"_node_ip_address": "127.0.0.1"} if config.ray_address is None else {}),
            )
        except ConnectionError as error:
            raise EngineStartError(f"Ray at {state.address} cannot be reached: {error}") from error


def _deploy(name: str, application: Application, say: Callable[[str], None]) -> None:
    say(f"deploying {name}")
    try:
        serve.run(application, name=name, route_prefix=None)
    except RuntimeError as error:
        found = serve.status().applications.get(name)
        why = f"{error} {'' if found is None else _status_of(name, found).message}"
        raise EngineStartError(f"{name} could not be deployed: {cause_in(why)}") from error


def cause_in(text: str) -> str:
    """What a replica said when it could not start, from the traceback that Ray Serve shows; without that, its end."""
    _, mark, cause = text.rpartition(f"{EngineStartError.__name__}: ")
    return " ".join((cause if mark else text).split())[-_MAX_CAUSE:]


def _status_of(name: str, found: Any) -> ApplicationStatus:
    replicas: dict[str, int] = {}
    messages = [found.message]
    for deployment in found.deployments.values():
        messages.append(deployment.message)
        for state, number in deployment.replica_states.items():
            replicas[str(getattr(state, "value", state))] = replicas.get(str(state), 0) + number
    title = "ingress" if name == INGRESS_APP else name.removeprefix(app_name(""))
    text = " ".join(part for part in messages if part)
    return ApplicationStatus(title, str(getattr(found.status, "value", found.status)), replicas, text)


def _digest(config: ClusterConfig, one: Base | None) -> str:
    """Tells what an application is deployed with; that of a base does not depend on the other bases."""
    part = config.model_dump(mode="json")
    if one is None:
        # What else the bases are served with does not concern the doors, which go on.
        part["bases"] = [[base.name, base.shared_catalog, base.scaling.min] for base in config.bases]
    else:
        door = ("bases", "host", "port", "ingresses", "ingress_resource", "open_metrics", "allowed_host")
        part = {name: value for name, value in part.items() if name not in door}
        part["base"] = one.model_dump(mode="json")
        part["shared"] = [one.shared_store, one.shared_catalog]
    return hashlib.sha256(msgspec.json.encode(part)).hexdigest()


def _num_cpus(config: ClusterConfig) -> int:
    """Processors that Ray may reserve: those that there are, or what all replicas ask for."""
    needed = sum(base.scaling.max * base.cpus * (1 + base.surge_percent / 100) for base in config.bases)
    return max(os.cpu_count() or 1, math.ceil(needed) + 1)


def check_port(config: ClusterConfig) -> None:
    """Check that the door has a port that clients can know.

    Raises:
        ConfigurationError: If it is 0.
    """
    if config.port == 0:
        raise ConfigurationError("port: give a port; 0 would be another one for each door")
