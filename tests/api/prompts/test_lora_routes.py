"""vLLM's routes to load and unload adapters by a path below ``--adapter-dir``."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from prompt_store.blobs.staging import Staging, Upload
from server.api.prompts.adapter_directory import AdapterDirectory
from server.config import Settings
from server.errors import InvalidRequestError, NotFoundError
from tests.support.adapter_fixtures import AdapterFolder
from tests.support.api_fixtures import MakeApp, PeftDirectory, UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.in_process import ready
from tests.support.keyed import bearer, key_entry, locked

pytestmark = pytest.mark.anyio

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    root.mkdir()
    return root


@pytest.fixture
def files(root: Path, adapter_directory: AdapterFolder) -> Path:
    """A PEFT directory below the root."""
    return adapter_directory("triage", at=root)


@pytest.fixture
def with_root(settings: Settings, root: Path) -> Settings:
    return replace(settings, store=replace(settings.store, adapter_dir=root))


@pytest.fixture
async def http(make_app: MakeApp, with_root: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with ready(make_app(with_root)) as client:
        yield client


async def load(client: httpx.AsyncClient, path: Path | str, name: str = "triage", **more: Any) -> httpx.Response:
    return await client.post(LOAD, json={"lora_name": name, "lora_path": str(path), **more})


async def versions(client: httpx.AsyncClient, name: str = "triage") -> list[int]:
    page = (await client.get(f"/v1/prompts/{name}/versions")).json()
    return [version["version"] for version in page["data"]]


async def test_an_adapter_is_loaded_used_and_unloaded(
    http: httpx.AsyncClient, engine: FakeEngine, root: Path, files: Path
) -> None:
    loaded = await load(http, files)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'triage' added successfully.")
    assert len(engine.probed_adapters) == 1
    answer = await http.post("/v1/completions", json={"model": "triage", "prompt": "a"})
    assert answer.headers["x-prelude-prompt"] == "triage@1"
    assert "triage" in [card["id"] for card in (await http.get("/v1/models")).json()["data"]]
    unloaded = await http.post(UNLOAD, json={"lora_name": "triage", "lora_int_id": 7})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'triage' removed successfully.")
    gone = await http.post(UNLOAD, json={"lora_name": "triage"})
    assert (gone.status_code, gone.json()["error"]["message"]) == (
        404,
        "lora_name: the LoRA adapter 'triage' cannot be found.",
    )
    assert (await http.post("/v1/completions", json={"model": "triage", "prompt": "a"})).status_code == 404
    (await http.post("/v1/prompts/triage/restore")).raise_for_status()


@pytest.mark.parametrize("how", ["absolute", "relative", "dotted", "through a link to the root", "the root itself"])
async def test_a_path_may_be_absolute_or_relative_to_the_directory(
    make_app: MakeApp, with_root: Settings, tmp_path: Path, root: Path, files: Path, how: str
) -> None:
    path: Path | str = files
    settings = with_root
    if how == "relative":
        path = files.name
    elif how == "dotted":
        path = f"./{files.name}/."
    elif how == "through a link to the root":
        (tmp_path / "link").symlink_to(root)
        path = tmp_path / "link" / files.name
        settings = replace(with_root, store=replace(with_root.store, adapter_dir=tmp_path / "link"))
    elif how == "the root itself":
        settings = replace(with_root, store=replace(with_root.store, adapter_dir=files))
    async with ready(make_app(settings)) as client:
        response = await load(client, path)
        assert response.status_code == 200, response.text


async def test_the_same_files_are_loaded_once_and_others_replace_them_only_in_place(
    http: httpx.AsyncClient, root: Path, files: Path, adapter_directory: AdapterFolder
) -> None:
    other = adapter_directory("triage", seed=1, at=root)
    for _ in range(2):
        assert (await load(http, files)).status_code == 200
    assert await versions(http) == [1]
    refused = await load(http, other)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_name")
    assert "has already been loaded" in refused.json()["error"]["message"]
    assert (await load(http, other, load_inplace=True)).status_code == 200
    assert await versions(http) == [2, 1]
    assert (await load(http, other)).status_code == 200
    await http.post(UNLOAD, json={"lora_name": "triage"})
    assert (await http.get("/v1/prompts/triage")).status_code == 404


async def test_without_the_flag_there_are_no_such_routes(client: httpx.AsyncClient, files: Path) -> None:
    assert (await load(client, files)).status_code == 404
    assert (await client.post(UNLOAD, json={"lora_name": "triage"})).status_code == 404


async def test_the_scope_is_that_of_uploads(
    make_app: MakeApp, with_root: Settings, tmp_path: Path, files: Path
) -> None:
    keys = key_entry("writer", tenant="a") + key_entry("reader", tenant="a", scopes=["generate", "prompts:read"])
    keys += key_entry("other", tenant="b")
    async with ready(locked(make_app, with_root, tmp_path / "keys.toml", keys)) as client:
        body = {"lora_name": "triage", "lora_path": str(files)}
        assert (await client.post(LOAD, json=body)).status_code == 401
        for path in (LOAD, UNLOAD):
            assert (await client.post(path, json=body, headers=bearer("reader"))).status_code == 403
        assert (await client.post(LOAD, json=body, headers=bearer("writer"))).status_code == 200
        # It belongs to the tenant that has loaded it.
        assert (await client.post(UNLOAD, json=body, headers=bearer("other"))).status_code == 404
        assert (await client.post(LOAD, json=body, headers=bearer("other"))).status_code == 409
        assert (await client.post(UNLOAD, json=body, headers=bearer("writer"))).status_code == 200


Spoil = Callable[[Path, Path], str | None]


def _link_to_folder(root: Path, files: Path) -> str:
    (root / "link").symlink_to(files)
    return "link"


def _link_in_the_middle(root: Path, files: Path) -> str:
    (root / "link").symlink_to(root)
    return f"link/{files.name}"


def _link_to_outside(root: Path, files: Path) -> str:
    outside = root.parent / "outside"
    shutil.copytree(files, outside)
    (root / "link").symlink_to(outside)
    return "link"


def _linked_weights(_root: Path, files: Path) -> None:
    weights = files / "adapter_model.safetensors"
    weights.rename(files / "elsewhere")
    weights.symlink_to(files / "elsewhere")


def _pickle(_root: Path, files: Path) -> None:
    (files / "adapter_model.safetensors").rename(files / "adapter_model.bin")


def _pipe(_root: Path, files: Path) -> None:
    (files / "adapter_model.safetensors").unlink()
    os.mkfifo(files / "adapter_model.safetensors")


SPOILED: dict[str, tuple[Spoil, str]] = {
    "a link to a folder": (_link_to_folder, "'link' in 'link' is a symbolic link"),
    "a link on the way": (_link_in_the_middle, "'link' in 'link/lora-triage-0' is a symbolic link"),
    "a link that leads out": (_link_to_outside, "'link' in 'link' is a symbolic link"),
    "a linked file": (_linked_weights, "'adapter_model.safetensors' in 'lora-triage-0' is a symbolic link"),
    "a pickle": (_pickle, "adapter_model.bin, a pickle, which can run code and is never opened"),
    "a pipe": (_pipe, "is not a regular file"),
    "outside": (lambda root, _: str(root.parent / "elsewhere"), "is not inside --adapter-dir"),
    "up": (lambda _, files: f"{files.name}/../{files.name}", "is not inside --adapter-dir"),
    "far up": (lambda _, __: "../../etc/passwd", "is not inside --adapter-dir"),
    "a sibling with the same beginning": (lambda root, _: f"{root}x/a", "is not inside --adapter-dir"),
    "nothing": (lambda _, __: "", "must be a path of 1 to"),
    "a NUL": (lambda _, __: "a\0b", "must be a path of 1 to"),
    "long": (lambda _, __: "a/" * 5000, "must be a path of 1 to"),
}


OPENED = {"a pipe": ["adapter_model.safetensors"]}
"""Weights that are opened, without waiting for a writer, to learn that they are no file."""


@pytest.fixture
def upload(tmp_path: Path) -> Iterator[Upload]:
    staging = Staging(tmp_path / "staging")
    with staging.upload(1 << 20) as upload:
        yield upload
    staging.close()


@pytest.mark.parametrize("case", SPOILED)
async def test_what_leads_out_or_could_run_code_is_refused_unopened(
    http: httpx.AsyncClient, root: Path, files: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    spoil, text = SPOILED[case]
    path = spoil(root, files)
    path = files.name if path is None else path
    response = await load(http, path)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "lora_path"), error
    assert text in error["message"]
    assert (await http.get("/v1/prompts")).json()["data"] == []
    opened: list[str] = []
    really_open = os.open

    def watched(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        opened.append(str(name))
        return really_open(name, flags, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(InvalidRequestError):
        patched.setattr("os.open", watched)
        AdapterDirectory(root).copy(path, upload)
    assert {*opened} <= {str(root), files.name, "adapter_config.json", *OPENED.get(case, ())}
    assert upload.files == {}


@pytest.mark.parametrize("missing", ["the folder", "adapter_config.json", "adapter_model.safetensors", "a part"])
async def test_what_is_missing_is_named(http: httpx.AsyncClient, files: Path, missing: str) -> None:
    path = files.name
    if missing == "the folder":
        path, text = "nowhere", "there is no directory 'nowhere'"
    elif missing == "a part":
        path, text = f"{files.name}/adapter_config.json/x", "there is no directory"
    else:
        (files / missing).unlink()
        text = f"has no {missing}"
    response = await load(http, path)
    error = response.json()["error"]
    assert (response.status_code, error["param"], text in error["message"]) == (404, "lora_path", True), error


async def test_a_folder_that_becomes_a_link_is_not_followed(
    root: Path, files: Path, tmp_path: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(files, outside)
    look = os.lstat

    def swap(name: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        found = look(name, *args, **kwargs)
        if name == files.name and not files.is_symlink():
            shutil.rmtree(files)
            files.symlink_to(outside)
        return found

    with monkeypatch.context() as patched, pytest.raises(InvalidRequestError, match="is a symbolic link"):
        patched.setattr("os.lstat", swap)
        AdapterDirectory(root).copy(files.name, upload)
    assert upload.files == {}


async def test_a_directory_that_is_not_there_yet_has_no_adapters(tmp_path: Path, upload: Upload) -> None:
    with pytest.raises(NotFoundError, match="there is no directory"):
        AdapterDirectory(tmp_path / "later").copy("a", upload)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "a"}, "lora_name"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "Org/A", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a@1", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a", "lora_path": 7}, "lora_path"),
        ({"lora_name": "a", "lora_path": "a", "load_inplace": "x"}, "load_inplace"),
    ],
)
async def test_malformed_requests_name_the_field(http: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await http.post(LOAD, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_the_files_are_checked_as_an_upload_is(http: httpx.AsyncClient, files: Path) -> None:
    (files / "adapter_config.json").write_text("{}")
    error = (await load(http, files)).json()["error"]
    assert error["code"] == "invalid_prompt"
    (files / "adapter_config.json").write_text("{" * 100)
    assert (await load(http, files)).status_code == 400


async def test_a_large_file_is_refused(http: httpx.AsyncClient, files: Path) -> None:
    with (files / "adapter_model.safetensors").open("ab") as file:
        file.write(bytes(65 * 1024))
    assert (await load(http, files)).status_code == 413


async def test_soft_prompts_are_neither_loaded_nor_unloaded(
    http: httpx.AsyncClient, root: Path, files: Path, peft_directory: PeftDirectory, upload_parts: UploadParts
) -> None:
    shutil.copytree(peft_directory("tone"), root / "tone")
    error = (await load(http, "tone", "tone")).json()["error"]
    assert (error["param"], "are a soft prompt" in error["message"]) == ("lora_path", True)
    (await http.post("/v1/prompts", **upload_parts("triage"))).raise_for_status()
    assert (await load(http, files, load_inplace=True)).status_code == 200
    error = (await http.post(UNLOAD, json={"lora_name": "triage"})).json()["error"]
    assert (error["param"], "has versions that are soft prompts" in error["message"]) == ("lora_name", True)
    assert await versions(http) == [2, 1]


async def test_an_adapter_in_use_is_not_unloaded(
    http: httpx.AsyncClient, files: Path, upload_parts: UploadParts
) -> None:
    await load(http, files)
    (await http.post("/v1/prompts", **upload_parts("custom", over="triage@1"))).raise_for_status()
    response = await http.post(UNLOAD, json={"lora_name": "triage"})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "in_use")


def test_the_routes_are_documented(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    for path in (LOAD, UNLOAD):
        assert "404" in paths[path]["post"]["responses"]
