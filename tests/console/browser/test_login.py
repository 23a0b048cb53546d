"""Logging in, and what each key may do."""

from __future__ import annotations

import re

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.console.browser.test_everywhere import show
from tests.console.browser.visitors import KEYS, NOT_LOGGED_IN, ConsoleServer, Visit, button


def test_a_wrong_key_is_refused_and_a_right_one_opens_the_page(visit: Visit) -> None:
    visitor = visit()
    visitor.watch.allow(NOT_LOGGED_IN)
    page = visitor.page()
    page.get_by_label("API key").fill("x" * 40)
    button(page, "Log in").click()
    expect(page.get_by_text("the API key is not valid")).to_be_visible()
    page.get_by_label("API key").fill(KEYS["admin"][0])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Prompts", level=1)).to_be_visible()


def test_the_page_keeps_no_key_and_logging_out_ends_the_session(visit: Visit, server: ConsoleServer) -> None:
    visitor = visit()
    page = visitor.login_by_form()
    expect(page.get_by_role("link", name="sentiment")).to_be_visible()
    stored = page.evaluate(
        "() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )
    assert KEYS["admin"][0] not in stored
    (cookie,) = visitor.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert KEYS["admin"][0] not in cookie["value"]
    assert KEYS["admin"][0] not in server.log.read_text()
    page.reload()
    expect(page.get_by_role("link", name="sentiment")).to_be_visible()
    cookies = {str(cookie["name"]): str(cookie["value"])}
    assert httpx.get(f"{server.url}/v1/me", cookies=cookies).status_code == 200
    button(page, "Log out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert httpx.get(f"{server.url}/v1/me", cookies=cookies).status_code == 401


def test_a_session_ends_when_it_expires_and_with_its_key(visit: Visit, server: ConsoleServer) -> None:
    """To the server, an expired token is one that it does not know."""
    visitor = visit()
    page = visitor.login_by_form("leaver")
    expect(page.get_by_role("link", name="sentiment")).to_be_visible()
    (cookie,) = visitor.context.cookies()
    visitor.context.add_cookies(
        [{"name": str(cookie["name"]), "value": "A" * 43, "url": visitor.server.url, "httpOnly": True}]
    )
    expect(page.get_by_text("The session has ended")).to_be_visible()
    page.get_by_label("API key").fill(KEYS["leaver"][0])
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="sentiment")).to_be_visible()
    server.write_keys("leaver")
    try:
        expect(page.get_by_text("The session has ended")).to_be_visible()
    finally:
        server.write_keys()


ACTIONS: list[tuple[str, str | re.Pattern[str], str]] = [
    ("#/prompts", "Upload", "prompts:write"),
    ("#/upload", "Check only", "prompts:write"),
    ("#/playground?with=sentiment", re.compile("^Run"), "generate"),
    ("#/evaluations", "New", "generate"),
]
"""A view, an action on it, and the scope that it needs."""


@pytest.mark.parametrize("key", ["reader", "sender", "pusher", "watcher"])
def test_what_a_key_of_one_scope_may_not_do_is_there_and_says_why(visit: Visit, key: str) -> None:
    visitor = visit()
    visitor.watch.allow("status of 403")  # a page whose list the key may not read
    page = visitor.login(key)
    (scope,) = KEYS[key][1]
    for where, name, needed in ACTIONS:
        show(page, where)
        expect(button(page, name)).to_be_visible()
        reason = re.compile(f"^This key lacks the scope {needed}.$")
        if needed == scope:
            expect(button(page, name)).not_to_have_accessible_description(reason)
        else:
            expect(button(page, name)).to_have_accessible_description(reason)
            expect(button(page, name)).to_have_attribute("aria-disabled", "true")
    show(page, "#/keys")
    expect(page.get_by_text("This key lacks the scope admin")).to_have_count(int(scope != "admin"))
    show(page, "#/prompts")
    expect(page.get_by_text("insufficient_scope")).to_have_count(int(scope != "prompts:read"))
    if scope != "prompts:write":
        button(page, "Upload").focus()
        expect(page.get_by_role("tooltip").filter(has_text="prompts:write")).to_be_visible()
        page.keyboard.press("Enter")
        expect(page).to_have_url(f"{visitor.server.url}/console#/prompts")


def test_a_reader_sees_a_prompt_and_changes_nothing(visit: Visit) -> None:
    page = visit().login("reader", "#/prompts/sentiment")
    expect(page.get_by_role("heading", name="sentiment", level=1)).to_be_visible()
    for name in ("Delete", "Delete version", "Promote", "Upload a version"):
        expect(button(page, name)).to_have_attribute("aria-disabled", "true")


def test_the_theme_is_all_that_is_stored(admin: Page) -> None:
    for theme in ("light", "dark"):
        page_colours = admin.get_by_role("button", name="Colours")
        page_colours.click()
        expect(admin.locator("html")).to_have_attribute("data-theme", theme)
    assert admin.evaluate("() => ({...localStorage})") == {"prelude-theme": "dark"}
    admin.reload()
    expect(admin.locator("html")).to_have_attribute("data-theme", "dark")
