"""The flags and the environment of a replica's server, and the secrets of a cluster."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.cluster.config import Base, ClusterConfig

INGRESS_APP = "prelude-ingress"
"""Name of the application of Ray Serve with the doors."""

_THREADS = "OMP_NUM_THREADS"
"""Ray sets it to 1 for actors; the server counts its processors itself."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """Files with secrets.

    Attributes:
        ingress: What door and replicas sign with.
        sessions: What the console's sessions are signed with; None without keys.
    """

    ingress: Path
    sessions: Path | None


def app_name(base: str) -> str:
    """Name of the application of Ray Serve with the replicas of a base."""
    return f"prelude-base-{base}"


def secrets_of(config: ClusterConfig) -> Secrets:
    """The secrets of a cluster; those that the configuration does not name are made once, in its directory."""
    ingress = config.ingress_secret_file or _made(config.directory / "secrets" / "ingress")
    if config.api_key_file is None:
        return Secrets(ingress, None)
    return Secrets(ingress, config.session_secret_file or _made(config.directory / "secrets" / "sessions"))


def _made(path: Path) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.touch(mode=0o600)
        fresh.write_text(secrets.token_hex(32))
        try:
            path.hardlink_to(fresh)  # fails if another process was faster
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return path


def serve_arguments(config: ClusterConfig, base: Base, folder: Path, files: Secrets) -> list[str]:
    """The flags of ``prelude serve`` for a replica, without address and name.

    Store and catalog are in its environment, because they may contain a password.

    Args:
        config: The cluster.
        base: What the replica serves.
        folder: The directory of the replica on this machine.
        files: The secrets.
    """
    found = ["--model", base.model, "--served-model-name", base.name, "--cache", str(folder / "cache")]
    found += ["--ingress-secret-file", str(files.ingress), "--drain-seconds", f"{config.drain_seconds:g}"]
    found += ["--log-level", config.log_level, "--log-format", config.log_format]
    # The door checks Host headers and counts connections; a replica sees those of the door.
    found += ["--allowed-host", "*", "--max-connections", str(max(4096, 2 * config.max_connections))]
    if config.api_key_file is not None:
        found += ["--api-key-file", str(config.api_key_file)]
    if files.sessions is not None:
        found += ["--session-secret-file", str(files.sessions)]
    if config.otlp_traces_endpoint is not None:
        found += ["--otlp-traces-endpoint", config.otlp_traces_endpoint]
    return found + base.arguments


def environment_of(config: ClusterConfig, base: Base, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a replica's server.

    Args:
        config: The cluster.
        base: What the replica serves.
        environment: That of this process.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(("RAY_", "PRELUDE_")) and name != _THREADS
    }
    store = base.shared_store
    if "://" not in store:  # replicas share the files and keep copies, as of an object store
        Path(store).mkdir(parents=True, exist_ok=True)
        store = Path(store).resolve().as_uri()
    return {**kept, "PRELUDE_STORE": store, "PRELUDE_CATALOG": base.shared_catalog, **base.environment}
