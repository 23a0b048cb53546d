"""The directory of local copies and its budget."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prompt_store.blobs.blob_cache import BlobCache
from prompt_store.errors import PromptStoreError
from tests.support.presence import present

BUDGET = 100
BLOBS = {hashlib.sha256(data).hexdigest(): data for data in (bytes([65 + n]) * (10 + 15 * n) for n in range(8))}
"""Of 10 to 115 bytes: the last is larger than the whole budget."""
DIGESTS = list(BLOBS)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlobCache]:
    opened = BlobCache(tmp_path, BUDGET)
    yield opened
    opened.check_integrity()
    opened.close()


def admit(cache: BlobCache, digest: str, *, is_verified: bool = True) -> Path:
    file = cache.new_file()
    file.write_bytes(BLOBS[digest])
    return cache.admit(file, digest, len(BLOBS[digest]), is_verified=is_verified)


def get(cache: BlobCache, digest: str) -> Path | None:
    return cache.get(digest, len(BLOBS[digest]))


def resident(cache: BlobCache) -> set[str]:
    return {digest for digest in DIGESTS if (cache._blobs / digest).exists()}


def test_the_least_recently_used_goes_first(cache: BlobCache) -> None:
    first, second, third = DIGESTS[1], DIGESTS[2], DIGESTS[3]  # 25, 40, 55 bytes
    admit(cache, first)
    admit(cache, second)
    assert get(cache, first) is not None
    admit(cache, third)
    assert resident(cache) == {first, third}
    assert get(cache, second) is None
    stats = cache.stats()
    assert (stats.resident, stats.resident_bytes, stats.budget_bytes) == (2, 80, BUDGET)
    assert (stats.hits, stats.misses, stats.evictions, stats.loads) == (1, 1, 1, 0)


def test_pinned_copies_stay_over_the_budget(cache: BlobCache) -> None:
    for digest in DIGESTS[3:6]:  # 55, 70, 85 bytes
        cache.pin(digest)
        admit(cache, digest)
    assert resident(cache) == set(DIGESTS[3:6])
    cache.unpin(DIGESTS[4])
    assert resident(cache) == {DIGESTS[3], DIGESTS[5]}
    cache.unpin(DIGESTS[3])
    assert resident(cache) == {DIGESTS[5]}
    with pytest.raises(ValueError, match="not pinned"):
        cache.unpin(DIGESTS[3])
    cache.unpin(DIGESTS[5])


def test_a_blob_larger_than_the_budget_stays_while_pinned(cache: BlobCache) -> None:
    cache.pin(DIGESTS[7])
    assert admit(cache, DIGESTS[7]).read_bytes() == BLOBS[DIGESTS[7]]
    cache.unpin(DIGESTS[7])
    assert resident(cache) == set()
    assert admit(cache, DIGESTS[7]).exists()  # never pinned: until the next comes
    admit(cache, DIGESTS[0])
    assert resident(cache) == {DIGESTS[0]}


def test_dropping_waits_for_the_last_unpin_and_admitting_cancels_it(cache: BlobCache) -> None:
    digest = DIGESTS[0]
    cache.drop(digest)
    cache.pin(digest)
    admit(cache, digest)
    cache.drop(digest)
    assert get(cache, digest) is not None
    cache.unpin(digest)
    assert resident(cache) == set()
    cache.pin(digest)
    admit(cache, digest)
    cache.drop(digest)
    admit(cache, digest)
    cache.unpin(digest)
    assert resident(cache) == {digest}


def test_a_restart_keeps_copies_and_their_order_and_removes_partial_files(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, BUDGET)
    for turn, digest in enumerate((DIGESTS[2], DIGESTS[1], DIGESTS[0])):
        os.utime(admit(cache, digest), ns=(turn, turn))
    assert get(cache, DIGESTS[2]) is not None
    cache.new_file().write_bytes(b"half")
    cache.close()
    cache = BlobCache(tmp_path, BUDGET)
    assert list((tmp_path / "incoming").iterdir()) == []
    assert cache.stats().resident_bytes == 75
    admit(cache, DIGESTS[3])
    assert resident(cache) == {DIGESTS[2], DIGESTS[3]}
    cache.check_integrity()
    cache.close()
    cache = BlobCache(tmp_path, 60)  # a smaller budget holds from the start
    assert resident(cache) == {DIGESTS[3]}
    cache.close()


def test_copies_found_at_the_start_are_verified_at_first_use(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, BUDGET)
    whole, damaged, short = DIGESTS[:3]
    for digest in (whole, damaged, short):
        admit(cache, digest)
    cache.close()
    (tmp_path / "blobs" / damaged).write_bytes(b"x" * len(BLOBS[damaged]))
    (tmp_path / "blobs" / short).write_bytes(b"x")
    cache = BlobCache(tmp_path, BUDGET)
    for _ in range(2):
        assert get(cache, whole) is not None
    assert get(cache, damaged) is None
    assert get(cache, short) is None
    assert resident(cache) == {whole}
    stats = cache.stats()
    assert (stats.loads, stats.corrupt, stats.hits, stats.misses) == (2, 2, 2, 2)
    cache.check_integrity()
    cache.close()


def test_a_copy_removed_by_another_program_is_a_miss(cache: BlobCache) -> None:
    admit(cache, DIGESTS[0]).unlink()
    assert get(cache, DIGESTS[0]) is None
    assert cache.get(DIGESTS[0], 10, again=True) is None
    assert (cache.stats().resident_bytes, cache.stats().misses) == (0, 1)


def test_one_process_at_a_time_and_unlocked_after_a_kill(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from prompt_store.blobs.blob_cache import BlobCache
cache = BlobCache(Path({str(tmp_path)!r}), 100)
cache.new_file().write_bytes(b"half")
print("ready", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(PromptStoreError, match="in use by another process"):
            BlobCache(tmp_path, BUDGET)
        other.kill()
    cache = BlobCache(tmp_path, BUDGET)
    assert list((tmp_path / "incoming").iterdir()) == []
    cache.close()


def test_threads_stay_within_the_budget_and_read_the_right_bytes(cache: BlobCache) -> None:
    def work(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(60):
            digest = choice.choice(DIGESTS)
            cache.pin(digest)
            path = get(cache, digest) or admit(cache, digest, is_verified=choice.random() < 0.5)
            assert path.read_bytes() == BLOBS[digest]
            if choice.random() < 0.2:
                cache.drop(digest)
            cache.check_integrity()
            cache.unpin(digest)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert present(cache.stats().resident_bytes) <= BUDGET


class CacheMachine(RuleBasedStateMachine):
    """Fetches, pins, deletions, damage and restarts in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.cache = BlobCache(Path(self.folder.name), BUDGET)
        self.pins: Counter[str] = Counter()
        self.fetched_last: str | None = None

    def teardown(self) -> None:
        self.cache.close()
        self.folder.cleanup()

    @rule(digest=st.sampled_from(DIGESTS), is_verified=st.booleans())
    def fetch(self, digest: str, is_verified: bool) -> None:
        path = get(self.cache, digest)
        if path is None:
            path = admit(self.cache, digest, is_verified=is_verified)
            self.fetched_last = digest
        assert path.read_bytes() == BLOBS[digest]

    @rule(digest=st.sampled_from(DIGESTS))
    def pin(self, digest: str) -> None:
        self.cache.pin(digest)
        self.pins[digest] += 1

    @rule(digest=st.sampled_from(DIGESTS))
    def unpin(self, digest: str) -> None:
        if self.pins[digest]:
            self.cache.unpin(digest)
            self.pins[digest] -= 1
        else:
            with pytest.raises(ValueError, match="not pinned"):
                self.cache.unpin(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def pin_and_fetch(self, digest: str) -> None:
        self.pin(digest)
        self.fetch(digest, is_verified=True)

    @rule(digest=st.sampled_from(DIGESTS))
    def delete(self, digest: str) -> None:
        was_there = digest in resident(self.cache)
        self.cache.drop(digest)
        assert (digest in resident(self.cache)) == (was_there and self.pins[digest] > 0)

    @rule(digest=st.sampled_from(DIGESTS))
    def restart_with_one_damaged(self, digest: str) -> None:
        self.cache.close()
        path = Path(self.folder.name) / "blobs" / digest
        if path.exists():
            path.write_bytes(b"?" * len(BLOBS[digest]))
        self.cache = BlobCache(Path(self.folder.name), BUDGET)
        self.pins.clear()
        assert present(self.cache.stats().resident_bytes) <= BUDGET

    @invariant()
    def the_budget_is_kept(self) -> None:
        self.cache.check_integrity()
        here = resident(self.cache)
        loose = {digest for digest in here if not self.pins[digest]}
        pinned_bytes = sum(len(BLOBS[digest]) for digest in here - loose)
        if loose != {self.fetched_last}:
            assert present(self.cache.stats().resident_bytes) <= BUDGET + pinned_bytes


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase


def test_asking_for_a_copy_is_no_use_of_it(cache: BlobCache) -> None:
    first, second = DIGESTS[:2]
    admit(cache, first)
    admit(cache, second)
    before = cache.stats()
    assert cache.has(first)
    assert not cache.has(DIGESTS[2])
    assert cache.stats() == before
    admit(cache, DIGESTS[5])  # 85 bytes: what was used least recently has to go
    assert not cache.has(first)
