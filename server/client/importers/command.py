"""The command ``prelude import``: uploads exports, and converts soft prompts of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prompt_store.types import ROWS_TENSOR
from server.client.commands import DEFAULT_URL, EXIT_CODES, ApiKey, ExitStatus, Url, serving
from server.client.importers.kinds import Format, ImportFileError
from server.client.registry.transfer import import_export

app = typer.Typer(add_completion=False)


@app.command("import", epilog=EXIT_CODES)
def import_command(
    source: Annotated[
        Path, typer.Argument(help="File or directory of the other program, or of `prelude export`.", exists=True)
    ],
    out: Annotated[Path | None, typer.Option(help="PEFT directory to write, for files of another program.")] = None,
    wanted: Annotated[
        Format | None, typer.Option("--format", help="Format of the source; default: recognise it.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, as the configuration is to name it.")] = None,
    base_config: Annotated[
        Path | None,
        typer.Option(help="config.json of the base, or its directory; required for chatglm.", exists=True),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Share what an export holds with all tenants; needs the scope admin.")
    ] = False,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Accept versions of an export that name another base model.")
    ] = False,
    move_aliases: Annotated[
        bool, typer.Option("--move-aliases", help="Move aliases that point elsewhere to what the export says.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload what `prelude export` has written; or convert a soft prompt of another program, offline."""
    if out is None:
        with serving(url, api_key, as_json=as_json) as client:
            report = import_export(
                client, source, shared=shared, allow_other_base=allow_other_base, move_aliases=move_aliases
            )
        report.show("import", as_json=as_json)
        return
    # Imported here because NumPy takes a tenth of a second, and no other command needs it.
    from server.client.importers.conversion import convert  # noqa: PLC0415

    try:
        imported = convert(source, out, wanted=wanted, base=base, base_config=base_config)
    except (ImportFileError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ExitStatus.INVALID if isinstance(error, ImportFileError) else ExitStatus.FAILED) from None
    rows = imported.tensors.get(ROWS_TENSOR)
    if as_json:
        fields = {
            "format": imported.format,
            "peft_type": imported.config.get("peft_type"),
            "shape": None if rows is None else list(rows.shape),
            "directory": str(out),
            "notes": imported.notes,
        }
        typer.echo(json.dumps(fields))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    shape = "" if rows is None else f", {rows.shape[0]} virtual tokens, width {rows.shape[1]}"
    console.print(f"{source}: {imported.format}, {imported.config.get('peft_type')}{shape}")
    for note in imported.notes:
        console.print(f"  {note}")
    console.print(f"written to {out}. To publish it: prelude push {out} --id NAME")
