"""Blobs in an object store: a folder, and an S3 server (moto)."""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pytest

from prompt_store.blobs import object_store
from prompt_store.blobs.object_store import ObjectBlobs
from prompt_store.errors import BlobNotFoundError, CorruptBlobError, PromptStoreError, StoreUnavailableError
from tests.prompt_store.s3_server import BUCKET, Server, s3_server

BUDGET = 10_000_000
DATA = b"some bytes"


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


DIGEST = digest_of(DATA)
KEY = f"blobs/{DIGEST[:2]}/{DIGEST}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as started:
        yield started


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL with a prefix for this test."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}/prefix"


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return "memory:///" if request.param == "memory" else f"file://{tmp_path}/objects"


Open = Callable[..., ObjectBlobs]


@pytest.fixture
def open_blobs(tmp_path: Path) -> Iterator[Open]:
    opened = []

    def run(url: str, name: str = "cache", budget_bytes: int = BUDGET, **options: Any) -> ObjectBlobs:
        blobs = ObjectBlobs(url, tmp_path / name, budget_bytes, **options)
        opened.append(blobs)
        return blobs

    yield run
    for blobs in opened:
        blobs.close()


def put(blobs: ObjectBlobs, tmp_path: Path, data: bytes = DATA) -> str:
    staged = tmp_path / "staged"
    staged.write_bytes(data)
    blobs.put(staged, digest_of(data), len(data))
    assert not staged.exists()
    return digest_of(data)


def keys(blobs: ObjectBlobs, prefix: str = "") -> list[str]:
    return [meta["path"] for page in obstore.list(blobs._store, prefix or None) for meta in page]


def downloads(blobs: ObjectBlobs) -> int:
    return blobs.stats()[1].loads


def test_a_stored_blob_is_fetched_from_the_cache_and_the_store(url: str, open_blobs: Open, tmp_path: Path) -> None:
    blobs = open_blobs(url)
    put(blobs, tmp_path)
    assert keys(blobs) == [KEY]
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    assert downloads(blobs) == 0
    blobs._cache.drop(DIGEST)
    for _ in range(3):
        assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    disk, remote = blobs.stats()
    assert (disk.tier, disk.hits, disk.misses, disk.resident, disk.budget_bytes) == ("disk", 3, 1, 1, BUDGET)
    assert (remote.tier, remote.hits, remote.loads, remote.resident) == ("object_store", 1, 1, None)


def test_large_and_empty_blobs(s3: str, open_blobs: Open, tmp_path: Path) -> None:
    blobs = open_blobs(s3)
    for data in (os.urandom(6_000_000), b""):  # several parts, and none
        digest = put(blobs, tmp_path, data)
        blobs._cache.drop(digest)
        assert blobs.fetch(digest, len(data)).read_bytes() == data


def test_replicas_see_each_others_blobs(s3: str, open_blobs: Open, tmp_path: Path) -> None:
    put(open_blobs(s3), tmp_path)
    assert open_blobs(s3, "other").fetch(DIGEST, len(DATA)).read_bytes() == DATA


def test_a_missing_blob_is_an_error(url: str, open_blobs: Open) -> None:
    blobs = open_blobs(url)
    with pytest.raises(BlobNotFoundError, match=DIGEST):
        blobs.fetch(DIGEST, len(DATA))
    blobs.delete(DIGEST)
    assert blobs.stats()[1].misses == 1


def test_a_missing_bucket_is_not_a_missing_blob(s3: str, open_blobs: Open, tmp_path: Path) -> None:
    blobs = open_blobs("s3://another-bucket/prefix")
    with pytest.raises(StoreUnavailableError, match="no such bucket"):
        blobs.fetch(DIGEST, len(DATA))
    with pytest.raises(StoreUnavailableError):
        put(blobs, tmp_path)
    assert (tmp_path / "staged").read_bytes() == DATA
    with pytest.raises(StoreUnavailableError):
        blobs.delete(DIGEST)


@pytest.mark.parametrize("damage", [b"same bytes", b"short", b"", b"longer than it was"])
def test_a_damaged_object_is_quarantined_and_repaired_by_another_put(
    damage: bytes, url: str, open_blobs: Open, tmp_path: Path
) -> None:
    blobs = open_blobs(url)
    put(blobs, tmp_path)
    blobs._cache.drop(DIGEST)
    obstore.put(blobs._store, KEY, damage)
    with pytest.raises(CorruptBlobError, match="does not match its digest") as caught:
        blobs.fetch(DIGEST, len(DATA))
    assert not isinstance(caught.value, BlobNotFoundError)
    (aside,) = keys(blobs, "quarantine")
    assert aside.startswith(f"quarantine/{DIGEST}-")
    assert bytes(obstore.get(blobs._store, aside).bytes()) == damage
    with pytest.raises(BlobNotFoundError):
        blobs.fetch(DIGEST, len(DATA))
    put(blobs, tmp_path)
    blobs._cache.drop(DIGEST)
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    assert blobs.stats()[1].corrupt == 1
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []


