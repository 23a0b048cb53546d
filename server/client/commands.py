"""The client commands: they call a running server over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from prompt_store.types import CONFIG_FILE, DEFAULT_ALIAS, WEIGHTS_FILE, PromptKind, PromptRef, TaskType, check_name
from server.client import tables
from server.client.base_layers import BaseLayersError, without_base_layers
from server.client.http import ClientError, OnBytes, PreludeClient
from server.client.peft_directory import is_archive
from server.client.prompt_formats import UNKNOWN, ChosenFormat, format_of_directory, given_format
from server.client.registry.times import parse_duration

app = typer.Typer(add_completion=False)

DEFAULT_URL = "http://127.0.0.1:8000"

_PROGRESS_BYTES = 8 * 1024 * 1024
"""Minimum size of a transfer to show a progress bar."""


class ExitStatus(IntEnum):
    """Exit statuses of the client commands."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    INVALID = 4
    CONFLICT = 5
    NOT_AUTHORISED = 6
    UNAVAILABLE = 7


_BY_HTTP_STATUS = {
    400: ExitStatus.INVALID,
    401: ExitStatus.NOT_AUTHORISED,
    403: ExitStatus.NOT_AUTHORISED,
    404: ExitStatus.NOT_FOUND,
    409: ExitStatus.CONFLICT,
    413: ExitStatus.INVALID,
    415: ExitStatus.INVALID,
    429: ExitStatus.UNAVAILABLE,
    502: ExitStatus.UNAVAILABLE,
    503: ExitStatus.UNAVAILABLE,
    504: ExitStatus.UNAVAILABLE,
}

_BY_CODE = {"unreachable": ExitStatus.UNAVAILABLE, "usage": ExitStatus.USAGE}
"""Exit status of errors without an HTTP response."""

EXIT_CODES = (
    "Exit codes: 0 ok; 1 anything else; 2 usage; 3 not found; 4 invalid; 5 conflict; 6 not authorised; "
    "7 the server is unreachable or not ready."
)

Url = Annotated[str, typer.Option(envvar="PRELUDE_URL", help="URL of the server.")]
ApiKey = Annotated[str | None, typer.Option(envvar="PRELUDE_API_KEY", help="API key, sent with every request.")]
Json = Annotated[bool, typer.Option("--json", help="Print only the API's JSON.")]
Target = Annotated[str, typer.Argument(metavar="NAME", help="A soft prompt: NAME, NAME@VERSION or NAME@ALIAS.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a soft prompt.")]
Alias = Annotated[str, typer.Option(metavar="ALIAS", help="The alias.")]
Expect = Annotated[
    int | None,
    typer.Option(min=1, metavar="V", help="Only if the alias points at this version; otherwise exit with 5."),
]
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Reason of the change, for the history.")]
AllTenants = Annotated[
    bool, typer.Option("--all-tenants", help="Include the soft prompts of all tenants; needs the scope admin.")
]
TaskId = Annotated[int | None, typer.Option(min=0, help="Task id of a multitask prompt, from 0.")]


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return app.command(name, epilog=EXIT_CODES)


@_command("push")
def push(
    directory: Annotated[Path, typer.Argument(help="Directory saved by PEFT.", exists=True)],
    name: Annotated[str, typer.Option("--id", help="Name of the soft prompt.")],
    alias: Annotated[str | None, typer.Option(help="Alias to move, instead of latest.")] = None,
    description: Annotated[str | None, typer.Option(help="Free text.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag to filter by in `list`; repeatable.")] = None,
    metadata: Annotated[str | None, typer.Option(metavar="JSON", help="JSON object with any content.")] = None,
    lineage: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="JSON object with training_run, parent, dataset_digest or scores."),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Share it with all tenants; needs the scope admin.")
    ] = False,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Accept files that name another base model.")
    ] = False,
    task_type: Annotated[
        TaskType | None, typer.Option(help="Task type, if the adapter's configuration does not state it.")
    ] = None,
    drop_base_layers: Annotated[
        bool,
        typer.Option("--drop-base-layers", help="Leave out copies of the base's embeddings and head."),
    ] = False,
    prompt_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="How it wants to be asked: raw, chat, unknown, a JSON object, or a file with one or with a Jinja "
            "template; default: as trained or guessed.",
        ),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(metavar="NAME@V", help="The adapter that the soft prompt was trained over; used with it."),
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload a PEFT directory as the next version of a soft prompt or an adapter."""
    if not directory.is_dir():
        what = "an archive: unpack it, and give" if is_archive(directory) else "a file: give"
        raise typer.BadParameter(f"{directory} is {what} the directory that save_pretrained() wrote")
    with ExitStack() as stack:
        client = stack.enter_context(serving(url, api_key, as_json=as_json))
        chosen = _chosen_format(directory, prompt_format)
        if drop_base_layers and all((directory / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE)):
            try:
                directory, num_bytes = stack.enter_context(without_base_layers(directory))
            except BaseLayersError as error:
                raise typer.BadParameter(str(error)) from error
            if not as_json:
                typer.echo(f"left out {num_bytes:,} bytes of the base's tensors", err=True)
        sizes = [path.stat().st_size for file in (CONFIG_FILE, WEIGHTS_FILE) if (path := directory / file).is_file()]
        with _progress("uploading", sum(sizes)) as on_bytes:
            version, created = client.push(
                directory,
                name=name,
                alias=alias,
                description=description,
                tags=tag or (),
                metadata=metadata,
                lineage=lineage,
                shared=shared,
                allow_other_base=allow_other_base,
                task_type=task_type,
                prompt_format=chosen.text,
                over=over,
                on_bytes=on_bytes,
            )
    source = "" if chosen.source is None else f" ({chosen.source}; --format sets another)"
    recorded = (version.get("format") or {}).get("type", UNKNOWN)
    if recorded != chosen.name:
        source = f"; it was published with this format, and {chosen.name} was not recorded"
    answer(version, as_json, tables.pushed(version, created=created), f"format {recorded}{source}")
    for warning in version["warnings"]:
        typer.echo(f"prelude: {tables.clean(warning)}", err=True)


@_command("pull")
def pull(
    target: Target,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Target directory; created if missing.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that differ.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Download a version's files, byte for byte as they were uploaded, and verify their digests."""
    ref = parse_ref(target)
    with serving(url, api_key, as_json=as_json) as client:
        version = client.version(ref)
        with _progress("downloading", version["size"]) as on_bytes:
            client.pull(version, directory, force=force, on_bytes=on_bytes)
    answer(version, as_json, f"{version['id']}@{version['version']} is in {directory}")


