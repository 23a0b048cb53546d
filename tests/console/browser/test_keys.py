"""The keys of the server, and new ones that never leave the browser."""

from __future__ import annotations

import hashlib
import re
import tomllib

import httpx
from playwright.sync_api import Page, Request, expect

from tests.console.browser.isolated import barriers
from tests.console.browser.visitors import KEYS, ConsoleServer, Visit, button
from tests.support.keyed import bearer
from tests.support.waiting import wait_until


def test_keys_are_listed_with_scopes_and_use(visit: Visit, server: ConsoleServer) -> None:
    page = visit().login(where="#/keys")
    row = page.get_by_role("row").filter(has_text="admin").first
    expect(row).to_contain_text("prompts:write")
    expect(page.get_by_role("row")).to_have_count(len(KEYS) + 1)
    digest = hashlib.sha256(KEYS["reader"][0].encode()).hexdigest()
    expect(page.get_by_text(f"key-{digest[:12]}")).to_be_visible()
    assert digest[:13] not in page.content()


def test_a_key_without_admin_sees_no_keys(visit: Visit) -> None:
    page = visit().login("reader", where="#/keys")
    expect(page.get_by_text("This key lacks the scope admin")).to_be_visible()
    expect(page.get_by_role("table")).to_have_count(0)


def test_a_new_key_works_once_its_entry_is_in_the_file_and_is_never_sent(visit: Visit, server: ConsoleServer) -> None:
    visitor = visit()
    page = visitor.login(where="#/keys")
    sent: list[Request] = []

    def note(request: Request) -> None:  # Playwright takes no builtin method
        sent.append(request)

    page.on("request", note)
    secret, entry = make_key(page)
    parsed = tomllib.loads(entry)["keys"]
    assert parsed == [
        {
            "key": f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}",
            "scopes": ["prompts:read"],
            "name": "from-the-browser",
            "tenant": "acme",
            "requests_per_minute": 7,
        }
    ]
    assert barriers(page) == []
    button(page, "Done").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert secret not in page.content()
    assert (
        page.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}, location.href])").find(secret)
        < 0
    )
    page.reload()
    expect(page.get_by_role("heading", name="Keys", level=1)).to_be_visible()
    assert sent
    for request in sent:
        assert secret not in request.url
        assert secret not in (request.post_data or "")
        assert parsed[0]["key"].removeprefix("sha256:") not in (request.post_data or "")
    known = server.key_file.read_text()
    try:
        server.write_keys(more=entry)
        with httpx.Client(base_url=server.url, headers=bearer(secret)) as client:
            wait_until(lambda: client.get("/v1/me").is_success, 30)
            assert client.get("/v1/me").json()["name"] == "from-the-browser"
            assert client.post("/v1/completions", json={"model": "x", "prompt": "a"}).status_code == 403
        row = page.get_by_role("row").filter(has_text="from-the-browser")
        expect(row).to_contain_text("7 requests/min")
    finally:
        server.write_keys()
    assert server.key_file.read_text() == known


def make_key(page: Page) -> tuple[str, str]:
    """Make a key for the scope prompts:read; returns it and its entry."""
    button(page, "New key").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name", exact=True).fill("Not A Name")
    expect(button(dialog, "Make the key")).to_have_attribute("aria-disabled", "true")
    dialog.get_by_label("Name", exact=True).fill("from-the-browser")
    dialog.get_by_label("Tenant", exact=True).fill("acme")
    dialog.get_by_label(re.compile("^generate")).uncheck()
    dialog.get_by_label("Requests per minute").fill("7")
    assert barriers(page) == []
    button(dialog, "Make the key").click()
    secret = dialog.get_by_role("group", name="The key", exact=True).inner_text()
    assert re.fullmatch(r"prelude-[A-Za-z0-9_-]{43}", secret)
    return secret, dialog.get_by_role("group", name="The entry for the key file").inner_text()
