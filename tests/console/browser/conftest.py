"""The console in Chromium, against one server of the embedded model. No route is mocked."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.registry_scale import register
from prompt_store.open_store import CATALOG_FILE, open_store
from tests.console.browser.visitors import KEYS, MANY, REBOUND, ConsoleServer, Visit, Visitor, Watch
from tests.support.demo_server import TASKS
from tests.support.keyed import bearer
from tests.support.serving import adapter, serving, upload

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1",
]
TIMEOUT_MS = 30_000
expect.set_options(timeout=TIMEOUT_MS)  # the machine may be busy; no test measures time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here need a browser; where one is required, as in CI, its absence is a failure."""
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        item.add_marker(pytest.mark.slow)
        if CHROMIUM is None and not os.environ.get("PRELUDE_REQUIRE_BROWSER"):
            item.add_marker(pytest.mark.skip(reason="needs Chromium: apt-get install chromium"))


@contextmanager
def started(factory: pytest.TempPathFactory, folder: Path, *flags: str) -> Iterator[httpx.Client]:
    """Run a server until the block ends.

    The workers start theirs one after the other: in a new checkout, the first one compiles kernels for minutes, and
    the others find them.
    """
    with ExitStack() as stack:
        with (factory.getbasetemp().parent / "start.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            client, _ = stack.enter_context(serving(folder, *flags))
        yield client


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleServer]:
    """A server of the embedded model with the four embedded soft prompts, one of which has two versions."""
    folder = tmp_path_factory.mktemp("console")
    found = ConsoleServer(url="", key_file=folder / "keys.toml", log=folder / "server" / "log", admin=httpx.Client())
    found.write_keys()
    # One thread: two of these servers and their browsers share the machine.
    flags = ("--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "32")
    with started(tmp_path_factory, folder / "server", *flags, "--api-key-file", str(found.key_file)) as client:
        found.url = str(client.base_url).rstrip("/")
        found.admin = client
        client.headers.update(bearer(KEYS["admin"][0]))
        for task in TASKS:
            response = upload(client, task, *adapter(task), description=f"The embedded task {task}", shared="true")
            assert response.status_code == 201, response.text
        yield found
    log = found.log.read_text()
    assert not [name for name, (key, _) in KEYS.items() if key in log], "the log has a key"
    assert "strap" not in log, "the log has a text"


@pytest.fixture(scope="session")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server without keys, with ``MANY`` names and the embedded soft prompt sentiment.

    The tests that use it are of one group, so that one worker starts it.
    """
    folder = tmp_path_factory.mktemp("keyless")
    open_store(folder / "store").close()
    register(f"sqlite:///{folder / 'store' / CATALOG_FILE}", MANY)
    with started(tmp_path_factory, folder, "--dtype", "float32", "--num-threads", "1") as client:
        upload(client, "sentiment", *adapter("sentiment")).raise_for_status()
        yield client


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser, server: ConsoleServer) -> Iterator[Visit]:
    """Make browsers with separate cookies; what their pages have said is checked at the end."""
    visitors: list[Visitor] = []

    def make(**options: object) -> Visitor:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})  # type: ignore[arg-type]
        context.set_default_timeout(TIMEOUT_MS)
        visitors.append(Visitor(server, context, Watch(server.url)))
        return visitors[-1]

    yield make
    with ExitStack() as checks:  # whatever one of them finds, all browsers are closed and no soft prompt is left
        for visitor in visitors:
            checks.callback(visitor.watch.check)
        checks.callback(server.delete_leftovers)
        for visitor in visitors:
            checks.callback(visitor.close)


@pytest.fixture
def admin(visit: Visit) -> Page:
    """The list of soft prompts, seen by an administrator."""
    return visit().login()
