"""``prelude edit``: correct what is known about a version, or give a soft prompt to another tenant."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from prompt_store.types import check_name
from server.client.commands import (
    DEFAULT_URL,
    EXIT_CODES,
    AllTenants,
    ApiKey,
    Json,
    Reason,
    Target,
    Url,
    answer,
    parse_ref,
    serving,
)
from server.client.prompt_formats import given_format

app = typer.Typer(add_completion=False)


@app.command("edit", epilog=EXIT_CODES)
def edit(
    target: Target,
    description: Annotated[str | None, typer.Option(help="New description.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="New tag, instead of all old ones; repeatable.")] = None,
    no_tags: Annotated[bool, typer.Option("--no-tags", help="Remove all tags.")] = False,
    labels: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Names of the labels of the head, in order.")
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(metavar="JSON", help="Keys to set in the metadata; null removes a key.")
    ] = None,
    prompt_format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="Prompt format, as for push: raw, chat, or a file."),
    ] = None,
    owner: Annotated[
        str | None, typer.Option(metavar="TENANT", help="Give it to this tenant; needs the scope admin.")
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Share it with all tenants; needs the scope admin.")
    ] = False,
    reason: Reason = None,
    all_tenants: AllTenants = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Correct the description, tags, labels or metadata of a version, or change the owner of a soft prompt."""
    ref = parse_ref(target)
    fields = _fields(description, tag, labels, metadata, no_tags=no_tags)
    owning: dict[str, Any] = {"shared": True} if shared else {} if owner is None else {"owner": owner}
    is_version = bool(fields) or prompt_format is not None
    if (owner is not None and shared) or is_version == bool(owning):
        raise typer.BadParameter("give new values of a version, or one of --owner and --shared")
    with serving(url, api_key, as_json=as_json, all_tenants=all_tenants) as client:
        if owning:
            if "@" in target:
                raise typer.BadParameter(f"{target!r} is one version; an owner owns all: give {ref.name}")
            reply = client.call("PATCH", f"/v1/prompts/{ref.name}", json=_with_reason(owning, reason))
            whose = "shared" if shared else f"of {owner}"
            answer(reply, as_json, f"{ref.name} is {whose}")
            return
        if prompt_format is not None:
            fields["format"] = _format(prompt_format)
        version = client.version(ref)["version"]
        path = f"/v1/prompts/{ref.name}/versions/{version}"
        reply = client.call("PATCH", path, json=_with_reason(fields, reason))
    changed = ", ".join(reply["changed"])
    answer(reply, as_json, f"{ref.name}@{version}: " + (f"changed {changed}" if changed else "unchanged"))


def _fields(
    description: str | None, tags: list[str] | None, labels: str | None, metadata: str | None, *, no_tags: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {} if description is None else {"description": description}
    if no_tags and tags:
        raise typer.BadParameter("give --tag or --no-tags, not both")
    if no_tags or tags:
        found["tags"] = [_checked_tag(tag) for tag in tags or ()]
    if labels is not None:
        found["labels"] = [label.strip() for label in labels.split(",")]
    if metadata is not None:
        try:
            found["metadata"] = json.loads(metadata)
        except ValueError as error:
            raise typer.BadParameter(f"--metadata is not JSON: {error}") from error
    return found


def _format(text: str) -> Any:
    found = given_format(text).text
    if found is None:
        raise typer.BadParameter("a known format cannot be made unknown again: give raw, chat, or a file")
    return json.loads(found)


def _checked_tag(tag: str) -> str:
    try:
        return check_name(tag, "tag")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _with_reason(body: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return body if reason is None else {**body, "reason": reason}
