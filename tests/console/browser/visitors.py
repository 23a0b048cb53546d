"""Browsers that visit the console, and the server that they visit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, expect

from tests.support.processes import metric

SCREENSHOTS = os.environ.get("PRELUDE_SCREENSHOTS")
"""Folder for pictures of all pages; unset: none are taken."""

REBOUND = "rebound.example"
"""A foreign name that the browser finds at the server's address, as after DNS rebinding."""

MANY = 10_000
"""Names in the catalog of the server without keys."""

KEYS = {
    "admin": ("a" * 40, ("admin", "generate", "prompts:read", "prompts:write")),
    "writer": ("w" * 40, ("generate", "prompts:read", "prompts:write")),
    "reader": ("r" * 40, ("prompts:read",)),
    "sender": ("s" * 40, ("generate",)),
    "pusher": ("p" * 40, ("prompts:write",)),
    "watcher": ("m" * 40, ("admin",)),
    "leaver": ("l" * 40, ("prompts:read",)),
}
"""Key and scopes by name; all keys have the tenant acme."""


@dataclass
class ConsoleServer:
    """A server with keys.

    Attributes:
        url: Its address.
        key_file: The key file, which the server reads again when it changes.
        log: The file of its log.
        admin: A client with the key of an administrator.
        sessions: The cookies of sessions, by name of the key.
        leftovers: Soft prompts to delete once the pages that show them are closed.
    """

    url: str
    key_file: Path
    log: Path
    admin: httpx.Client
    sessions: dict[str, httpx.Cookies] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)

    def write_keys(self, *without: str, more: str = "") -> None:
        """Write the key file with all keys but some, and with more entries."""
        entries = [
            f'[[keys]]\nkey = "{key}"\nname = "{name}"\ntenant = "acme"\nscopes = {list(scopes)!r}\n'
            for name, (key, scopes) in KEYS.items()
            if name not in without
        ]
        # In one step: keys that are missing from half a file would end their sessions.
        new = self.key_file.with_suffix(".new")
        new.write_text("\n".join([*entries, more]))
        new.chmod(0o600)
        new.replace(self.key_file)

    def session(self, name: str) -> httpx.Cookies:
        """The cookies of a key's session, which all tests share.

        It is begun from an address that no browser uses: the logins of one address are limited.
        """
        if name not in self.sessions:
            transport = httpx.HTTPTransport(local_address=f"127.0.0.{2 + list(KEYS).index(name)}")
            with httpx.Client(base_url=self.url, transport=transport, headers={"x-prelude-console": "1"}) as client:
                client.post("/console/session", json={"key": KEYS[name][0]}).raise_for_status()
                self.sessions[name] = client.cookies
        return self.sessions[name]

    def metric(self, name: str) -> float:
        """The value of a sample of the server's metrics, by its name and labels."""
        return metric(self.admin.get("/metrics").text, name)

    def delete_leftovers(self) -> None:
        while self.leftovers:
            self.admin.delete(f"/v1/prompts/{self.leftovers.pop()}?force=true")


AUTOFOCUS = "Autofocus processing was blocked"
"""The browser's note when a dialog opens from a button in focus; the dialog moves the focus itself."""


@dataclass
class Watch:
    """What the pages of a test have said and asked for; checked at its end."""

    origin: str
    messages: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=lambda: [AUTOFOCUS])

    def allow(self, *texts: str) -> None:
        """Accept console messages that contain one of these texts."""
        self.allowed += texts

    def follow(self, page: Page) -> None:
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        page.on("request", lambda request: self._asked(request.url))

    def check(self) -> None:
        unexpected = [text for text in self.messages if not any(allowed in text for allowed in self.allowed)]
        assert unexpected == [], unexpected
        assert self.foreign == [], self.foreign
        for key, _ in KEYS.values():
            assert not [url for url in self.urls if key in url]

    def _note(self, message: ConsoleMessage) -> None:
        self.messages.append(f"{message.type}: {message.text}")

    def _asked(self, url: str) -> None:
        self.urls.append(url)
        if not url.startswith((self.origin, "data:", "blob:")):
            self.foreign.append(url)


KEPT = "() => Object.keys({...localStorage, ...sessionStorage}).filter(name => name !== 'prelude-theme')"
"""What a page stores besides the choice of colours."""

NOT_LOGGED_IN = "status of 401"
"""The browser's message about the first request of a page without a session."""


@dataclass
class Visitor:
    """A browser with its cookies."""

    server: ConsoleServer
    context: BrowserContext
    watch: Watch

    def close(self) -> None:
        """Close the browser, whose pages have stored nothing."""
        try:
            for page in self.context.pages:
                if page.url.startswith(f"{self.server.url}/console"):
                    assert page.evaluate(KEPT) == []
        finally:
            self.context.close()

    def page(self, where: str = "") -> Page:
        """Open a view, such as ``#/prompts``."""
        page = self.context.new_page()
        self.watch.follow(page)
        page.goto(f"{self.server.url}/console{where}")
        return page

    def login(self, name: str = "admin", where: str = "#/prompts") -> Page:
        """Go to a view with the session of a key."""
        for cookie, value in self.server.session(name).items():
            self.context.add_cookies(
                [{"name": cookie, "value": value, "url": self.server.url, "httpOnly": True, "sameSite": "Strict"}]
            )
        page = self.page(where)
        expect(page.get_by_role("navigation", name="Pages")).to_be_visible()
        return page

    def login_by_form(self, name: str = "admin", where: str = "#/prompts") -> Page:
        """Begin a session of the test's own, and go to a view."""
        self.watch.allow(NOT_LOGGED_IN)
        page = self.page(where)
        page.get_by_label("API key").fill(KEYS[name][0])
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("navigation", name="Pages")).to_be_visible()
        return page


Visit = Callable[..., Visitor]


def button(page: Page | Locator, name: str | re.Pattern[str]) -> Locator:
    return page.get_by_role("button", name=name, exact=True)
