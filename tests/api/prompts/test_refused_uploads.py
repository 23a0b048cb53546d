"""A refused upload leaves no files, and no upload may exceed its size limit."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from prompt_store.blobs.blobs import BlobDirectory
from prompt_store.catalog.catalog import BlobsGoneError, Catalog
from prompt_store.errors import StoreUnavailableError
from prompt_store.files.adapter_config import MAX_CONFIG_BYTES
from prompt_store.store import PromptStore
from server.api.http.multipart import bounded
from server.api.prompts import routes
from server.config import Settings
from tests.support.api_fixtures import CountingStore, Serve, UploadParts, WaitUntil
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("still_clock")]

KEYS = "".join(
    [
        key_entry("a"),
        key_entry("b", requests_per_minute=2),
        key_entry("reader", tenant="a", scopes=["generate", "prompts:read"]),
    ]
)


def files_of(root: str) -> dict[str, int]:
    """Every file of a store with its size, except the catalog's."""
    found = {}
    for folder, _, files in os.walk(root):
        for name in files:
            if not name.startswith("catalog.sqlite3"):
                path = Path(folder) / name
                found[str(path.relative_to(root))] = path.stat().st_size
    return found


def folders_of(root: str) -> int:
    """Folders of unfinished uploads."""
    return sum(len(folders) for folder, folders, _ in os.walk(Path(root) / "staging") if folder.count("/staging/"))


@pytest.fixture
async def nothing_left(
    client: httpx.AsyncClient, app: FastAPI, settings: Settings, upload_parts: UploadParts
) -> AsyncIterator[None]:
    """After the test, the disk has the same files as before, and the store accepts the next upload."""
    root = settings.store.location
    (await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("mine"))).raise_for_status()
    before, under_way = files_of(root), folders_of(root)
    yield
    assert files_of(root) == before
    assert folders_of(root) == under_way
    (await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("mine", seed=77))).raise_for_status()
    assert len(files_of(root)) == len(before) + 1  # the configuration is the same


def changed(parts: dict[str, Any], filename: str, data: bytes) -> dict[str, Any]:
    files = [("files", (name, data if name == filename else old)) for _, (name, old) in parts["files"]]
    return {"data": parts["data"], "files": files}


def config_of(parts: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps(json.loads(dict(file for _, file in parts["files"])["adapter_config.json"]) | fields).encode()


@pytest.mark.parametrize(
    ("key", "status", "change"),
    [
        ("b", 409, lambda parts: parts),
        ("reader", 403, lambda parts: parts),
        ("a", 403, lambda parts: parts | {"data": parts["data"] | {"shared": "true"}}),
        ("a", 400, lambda parts: parts | {"data": {"id": "Not A Name"}}),
        ("a", 400, lambda parts: parts | {"data": {"id": "tiny"}}),
        ("a", 400, lambda parts: parts | {"data": {}}),
        ("a", 400, lambda parts: parts | {"data": parts["data"] | {"metadata": "{"}}),
        ("a", 400, lambda parts: parts | {"files": parts["files"][:1]}),
        ("a", 400, lambda parts: parts | {"files": parts["files"] * 2}),
        ("a", 400, lambda parts: parts | {"files": [*parts["files"], ("files", ("more.bin", b"x" * 9000))]}),
        ("a", 400, lambda parts: changed(parts, "adapter_model.safetensors", b"x" * 60_000)),
        ("a", 400, lambda parts: changed(parts, "adapter_config.json", config_of(parts, num_virtual_tokens=5))),
        (
            "a",
            400,
            lambda parts: changed(parts, "adapter_config.json", config_of(parts, base_model_name_or_path="o")),
        ),
        ("a", 413, lambda parts: changed(parts, "adapter_model.safetensors", b"x" * 65_537)),
        ("a", 413, lambda parts: changed(parts, "adapter_config.json", b" " * 65_537)),
    ],
)
async def test_every_refused_upload_leaves_no_files(
    client: httpx.AsyncClient,
    nothing_left: None,
    upload_parts: UploadParts,
    key: str,
    status: int,
    change: Callable[..., Any],
) -> None:
    response = await client.post("/v1/prompts", headers=bearer(key), **change(upload_parts("mine", seed=5)))
    assert response.status_code == status, response.text


async def test_an_upload_over_a_keys_limit_leaves_no_files(
    client: httpx.AsyncClient, nothing_left: None, upload_parts: UploadParts
) -> None:
    for status in (409, 409, 429):
        response = await client.post("/v1/prompts", headers=bearer("b"), **upload_parts("mine", seed=6))
        assert response.status_code == status


async def test_an_upload_before_the_server_is_ready_leaves_no_files(
    client: httpx.AsyncClient, nothing_left: None, upload_parts: UploadParts, engine: FakeEngine
) -> None:
    engine.alive = False
    response = await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("mine", seed=5))
    assert response.status_code == 503
    engine.alive = True


@pytest.mark.parametrize("failing", ["check_owner", "reserve", "publish"])
@pytest.mark.parametrize("error", [StoreUnavailableError("it broke off"), BlobsGoneError()])
async def test_an_upload_that_loses_the_catalog_leaves_no_files(
    client: httpx.AsyncClient,
    nothing_left: None,
    upload_parts: UploadParts,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, failing, fail)
        response = await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("mine", seed=5))
    assert response.status_code in {500, 503}


async def test_files_that_could_not_be_deleted_are_deleted_with_the_next_upload(
    client: httpx.AsyncClient, settings: Settings, upload_parts: UploadParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreUnavailableError("it broke off")

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "publish", fail)
        patch.setattr(Catalog, "garbage", fail)
        response = await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("mine", seed=5))
    assert response.status_code == 503
    assert len(files_of(settings.store.location)) > 2
    (await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("other", seed=6))).raise_for_status()
    left = [name for name in files_of(settings.store.location) if name.startswith("blobs/")]
    assert len(left) == 2


