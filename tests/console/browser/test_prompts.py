"""The pages of soft prompts: list, versions, aliases, deletion, upload."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, Route, expect
from safetensors.numpy import save

from server.demo.tour import SOFT_PROMPTS_DIRECTORY
from tests.console.browser.isolated import barriers
from tests.console.browser.test_everywhere import show
from tests.console.browser.visitors import ConsoleServer, Visit, button
from tests.support.serving import adapter, upload

FILES = [SOFT_PROMPTS_DIRECTORY / "sentiment" / name for name in ("adapter_config.json", "adapter_model.safetensors")]


@pytest.fixture
def prompt(server: ConsoleServer, request: pytest.FixtureRequest) -> str:
    """A soft prompt with two versions, the second of which is canary."""
    name: str = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[:60].rstrip("-")
    first = upload(server.admin, name, *adapter("sentiment"), metadata='{"learning_rate": 0.001}')
    second = upload(server.admin, name, *adapter("intent"), alias="canary", metadata='{"learning_rate": 0.003}')
    assert (first.status_code, second.status_code) == (201, 201), (first.text, second.text)
    server.leftovers.append(name)
    return name


def aliases(server: ConsoleServer, name: str) -> dict[str, int]:
    found: dict[str, int] = server.admin.get(f"/v1/prompts/{name}").json()["aliases"]
    return found


def open_prompt(page: Page, name: str, version: int | None = None) -> None:
    show(page, f"#/prompts/{name}" + (f"?version={version}" if version else ""))
    expect(page.get_by_role("heading", name=name, level=1)).to_be_visible()


def test_the_list_is_searched_sorted_and_filtered_by_the_server(admin: Page, prompt: str) -> None:
    expect(admin.get_by_role("row")).not_to_have_count(1)
    expect(admin.get_by_role("row").filter(has=admin.get_by_role("link", name="intent", exact=True))).to_contain_text(
        "disk"
    )
    admin.get_by_label("Search", exact=True).fill("senti")
    expect(admin.get_by_role("link", name="intent", exact=True)).to_have_count(0)
    expect(admin.get_by_role("link", name="sentiment", exact=True)).to_be_visible()
    expect(admin).to_have_url(re.compile(r"#/prompts\?q=senti$"))
    admin.get_by_label("Search", exact=True).fill("embedded task dates")
    expect(admin.get_by_role("link", name="dates", exact=True)).to_be_visible()
    expect(admin.get_by_role("link", name="sentiment", exact=True)).to_have_count(0)
    admin.get_by_label("Search", exact=True).fill("")
    expect(admin.get_by_role("row").nth(1)).not_to_contain_text(prompt)
    admin.get_by_label("Order").select_option("updated")
    expect(admin.get_by_role("row").nth(1)).to_contain_text(prompt)
    admin.get_by_label("Search", exact=True).fill("no such name")
    expect(admin.get_by_text("No soft prompt fits these filters.")).to_be_visible()
    button(admin, "Show all").click()
    button(admin, "Adapters").click()
    expect(admin.get_by_text("No soft prompt fits these filters.")).to_be_visible()


def test_a_missing_prompt_is_explained(visit: Visit) -> None:
    visitor = visit()
    visitor.watch.allow("status of 404")
    page = visitor.login(where="#/prompts/no-such-prompt")
    expect(page.get_by_text("There is no soft prompt of this name.")).to_be_visible()


def test_promote_shows_what_changes_and_undo_takes_it_back(admin: Page, server: ConsoleServer, prompt: str) -> None:
    open_prompt(admin, prompt, 2)
    button(admin, "Promote").click()
    dialog = admin.get_by_role("dialog")
    expect(dialog).to_contain_text(f"From the next request on, {prompt} means version 2.")
    expect(dialog.get_by_role("row", name="learning_rate")).to_contain_text("0.001")
    button(dialog, "Promote 2 → latest").click()
    expect(admin.get_by_text("latest now points at version 2.")).to_be_visible()
    assert aliases(server, prompt) == {"latest": 2, "canary": 2}
    button(admin, "Undo").click()
    expect(admin.get_by_text("latest points at version 1 again.")).to_be_visible()
    assert aliases(server, prompt) == {"latest": 1, "canary": 2}


def test_promote_says_that_it_ends_a_rollout(admin: Page, server: ConsoleServer, prompt: str) -> None:
    rollout = {"version": 1, "canaries": {"2": 12.5}, "shadow": {"version": 2, "percent": 10}}
    assert server.admin.put(f"/v1/prompts/{prompt}/aliases/latest", json=rollout).status_code == 200
    open_prompt(admin, prompt, 2)
    button(admin, "Promote").click()
    dialog = admin.get_by_role("dialog")
    expect(dialog).to_contain_text(
        "latest has a rollout: version 2 answers 12.5% of its requests, version 2 gets copies of 10% of them. "
        "The promotion ends it, and Undo does not start it again."
    )
    assert barriers(admin) == []
    dialog.get_by_label("Alias").fill("canary")
    expect(dialog).not_to_contain_text("has a rollout")
    dialog.get_by_label("Alias").fill("latest")
    button(dialog, "Promote 2 → latest").click()
    expect(admin.get_by_text("latest now points at version 2.")).to_be_visible()
    assert server.admin.get(f"/v1/prompts/{prompt}").json()["rollouts"] == {}


def test_what_another_client_changes_is_shown_at_once(admin: Page, server: ConsoleServer, prompt: str) -> None:
    row = admin.get_by_role("row").filter(has=admin.get_by_role("link", name=prompt, exact=True))
    expect(row).to_contain_text("latest → 1")
    server.admin.put(f"/v1/prompts/{prompt}/aliases/latest", json={"version": 2})
    expect(row).to_contain_text("latest → 2")
    open_prompt(admin, prompt, 1)
    history = admin.get_by_role("region", name="History")
    expect(history).to_contain_text("moved latest from 1 to 2")
    server.admin.put(f"/v1/prompts/{prompt}/aliases/stable", json={"version": 1})
    expect(history).to_contain_text("moved stable to 1")
    button(admin, "Promote").click()
    expect(admin.get_by_role("dialog")).to_contain_text("latest 2 → 1")
    server.admin.put(f"/v1/prompts/{prompt}/aliases/later", json={"version": 1})
    admin.keyboard.press("Escape")
    expect(history).to_contain_text("moved later to 1")


def test_a_new_alias_is_made_and_undone(admin: Page, server: ConsoleServer, prompt: str) -> None:
    open_prompt(admin, prompt, 1)
    button(admin, "Promote").click()
    admin.get_by_label("Alias", exact=True).fill("stable")
    button(admin, "Promote 1 → stable").click()
    expect(admin.get_by_text("stable now points at version 1.")).to_be_visible()
    assert aliases(server, prompt)["stable"] == 1
    button(admin, "Undo").click()
    expect(admin.get_by_text("The alias stable is gone again.")).to_be_visible()
    assert "stable" not in aliases(server, prompt)


def test_roll_back(admin: Page, server: ConsoleServer, prompt: str) -> None:
    server.admin.put(f"/v1/prompts/{prompt}/aliases/latest", json={"version": 2})
    open_prompt(admin, prompt)
    button(admin, "Roll back").click()
    dialog = admin.get_by_role("dialog")
    expect(dialog).to_contain_text("2 → 1")
    button(dialog, "Roll back").click()
    expect(admin.get_by_text("latest points at version 1 again.")).to_be_visible()
    assert aliases(server, prompt)["latest"] == 1


def test_a_rollout_is_started_changed_and_ended(admin: Page, server: ConsoleServer, prompt: str) -> None:
    def rollouts() -> object:
        return server.admin.get(f"/v1/prompts/{prompt}").json()["rollouts"]

    open_prompt(admin, prompt)
    card = admin.get_by_role("region", name="Rollouts")
    button(card, "Start a rollout").click()
    dialog = admin.get_by_role("dialog")
    expect(dialog.get_by_role("status")).to_contain_text("No version has a share.")
    dialog.get_by_label("% answered by version 2").fill("120")
    expect(button(dialog, "Start the rollout")).to_have_attribute("aria-disabled", "true")
    dialog.get_by_label("% answered by version 2").fill("12.5")
    dialog.get_by_label("Shadow", exact=True).select_option("2")
    dialog.get_by_label("% copied to the shadow").fill("40")
    expect(dialog.get_by_role("status")).to_contain_text("version 2 answers 12.5% of its requests")
    assert barriers(admin) == []
    button(dialog, "Start the rollout").click()
    expect(card).to_contain_text("87.5% version 1")
    assert rollouts() == {"latest": {"canaries": {"2": 12.5}, "shadow": {"version": 2, "percent": 40}}}
    history = admin.get_by_role("region", name="History")
    expect(history).to_contain_text("started the rollout of latest: version 2 answers 12.5% of its requests")
    button(card, "Change the rollout of latest").click()
    dialog.get_by_label("% answered by version 2").fill("50")
    dialog.get_by_label("Shadow", exact=True).select_option("")
    button(dialog, "Change the rollout").click()
    expect(history).to_contain_text("changed the rollout of latest: version 2 answers 50% of its requests")
    button(card, "End the rollout of latest").click()
    expect(history).to_contain_text("ended the rollout of latest")
    assert rollouts() == {}
    button(admin, "Undo").click()
    expect(card).to_contain_text("50% version 2")
    assert rollouts() == {"latest": {"canaries": {"2": 50}}} or rollouts() == {
        "latest": {"canaries": {"2": 50.0}, "shadow": None}
    }


@pytest.mark.parametrize("how", ["change", "end", "promote", "roll back"])
def test_a_rollout_of_another_client_is_not_overwritten(
    visit: Visit, server: ConsoleServer, prompt: str, how: str
) -> None:
    def rollouts() -> object:
        return server.admin.get(f"/v1/prompts/{prompt}").json()["rollouts"]

    alias = f"/v1/prompts/{prompt}/aliases/latest"
    server.admin.put(alias, json={"version": 1, "canaries": {"2": 5}}).raise_for_status()
    visitor = visit()
    visitor.watch.allow("status of 409")
    page = visitor.login(where=f"#/prompts/{prompt}?version=2")
    card = page.get_by_role("region", name="Rollouts")
    expect(card).to_contain_text("5% version 2")
    if how == "change":
        button(card, "Change the rollout of latest").click()
        page.get_by_role("dialog").get_by_label("% answered by version 2").fill("50")
    elif how in ("promote", "roll back"):
        button(page, how.capitalize()).click()
        expect(page.get_by_role("dialog")).to_contain_text("5% of its requests")
    page.route(f"**{alias}*", lambda route: meet(server, alias, route))
    page.route(f"**{alias}/rollback", lambda route: meet(server, alias, route))
    if how == "end":
        button(card, "End the rollout of latest").click()
    else:
        names = {"change": "Change the rollout", "promote": "Promote 2 → latest", "roll back": "End the rollout"}
        button(page.get_by_role("dialog"), names[how]).click()
    expect(page.get_by_role("alert").first).to_contain_text("not the expected rollout")
    expect(page.get_by_text("admin changed the rollout of latest: version 2 answers 20%")).not_to_have_count(0)
    assert rollouts() == {"latest": {"canaries": {"2": 20}, "shadow": None}}


def meet(server: ConsoleServer, alias: str, route: Route) -> None:
    """Another client changes the rollout just before the page's request arrives."""
    server.admin.put(alias, json={"version": 1, "canaries": {"2": 20}}).raise_for_status()
    route.continue_()


