"""What the page says while the server cannot work: loading, restarting, without its catalog, draining, gone."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from server.demo.tour import MODEL_DIRECTORY
from tests.console.browser.isolated import barriers
from tests.console.browser.visitors import Watch
from tests.prompt_store.databases import postgres_url, refuse_connections
from tests.support.processes import PRELUDE, engine_of, free_port
from tests.support.serving import BASE
from tests.support.waiting import wait_until

PATIENCE_MS = 90_000
"""A start of the engine, on a busy machine."""


@contextmanager
def started(folder: Path, catalog: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server without keys that may still be loading; gives its address."""
    port = free_port()
    command = [*PRELUDE, "serve", "--model", str(MODEL_DIRECTORY), "--served-model-name", BASE, "--port", str(port)]
    command += ["--store", str(folder / "store"), "--catalog", catalog, "--kv-cache-memory", "64MiB"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--dtype", "float32", "--num-threads", "1"], stderr=log)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/live").is_success
    except httpx.TransportError:
        return False


def has_engine(server: psutil.Process) -> bool:
    try:
        engine_of(server)
    except (ValueError, psutil.Error):
        return False
    return True


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


@pytest.mark.usefixtures("server")  # whose start has compiled the kernels, in a new checkout for minutes
def test_banners_through_the_life_of_a_server(page: Page, tmp_path: Path) -> None:
    banner = page.get_by_role("alert")
    with postgres_url() as catalog, started(tmp_path, catalog) as (url, process):
        watch = Watch(url)
        watch.allow(
            "status of 503", "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET"
        )
        watch.follow(page)
        server = psutil.Process(process.pid)
        wait_until(lambda: answers(url) and has_engine(server), 120)
        loads(page, url, engine_of(server), banner)
        restarts(server, banner)
        loses_its_catalog(page, catalog, banner)
        drains(page, url, process, banner)
        watch.check()


def loads(page: Page, url: str, engine: psutil.Process, banner: Locator) -> None:
    engine.suspend()  # however fast the machine is, the page is there before the model
    page.goto(f"{url}/console")
    expect(banner).to_contain_text("Loading")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert barriers(page) == [], scheme
    engine.resume()
    expect(banner).to_have_count(0, timeout=PATIENCE_MS)
    expect(page.get_by_text("There is no soft prompt yet.")).to_be_visible()


def restarts(server: psutil.Process, banner: Locator) -> None:
    killed = engine_of(server)
    killed.kill()
    expect(banner).to_contain_text("Restarting")
    expect(banner).to_have_count(0, timeout=PATIENCE_MS)
    assert engine_of(server).pid != killed.pid


def loses_its_catalog(page: Page, catalog: str, banner: Locator) -> None:
    refuse_connections(catalog, refuse=True)
    try:
        expect(banner.filter(has_text="Catalog unavailable")).to_be_visible()
    finally:
        refuse_connections(catalog, refuse=False)
    expect(banner).to_have_count(0)
    expect(page.get_by_text("There is no soft prompt yet.")).to_be_visible()


def drains(page: Page, url: str, process: subprocess.Popen[bytes], banner: Locator) -> None:
    body = {"model": BASE, "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    has_begun, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            for _ in response.iter_lines():
                has_begun.set()
                may_end.wait(60)

    request = threading.Thread(target=hold)
    request.start()
    try:
        assert has_begun.wait(30)
        engine = engine_of(psutil.Process(process.pid))
        engine.suspend()  # so that the request does not end before the page has seen the phase
        process.send_signal(signal.SIGTERM)
        expect(banner).to_contain_text("Draining")
        engine.resume()
    finally:
        may_end.set()
        request.join()
    expect(banner).to_contain_text("Unreachable", timeout=PATIENCE_MS)
    assert process.wait(60) == 0
