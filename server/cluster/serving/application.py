"""The applications of Ray Serve: one for each base, and one with the doors.

``prelude cluster up`` runs them. A Serve configuration, such as KubeRay's, names ``base`` and ``ingress`` by their
import paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from server.cluster.config import Base, ClusterConfig, read_config
from server.cluster.serving.deployments import Ingress, Replica

_HEALTH_SECONDS = 1.0
_STOP_SECONDS = 60.0
"""Seconds that a process has to stop after its drain, before Ray Serve kills it."""

_UNBOUNDED = 100_000
"""Requests of a replica as Ray Serve counts them; the server has limits of its own."""


def base(args: dict[str, str]) -> Application:
    """The application of one base, for a Serve configuration.

    Args:
        args: ``config``, the path of ``cluster.yaml``, and ``base``, a name in it.
    """
    config = read_config(Path(args["config"]))
    return base_application(config, next(one for one in config.bases if one.name == args["base"]))


def ingress(args: dict[str, str]) -> Application:
    """The application with the doors, for a Serve configuration.

    Args:
        args: ``config``, the path of ``cluster.yaml``.
    """
    return ingress_application(read_config(Path(args["config"])))


def base_application(config: ClusterConfig, one: Base) -> Application:
    """The replicas of a base."""
    routing, scaling = config.routing, one.scaling
    number: dict[str, Any] = {"num_replicas": scaling.min}
    if scaling.min != scaling.max:
        policy = {"sequences": scaling.sequences, "tokens_per_second": scaling.tokens_per_second}
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scaling.min,
                max_replicas=scaling.max,
                initial_replicas=max(1, scaling.min),
                metrics_interval_s=min(10.0, max(1.0, scaling.up_seconds / 2)),
                look_back_period_s=max(2.0, scaling.up_seconds),
                upscale_delay_s=scaling.up_seconds,
                downscale_delay_s=scaling.down_seconds,
                policy=AutoscalingPolicy(
                    policy_function="server.cluster.serving.autoscaling.LoadPolicy", policy_kwargs=policy
                ),
            )
        }
    deployment = serve.deployment(
        Replica,
        name=one.name,
        max_ongoing_requests=_UNBOUNDED,
        ray_actor_options={"num_cpus": one.cpus, "num_gpus": one.gpus},
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=15.0,
        max_surge_percent=one.surge_percent,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=config.drain_seconds + _STOP_SECONDS,
        request_router_config=RequestRouterConfig(
            request_router_class="server.cluster.serving.router.SoftPromptRouter",
            request_router_kwargs={
                "base": one.name,
                "balance": routing.balance,
                "patience": routing.patience,
                "floor": routing.floor,
            },
            request_routing_stats_period_s=routing.report_seconds,
            request_routing_stats_timeout_s=10.0,
        ),
        **number,
    )
    return deployment.bind(config, one.name)


def ingress_application(config: ClusterConfig) -> Application:
    """The doors."""
    resources = {} if config.ingress_resource is None else {config.ingress_resource: 0.001}
    deployment = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=config.ingresses,
        # On one machine a new door listens beside the old one before that closes.
        max_surge_percent=100 if config.ingresses == 1 else 0,
        max_replicas_per_node=None if config.ingresses == 1 else 1,
        ray_actor_options={"num_cpus": 0, "resources": resources},
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=config.drain_seconds + _STOP_SECONDS,
    )
    return deployment.bind(config)