def test_a_rollback_that_ends_canaries_says_that_nothing_moves(
    admin: Page, server: ConsoleServer, prompt: str
) -> None:
    server.admin.put(f"/v1/prompts/{prompt}/aliases/latest", json={"version": 2})
    server.admin.put(f"/v1/prompts/{prompt}/aliases/latest", json={"version": 2, "canaries": {"1": 30}})
    open_prompt(admin, prompt)
    button(admin, "Roll back").click()
    dialog = admin.get_by_role("dialog")
    expect(dialog).to_contain_text("latest stays at 2")
    expect(dialog).to_contain_text("Now version 1 answers 30% of its requests. This ends the rollout")
    expect(dialog).not_to_contain_text("→")
    button(dialog, "End the rollout").click()
    expect(admin.get_by_text("The rollout of latest has ended; it points at version 2 as before.")).to_be_visible()
    assert aliases(server, prompt)["latest"] == 2
    assert server.admin.get(f"/v1/prompts/{prompt}").json()["rollouts"] == {}
    button(admin, "Roll back").click()
    expect(dialog).to_contain_text("latest 2 → 1")


def test_a_version_says_where_it_lies_and_how_far_its_tokens_moved(
    admin: Page, server: ConsoleServer, prompt: str
) -> None:
    asked = {"model": f"{prompt}@2", "prompt": "a", "max_tokens": 1}
    assert server.admin.post("/v1/completions", json=asked).is_success
    open_prompt(admin, prompt, 2)
    expect(admin.get_by_role("region", name="Version 2")).to_contain_text(
        re.compile(r"on the device \(\d+ blocks?, idle\), in host memory, on the local disk")
    )
    changes = admin.get_by_role("region", name="What changes: 1 → 2")
    expect(changes.get_by_role("row", name="learning_rate")).to_contain_text("0.003")
    expect(changes).to_contain_text(re.compile(r"virtual tokens in both; cosine [\d.-]+ on average"))
    expect(changes.get_by_role("listitem")).not_to_have_count(0)
    button(admin, "Promote").click()
    expect(admin.get_by_role("dialog")).to_contain_text(
        "0 requests with version 1 and 1 with version 2; now it answers 0 and 0."
    )
    assert barriers(admin) == []


