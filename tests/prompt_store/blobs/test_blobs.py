"""The local directory of blobs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prompt_store import durable
from prompt_store.blobs import blobs as blobs_module
from prompt_store.blobs.blobs import BlobDirectory, TierCounters
from prompt_store.blobs.staging import Staging
from prompt_store.errors import BlobNotFoundError, CorruptBlobError

DATA = b"some bytes"


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


DIGEST = digest_of(DATA)


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobDirectory]:
    opened = BlobDirectory(tmp_path)
    yield opened
    opened.close()


def put(blobs: BlobDirectory, tmp_path: Path, data: bytes = DATA) -> str:
    staged = tmp_path / f"staged-{threading.get_ident()}"
    staged.write_bytes(data)
    blobs.put(staged, digest_of(data), len(data))
    assert not staged.exists()
    return digest_of(data)


def quarantined(tmp_path: Path) -> list[bytes]:
    return [file.read_bytes() for file in (tmp_path / "quarantine").iterdir()]


def test_a_stored_blob_is_fetched(blobs: BlobDirectory, tmp_path: Path) -> None:
    put(blobs, tmp_path)
    path = blobs.fetch(DIGEST, len(DATA))
    assert path == tmp_path / "blobs" / DIGEST[:2] / DIGEST
    assert path.read_bytes() == DATA
    assert list(blobs.digests()) == [DIGEST]


def test_a_missing_blob_is_an_error(blobs: BlobDirectory) -> None:
    with pytest.raises(BlobNotFoundError, match=f"{DIGEST} is missing"):
        blobs.fetch(DIGEST, len(DATA))
    blobs.delete(DIGEST)
    assert blobs.stats()[0].misses == 1


def test_the_digest_is_computed_once_and_again_only_after_a_change(
    blobs: BlobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(blobs, tmp_path)
    for _ in range(3):
        path = blobs.fetch(DIGEST, len(DATA))
    assert blobs.stats()[0].loads == 1
    os.utime(path, ns=(1, 1))
    blobs.fetch(DIGEST, len(DATA))
    assert blobs.stats()[0].loads == 2
    monkeypatch.setattr(blobs_module, "_MAX_VERIFIED", 1)
    other = put(blobs, tmp_path, b"other")
    blobs.fetch(other, 5)
    blobs.fetch(DIGEST, len(DATA))
    assert blobs.stats()[0].loads == 4
    assert blobs.stats()[0].hits == 6


@pytest.mark.parametrize("damage", [b"same bytes", b"short", b"", b"longer than it was"])
def test_a_damaged_blob_is_quarantined_and_repaired_by_another_put(
    damage: bytes, blobs: BlobDirectory, tmp_path: Path
) -> None:
    put(blobs, tmp_path)
    blobs.fetch(DIGEST, len(DATA)).write_bytes(damage)
    with pytest.raises(CorruptBlobError, match="put aside") as caught:
        blobs.fetch(DIGEST, len(DATA))
    assert not isinstance(caught.value, BlobNotFoundError)
    assert quarantined(tmp_path) == [damage]
    with pytest.raises(BlobNotFoundError):
        blobs.fetch(DIGEST, len(DATA))
    put(blobs, tmp_path)
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    assert blobs.stats()[0].corrupt == 1


@pytest.mark.parametrize("damage", [b"same bytes", b"short"])
def test_another_put_repairs_undetected_damage(damage: bytes, blobs: BlobDirectory, tmp_path: Path) -> None:
    put(blobs, tmp_path)
    blobs.path(DIGEST).write_bytes(damage)
    put(blobs, tmp_path)
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA
    assert quarantined(tmp_path) == [damage]


def test_an_intact_blob_is_synced_and_not_written_again(
    blobs: BlobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(blobs, tmp_path)
    inode = blobs.path(DIGEST).stat().st_ino
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync", synced.append)
    put(blobs, tmp_path)
    assert blobs.path(DIGEST).stat().st_ino == inode
    assert synced == [blobs.path(DIGEST), blobs.path(DIGEST).parent, tmp_path / "blobs"]


def test_a_blob_deleted_during_a_put_is_written(
    blobs: BlobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(blobs, tmp_path)
    sync = durable.sync

    def delete_first(path: Path) -> None:
        monkeypatch.setattr(durable, "sync", sync)
        blobs.delete(DIGEST)
        sync(path)

    monkeypatch.setattr(durable, "sync", delete_first)
    put(blobs, tmp_path)
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA


def test_an_intact_copy_that_replaced_a_damaged_one_is_not_quarantined(
    blobs: BlobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(blobs, tmp_path)
    blobs.path(DIGEST).write_bytes(b"same bytes")

    def healed_while_read(path: Path) -> str:
        fresh = tmp_path / "fresh"
        fresh.write_bytes(DATA)
        fresh.rename(path)
        return digest_of(b"same bytes")

    with monkeypatch.context() as patch:
        patch.setattr(blobs_module, "sha256_of", healed_while_read)
        with pytest.raises(CorruptBlobError):
            blobs.fetch(DIGEST, len(DATA))
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA


def test_a_pinned_blob_is_deleted_by_the_last_unpin(blobs: BlobDirectory, tmp_path: Path) -> None:
    put(blobs, tmp_path)
    blobs.pin(DIGEST)
    blobs.pin(DIGEST)
    blobs.delete(DIGEST)
    blobs.unpin(DIGEST)
    assert blobs.fetch(DIGEST, len(DATA)).exists()
    blobs.unpin(DIGEST)
    with pytest.raises(BlobNotFoundError):
        blobs.fetch(DIGEST, len(DATA))
    with pytest.raises(ValueError, match="not pinned"):
        blobs.unpin(DIGEST)


def test_another_put_cancels_a_pending_deletion(blobs: BlobDirectory, tmp_path: Path) -> None:
    put(blobs, tmp_path)
    blobs.pin(DIGEST)
    blobs.delete(DIGEST)
    put(blobs, tmp_path)
    blobs.unpin(DIGEST)
    assert blobs.fetch(DIGEST, len(DATA)).read_bytes() == DATA


def test_threads_compute_the_digest_of_a_first_use_once(blobs: BlobDirectory, tmp_path: Path) -> None:
    data = bytes(4_000_000)
    digest = put(blobs, tmp_path, data)
    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(lambda _: blobs.fetch(digest, len(data)), range(16)))
    assert len(set(paths)) == 1
    assert blobs.stats()[0].loads == 1


def test_threads_put_equal_and_different_blobs(blobs: BlobDirectory, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda turn: put(blobs, tmp_path, b"%d" % (turn % 5)), range(40)))
    assert set(blobs.digests()) == digests
    assert all(digest_of(blobs.fetch(digest, 1).read_bytes()) == digest for digest in digests)
    stats = blobs.stats()[0]
    assert (stats.tier, stats.resident, stats.resident_bytes, stats.budget_bytes) == ("disk", None, None, None)


def test_a_killed_process_leaves_no_partial_blob(tmp_path: Path) -> None:
    code = f"""
