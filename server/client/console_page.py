"""``prelude console``: open the pages of a server."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Annotated
from urllib.parse import quote

import typer

from server.client.commands import DEFAULT_URL, EXIT_CODES, Json, Url, answer, checked, serving
from server.client.http import server_url

app = typer.Typer(add_completion=False)


@app.command("console", epilog=EXIT_CODES)
def console(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A soft prompt, whose page is shown; default: all.")
    ] = None,
    only_prints: Annotated[bool, typer.Option("--no-open", help="Only print the address.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Print the address of the server's console, and open it in a browser."""
    if name is not None:
        checked(name, "name")
    with serving(url, None, as_json=as_json) as client:
        # Needs no key, and answers while the model loads: without a server, this is an error and not a blank page.
        client.send("GET", "/console")
    page = f"{str(server_url(url)).rstrip('/')}/console" + (
        "" if name is None else f"#/prompts/{quote(name, safe='')}"
    )
    is_open = not (only_prints or as_json) and _open(page)
    asked = ("Open this address in a browser.",) if not (is_open or only_prints) else ()
    answer({"url": page}, as_json, page, *asked)


def _open(page: str) -> bool:
    """Open an address in a browser with windows; returns whether there is one.

    A browser that needs the terminal, which Python would choose otherwise, would take it from the next command.
    """
    if sys.platform == "linux" and not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        return False
    try:
        return webbrowser.open(page)
    except webbrowser.Error:
        return False