def test_damage_that_cannot_be_quarantined_stays_and_is_repaired(
    s3: str, open_blobs: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = open_blobs(s3)
    put(blobs, tmp_path)
    blobs._cache.drop(DIGEST)
    obstore.put(blobs._store, KEY, b"same bytes", attributes={"sha256": DIGEST})

    def refuse(*args: object) -> None:
        raise PermissionError("read only")

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "copy", refuse)
        with pytest.raises(CorruptBlobError):
            blobs.fetch(DIGEST, len(DATA))
    assert keys(blobs) == [KEY]
    put(blobs, tmp_path)  # although size and attribute are right
    blobs._cache.drop(DIGEST)
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA


def test_damage_in_transfer_quarantines_nothing(
    url: str, open_blobs: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = open_blobs(url)
    put(blobs, tmp_path)
    blobs._cache.drop(DIGEST)
    download = blobs._download
    answers = iter([("tag", False)])
    monkeypatch.setattr(blobs, "_download", lambda *args: next(answers, None) or download(*args))
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    assert keys(blobs) == [KEY]


def test_an_object_repaired_meanwhile_is_not_removed(
    s3: str, open_blobs: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = open_blobs(s3)
    put(blobs, tmp_path)
    blobs._cache.drop(DIGEST)
    obstore.put(blobs._store, KEY, b"same bytes")
    copy = obstore.copy

    def heal_after(*args: Any) -> None:
        copy(*args)
        obstore.put(blobs._store, KEY, DATA)

    monkeypatch.setattr(obstore, "copy", heal_after)
    with pytest.raises(CorruptBlobError):
        blobs.fetch(DIGEST, len(DATA))
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA


def test_at_most_the_expected_bytes_are_downloaded(
    open_blobs: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = open_blobs("memory:///")
    put(blobs, tmp_path)
    blobs._cache.drop(DIGEST)
    endless = SimpleNamespace(
        meta={"size": len(DATA), "e_tag": "a"}, stream=lambda min_chunk_size: itertools.repeat(DATA)
    )
    monkeypatch.setattr(obstore, "get", lambda *args: endless)
    with pytest.raises(CorruptBlobError):
        blobs.fetch(DIGEST, len(DATA))


def test_a_copy_that_another_thread_downloaded_is_used(open_blobs: Open, tmp_path: Path) -> None:
    blobs = open_blobs("memory:///")
    put(blobs, tmp_path)
    assert blobs._load(DIGEST, len(DATA)).read_bytes() == DATA
    assert downloads(blobs) == 0


def test_a_killed_process_leaves_intact_objects_and_a_usable_cache(open_blobs: Open, tmp_path: Path) -> None:
    code = f"""
import hashlib, itertools
from pathlib import Path
from prompt_store.blobs.object_store import ObjectBlobs
from tests.prompt_store.s3_server import BUCKET, Server, s3_server
path = Path({str(tmp_path)!r})
blobs = ObjectBlobs("file://{tmp_path}/objects", path / "cache", {BUDGET})
for turn in itertools.count():
    data = str(turn).encode() * 100_000
    (path / "staged").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    blobs.put(path / "staged", digest, len(data))
    blobs._cache.drop(digest)
    blobs.fetch(digest, len(data))
    print(digest, len(data), flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().split() for _ in range(20)]
        process.kill()
    (tmp_path / "staged").unlink(missing_ok=True)
    blobs = open_blobs(f"file://{tmp_path}/objects")
    for digest, size in acknowledged:
        for _ in range(2):
            assert digest_of(blobs.fetch(digest, int(size)).read_bytes()) == digest
            blobs._cache.drop(digest)
    blobs._cache.check_integrity()


def test_an_intact_object_is_not_uploaded_again(
    s3: str, open_blobs: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = open_blobs(s3)
    uploads = []
    real_put = obstore.put

    def counting(*args: Any, **options: Any) -> object:
        uploads.append(args[1])
        return real_put(*args, **options)

    monkeypatch.setattr(obstore, "put", counting)
    put(blobs, tmp_path)
    put(blobs, tmp_path)
    assert uploads == [KEY]
    real_put(blobs._store, KEY, b"same bytes")  # right size, but nobody's word for the digest
    put(blobs, tmp_path)
    assert uploads == [KEY, KEY]


def test_a_file_of_another_size_is_rejected(open_blobs: Open, tmp_path: Path) -> None:
    blobs = open_blobs("memory:///")
    (tmp_path / "staged").write_bytes(DATA)
    with pytest.raises(ValueError, match="has 10 bytes, not 11"):
        blobs.put(tmp_path / "staged", DIGEST, 11)
    assert keys(blobs) == []


def test_a_cache_on_another_file_system_is_filled_at_first_use(
    open_blobs: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = open_blobs("memory:///")

    def refuse(*args: object, **options: Any) -> Path:
        raise OSError(18, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(blobs._cache, "admit", refuse)
        put(blobs, tmp_path)
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    assert downloads(blobs) == 1


def test_a_deleted_blob_keeps_its_pinned_copy_until_the_last_unpin(
    url: str, open_blobs: Open, tmp_path: Path
) -> None:
    blobs = open_blobs(url)
    put(blobs, tmp_path)
    blobs.pin(DIGEST)
    path = blobs.fetch(DIGEST, len(DATA))
    blobs.delete(DIGEST)
    assert keys(blobs) == []
    assert path.read_bytes() == DATA
    blobs.unpin(DIGEST)
    assert not path.exists()


def test_sixteen_threads_download_a_first_use_once(s3: str, open_blobs: Open, tmp_path: Path) -> None:
    put(open_blobs(s3), tmp_path, bytes(2_000_000))
    digest = digest_of(bytes(2_000_000))
    blobs = open_blobs(s3, "other")
    barrier = threading.Barrier(16)

    def fetch(_: int) -> bytes:
        blobs.pin(digest)
        barrier.wait()
        return blobs.fetch(digest, 2_000_000).read_bytes()

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(fetch, range(16))) == {bytes(2_000_000)}
    assert downloads(blobs) == 1
    assert blobs.stats()[0].misses <= 16


def test_the_budget_is_kept_under_concurrent_fetches(open_blobs: Open, tmp_path: Path) -> None:
    blobs = open_blobs("memory:///", budget_bytes=350)
    digests = [put(blobs, tmp_path, bytes([n]) * 100) for n in range(10)]

    def work(turn: int) -> None:
        digest = digests[turn * 7 % 10]
        blobs.pin(digest)
        assert digest_of(blobs.fetch(digest, 100).read_bytes()) == digest
        blobs.unpin(digest)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    blobs._cache.check_integrity()
    disk = blobs.stats()[0]
    assert disk.resident_bytes is not None
    assert disk.resident_bytes <= 350
    assert disk.evictions > 0


def test_a_stopped_server_is_reported_and_the_cache_still_serves(
    open_blobs: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto")
    server = Server()
    server.create_bucket()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    blobs = open_blobs(f"s3://{BUCKET}/prefix")
    put(blobs, tmp_path)
    other = put(blobs, tmp_path, b"other")
    blobs._cache.drop(other)
    server.stop()
    started = time.monotonic()
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    with pytest.raises(StoreUnavailableError, match="downloading blob") as caught:
        blobs.fetch(other, 5)
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreUnavailableError, match="looking for"):
        put(blobs, tmp_path)
    assert (tmp_path / "staged").read_bytes() == DATA
    with pytest.raises(StoreUnavailableError, match="deleting"):
        blobs.delete(DIGEST)
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    assert time.monotonic() - started < 5
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []


HALF_AN_ANSWER = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\nLast-Modified: Tue, 24 Nov 2026 20:00:00 GMT\r\nETag: "a"\r\n\r\nsome'
)


@pytest.mark.parametrize("answer", [b"", HALF_AN_ANSWER], ids=["at once", "in the middle"])
def test_a_stalled_request_times_out(
    answer: bytes, open_blobs: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connections = []
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    break
                connections.append(connection)
                connection.sendall(answer)
            for connection in connections:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ALLOW_HTTP"):
            monkeypatch.setenv(name, "true")
        blobs = open_blobs(f"s3://{BUCKET}", stall_timeout=0.2, max_retries=1)
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            blobs.fetch(DIGEST, len(DATA))
        assert time.monotonic() - started < 5
        assert list((tmp_path / "cache" / "incoming").iterdir()) == []
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("url", ["http://example.org/x", "/a/folder", "s3://", "file://not-local/x"])
def test_other_urls_are_rejected(url: str, open_blobs: Open) -> None:
    with pytest.raises(PromptStoreError, match="is not an object store|cannot be opened"):
        open_blobs(url)


def test_the_cache_belongs_to_one_process(open_blobs: Open) -> None:
    open_blobs("memory:///")
    with pytest.raises(PromptStoreError, match="in use by another process"):
        open_blobs("memory:///")


def test_without_obstore_the_error_names_the_extra(open_blobs: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "has_obstore", False)
    with pytest.raises(PromptStoreError, match=r"pip install 'prelude-server\[objects\]'"):
        open_blobs("memory:///")


def test_the_module_can_be_imported_without_obstore() -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from prompt_store.blobs import object_store\n"
        "print(object_store.has_obstore)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