import hashlib, itertools
from pathlib import Path
from prompt_store.blobs.blobs import BlobDirectory
from prompt_store.blobs.staging import Staging
path = Path({str(tmp_path)!r})
blobs, staging = BlobDirectory(path), Staging(path)
for turn in itertools.count():
    with staging.upload(1 << 20) as upload:
        with upload.open("adapter_config.json") as file:
            file.write(str(turn).encode() * 20_000)
        stored = file.stored
        blobs.put(upload.path("adapter_config.json"), stored.sha256, stored.size)
        print(stored.sha256, stored.size, flush=True)
"""
    acknowledged: list[tuple[str, int]] = []
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(7):
                words = process.stdout.readline().split()
                acknowledged.append((words[0], int(words[1])))
            process.kill()
    reopened = BlobDirectory(tmp_path)
    for digest, size in acknowledged:
        assert reopened.fetch(digest, size).stat().st_size == size
    assert all(digest_of(reopened.path(digest).read_bytes()) == digest for digest in reopened.digests())
    staging = Staging(tmp_path)
    assert [file for file in (tmp_path / "staging").glob("*/*") if file.name != "lock"] == []
    staging.close()


def test_stats_are_a_snapshot() -> None:
    counters = TierCounters("disk", budget_bytes=9)
    for seconds in (0.001, 0.3, 99.0):
        counters.count_load(seconds)
    counters.count("evictions")
    stats = counters.stats(1, 2)
    assert (stats.loads, stats.evictions, stats.resident, stats.resident_bytes, stats.budget_bytes) == (3, 1, 1, 2, 9)
    counters.count_load(0.3)
    assert (stats.loads, counters.stats().loads) == (3, 4)
