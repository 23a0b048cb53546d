"""``prelude store``: back up, restore and verify a store on this machine; no server is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prompt_store.errors import PromptConflictError, PromptStoreError, StoreUnavailableError
from server.client.commands import EXIT_CODES, ExitStatus, Json
from server.config import StoreSettings

app = typer.Typer(
    name="store", help="Back up, restore and verify a store, by its files and database.", no_args_is_help=True
)

_DEFAULT = StoreSettings()

Store = Annotated[
    str,
    typer.Option(
        envvar="PRELUDE_STORE", help="Where soft prompts are stored: a directory, or s3://, gs:// or az://."
    ),
]
Catalog = Annotated[
    str | None,
    typer.Option(
        envvar="PRELUDE_CATALOG",
        help="Database of names and versions: postgresql://... or sqlite:///PATH; default: SQLite in the store.",
    ),
]


@app.command(epilog=EXIT_CODES)
def backup(
    target: Annotated[
        Path,
        typer.Argument(metavar="FILE|DIR", help="A file that ends in .tar, or a directory; it may hold a backup."),
    ],
    store: Store = _DEFAULT.location,
    catalog: Catalog = None,
    as_json: Json = False,
) -> None:
    """Copy catalog and files, also while a server runs."""
    # Imported here because SQLAlchemy is slow to import, and other commands do not need it.
    from prompt_store.maintenance.backup import back_up  # noqa: PLC0415

    with _errors_on_one_line():
        report = back_up(store, catalog, target)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        typer.echo(
            f"{report.versions} versions of {report.prompts} soft prompts are in {target}: {report.blobs} files, "
            f"{report.bytes} bytes; {report.copied} were copied now"
        )
    _fail_with(report.damaged)


@app.command(epilog=EXIT_CODES)
def restore(
    source: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A backup.", exists=True)],
    store: Store = _DEFAULT.location,
    catalog: Catalog = None,
    as_json: Json = False,
) -> None:
    """Fill an empty store from a backup; no server may use the store."""
    from prompt_store.maintenance.backup import restore  # noqa: PLC0415 - slow to import

    with _errors_on_one_line():
        report = restore(source, store, catalog)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        typer.echo(f"{report.versions} versions of {report.prompts} soft prompts are in {store}")


@app.command(epilog=EXIT_CODES)
def verify(store: Store = _DEFAULT.location, catalog: Catalog = None, as_json: Json = False) -> None:
    """Read every file and check it and the catalog, also while a server runs, or of a backup in a directory."""
    from prompt_store.maintenance.verification import verify  # noqa: PLC0415 - slow to import

    with _errors_on_one_line():
        found = verify(store, catalog)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        typer.echo(f"schema {found.schema}: {found.versions} versions, {found.blobs} files, {found.bytes} bytes")
    _fail_with([*found.faults, *(f"blob {digest} is unknown to the catalog" for digest in found.orphans)])


def _fail_with(faults: tuple[str, ...] | list[str]) -> None:
    for fault in faults:
        typer.echo(f"prelude: {fault}", err=True)
    if faults:
        raise typer.Exit(ExitStatus.FAILED)


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    try:
        yield
    except (PromptStoreError, OSError) as error:
        typer.echo(f"prelude: {' '.join(str(error).split())}", err=True)
        status = ExitStatus.FAILED
        if isinstance(error, PromptConflictError):
            status = ExitStatus.CONFLICT
        elif isinstance(error, StoreUnavailableError):
            status = ExitStatus.UNAVAILABLE
        raise typer.Exit(status) from error
