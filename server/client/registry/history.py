"""``prelude history``: what was changed, by whom and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.client import tables
from server.client.commands import DEFAULT_URL, EXIT_CODES, AllTenants, ApiKey, Json, Url, answer, checked, serving
from server.client.registry.times import parse_time

app = typer.Typer(add_completion=False)

_PAGE = 1000


@app.command("history", epilog=EXIT_CODES)
def history(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A soft prompt; default: all.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only changes since then: 7d (before now), or a date.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only changes before then.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only changes by this API key: its name or key-....")] = None,
    action: Annotated[str | None, typer.Option(help="Only changes of this kind, such as promote.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of changes.")] = 50,
    all_tenants: AllTenants = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List changes, newest first; those of deleted soft prompts too."""
    if name is not None:
        checked(name, "name")
    texts = {"prompt_id": name, "actor": actor, "action": action}
    params: dict[str, Any] = {key: text for key, text in texts.items() if text is not None}
    params |= {key: parse_time(text) for key, text in (("since", since), ("until", until)) if text is not None}
    found: list[dict[str, Any]] = []
    with serving(url, api_key, as_json=as_json, all_tenants=all_tenants) as client:
        while True:
            page = client.call("GET", "/v1/history", params={**params, "limit": min(_PAGE, limit - len(found))})
            found += page["data"]
            if not page["has_more"] or len(found) >= limit:
                break
            params["before"] = page["last_id"]
    has_more = page["has_more"]
    reply = {"object": "list", "data": found, "has_more": has_more, "last_id": page["last_id"]}
    more = ("There are more: give a higher --limit, or --since.",) if has_more else ()
    answer(reply, as_json, tables.changes(found), *more)
