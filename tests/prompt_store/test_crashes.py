"""A few rounds of the script that kills a writing store, and proof that its checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import crash_store

pytestmark = pytest.mark.slow


def test_a_store_killed_at_random_moments_loses_and_leaves_nothing(tmp_path: Path) -> None:
    assert crash_store.run_rounds(tmp_path / "store", 20, seed=1, is_quiet=True) >= 20


def test_the_check_detects_losses_and_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    states = {"name-0": crash_store.Expected()}
    assert crash_store.run_round(folder, states, seed=3) > 0
    while not states["name-0"].versions:
        crash_store.run_round(folder, states, seed=4)
    version = max(states["name-0"].versions)
    lost = {"name-0": states["name-0"].copy()}
    del lost["name-0"].versions[version]
    with pytest.raises(AssertionError, match="name-0 is"):
        crash_store.check(folder, lost, {})
    (folder / "blobs" / "ab").mkdir(exist_ok=True)
    (folder / "blobs" / "ab" / "ab01").touch()
    with pytest.raises(AssertionError, match="unreferenced blobs"):
        crash_store.check(folder, states, {})
