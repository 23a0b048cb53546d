"""``prelude export``, ``import``, ``prune`` and ``list --unused-for``, between two servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import PeftConfig
from typer.testing import CliRunner

from prompt_store.open_store import open_store
from server.app import create_app
from server.cli import app as cli
from server.config import Settings
from tests.client.conftest import Data, Get, Ok, Prelude
from tests.support.api_fixtures import PeftDirectory
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.live_server import LiveServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def target(settings: Settings, tmp_path: Path) -> Iterator[LiveServer]:
    """A second server with an empty store."""
    location = str(tmp_path / "second")
    store = open_store(location)
    changed = replace(settings, store=replace(settings.store, location=location))
    app = create_app(changed, engine=FakeEngine(), tokenizer=ByteTokenizer(), store=store)  # type: ignore[arg-type]
    with LiveServer(app, changed).running() as live:
        live.wait_until_ready()
        yield live
    store.close()


@pytest.fixture
def filled(ok: Ok, peft_directory: PeftDirectory) -> None:
    """p with versions 1 and 3, aliases and an edit; q with one version."""
    for seed in (0, 1, 2):
        ok("push", str(peft_directory("p", seed=seed)), "--id", "p", "--tag", f"t{seed}", "--format", "raw")
    ok("promote", "p", "1", "--alias", "prod", "--reason", "go")
    ok("edit", "p@3", "--metadata", '{"a": 1}', "--description", "third")
    ok("rm", "p@2")
    lineage = json.dumps({"training_run": "9", "scores": {"f1": 0.5}})
    ok("push", str(peft_directory("q")), "--id", "q", "--alias", "canary", "--lineage", lineage)


def bring(target: LiveServer, *arguments: str) -> tuple[int, str, str]:
    """Run a command against the second server."""
    result = CliRunner().invoke(cli, list(arguments), env={"PRELUDE_URL": target.url})
    return result.exit_code, result.stdout, result.stderr


def records(url: str) -> list[Any]:
    """Everything that a server says about its soft prompts."""
    found = []
    for prompt in httpx.get(f"{url}/v1/prompts").json()["data"]:
        path = f"{url}/v1/prompts/{prompt['id']}"
        versions = httpx.get(f"{path}/versions").json()["data"]
        files = [
            httpx.get(f"{path}/versions/{one['version']}/files/{file['filename']}").content
            for one in versions
            for file in one["files"]
        ]
        found.append((prompt, versions, files))
    return found


def test_an_export_is_imported_whole(
    ok: Ok, data: Data, get: Get, live: LiveServer, target: LiveServer, filled: None, tmp_path: Path
) -> None:
    folder = str(tmp_path / "out")
    assert data("export", "--all", folder) == {
        "object": "export",
        "prompts": 2,
        "versions": 3,
        "known": 0,
        "notes": [],
        "failures": [],
    }
    assert sorted(path.name for path in (tmp_path / "out" / "p").iterdir()) == ["1", "3", "prompt.json"]
    assert PeftConfig.from_pretrained(f"{folder}/p/3").num_virtual_tokens == 4
    again = data("export", "--all", folder)
    assert (again["versions"], again["known"]) == (0, 3)
    status, shown, errors = bring(target, "import", folder)
    assert (status, errors) == (0, "")
    assert shown.splitlines()[0] == "imported 3 versions of 2 soft prompts; 0 were there already"
    assert records(target.url) == records(live.url)

    def changes(url: str) -> list[tuple[Any, ...]]:
        entries = httpx.get(f"{url}/v1/prompts/p/history?limit=1000").json()["data"]
        keys = ("action", "alias", "version", "previous_version", "reason", "details", "created_at")
        return [tuple(map(repr, map(entry.get, keys))) for entry in entries if entry["action"] != "import"]

    assert changes(target.url) == changes(live.url)
    before = httpx.get(f"{target.url}/v1/history?limit=1000").json()
    status, shown, errors = bring(target, "import", f"{folder}/p")  # one soft prompt of it
    assert (status, shown.splitlines()[0], errors) == (
        0,
        "imported 0 versions of 1 soft prompts; 2 were there already",
        "",
    )
    assert httpx.get(f"{target.url}/v1/history?limit=1000").json() == before
    assert bring(target, "rollback", "p")[:2] == (0, "p@latest is version 1\n")


def test_what_cannot_come_is_reported(
    ok: Ok, target: LiveServer, filled: None, tmp_path: Path, peft_directory: PeftDirectory
) -> None:
    folder = tmp_path / "out"
    ok("export", "p", str(folder))
    assert bring(target, "push", str(peft_directory("p", seed=9)), "--id", "p")[0] == 0
    status, shown, errors = bring(target, "import", str(folder))
    assert status == 1
    assert errors.splitlines() == [
        "prelude: p@1: version 1 of 'p' exists here with other bytes",
    ]
    assert "p@latest stays at version 1: give --move-aliases to move it" in shown
    assert bring(target, "import", str(folder), "--move-aliases")[0] == 1
    assert httpx.get(f"{target.url}/v1/prompts/p").json()["aliases"] == {"latest": 3, "prod": 1}
    weights = folder / "p" / "3" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    ok("export", "p", str(folder))  # a damaged file is downloaded again
    (folder / "p" / "3" / "version.json").unlink()
    ok("export", "p", str(folder))
    for wrong in ([], ["--json"]):
        status, _, errors = bring(target, "import", str(tmp_path / "peft-p-9"), *wrong)
        assert status == 1
        assert "was not written by prelude export" in errors
    (folder / "p" / "prompt.json").write_text("[]")
    assert "is not a JSON object" in bring(target, "import", str(folder))[2]
    (folder / "p" / "prompt.json").write_text("{")
    assert "cannot be read" in bring(target, "import", str(folder))[2]
    (folder / "p" / "prompt.json").write_text('{"id": "../x"}')
    assert "names no soft prompt" in bring(target, "import", str(folder))[2]


def test_export_needs_names_or_all(prelude: Prelude, filled: None, tmp_path: Path) -> None:
    for arguments in ([str(tmp_path)], ["--all", "p", str(tmp_path)], ["No", str(tmp_path)]):
        assert prelude("export", *arguments).exit_code == 2
    assert prelude("export", "none", str(tmp_path)).exit_code == 3


def test_prune_deletes_only_what_is_not_needed(
    ok: Ok, data: Data, get: Get, filled: None, prelude: Prelude, live: LiveServer
) -> None:
    assert ok("prune", "--keep", "1") == "0 versions deleted\n"
    assert data("list", "--unused-for", "1h")["data"] == []
    assert prelude("list", "--unused-for", "long").exit_code == 2
    assert prelude("prune", "--older-than", "0d").exit_code == 2
    assert prelude("prune", "No").exit_code == 2
    assert prelude("prune", "none", "--keep", "1").exit_code == 3
    httpx.delete(f"{live.url}/v1/prompts/p/aliases/prod").raise_for_status()
    wait_until(lambda: data("prune", "--keep", "1", "--older-than", "1s", "--dry-run")["versions"] == {"p": [1]})
    assert get("/p")["num_versions"] == 2
    assert ok("prune", "--keep", "1", "--older-than", "1s") == "p@1\n1 version deleted\n"
    assert get("/p")["num_versions"] == 1
    assert ok("restore", "p@1") == "restored p@1\n"
    wait_until(lambda: [one["id"] for one in data("list", "--unused-for", "1s")["data"]] == ["p", "q"])