def test_a_conflict_says_who_was_faster(visit: Visit, server: ConsoleServer, prompt: str) -> None:
    visitor = visit()
    visitor.watch.allow("status of 409")
    page = visitor.login(where=f"#/prompts/{prompt}?version=1")
    button(page, "Promote").click()
    page.get_by_label("Alias").fill("canary")

    def delete(route: Route) -> None:
        """Another client is faster, and the page has not seen it yet."""
        server.admin.delete(f"/v1/prompts/{prompt}/aliases/canary").raise_for_status()
        route.continue_()

    page.route("**/aliases/canary*", delete)
    button(page, "Promote 1 → canary").click()
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("dialog").get_by_text("admin deleted the alias canary")).to_be_visible()
    button(page, "Show what is there now").click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_delete_a_version_and_restore_it(admin: Page, server: ConsoleServer, prompt: str) -> None:
    open_prompt(admin, prompt, 2)
    button(admin, "Delete version").click()
    dialog = admin.get_by_role("dialog")
    expect(dialog).to_contain_text("canary")
    delete = button(dialog, f"Delete {prompt}@2")
    expect(delete).to_have_attribute("aria-disabled", "true")
    dialog.get_by_role("textbox").fill(f"{prompt}@2")
    delete.click()
    expect(admin.get_by_text(f"{prompt}@2 is deleted")).to_be_visible()
    assert aliases(server, prompt) == {"latest": 1}
    button(admin, "Undo").click()
    expect(admin.get_by_text(f"{prompt}@2 is back.")).to_be_visible()
    assert aliases(server, prompt) == {"latest": 1, "canary": 2}


