"""``prelude console``: the address of the pages, and a browser only where one can be."""

from __future__ import annotations

import json
import webbrowser

import httpx
import pytest

from tests.client.conftest import Prelude
from tests.support.live_server import LiveServer
from tests.support.processes import free_port


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that a browser was told to open; this machine has a display."""
    addresses: list[str] = []

    def remember(page: str) -> bool:
        addresses.append(page)
        return True

    monkeypatch.setattr(webbrowser, "open", remember)
    monkeypatch.setenv("DISPLAY", ":0")
    return addresses


def test_the_page_is_opened_and_its_address_printed(prelude: Prelude, live: LiveServer, opened: list[str]) -> None:
    result = prelude("console", "--url", f"{live.url}/v1")
    assert (result.exit_code, result.stdout, opened) == (0, f"{live.url}/console\n", [f"{live.url}/console"])
    found = httpx.get(opened[0], follow_redirects=True)
    assert (found.status_code, found.headers["content-type"].partition(";")[0]) == (200, "text/html")


def test_a_soft_prompt_has_a_page_of_its_own(prelude: Prelude, live: LiveServer, opened: list[str]) -> None:
    assert prelude("console", "a.b").exit_code == 0
    assert opened == [f"{live.url}/console#/prompts/a.b"]
    refused = prelude("console", "a/b")
    assert (refused.exit_code, len(opened)) == (2, 1)


@pytest.mark.parametrize("flag", ["--no-open", "--json"])
def test_nothing_is_opened_for_scripts(prelude: Prelude, live: LiveServer, opened: list[str], flag: str) -> None:
    result = prelude("console", flag)
    expected = f"{live.url}/console"
    assert (json.loads(result.stdout)["url"] if flag == "--json" else result.stdout.strip()) == expected
    assert opened == []


def test_without_a_display_the_address_is_left_to_the_user(
    prelude: Prelude, live: LiveServer, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    result = prelude("console")
    assert (result.exit_code, result.stdout) == (0, f"{live.url}/console\nOpen this address in a browser.\n")
    assert opened == []


def test_a_browser_that_does_not_start_is_no_error(
    prelude: Prelude, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_page: str) -> bool:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "open", fail)
    assert prelude("console").stdout.endswith("Open this address in a browser.\n")


def test_without_a_server_nothing_is_opened(prelude: Prelude, opened: list[str]) -> None:
    result = prelude("console", "--url", f"http://127.0.0.1:{free_port()}")
    assert (result.exit_code, opened) == (7, [])
    assert "cannot be reached" in result.stderr