@_command("list")
def list_(
    tag: Annotated[str | None, typer.Option(help="List only names with this tag.")] = None,
    kind: Annotated[PromptKind | None, typer.Option(help="List only names with a version of this kind.")] = None,
    unused_for: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only those neither published nor used within this time: 30d.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number to list; default: all.")] = None,
    all_tenants: AllTenants = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List the soft prompts and adapters."""
    seconds = None if unused_for is None else parse_duration(unused_for)
    with serving(url, api_key, as_json=as_json, all_tenants=all_tenants) as client:
        # One more than requested, to know whether there are more.
        found = list(
            client.prompts(tag=tag, kind=kind, limit=None if limit is None else limit + 1, unused_for=seconds)
        )
    data = found[:limit]
    page = {
        "object": "list",
        "data": data,
        "has_more": len(found) > len(data),
        "last_id": data[-1]["id"] if data else None,
    }
    answer(page, as_json, tables.prompts(data))


@_command("show")
def show(
    target: Target,
    limit: Annotated[
        int, typer.Option(min=1, max=1000, help="Maximum number of versions and of history entries.")
    ] = 20,
    all_tenants: AllTenants = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show a soft prompt with its aliases, versions and history, or one version."""
    ref = parse_ref(target)
    with serving(url, api_key, as_json=as_json, all_tenants=all_tenants) as client:
        if "@" in target:
            version = client.version(ref)
            answer(version, as_json, *tables.version(version))
            return
        prompt = client.prompt(ref.name)
        versions, history = client.versions(ref.name, limit=limit), client.history(ref.name, limit=limit)
    shown = {"prompt": prompt, "versions": versions, "history": history}
    answer(shown, as_json, *tables.prompt(prompt, versions, history))


@_command("rollback")
def rollback(
    name: Name,
    alias: Alias = DEFAULT_ALIAS,
    expect: Expect = None,
    reason: Reason = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Point an alias back at the version before its last promotion."""
    checked(name, "name")
    checked(alias, "alias")
    with serving(url, api_key, as_json=as_json) as client:
        reply = client.rollback(name, alias, expected=expect, reason=reason)
    answer(reply, as_json, f"{name}@{alias} is version {reply['version']}")


@_command("rm")
def rm(
    target: Annotated[str, typer.Argument(metavar="NAME", help="A soft prompt, or NAME@VERSION for one version.")],
    yes: Annotated[
        bool,
        typer.Option("--yes", "-y", help="Do not ask, and delete aliases and several versions too."),
    ] = False,
    reason: Reason = None,
    all_tenants: AllTenants = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete a soft prompt or one version; asks on a terminal. `restore` undoes it."""
    ref = _number_or_name(target)
    with serving(url, api_key, as_json=as_json, all_tenants=all_tenants) as client:
        if not yes and sys.stdin.isatty():
            what, yes = _removal(client.prompt(ref.name), ref.version)
            typer.confirm(f"This deletes {what}. Continue?", abort=True, err=True)
        # Without a terminal and without --yes, the server refuses what has to be forced.
        deleted = client.remove(ref.name, ref.version, force=yes, reason=reason)
    answer(deleted, as_json, *tables.deleted(target, deleted))


@_command("restore")
def restore(
    target: Annotated[
        str, typer.Argument(metavar="NAME", help="A soft prompt, or NAME@VERSION for one deleted version.")
    ],
    all_tenants: AllTenants = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Undo the last deletion of a soft prompt, or restore one version, with the aliases."""
    ref = _number_or_name(target)
    with serving(url, api_key, as_json=as_json, all_tenants=all_tenants) as client:
        restored = client.restore(ref.name, ref.version)
    answer(restored, as_json, *tables.restored(restored))


@_command("inspect")
def inspect(
    target: Target,
    top_k: Annotated[
        int | None, typer.Option(min=1, max=20, help="Number of nearest tokens to show per virtual token.")
    ] = None,
    task_id: TaskId = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Compare a soft prompt with the model by norms and nearest tokens, or show what an adapter changes."""
    ref = parse_ref(target)
    with serving(url, api_key, as_json=as_json) as client:
        found = client.inspect(ref, top_k=top_k, task_id=task_id)
    answer(found, as_json, *tables.inspection(found))


@_command("warm")
def warm(
    target: Target,
    pin: Annotated[
        bool | None,
        typer.Option(
            "--pin/--unpin", help="Keep it in memory until --unpin, or release it; unpinning loads nothing."
        ),
    ] = None,
    task_id: TaskId = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Load a soft prompt or an adapter onto the device before its first request."""
    ref = parse_ref(target)
    with serving(url, api_key, as_json=as_json) as client:
        reply = client.warm(ref, task_id=task_id, pin=pin)
    what = "is not pinned" if pin is False else f"is warm after {reply['seconds']:.3f} s"
    if pin is not False and reply["pinned"]:
        what += ", and pinned"
    answer(reply, as_json, f"{reply['id']}@{reply['version']} {what}")


def status_of(error: ClientError) -> ExitStatus:
    """The exit status for an error."""
    if error.status is None:
        return _BY_CODE.get(error.code, ExitStatus.FAILED)
    return _BY_HTTP_STATUS.get(error.status, ExitStatus.FAILED)


@contextmanager
def serving(url: str, api_key: str | None, *, as_json: bool, all_tenants: bool = False) -> Iterator[PreludeClient]:
    """Yield a client. An error is printed in one line, or one per fault of rejected files, and ends the command."""
    try:
        with PreludeClient(url, api_key=api_key, all_tenants=all_tenants) as client:
            yield client
    except ClientError as error:
        if as_json:
            typer.echo(json.dumps(error.body))
        lines = [f"{code}: {message}" for code, message in error.faults] or [str(error)]
        for line in lines:
            typer.echo(f"prelude: {tables.clean(' '.join(line.split()))}", err=True)
        raise typer.Exit(status_of(error)) from error


@contextmanager
def _progress(what: str, total: int) -> Iterator[OnBytes]:
    """A progress bar on standard error, if that is a terminal and the transfer is large."""
    if total < _PROGRESS_BYTES or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def answer(value: dict[str, Any], as_json: bool, *shown: Table | str) -> None:
    """Print the API's JSON, or tables made from it."""
    if as_json:
        typer.echo(json.dumps(value))
    else:
        tables.show(*shown)


def _chosen_format(directory: Path, given: str | None) -> ChosenFormat:
    """The format as given or found; a guess is confirmed on a terminal."""
    if given is not None:
        return given_format(given)
    found = format_of_directory(directory)
    if found.is_guess and _is_terminal():
        typer.echo("How does the soft prompt want to be asked: raw text, or in the model's chat template?", err=True)
        return given_format(typer.prompt(f"Format (raw, chat or {UNKNOWN})", default=found.name, err=True))
    return found


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _removal(prompt: dict[str, Any], version: int | None) -> tuple[str, bool]:
    """What the deletion of a soft prompt, or of one version, will delete; and whether it has to be forced."""
    aliases = sorted(alias for alias, target in prompt["aliases"].items() if version in (None, target))
    count = prompt["num_versions"]
    what = f"{prompt['id']} with {count} version{'s' if count > 1 else ''}"
    if version is not None:
        what = f"{prompt['id']}@{version}"
    if aliases:
        what += f" and the alias{'es' if len(aliases) > 1 else ''} {', '.join(aliases)}"
    sharing = [] if version is None else _in_rollout(prompt, version)
    if sharing:
        what += f" and ends the rollout of {', '.join(sharing)}"
    return what, count > 1 if version is None else bool(aliases or sharing)


def _in_rollout(prompt: Mapping[str, Any], version: int) -> list[str]:
    """The aliases whose rollout names a version."""
    return [
        alias
        for alias, rollout in sorted(prompt.get("rollouts", {}).items())
        if str(version) in (rollout.get("canaries") or {}) or (rollout.get("shadow") or {}).get("version") == version
    ]


def _number_or_name(target: str) -> PromptRef:
    ref = parse_ref(target)
    if ref.version is None and "@" in target:
        raise typer.BadParameter(f"{target!r} names an alias; give NAME or NAME@VERSION")
    return ref


def parse_ref(target: str) -> PromptRef:
    """Parse a reference to a soft prompt; typer.BadParameter if it is malformed."""
    try:
        return PromptRef.parse(target)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def checked(text: str, what: str) -> None:
    """Check the syntax of a name or an alias.

    Raises:
        typer.BadParameter: If it is malformed.
    """
    try:
        check_name(text, what)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