def test_delete_a_prompt_and_restore_it(admin: Page, prompt: str) -> None:
    open_prompt(admin, prompt)
    button(admin, "Delete").click()
    admin.get_by_role("dialog").get_by_role("textbox").fill(prompt)
    admin.keyboard.press("Enter")
    expect(admin.get_by_role("heading", name="Prompts", level=1)).to_be_visible()
    button(admin, "Undo").click()
    expect(admin.get_by_role("heading", name=prompt, level=1)).to_be_visible()


def test_a_version_is_tried_beside_the_latest_one_and_its_evaluations_are_near(admin: Page, prompt: str) -> None:
    for version, members in ((2, [prompt, f"{prompt}@2"]), (1, [prompt])):
        open_prompt(admin, prompt, version)
        expect(admin.get_by_role("region", name=f"Version {version}", exact=True)).to_be_visible()
        admin.get_by_role("link", name="Open in playground").click()
        expect(admin.get_by_role("heading", name="Playground", level=1)).to_be_visible()
        expect(admin.locator(".member")).to_have_text(members)
    open_prompt(admin, prompt)
    admin.get_by_role("link", name="See evaluations").click()
    expect(admin.get_by_role("link", name=f"of {prompt}: show all")).to_be_visible()


def test_inspect_names_the_nearest_tokens(admin: Page) -> None:
    open_prompt(admin, "sentiment")
    tokens = admin.get_by_role("region", name="Virtual tokens", exact=True).get_by_role("listitem")
    expect(tokens).to_have_count(12)
    expect(tokens.first).to_contain_text("Classify")
    open_prompt(admin, "dates")
    expect(admin.get_by_role("region", name="Norms by layer").get_by_role("row")).to_have_count(7)


def test_upload_a_new_prompt_and_the_same_files_again(admin: Page, server: ConsoleServer) -> None:
    server.leftovers.append("uploaded")
    for text in ("uploaded@1 is stored.", "The same files are there already, as uploaded@1."):
        show(admin, "#/upload")
        admin.locator("input[type=file]").set_input_files(FILES)
        admin.get_by_label("Name", exact=True).fill("uploaded")
        admin.get_by_label("Metadata").fill('{"rows": 12}')
        button(admin, "Upload").click()
        expect(admin.get_by_text(text)).to_be_visible()
        expect(admin.get_by_role("heading", name="uploaded", level=1)).to_be_visible()
    assert server.admin.get("/v1/prompts/uploaded").json()["latest"]["metadata"] == {"rows": 12}


