"""The pages Evaluations and Training: from labelled rows to a promotion, and a run that arrives while one looks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from server.demo.tour import SOFT_PROMPTS_DIRECTORY
from tests.console.browser.isolated import barriers
from tests.console.browser.test_everywhere import settle
from tests.console.browser.visitors import ConsoleServer, Visit, button
from tests.support.serving import adapter, upload

HELD_OUT = (SOFT_PROMPTS_DIRECTORY.parent / "heldout" / "intent.jsonl").read_text().splitlines()[:40]
ROWS = [{"text": row["input"], "label": row["output"]} for row in map(json.loads, HELD_OUT)]
RUN = "/v1/runs/run-" + "7" * 32


@pytest.fixture
def judged(server: ConsoleServer) -> Iterator[str]:
    """A soft prompt whose first version is trained for another task, and whose alias points there."""
    upload(server.admin, "judged", *adapter("extract")).raise_for_status()
    upload(server.admin, "judged", *adapter("intent"), alias="candidate").raise_for_status()
    server.leftovers.append("judged")
    yield "judged"
    for one in server.admin.get("/v1/evaluations?limit=500").json()["data"]:
        server.admin.delete(f"/v1/evaluations/{one['id']}")


@pytest.fixture
def reported(server: ConsoleServer) -> Iterator[None]:
    yield
    server.admin.delete(RUN)


def test_from_labelled_rows_to_a_promotion(visit: Visit, server: ConsoleServer, judged: str, tmp_path: Path) -> None:
    data = tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    visitor = visit()
    visitor.watch.allow("status of 400")
    page = visitor.login(where="#/evaluations")
    expect(page.get_by_text("prelude eval NAME --data test.jsonl --record")).to_be_visible()
    assert barriers(page) == []
    for model in ("judged@1", "judged@2"):
        button(page, "New").click()
        dialog = page.get_by_role("dialog", name="New evaluation")
        dialog.get_by_label("Model").fill(model)
        faulty = tmp_path / "faulty.jsonl"
        faulty.write_text('{"text": "a"}\n{"text": "b"}\n')
        dialog.get_by_label("Labelled rows, in JSON Lines").set_input_files(faulty)
        button(dialog, "Start").click()
        expect(dialog.get_by_text("Line 2: has no 'label'")).to_be_visible()
        dialog.get_by_label("Labelled rows, in JSON Lines").set_input_files(data)
        dialog.get_by_label("Keep the texts of the rows").check()
        button(dialog, "Start").click()
        expect(dialog).to_have_count(0)
        expect(page.get_by_role("heading", name=f"{model} on held-out.jsonl")).to_be_visible()
        # It is completed while one looks, without a reload.
        expect(page.get_by_role("heading", name="Rows that are not right")).to_be_visible()
        settle(page)
        assert barriers(page) == [], model
    page.get_by_label("Compare with").select_option(index=1)
    expect(page.get_by_text("judged@2 answers more rows correctly")).to_be_visible()
    expect(page.get_by_role("region", name="Confusion matrix of judged@1")).to_be_visible()
    differing = page.get_by_role("region", name="Rows that only one answers correctly").get_by_role("row")
    expect(differing.nth(1)).to_be_visible()
    assert barriers(page) == []
    found = server.admin.get("/v1/evaluations?prompt_id=judged").json()["data"]
    assert [one["model"] for one in found] == ["judged@2", "judged@1"]
    assert found[0]["scores"]["accuracy"] > found[1]["scores"]["accuracy"]
    page.set_viewport_size({"width": 390, "height": 860})
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1280, "height": 860})
    button(page, "Promote version 2").click()
    dialog = page.get_by_role("dialog")
    button(dialog, re.compile("Promote 2 → latest")).click()
    expect(page.get_by_text("latest now points at version 2.")).to_be_visible()
    assert server.admin.get("/v1/prompts/judged").json()["aliases"]["latest"] == 2


def test_a_run_arrives_while_one_looks(visit: Visit, server: ConsoleServer, reported: None) -> None:
    page = visit().login(where="#/training")
    settle(page)
    expect(page.get_by_text("No training runs yet")).to_be_visible()
    assert barriers(page) == []
    now = int(time.time())
    run: dict[str, Any] = {"prompt_id": "sentiment", "method": "prompt_tuning", "started_at": now, "num_steps": 4}
    link = page.get_by_role("link", name=re.compile("sentiment"))

    server.admin.put(RUN, json=run | {"status": "running", "step": 1, "settings": {"seed": 0}}).raise_for_status()
    link.click()
    expect(page.get_by_role("progressbar", name="Steps")).to_be_visible()
    points = [{"step": step, "values": {"loss": 2.0 / step, "eval_loss": 3.0 / step}} for step in (1, 2, 3)]
    server.admin.post(f"{RUN}/metrics", json={"data": points}).raise_for_status()
    shown = re.compile("at step 3: training loss 0.667, held-out loss 1")
    expect(page.get_by_role("img", name=shown)).to_be_visible()
    end: dict[str, Any] = {
        "status": "completed",
        "step": 4,
        "best_step": 3,
        "scores": {"untrained": {"loss": 3.0, "accuracy": 0.2}, "trained": {"loss": 1.0, "accuracy": 0.9}},
        "golden_check": {"is_passed": True, "largest_difference": 0.00001, "tolerance": 0.001},
        "version": 1,
        "alias": "candidate",
        "finished_at": now + 60,
    }
    server.admin.put(RUN, json=run | end).raise_for_status()
    expect(page.get_by_text("Golden check passed: the largest difference from PEFT is 0.00001 nats")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("^trained 1, 90.0%"))).to_be_visible()
    assert barriers(page) == []
    page.set_viewport_size({"width": 390, "height": 860})
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1280, "height": 860})
    button(page, "Promote version 1").click()
    expect(page.get_by_role("dialog", name="Promote version 1 of sentiment")).to_be_visible()


def test_a_key_that_may_only_read_sees_why_it_cannot_start_one(visit: Visit) -> None:
    page = visit().login("reader", where="#/evaluations")
    settle(page)
    blocked = button(page, "New")
    expect(blocked).to_have_attribute("aria-disabled", "true")
    expect(blocked).to_have_accessible_description("This key lacks the scope generate.")