async def test_a_disk_full_before_the_second_file_leaves_no_files(
    client: httpx.AsyncClient, nothing_left: None, upload_parts: UploadParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = BlobDirectory.put
    put: list[str] = []

    def fill(self: BlobDirectory, staged: Path, digest: str, size: int) -> None:
        put.append(digest)
        if len(put) == 2:
            raise OSError(28, "No space left on device")
        real(self, staged, digest, size)

    with monkeypatch.context() as patch:
        patch.setattr(BlobDirectory, "put", fill)
        parts = upload_parts("mine", seed=5)
        parts = changed(parts, "adapter_config.json", config_of(parts, some="thing"))
        response = await client.post("/v1/prompts", headers=bearer("a"), **parts)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
    assert len(put) == 2


async def test_an_unexpected_error_leaves_no_files(
    client: httpx.AsyncClient, nothing_left: None, upload_parts: UploadParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(PromptStore, "publish", fail)
        with suppress(ZeroDivisionError):
            await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("mine", seed=5))


async def test_the_second_of_two_tenants_with_one_name_leaves_no_files(
    client: httpx.AsyncClient, settings: Settings, upload_parts: UploadParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is taken between check and write: the later upload is deleted."""
    monkeypatch.setattr(Catalog, "check_owner", lambda *_: None)
    (await client.post("/v1/prompts", headers=bearer("a"), **upload_parts("mine"))).raise_for_status()
    before = files_of(settings.store.location)
    response = await client.post("/v1/prompts", headers=bearer("b"), **upload_parts("mine", seed=5))
    assert response.status_code == 409
    assert files_of(settings.store.location) == before


BOUNDARY = b"limit"


def part(name: bytes, data: bytes, filename: bytes | None = None, header: bytes = b"") -> bytes:
    named = b'; filename="' + filename + b'"' if filename else b""
    return (
        b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="' + name + b'"' + named + b"\r\n"
        + header + b"\r\n" + data + b"\r\n"
    )  # fmt: skip


def endless(piece: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def send() -> AsyncIterator[bytes]:
        for _ in range(4000):
            yield piece

    return send


WHOLE = part(b"id", b"mine") + b"--" + BOUNDARY + b"--\r\n"


@pytest.mark.parametrize(
    ("opening", "piece"),
    [
        (b"", b"preamble\r\n" * 100),
        (WHOLE, b"epilogue\r\n" * 100),
        (WHOLE, WHOLE * 20),
        (b"", part(b"unknown", b"x" * 900)),
        (b"", part(b"id", b"")),
        (part(b"description", b"")[:-2], b"x" * 1000),
        (part(b"files", b"", b"adapter_config.json")[:-2], b" " * 1000),
        (part(b"files", b"", b"adapter_model.safetensors")[:-2], b"x" * 1000),
        (b"--" + BOUNDARY + b"\r\nX-Long: ", b"x" * 1000),
        (b"--" + BOUNDARY + b"\r\n", b"X-Many: y\r\n" * 100),
        (b"--" + BOUNDARY + b"\r\n", b"y" * 1000),
        (b"", b"--" + BOUNDARY + b"\r\n\r\n\r\n"),
    ],
)
async def test_the_size_limit_holds_for_every_framing(
    client: httpx.AsyncClient, nothing_left: None, monkeypatch: pytest.MonkeyPatch, opening: bytes, piece: bytes
) -> None:
    """No length is declared, and 4 MB would follow."""
    monkeypatch.setattr(routes, "_UPLOAD_SLACK_BYTES", 100_000)
    limit, sent = 64 * 1024 + 100_000, 0
    monkeypatch.setattr("server.api.http.multipart._LINGER_BYTES", 0)

    async def send() -> AsyncIterator[bytes]:
        nonlocal sent
        yield opening
        async for data in endless(piece)():
            sent += len(data)
            yield data

    headers = bearer("a") | {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
    response = await client.post("/v1/prompts", content=send(), headers=headers)
    assert response.status_code in {400, 413}, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert sent <= limit + 2 * len(piece)


async def test_bytes_are_counted_without_a_declared_length() -> None:
    read = 0

    async def send() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1000
            yield b"x" * 1000

    with pytest.raises(Exception, match="exceeds the limit of 5500 bytes"):
        async for _ in bounded(send(), 5500):
            pass
    assert read == 6000


async def test_a_configuration_has_a_separate_limit(store: CountingStore) -> None:
    assert MAX_CONFIG_BYTES < 512 * 1024 * 1024
    with store.upload() as upload:
        upload._max_bytes = 1 << 30
        assert upload.open("adapter_config.json")._max_bytes == MAX_CONFIG_BYTES
        assert upload.open("adapter_model.safetensors")._max_bytes == 1 << 30


def test_a_disconnect_during_an_upload_leaves_no_files(
    serve: Serve, upload_parts: UploadParts, settings: Settings, eventually: WaitUntil
) -> None:
    live = serve()
    root = settings.store.location
    before = files_of(root)

    async def half() -> None:
        async def send() -> AsyncIterator[bytes]:
            yield part(b"files", b"", b"adapter_model.safetensors")[:-2] + b"x" * 30_000
            await asyncio.to_thread(eventually, lambda: folders_of(root) == 1)  # the upload has started
            raise ZeroDivisionError

        headers = bearer("a") | {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
        async with httpx.AsyncClient() as client:
            with pytest.raises(ZeroDivisionError):
                await client.post(f"{live.url}/v1/prompts", content=send(), headers=headers)

    asyncio.run(half())
    eventually(lambda: files_of(root) == before and folders_of(root) == 0)
