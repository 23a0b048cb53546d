"""``prelude export``, and the upload of what it has written by ``prelude import``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from server.client import tables
from server.client.commands import (
    DEFAULT_URL,
    EXIT_CODES,
    AllTenants,
    ApiKey,
    ExitStatus,
    Json,
    Url,
    answer,
    checked,
    serving,
)
from server.client.http import ClientError, PreludeClient
from server.client.registry.archive import (
    PROMPT_FILE,
    VERSION_FILE,
    exported_prompts,
    exported_versions,
    name_in,
    read_record,
    write_record,
)

app = typer.Typer(add_completion=False)

_PAGE = 200
_MAX_ENTRIES = 500


@dataclass(slots=True)
class Report:
    """What was moved, and what was not.

    Attributes:
        prompts: Number of soft prompts.
        versions: Number of versions that were written or uploaded now.
        known: Number of versions that were there already.
        notes: What differs from the source, one line each.
        failures: What could not be moved, one line each.
    """

    prompts: int = 0
    versions: int = 0
    known: int = 0
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def show(self, what: str, *, as_json: bool) -> None:
        """Print the report; ends the command if something could not be moved."""
        reply = {
            "object": what,
            "prompts": self.prompts,
            "versions": self.versions,
            "known": self.known,
            "notes": self.notes,
            "failures": self.failures,
        }
        line = f"{what}ed {self.versions} versions of {self.prompts} soft prompts; {self.known} were there already"
        answer(reply, as_json, line, *(self.notes if not as_json else ()))
        for failure in self.failures:
            typer.echo(f"prelude: {tables.clean(failure)}", err=True)
        if self.failures:
            raise typer.Exit(ExitStatus.FAILED)


@app.command("export", epilog=EXIT_CODES)
def export(
    targets: Annotated[
        list[str], typer.Argument(metavar="[NAME...] DIR", help="Soft prompts, and the directory to write.")
    ],
    all_: Annotated[bool, typer.Option("--all", help="Export all soft prompts.")] = False,
    all_tenants: AllTenants = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Write soft prompts with all versions, aliases and history to a directory, for `prelude import`; resumable."""
    *names, directory = targets
    if all_ == bool(names):
        raise typer.BadParameter("give names and a directory, or --all and a directory")
    for name in names:
        checked(name, "name")
    report = Report()
    with serving(url, api_key, as_json=as_json, all_tenants=all_tenants) as client:
        found = (prompt["id"] for prompt in client.prompts()) if all_ else iter(names)
        for name in found:
            _export_one(client, name, Path(directory) / name, report)
    report.show("export", as_json=as_json)


def import_export(
    client: PreludeClient, directory: Path, *, shared: bool, allow_other_base: bool, move_aliases: bool
) -> Report:
    """Upload what ``prelude export`` has written; what is on the server already is not sent again.

    Raises:
        ClientError: If the directory has no export, or the server cannot be reached.
    """
    report = Report()
    prompts = []
    for folder in exported_prompts(directory):
        record = read_record(folder / PROMPT_FILE)
        prompts.append((name_in(record, folder / PROMPT_FILE), folder, record))
    report.prompts = len(prompts)
    versions = [(name, number, path) for name, folder, _ in prompts for number, path in exported_versions(folder)]
    # A soft prompt that was trained over an adapter needs the adapter to be there.
    for name, number, path in sorted(versions, key=lambda one: bool(read_record(one[2] / VERSION_FILE).get("over"))):
        _import_version(client, name, number, path, report, shared=shared, allow_other_base=allow_other_base)
    for name, _, record in prompts:
        try:
            _import_history(client, name, record, report, move_aliases=move_aliases)
        except ClientError as error:
            _raise_if_down(error)
            report.failures.append(f"{name}: aliases and history: {error}")
    return report