def test_every_fault_of_an_upload_is_shown_at_once(visit: Visit, server: ConsoleServer, tmp_path: Path) -> None:
    visitor = visit()
    visitor.watch.allow("status of 400")
    page = visitor.login(where="#/upload")
    config = json.loads(FILES[0].read_text()) | {"base_model_name_or_path": "another/base", "token_dim": 7}
    changed = tmp_path / "adapter_config.json"
    changed.write_text(json.dumps(config))
    page.locator("input[type=file]").set_input_files([changed, FILES[1]])
    page.get_by_label("Name", exact=True).fill("faulty")
    button(page, "Upload").click()
    faults = page.get_by_role("list", name="Faults").get_by_role("listitem")
    expect(faults).to_have_count(2)
    expect(faults.nth(0)).to_contain_text("base_model_mismatch")
    expect(faults.nth(1)).to_contain_text(re.compile("adapter_config.json . token_dim"))
    expect(page.get_by_text("2 faults, nothing was stored")).to_be_visible()
    assert server.admin.get("/v1/prompts/faulty").status_code == 404


Tensors = dict[str, "np.ndarray[Any, Any]"]

ROWS = np.ones((12, 192), np.float32)
FAULTY: dict[str, tuple[dict[str, object], Tensors]] = {
    "another method": ({"peft_type": "LOHA"}, {}),
    "no task": ({"task_type": None}, {}),
    "another task": ({"task_type": "TOKEN_CLS"}, {}),
    "two submodules": ({"num_transformer_submodules": 2}, {}),
    "another base model": ({"base_model_name_or_path": "another/base"}, {}),
    "another number of virtual tokens": ({"num_virtual_tokens": 9}, {}),
    "another width in the configuration": ({"token_dim": 7}, {}),
    "another width": ({}, {"prompt_embeddings": np.ones((12, 64), np.float32)}),
    "no room for a text": ({"num_virtual_tokens": 1024}, {"prompt_embeddings": np.ones((1024, 192), np.float32)}),
    "a tensor of another method": ({}, {"prefix_task_cols": np.ones((2, 12, 1), np.float32)}),
    "a copy of the embeddings": ({}, {"base_model.model.model.embed_tokens.weight": ROWS}),
    "not a number": ({}, {"prompt_embeddings": np.full((12, 192), np.nan, np.float32)}),
    "infinity": ({}, {"prompt_embeddings": np.full((12, 192), np.inf, np.float32)}),
    "integers": ({}, {"prompt_embeddings": np.ones((12, 192), np.int32)}),
    "double precision": ({}, {"prompt_embeddings": np.ones((12, 192), np.float64)}),
}
"""Changes of a file's configuration and tensors for each row of the table of docs/soft-prompts.md, and more."""


def test_the_page_shows_what_the_server_finds_in_each_faulty_file(
    visit: Visit, server: ConsoleServer, tmp_path: Path
) -> None:
    visitor = visit()
    visitor.watch.allow("status of 400")
    page = visitor.login(where="#/upload")
    config, weights = tmp_path / FILES[0].name, tmp_path / FILES[1].name
    cases = {
        name: (
            json.dumps(json.loads(FILES[0].read_text()) | changes).encode(),
            save({"prompt_embeddings": ROWS} | more),
        )
        for name, (changes, more) in FAULTY.items()
    }
    cases |= {"no JSON": (b"{", FILES[1].read_bytes()), "no safetensors": (FILES[0].read_bytes(), b"\x80\x04.")}
    for name, (text, tensors) in cases.items():
        config.write_bytes(text)
        weights.write_bytes(tensors)
        reply = upload(server.admin, "faulty", text, tensors, dry_run="true")
        assert reply.status_code == 400, (name, reply.text)
        found = reply.json()["error"].get("details") or [reply.json()["error"]]
        page.locator("input[type=file]").set_input_files([config, weights])
        faults = page.get_by_role("list", name="Faults").get_by_role("listitem")
        expect(faults).to_contain_text([one["message"] for one in found])
        assert all(one.get("file") in (config.name, weights.name) for one in found if "file" in one), name


def test_a_fault_of_a_field_stands_beside_it(visit: Visit) -> None:
    visitor = visit()
    visitor.watch.allow("status of 400")
    page = visitor.login(where="#/upload")
    page.locator("input[type=file]").set_input_files(FILES)
    page.get_by_label("Name", exact=True).fill("Not A Name")
    button(page, "Upload").click()
    expect(page.get_by_label("Name", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Name", exact=True)).to_have_accessible_description(re.compile("is not valid"))
