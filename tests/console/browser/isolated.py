"""Scripts in a world of their own beside a page: they see its document, and its policy does not bind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

AXE = Path(__file__).parents[3] / "server/console/web/node_modules/axe-core/axe.min.js"

_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def run(page: Page, *scripts: str) -> Any:
    """Run scripts in one new isolated world.

    Returns:
        The value of the last one, awaited.

    Raises:
        RuntimeError: If a script raises.
    """
    session = page.context.new_cdp_session(page)
    try:
        frame = session.send("Page.getFrameTree")["frameTree"]["frame"]["id"]
        world = session.send("Page.createIsolatedWorld", {"frameId": frame, "worldName": "test"})[
            "executionContextId"
        ]
        value: Any = None
        for script in scripts:
            answer = session.send(
                "Runtime.evaluate",
                {"expression": script, "contextId": world, "awaitPromise": True, "returnByValue": True},
            )
            if "exceptionDetails" in answer:
                raise RuntimeError(str(answer["exceptionDetails"]))
            value = answer["result"].get("value")
        return value
    finally:
        session.detach()


def barriers(page: Page) -> list[str]:
    """What axe finds on a page by WCAG 2.2 AA and its best practices: rule, elements and reasons."""
    options = {"runOnly": _RULES, "resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}
    found = run(
        page,
        AXE.read_text(),
        f"axe.run(document, {json.dumps(options)}).then(found => found.violations.map(one => "
        "one.id + ': ' + one.nodes.map(node => node.target + ' ' + node.failureSummary).join(' | ')))",
    )
    return list(found)
