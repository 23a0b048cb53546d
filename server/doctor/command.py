"""The command ``prelude doctor``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.client.commands import DEFAULT_URL, ApiKey, ExitStatus, Url
from server.command_line.store_commands import Catalog, Store
from server.config import StoreSettings
from server.doctor.findings import Finding, Status
from server.doctor.machine import GIB, inspect_machine
from server.doctor.packages import check_kernels, check_packages
from server.doctor.services import check_server, check_store, check_vllm
from server.doctor.sizes import Fit, fits

app = typer.Typer(add_completion=False)

_DEFAULT = StoreSettings()

_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red"}


@app.command("doctor", epilog="Exit codes: 0 nothing failed, perhaps with warnings; 1 something failed; 2 usage.")
def doctor(
    store: Store = _DEFAULT.location,
    catalog: Catalog = None,
    engine_python: Annotated[
        str | None,
        typer.Option(envvar="PRELUDE_ENGINE_PYTHON", help="Python of the environment with vLLM, to check that too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Check this machine, the installation, the store and a running server; say which models fit."""
    findings = check_packages()
    device, of_machine = inspect_machine()
    findings += of_machine + check_kernels(has_gpu=device.name == "cuda")
    findings += check_vllm(engine_python) + check_store(store, catalog) + check_server(url, api_key)
    found = fits(device)
    has_failed = any(finding.status is Status.FAILED for finding in findings)
    if as_json:
        report = {
            "ok": not has_failed,
            "device": asdict(device),
            "findings": [asdict(finding) for finding in findings],
            "models": [asdict(fit) for fit in found],
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(Console(highlight=False), findings, found, device.name)
    raise typer.Exit(ExitStatus.FAILED if has_failed else ExitStatus.OK)


def _show(console: Console, findings: Sequence[Finding], found: Sequence[Fit], device: str) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        text = Text(finding.text)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", style="italic")
        table.add_row(Text(finding.status.value, style=_STYLES[finding.status]), Text(finding.area), text)
    console.print(table)
    console.print()
    sizes = Table(box=None, title=f"Models on this {device}", title_justify="left", padding=(0, 3, 0, 0))
    sizes.add_column("model")
    sizes.add_column("dtype")
    sizes.add_column("weights", justify="right")
    sizes.add_column("tokens of context in all", justify="right")
    for fit in found:
        room = f"{fit.tokens:,}" if fit.tokens else "does not fit"
        sizes.add_row(fit.model, fit.dtype, f"{fit.weight_bytes / GIB:.1f} GiB", room)
    console.print(sizes)
