"""The playground: one text against several soft prompts, in one request and one batch."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from server.demo.tour import MODEL_NAME
from tests.console.browser.isolated import barriers, run
from tests.console.browser.test_everywhere import picture, show, walk_to
from tests.console.browser.visitors import KEYS, ConsoleServer, Visit, Visitor, button
from tests.support.demo_server import TASKS
from tests.support.waiting import wait_until

logger = logging.getLogger(__name__)

TEXT = "The strap was never shoddy, but the zipper broke on day two."
TIMEOUT_MS = 60_000
PATIENCE = 30.0
"""Seconds in which a change arrives, on a busy machine."""


@pytest.fixture
def visitor(visit: Visit) -> Visitor:
    found = visit()
    found.context.grant_permissions(["clipboard-read", "clipboard-write"])
    return found


def ask(page: Page, members: str, text: str = TEXT, mode: str = "complete") -> None:
    """Ask the members and wait until all have answered."""
    show(page, f"#/playground?with={members}&mode={mode}")
    page.get_by_label("Message" if mode == "chat" else "Text", exact=True).fill(text)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status").filter(has_text="Running …")).to_have_count(0, timeout=TIMEOUT_MS)


def answer(page: Page, model: str) -> str:
    card = page.get_by_role("region", name=f"Answer of {model}", exact=True)
    return card.get_by_role("group", name=re.compile("^Text")).inner_text()


def greedy(server: ConsoleServer, model: str) -> str:
    body = {"model": model, "prompt": TEXT, "max_tokens": 64, "temperature": 0}
    text: str = server.admin.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def test_four_soft_prompts_answer_in_one_batch_as_they_do_alone(visitor: Visitor) -> None:
    page = visitor.login()
    ask(page, ",".join(TASKS))
    for task in TASKS:
        assert answer(page, f"{task}@1").strip() == greedy(visitor.server, task).strip(), task
    batch = page.get_by_role("region", name="One batch")
    shared = re.search(r"(\d+)% shared", batch.inner_text())
    assert shared
    assert int(shared[1]) >= 90
    expect(batch.get_by_role("img")).to_have_count(4)
    hues = batch.locator(".lane").evaluate_all("lanes => lanes.map(lane => lane.style.getPropertyValue('--h'))")
    assert len(set(hues)) == 4
    assert sum("/v1/completions" in url for url in visitor.watch.urls) == 1
    assert not [url for url in visitor.watch.urls if "strap" in url]
    assert "strap" not in page.url
    assert barriers(page) == []
    picture(page, "answers-light-wide")


def test_the_candidates_of_a_token_are_shown_by_pointer_and_keyboard(visitor: Visitor) -> None:
    page = visitor.login()
    ask(page, f"sentiment,{MODEL_NAME}")
    card = page.get_by_role("region", name=f"Answer of {MODEL_NAME}", exact=True)
    rows = card.get_by_role("row")
    expect(rows).to_have_count(6)
    card.locator(".tok").nth(1).hover()
    expect(card.locator(".tok").nth(1)).to_have_class(re.compile("cur"))
    card.get_by_role("group").focus()
    page.keyboard.press("ArrowRight")
    expect(card.locator(".tok").nth(2)).to_have_class(re.compile("cur"))
    assert card.locator(".tok").evaluate_all("all => all.some(one => one.style.getPropertyValue('--w'))")


def test_chat_classify_and_score(visitor: Visitor) -> None:
    page = visitor.login()
    ask(page, f"sentiment,{MODEL_NAME}", mode="chat")
    assert answer(page, "sentiment@1")
    ask(page, f"sentiment,{MODEL_NAME}", mode="classify")
    labels = page.get_by_role("region", name="Labels by sentiment")
    expect(labels.get_by_role("row")).to_have_count(3)
    expect(labels.get_by_role("rowheader").first).to_have_text("↵positive")
    assert barriers(page) == []
    ask(page, f"sentiment,{MODEL_NAME}", mode="score")
    assert answer(page, "sentiment@1") == TEXT
    expect(page.get_by_role("region", name="Answer of sentiment@1").get_by_text("nats a token")).to_be_visible()


def test_two_soft_prompts_are_compared_from_the_first_page(visitor: Visitor) -> None:
    """Its seconds are in docs/console.md; ``ARGS='-k from_the_first_page --log-cli-level=INFO'`` shows them."""
    visitor.login().close()
    started = time.perf_counter()
    page = visitor.page()
    page.get_by_role("link", name="Playground").click()
    for name in ("sentiment", "intent"):
        page.get_by_label("Add a soft prompt").fill(name)
        button(page, "Add").click()
    page.get_by_label("Text", exact=True).fill(TEXT)
    button(page, re.compile("^Run")).click()
    expect(page.get_by_role("status").filter(has_text="new.")).to_be_visible(timeout=TIMEOUT_MS)
    logger.info("from opening the console to two soft prompts compared: %.1f s", time.perf_counter() - started)
    for name in ("sentiment@1", "intent@1"):
        assert answer(page, name)


def test_markup_in_tokens_is_text(visitor: Visitor) -> None:
    page = visitor.login()
    text = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    ask(page, f"sentiment,{MODEL_NAME}", text=text, mode="score")
    assert answer(page, "sentiment@1") == text
    page.locator(".tok").nth(2).hover()
    assert run(page, "document.querySelectorAll('main img, main script').length") == 0
    expect(page).not_to_have_title("owned")


def test_an_unknown_member_is_named(visitor: Visitor) -> None:
    visitor.watch.allow("status of 404")
    page = visitor.login()
    ask(page, "sentiment,no-such-prompt,neither-this")
    expect(page.get_by_role("alert")).to_contain_text("no-such-prompt")


def running(server: ConsoleServer) -> float:
    return server.metric("prelude_num_requests_running")


def aborted(server: ConsoleServer, prompt: str = "-") -> float:
    """The requests with version 1 of a soft prompt, or with the base model, whose client left."""
    version = "-" if prompt == "-" else "1"
    return server.metric(f'prelude_requests_total{{outcome="abort",prompt="{prompt}",version="{version}"}}')


def without_end(route: Route) -> None:
    """Send a question on with ``ignore_eos``: the embedded model's own answers end too soon to be stopped."""
    route.continue_(post_data=json.dumps(json.loads(route.request.post_data or "{}") | {"ignore_eos": True}))


