"""``prelude prune``: delete old versions that are not needed any more."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from server.client.commands import (
    DEFAULT_URL,
    EXIT_CODES,
    AllTenants,
    ApiKey,
    Json,
    Reason,
    Url,
    answer,
    checked,
    serving,
)
from server.client.http import PreludeClient
from server.client.registry.times import parse_duration

app = typer.Typer(add_completion=False)


@app.command("prune", epilog=EXIT_CODES)
def prune(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A soft prompt; default: all.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Number of newest versions of each soft prompt to keep.")] = 3,
    older_than: Annotated[
        str, typer.Option(metavar="TIME", help="Only versions neither published nor used within this time.")
    ] = "90d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; list what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask on a terminal.")] = False,
    reason: Reason = None,
    all_tenants: AllTenants = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete old versions, but none that an alias points at, that is pinned or that is used; `restore` undoes it."""
    if name is not None:
        checked(name, "name")
    body: dict[str, Any] = {"keep": keep, "older_than": parse_duration(older_than)}
    if reason is not None:
        body["reason"] = reason
    with serving(url, api_key, as_json=as_json, all_tenants=all_tenants) as client:
        # A soft prompt with no more versions than are kept has nothing to prune.
        names = [name] if name else [one["id"] for one in client.prompts() if one["num_versions"] > keep]
        found = _prune(client, names, {**body, "dry_run": True})
        if not dry_run and found:
            if not yes and sys.stdin.isatty():
                typer.echo(_lines(found), err=True)
                typer.confirm("Delete these versions?", abort=True, err=True)
            found = _prune(client, list(found), {**body, "dry_run": False})
    count = sum(map(len, found.values()))
    end = f"{count} version{'' if count == 1 else 's'} {'would be deleted' if dry_run else 'deleted'}"
    shown = [_lines(found)] if found else []
    answer({"object": "pruned", "versions": found, "dry_run": dry_run}, as_json, *shown, end)


def _prune(client: PreludeClient, names: list[str], body: dict[str, Any]) -> dict[str, list[int]]:
    """The deleted versions of each name; names without any are left out."""
    found = {name: client.call("POST", f"/v1/prompts/{name}/prune", json=body)["versions"] for name in names}
    return {name: versions for name, versions in found.items() if versions}


def _lines(found: dict[str, list[int]]) -> str:
    return " ".join(f"{name}@{version}" for name, versions in found.items() for version in versions)
