"""``cluster.yaml``: the bases of a cluster, their replicas, and the door before them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from server.api.keys.keys import is_loopback
from server.errors import ConfigurationError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")

OWN_FLAGS = frozenset(
    {
        "model",
        "served-model-name",
        "host",
        "port",
        "store",
        "catalog",
        "cache",
        "api-key-file",
        "api-keys",
        "session-secret-file",
        "ingress-secret-file",
        "replica-name",
        "drain-seconds",
        "log-level",
        "log-format",
        "allow-open",
        "otlp-traces-endpoint",
    }
)
"""Flags of ``prelude serve`` that the cluster sets; other fields of the file decide them."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scaling(_Section):
    """How many replicas a base has.

    Attributes:
        min: Minimum; 0 stops a base that gets no requests.
        max: Maximum.
        sequences: Sequences of a replica, running and waiting, above which another is started.
        tokens_per_second: Tokens that a replica computes in a second, above which another is started; None: only
            sequences count.
        up_seconds: Seconds for which the load must be high before replicas are added.
        down_seconds: Seconds for which it must be low before replicas are removed.
    """

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    sequences: Annotated[float, Field(gt=0)] = 64.0
    tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    up_seconds: Annotated[float, Field(ge=0)] = 10.0
    down_seconds: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}: give a max of at least min")
        return self


class Base(_Section):
    """A base model with its own store and catalog.

    Attributes:
        name: Its name in requests.
        model: Hub id, or a directory that is the same on all machines.
        store: A directory that all machines share, or the URL of an object store; None: ``PRELUDE_STORE``.
        catalog: ``postgresql://...``; None: ``PRELUDE_CATALOG``.
        replicas: A number, or bounds for autoscaling.
        cpus: Processors that Ray reserves for a replica.
        gpus: GPUs of a replica.
        flags: Further flags of ``prelude serve``, without the dashes; a list repeats one.
        environment: Further environment variables.
        surge_percent: Replicas that an update starts before it stops old ones, of their number; 0: one stops first.
        start_seconds: Maximum time from the start of a replica until it is ready.
    """

    name: str
    model: str
    store: str | None = None
    catalog: Annotated[str | None, Field(repr=False)] = None
    replicas: Annotated[int, Field(ge=1)] | Scaling = 1
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    flags: dict[str, bool | int | float | str | list[str]] = {}
    environment: Annotated[dict[str, str], Field(repr=False)] = {}
    surge_percent: Annotated[int, Field(ge=0, le=100)] = 0
    start_seconds: Annotated[float, Field(gt=0)] = 1200.0

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} must be letters, digits, '.', '_' and '-', at most 63")
        return name

    @field_validator("flags")
    @classmethod
    def _check_flags(cls, flags: dict[str, Any]) -> dict[str, Any]:
        for name in flags:
            if name.startswith("-") or "_" in name:
                raise ValueError(f"{name!r}: write flags without their first dashes, such as max-num-seqs")
            if name.removeprefix("no-") in OWN_FLAGS:
                raise ValueError(f"{name!r} is set by the cluster; see the other fields of the file")
        return flags

    @property
    def scaling(self) -> Scaling:
        """The bounds of the number of replicas; the same twice for a fixed number."""
        if isinstance(self.replicas, Scaling):
            return self.replicas
        return Scaling(min=self.replicas, max=self.replicas)

    @property
    def shared_store(self) -> str:
        """Where its soft prompts are stored.

        Raises:
            ConfigurationError: If that is given neither here nor by ``PRELUDE_STORE``.
        """
        found = self.store or os.environ.get("PRELUDE_STORE")
        if not found:
            raise ConfigurationError(
                f"{self.name}: store: replicas need one that all of them reach: give a URL such as "
                "s3://BUCKET/PREFIX, or a directory that all machines share"
            )
        return found

    @property
    def shared_catalog(self) -> str:
        """The URL of its catalog.

        Raises:
            ConfigurationError: If there is none, or it is SQLite, which belongs to one process.
        """
        found = self.catalog or os.environ.get("PRELUDE_CATALOG")
        if not found:
            raise ConfigurationError(
                f"{self.name}: catalog: replicas share a PostgreSQL database: give postgresql://USER@HOST/DATABASE. "
                "The SQLite catalog of a single server belongs to one process"
            )
        if not found.startswith(("postgresql:", "postgres:", "postgresql+")):
            scheme = found.partition(":")[0]
            what = "SQLite belongs to one process" if scheme.startswith("sqlite") else f"{scheme!r} is not supported"
            raise ConfigurationError(f"{self.name}: catalog: {what}; replicas need postgresql://USER@HOST/DATABASE")
        return found

    @property
    def arguments(self) -> list[str]:
        """The further flags as arguments of ``prelude serve``."""
        found: list[str] = []
        for name, value in self.flags.items():
            if isinstance(value, bool):
                found.append(f"--{name}" if value else f"--no-{name}")
            else:
                for item in value if isinstance(value, list) else [value]:
                    found += [f"--{name}", str(item)]
        return found


class Routing(_Section):
    """How replicas are chosen.

    Attributes:
        balance: Load up to which a replica with the soft prompt is preferred, as a multiple of the mean load.
        patience: The same for the only replica that has it on the device.
        floor: Sequences up to which a replica never counts as loaded.
        report_seconds: Period of the replicas' reports.
        wait_seconds: Maximum time that a request waits for the first replica of its base.
    """

    balance: Annotated[float, Field(gt=1)] = 1.15
    patience: Annotated[float, Field(gt=1)] = 1.5
    floor: Annotated[int, Field(ge=1)] = 4
    report_seconds: Annotated[float, Field(ge=0.1)] = 1.0
    wait_seconds: Annotated[float, Field(gt=0)] = 120.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.patience < self.balance:
            raise ValueError("patience must be at least balance")
        return self