@pytest.mark.parametrize("how", ["button", "escape", "leave", "close"])
def test_stopping_or_leaving_ends_the_sequences(visitor: Visitor, how: str) -> None:
    page = visitor.login()
    show(page, f"#/playground?with={MODEL_NAME}")
    page.get_by_label("max_tokens").fill("900")
    page.get_by_label("Text", exact=True).fill("Once upon a time")
    page.route("**/v1/completions", without_end)
    before = aborted(visitor.server)
    with page.expect_response("**/v1/completions"):
        button(page, re.compile("^Run")).click()
    wait_until(lambda: running(visitor.server) > 0, PATIENCE)
    if how == "button":
        button(page, "Stop").click()
    elif how == "escape":
        page.keyboard.press("Escape")
    elif how == "leave":
        show(page, "#/prompts")
    else:
        page.close()
    # By what was done, not because it had all its tokens.
    wait_until(lambda: not running(visitor.server) and aborted(visitor.server) == before + 1, PATIENCE)


PROGRAMS = {
    "curl": ["sh"],
    "Python": [sys.executable, "-"],
    "JavaScript": ["node", "--input-type=module", "-"],
    "command line": ["sh"],
}


@pytest.mark.parametrize("language", PROGRAMS)
def test_what_is_copied_runs(visitor: Visitor, tmp_path: Path, language: str) -> None:
    page = visitor.login("writer")
    text = "It's \"fine\", isn't it? $HOME `id` \\ ü"
    ask(page, "sentiment@1,intent", text)
    button(page, language).click()
    expect(page.get_by_text(f"Copied as {language}.")).to_be_visible()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    key = KEYS["writer"][0]
    assert key not in copied
    environment = os.environ | {
        "PRELUDE_API_KEY": key,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.getcwd(),  # noqa: PTH109  where pytest runs
    }
    done = subprocess.run(
        PROGRAMS[language], input=copied, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "intent@1" in done.stdout
    body = {"model": "sentiment@1", "prompt": text, "max_tokens": 64, "temperature": 0}
    expected: str = visitor.server.admin.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert expected.split(maxsplit=1)[0] in done.stdout


def test_compare_by_keyboard_alone(visitor: Visitor) -> None:
    page = visitor.login()
    page.keyboard.press("Control+k")
    expect(page.get_by_label("Find a soft prompt or a page")).to_be_focused()
    page.keyboard.type("Playground")
    expect(page.get_by_role("dialog").get_by_role("option", selected=True)).to_contain_text("Playground")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Playground", level=1)).to_be_visible()
    expect(page.locator("#main")).to_be_focused()
    walk_to(page, "Text")
    page.keyboard.type(TEXT)
    walk_to(page, "Add a soft prompt")
    for name in ("sentiment", "intent"):
        page.keyboard.type(name)
        page.keyboard.press("Enter")
    page.keyboard.press("Control+Enter")
    for name in ("sentiment@1", "intent@1"):
        expect(page.get_by_role("region", name=f"Answer of {name}")).to_be_visible(timeout=TIMEOUT_MS)
