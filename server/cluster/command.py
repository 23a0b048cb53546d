"""``prelude cluster``: start, show and end a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.client.commands import EXIT_CODES, ExitStatus, Json
from server.cluster.local_ray import use_token
from server.errors import ConfigurationError, ServerError

if TYPE_CHECKING:
    from server.cluster.config import ClusterConfig

app = typer.Typer(
    name="cluster", help="Replicas behind one address, on Ray Serve; needs the extra 'cluster'.", no_args_is_help=True
)

Config = Annotated[
    Path,
    typer.Option("--config", "-c", envvar="PRELUDE_CLUSTER_CONFIG", help="The file that describes the cluster."),
]
_CONFIG = Path("cluster.yaml")


@app.command(epilog=EXIT_CODES)
def up(config: Config = _CONFIG) -> None:
    """Start a cluster, or bring a running one to a changed configuration without losing a request."""
    with _errors_on_one_line():
        found = _read(config)
        # Imported here because it needs the extra 'cluster', and Ray is slow to import.
        from server.cluster.serving.operator import check_port  # noqa: PLC0415
        from server.cluster.serving.operator import up as start  # noqa: PLC0415

        check_port(found)
        state = start(found, lambda line: typer.echo(line, err=True))
    host = f"[{found.host}]" if ":" in found.host else found.host
    typer.echo(f"http://{host}:{state.port} serves {', '.join(base.name for base in found.bases)}")


@app.command(epilog=EXIT_CODES)
def status(config: Config = _CONFIG, as_json: Json = False) -> None:
    """Show the bases and the ingress with their replicas; status 1 if one of them is not running."""
    with _errors_on_one_line():
        settings = _read(config)
        from server.cluster.serving.operator import status as look  # noqa: PLC0415 - as in up

        found = look(settings)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
    else:
        for one in found:
            replicas = ", ".join(f"{number} {state.lower()}" for state, number in one.replicas.items())
            typer.echo(f"{one.name}: {one.status.lower()}, {replicas or 'no replicas'} {one.message}".rstrip())
        if not found:
            typer.echo("the cluster is not running")
    if not found or any(one.status != "RUNNING" for one in found):
        raise typer.Exit(ExitStatus.FAILED)


@app.command(epilog=EXIT_CODES)
def down(config: Config = _CONFIG) -> None:
    """End a cluster after its running requests."""
    with _errors_on_one_line():
        settings = _read(config)
        from server.cluster.serving.operator import down as end  # noqa: PLC0415 - as in up

        was_running = end(settings, lambda line: typer.echo(line, err=True))
    typer.echo("the cluster has ended" if was_running else "the cluster is not running")


def _read(path: Path) -> ClusterConfig:
    """Read the configuration, and prepare this process for Ray, which reads its token as it is imported.

    Raises:
        ConfigurationError: If the file is not valid, or Ray Serve is missing.
    """
    # Imported here because it imports parts of the API, which client commands do not need.
    from server.cluster.config import read_config  # noqa: PLC0415

    found = read_config(path)
    if find_spec("ray") is None:
        raise ConfigurationError("Ray Serve is missing: pip install 'prelude-server[cluster]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if found.ray_address is None:
        use_token(found.directory)
    return found


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    try:
        yield
    except ServerError as error:
        typer.echo(f"prelude: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(ExitStatus.FAILED) from error
