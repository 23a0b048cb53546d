"""The page of the running batch."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from playwright.sync_api import expect

from server.demo.tour import MODEL_NAME
from tests.console.browser.isolated import barriers
from tests.console.browser.test_everywhere import picture, show
from tests.console.browser.visitors import ConsoleServer, Visit, button
from tests.support.demo_server import TASKS

TEXT = "The strap was never shoddy, but the zipper broke on day two. "


@contextmanager
def traffic(server: ConsoleServer, *models: str, tokens: int = 900) -> Iterator[None]:
    """Long answers of each model, until the block ends."""
    answered = threading.Event()

    def answer(model: str) -> None:
        body = {"model": model, "prompt": TEXT * 3, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        while not answered.is_set():
            with (
                httpx.Client(base_url=server.url, headers=server.admin.headers, timeout=120) as client,
                client.stream("POST", "/v1/completions", json=body) as response,
            ):
                assert response.status_code == 200
                for _ in response.iter_raw():
                    if answered.is_set():
                        break

    threads = [threading.Thread(target=answer, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        answered.set()
        for thread in threads:
            thread.join()


def test_the_batch_is_drawn_with_each_soft_prompt_once(visit: Visit, server: ConsoleServer) -> None:
    page = visit().login(where="#/live")
    with traffic(server, *TASKS, "sentiment", MODEL_NAME):
        for task, rows in [(task, "2 rows" if task == "sentiment" else "1 row") for task in TASKS]:
            group = page.get_by_role("group", name=f"{task}@1: {rows}")
            expect(group).to_be_visible()
            expect(group.locator(".shared")).to_have_count(1)
            expect(group.locator(".shared")).to_have_attribute("aria-label", re.compile(f"one copy for {rows}"))
        groups = page.locator(".batch .group.sp:not(.base)")
        hues = groups.evaluate_all("all => all.map(one => one.style.getPropertyValue('--h'))")
        assert len(set(hues)) == 4
        expect(page.get_by_role("group", name="base model, no soft prompt: 1 row")).to_be_visible()
        expect(page.get_by_role("region", name="Soft prompts on the device").get_by_role("listitem")).to_have_count(4)
        assert barriers(page) == []
        picture(page, "live-busy-light-wide")
        button(page, "Table").click()
        expect(page.get_by_role("row", name=re.compile("sentiment@1"))).to_have_count(2)
        assert barriers(page) == []
    expect(page.get_by_text("Nothing runs now.")).to_be_visible()


def test_a_paused_page_asks_for_nothing(visit: Visit, server: ConsoleServer) -> None:
    page = visit().login(where="#/live")
    expect(page.get_by_role("region", name="The running batch")).to_be_visible()
    button(page, "Pause").click()
    with traffic(server, "sentiment"):
        time.sleep(1)
        expect(page.get_by_text("Nothing runs now.")).to_be_visible()
        button(page, "Go on").click()
        expect(page.get_by_role("group", name="sentiment@1: 1 row")).to_be_visible()


def test_the_address_names_the_view_and_no_text(visit: Visit, server: ConsoleServer) -> None:
    page = visit().login(where="#/live")
    show(page, "#/live")
    with traffic(server, "sentiment"):
        expect(page.get_by_role("group", name="sentiment@1: 1 row")).to_be_visible()
        assert "strap" not in page.content()
