"""The page of the running batch."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
from playwright.sync_api import Page, Route, expect

from server.api.monitoring.subscription import MAX_SUBSCRIBERS
from server.demo.tour import MODEL_NAME
from tests.console.browser.isolated import barriers
from tests.console.browser.test_everywhere import picture, show
from tests.console.browser.test_playground import PATIENCE, aborted, running, without_end
from tests.console.browser.visitors import ConsoleServer, Visit, button
from tests.support.demo_server import TASKS
from tests.support.serving import adapter, upload
from tests.support.waiting import wait_until

HUES = """([selector, count]) => {
  const found = [...document.querySelectorAll(selector)];
  return new Set(found.map(one => one.style.getPropertyValue('--h'))).size === count;
}"""
"""Whether ``count`` colours are shown at once. Tests wait for it: a row may be gone between two requests."""

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
        page.wait_for_function(HUES, arg=[".batch .group.sp:not(.base)", 4])
        expect(page.get_by_role("group", name="base model, no soft prompt: 1 row")).to_be_visible()
        expect(page.get_by_role("region", name="Soft prompts on the device").get_by_role("listitem")).to_have_count(4)
        assert barriers(page) == []
        picture(page, "live-busy-light-wide")
        button(page, "Table").click()
        expect(page.get_by_role("row", name=re.compile("sentiment@1"))).to_have_count(2)
        assert barriers(page) == []
    expect(page.get_by_text("Nothing runs now.")).to_be_visible()


def test_four_soft_prompts_in_one_request_are_drawn_and_end_with_the_tab(visit: Visit, server: ConsoleServer) -> None:
    """Their texts equal four separate requests; a closed tab leaves no sequence, lease or subscriber."""
    visitor = visit()
    page, live = visitor.login(), visitor.page("#/live")
    expect(live.get_by_text("Nothing runs now.")).to_be_visible()
    page.route("**/v1/completions", without_end)
    begin(page, 100)
    expect(page.get_by_role("status").filter(has_text="new.")).to_be_visible(timeout=60_000)
    shared = re.search(r"(\d+)% shared", page.get_by_role("region", name="One batch").inner_text())
    assert shared
    assert int(shared[1]) >= 90
    for task in TASKS:
        body = {"model": task, "prompt": TEXT, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        alone = server.admin.post("/v1/completions", json=body).json()["choices"][0]["text"]
        card = page.get_by_role("region", name=f"Answer of {task}@1", exact=True)
        shown = card.get_by_role("group", name=re.compile("^Text")).evaluate("element => element.textContent")
        assert shown.split() == alone.split(), task
    ended = [aborted(server, task) + 1 for task in TASKS]
    begin(page, 900)
    for task in TASKS:
        group = live.get_by_role("group", name=f"{task}@1: 1 row")
        expect(group.locator(".shared")).to_have_count(1)
    live.wait_for_function(HUES, arg=[".batch .group", 4])
    page.close()
    live.close()
    # By the closed tab, not because they had all their tokens.
    wait_until(lambda: not users(server) and [aborted(server, task) for task in TASKS] == ended, PATIENCE)
    assert not running(server)
    with ExitStack() as streams:  # as many as there may be at once: none of the closed pages is counted
        client = streams.enter_context(httpx.Client(base_url=server.url, headers=server.admin.headers, timeout=60))
        found = [streams.enter_context(client.stream("GET", "/v1/events")) for _ in range(MAX_SUBSCRIBERS)]
        assert {response.status_code for response in found} == {200}


def begin(page: Page, tokens: int) -> None:
    """Ask four soft prompts in one request."""
    show(page, f"#/playground?with={','.join(TASKS)}")
    page.get_by_label("max_tokens").fill(str(tokens))
    page.get_by_label("Text", exact=True).fill(TEXT)
    with page.expect_response("**/v1/completions"):
        page.keyboard.press("Control+Enter")


def users(server: ConsoleServer) -> int:
    """Sequences that use a soft prompt on the device or wait for one."""
    return sum(one["users"] for one in server.admin.get("/v1/engine").json()["soft_prompts"])


def test_a_soft_prompt_of_two_names_is_shown_by_the_one_in_use(visit: Visit, server: ConsoleServer) -> None:
    """The same bytes have one copy on the device."""
    upload(server.admin, "twin", *adapter("sentiment")).raise_for_status()
    server.leftovers.append("twin")
    page = visit().login(where="#/live")
    with traffic(server, "twin"), traffic(server, "sentiment"):
        group = page.get_by_role("group", name=re.compile(r"^(twin@1, sentiment@1|sentiment@1, twin@1): 2 rows$"))
        expect(group.locator(".shared")).to_have_count(1)
        page.wait_for_function(HUES, arg=[".batch .group .names .sw", 2])
    with traffic(server, "sentiment"):
        expect(page.get_by_role("group", name="sentiment@1: 1 row")).to_be_visible()
        resident = page.get_by_role("region", name="Soft prompts on the device")
        expect(resident.get_by_text("sentiment@1", exact=True)).to_be_visible()


def test_a_paused_page_asks_for_nothing(visit: Visit, server: ConsoleServer) -> None:
    page = visit().login(where="#/live")
    expect(page.get_by_role("region", name="The running batch")).to_be_visible()
    button(page, "Pause").click()
    with traffic(server, "sentiment"):
        wait_until(lambda: running(server) > 0, PATIENCE)
        page.wait_for_timeout(1000)  # several of the events that it would have read
        expect(page.get_by_text("Nothing runs now.")).to_be_visible()
        button(page, "Go on").click()
        expect(page.get_by_role("group", name="sentiment@1: 1 row")).to_be_visible()


def test_the_address_names_the_view_and_no_text(visit: Visit, server: ConsoleServer) -> None:
    page = visit().login(where="#/live")
    show(page, "#/live")
    with traffic(server, "sentiment"):
        expect(page.get_by_role("group", name="sentiment@1: 1 row")).to_be_visible()
        assert "strap" not in page.content()


def test_behind_an_ingress_one_replica_is_chosen_and_shown(visit: Visit, server: ConsoleServer) -> None:
    """The answers get what an ingress adds to them; a replica that has ended is forgotten."""
    visitor = visit()
    page = visitor.login()
    replicas = ["demo-0", "demo-1"]

    def as_ingress(route: Route) -> None:
        asked = re.search("replica=([^&]+)", route.request.url)
        name = asked[1] if asked else replicas[0]
        if name not in replicas:
            route.fulfill(status=404, json={"error": {"message": "there is no such replica", "code": "not_found"}})
            return
        response = route.fetch()
        names = {"x-prelude-replica": name, "x-prelude-replicas": ", ".join(replicas)}
        route.fulfill(response=response, headers={**response.headers, **names})

    page.route("**/v1/engine*", as_ingress)
    with page.expect_request("**/v1/events?topics=*live*&replica=demo-0"):
        show(page, "#/live")
    choice = page.get_by_label("Replica")
    expect(choice).to_have_value("demo-0")
    with (
        page.expect_request("**/v1/events?topics=*live*&replica=demo-1"),
        page.expect_request("**/v1/stats?replica=demo-1"),
        page.expect_request("**/v1/engine?replica=demo-1"),
    ):
        choice.select_option("demo-1")
    expect(choice).to_have_value("demo-1")
    with traffic(server, "sentiment"):
        expect(page.get_by_role("group", name="sentiment@1: 1 row")).to_be_visible()
    assert barriers(page) == []
    button(page, "Pause").click()
    visitor.watch.allow("404")
    replicas[:] = ["demo-0", "demo-2"]
    choice.evaluate("element => element.append(new Option('demo-9'))")
    choice.select_option("demo-9")
    expect(choice).to_have_value("demo-0")
    expect(choice.get_by_role("option", name="demo-2")).to_have_count(1)
    expect(choice.get_by_role("option", name="demo-1")).to_have_count(0)
    page.unroute_all(behavior="ignoreErrors")  # of a request that the page itself has ended