def _export_one(client: PreludeClient, name: str, folder: Path, report: Report) -> None:
    prompt = client.prompt(name)
    report.prompts += 1
    for version in _pages(client, f"/v1/prompts/{name}/versions"):
        path = folder / str(version["version"])
        record = path / VERSION_FILE
        is_known = record.is_file() and read_record(record).get("digest") == version["digest"]
        try:
            client.pull(version, path, force=True)
        except ClientError as error:
            _raise_if_down(error)
            report.failures.append(f"{name}@{version['version']}: {error}")
            continue
        write_record(record, version)
        report.known += is_known
        report.versions += not is_known
    history = [*_pages(client, f"/v1/prompts/{name}/history")]
    write_record(folder / PROMPT_FILE, {"id": name, "prompt": prompt, "history": history[::-1]})


def _pages(client: PreludeClient, path: str) -> Iterator[dict[str, Any]]:
    """The entries of all pages."""
    params: dict[str, Any] = {"limit": _PAGE}
    while True:
        page = client.call("GET", path, params=params)
        yield from page["data"]
        if not page["has_more"]:
            return
        params["before"] = page["last_id"]


def _import_version(
    client: PreludeClient,
    name: str,
    number: int,
    path: Path,
    report: Report,
    *,
    shared: bool,
    allow_other_base: bool,
) -> None:
    record = read_record(path / VERSION_FILE)
    overrides = record.get("overrides") or {}
    prompt_format = record.get("format")
    fields = {"version": str(number), "created_at": str(record["created_at"])}
    if record.get("created_by"):
        fields["created_by"] = record["created_by"]
    try:
        sent, is_new = client.push(
            path,
            name=name,
            description=record["description"],
            tags=record["tags"],
            metadata=_json(record["metadata"]),
            lineage=_json(record["lineage"]),
            shared=shared,
            allow_other_base=allow_other_base or bool(overrides.get("allow_other_base")),
            task_type=overrides.get("task_type"),
            over=record.get("over"),
            prompt_format=None if prompt_format is None else json.dumps(prompt_format),
            fields=fields,
        )
    except ClientError as error:
        _raise_if_down(error)
        reasons = "; ".join(message for _, message in error.faults) or str(error)
        report.failures.append(f"{name}@{number}: {reasons}")
        return
    report.versions += is_new
    report.known += not is_new
    if record["shared"] and not sent["shared"]:
        report.notes.append(f"{name}@{number} was shared, and belongs to one tenant here: give --shared to share it")
    if sent["digest"] != record["digest"]:
        report.failures.append(f"{name}@{number}: the server computed another digest")


def _import_history(
    client: PreludeClient, name: str, record: Mapping[str, Any], report: Report, *, move_aliases: bool
) -> None:
    entries = record["history"]
    parts = [entries[first : first + _MAX_ENTRIES] for first in range(0, len(entries), _MAX_ENTRIES)] or [[]]
    for index, part in enumerate(parts):
        body: dict[str, Any] = {"history": part}
        if index == len(parts) - 1:
            prompt = record["prompt"]
            body |= {"aliases": prompt["aliases"], "move_aliases": move_aliases}
            if prompt.get("rollouts"):
                body["rollouts"] = prompt["rollouts"]
        reply = client.call("POST", f"/v1/prompts/{name}/import", json=body)
        if reply["skipped_entries"]:
            report.notes.append(
                f"{name}: {reply['skipped_entries']} changes are of kinds that the server does not know"
            )
    for alias, version in reply["kept_aliases"].items():
        report.notes.append(f"{name}@{alias} stays at version {version}: give --move-aliases to move it")
    report.failures += [f"{name}@{alias}: its version is not on the server" for alias in reply["missing_aliases"]]
    report.failures += [
        f"{name}@{alias}: a version of its rollout is not on the server"
        for alias in reply.get("missing_rollouts", ())
    ]


def _json(value: Mapping[str, Any]) -> str | None:
    return json.dumps(value) if value else None


def _raise_if_down(error: ClientError) -> None:
    """Raise an error that concerns everything, such as an unreachable server or a wrong key."""
    if (error.status is None and error.code != "local") or error.status in (401, 429, 502, 503, 504):
        raise error