class ClusterConfig(_Section):
    """All settings of a cluster.

    Attributes:
        bases: The base models; the first answers requests that name none.
        directory: Where a machine keeps secrets, logs and the local files of its replicas.
        host: Address of the door; anything but loopback needs keys.
        port: Port of the door.
        replica_host: Address that replicas bind; None: loopback if Ray is started here, else the node's own.
        ingresses: Number of doors, at most one for each machine.
        ingress_resource: Custom resource of Ray that a machine with a door needs; None: any machine.
        api_key_file: Keys of all replicas and the door; the same path on all machines.
        session_secret_file: Secret for the console's sessions; None: one is made if there are keys.
        ingress_secret_file: Secret between door and replicas; None: one is made, which only works on one machine.
        allow_open: Whether to serve without keys on an address that other machines can reach.
        open_metrics: Whether ``/metrics`` needs no key.
        allowed_host: Further host names of the door, for the Host header.
        ray_address: ``auto`` or ``HOST:PORT`` of a running Ray; None: ``prelude cluster up`` starts one here.
        drain_seconds: Time that running requests have when a replica stops.
        max_connections: Maximum number of open connections of a door.
        max_body_bytes: Largest JSON body in which the door looks for names; larger ones are passed on.
        routing: How replicas are chosen.
        log_level: Python's level name.
        log_format: ``text`` or ``json``.
        otlp_traces_endpoint: URL for OTLP traces of the replicas over HTTP.
    """

    bases: Annotated[list[Base], Field(min_length=1)]
    directory: Path = Path("prelude-cluster")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replica_host: str | None = None
    ingresses: Annotated[int, Field(ge=1)] = 1
    ingress_resource: str | None = None
    api_key_file: Path | None = None
    session_secret_file: Path | None = None
    ingress_secret_file: Path | None = None
    allow_open: bool = False
    open_metrics: bool = False
    allowed_host: tuple[str, ...] = ()
    ray_address: str | None = None
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    max_connections: Annotated[int, Field(ge=1)] = 4096
    max_body_bytes: Annotated[int, Field(ge=1)] = 8 * 1024 * 1024
    routing: Routing = Routing()
    log_level: str = "INFO"
    log_format: Annotated[str, Field(pattern="^(text|json)$")] = "text"
    otlp_traces_endpoint: str | None = None

    @field_validator("bases")
    @classmethod
    def _check_bases(cls, bases: list[Base]) -> list[Base]:
        names = [base.name for base in bases]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two bases have the name {name!r}")
        return bases

    def check(self) -> None:
        """Check what depends on the environment and on several fields.

        Raises:
            ConfigurationError: If a store or catalog is missing or cannot be shared, two bases share a catalog, the
                door would be open to other machines, or a secret is missing for several machines.
        """
        catalogs: dict[str, str] = {}
        for base in self.bases:
            _ = base.shared_store
            other = catalogs.setdefault(base.shared_catalog, base.name)
            if other != base.name:
                raise ConfigurationError(
                    f"{base.name}: catalog: {other} has the same; each base needs a database of its own, because a "
                    "soft prompt fits the base that it was trained on only"
                )
        if self.api_key_file is None and not (is_loopback(self.host) or self.allow_open):
            raise ConfigurationError(
                f"host: {self.host!r} can be reached from other machines: give api_key_file, bind 127.0.0.1, or set "
                "allow_open"
            )
        if self.ray_address is not None and self.ingress_secret_file is None:
            raise ConfigurationError(
                "ingress_secret_file: machines of one Ray cluster need the same secret: give a file that all of them "
                "have, such as a mounted Kubernetes Secret"
            )
        if self.ray_address is not None and self.api_key_file is not None and self.session_secret_file is None:
            raise ConfigurationError("session_secret_file: replicas on several machines need one for the console")


def read_config(path: Path) -> ClusterConfig:
    """Read and check ``cluster.yaml``.

    Relative paths in it are relative to its directory.

    Raises:
        ConfigurationError: If it cannot be read or is not valid; names the field.
    """
    try:
        import yaml  # noqa: PLC0415 - of the extra 'cluster'
    except ImportError as error:
        raise ConfigurationError("PyYAML is missing: pip install 'prelude-server[cluster]'") from error
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold fields such as 'bases'")
    try:
        config = ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {_first_fault(error)}") from error
    config = _resolved(config, path.resolve().parent)
    config.check()
    return config


def _first_fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_input=False)
    # Of a field with two forms, the fault in words is that of the form that was meant.
    fault = next((fault for fault in faults if fault["type"] == "value_error"), faults[0])
    field = ".".join(str(part) for part in fault["loc"])
    return f"{field}: {fault['msg'].removeprefix('Value error, ')}"


def _resolved(config: ClusterConfig, folder: Path) -> ClusterConfig:
    """The configuration with absolute paths, because replicas run in other directories."""
    paths = {
        field: folder / value
        for field in ("directory", "api_key_file", "session_secret_file", "ingress_secret_file")
        if (value := getattr(config, field)) is not None
    }
    bases = [_base_resolved(base, folder) for base in config.bases]
    return config.model_copy(update={**paths, "bases": bases})


def _base_resolved(base: Base, folder: Path) -> Base:
    changes: dict[str, object] = {}
    if (folder / base.model).is_dir():
        changes["model"] = str(folder / base.model)
    if base.store is not None and "://" not in base.store:
        changes["store"] = str(folder / base.store)
    return base.model_copy(update=changes)
