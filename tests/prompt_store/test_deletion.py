"""Deleted versions keep their files until they can no longer be restored."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from prompt_store.blobs import collector
from prompt_store.errors import PromptInUseError, PromptNotFoundError
from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import PromptRef
from tests.prompt_store.conftest import Publish
from tests.prompt_store.databases import postgres_url
from tests.support.waiting import wait_until

Files = dict[str, tuple[bytes, bytes]]


def num_blobs(folder: Path) -> int:
    return sum(1 for _ in (folder / "blobs").glob("*/*"))


def test_a_restored_version_has_its_files(
    store: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    publish(store, peft_files["p_tuning"])
    with pytest.raises(PromptInUseError):
        store.delete_version("p", 1)
    before = time.time()
    deletion = store.delete_version("p", 1, force=True)
    until = store.restorable_until(deletion)
    assert until is not None
    assert before <= until - collector.RETENTION_SECONDS <= time.time()
    with pytest.raises(PromptNotFoundError):
        store.resolve(PromptRef("p"))
    store.collect()
    assert num_blobs(tmp_path / "store") == 2
    assert store.restore("p").aliases == {"latest": 1}
    with store.leased(PromptRef("p")) as leased:
        assert leased.weights_path.read_bytes() == peft_files["p_tuning"][1]


def test_a_lookup_cached_before_a_restoration_is_not_used_after_it(
    store: PromptStore, publish: Publish, peft_files: Files
) -> None:
    publish(store, peft_files["p_tuning"])
    publish(store, peft_files["prompt_tuning"])
    store.delete_version("p", 2, force=True)
    store.set_alias("p", "latest", 1)
    assert store.resolve(PromptRef("p")).version == 1
    store.delete_alias("p", "latest")
    store.restore("p")
    assert store.resolve(PromptRef("p")).version == 2


def test_after_the_retention_time_the_files_are_removed(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    folder = tmp_path / "store"
    store = open_store(folder)
    publish(store, peft_files["p_tuning"])
    publish(store, peft_files["prompt_tuning"], name="q")
    store.delete_prompt("p")
    store.close()
    connection = sqlite3.connect(folder / "catalog.sqlite3")
    week = int(collector.RETENTION_SECONDS * 1e6)
    connection.execute("UPDATE versions SET deleted_at = deleted_at - ? WHERE deleted_at IS NOT NULL", (week,))
    connection.commit()
    connection.close()
    store = open_store(folder)
    assert num_blobs(folder) == 2
    with pytest.raises(PromptNotFoundError, match="too late to restore it"):
        store.restore("p", 1)
    store.close()


def test_a_running_store_removes_the_files_by_itself(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    store = open_store(tmp_path / "store", retention_seconds=0.1)
    publish(store, peft_files["p_tuning"])
    store.delete_prompt("p")
    assert num_blobs(tmp_path / "store") == 2
    wait_until(lambda: num_blobs(tmp_path / "store") == 0, 10.0)
    store.close()


def test_without_retention_a_deletion_is_final(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    store = open_store(tmp_path / "store", retention_seconds=0)
    publish(store, peft_files["p_tuning"])
    assert store.restorable_until(store.delete_prompt("p")) is None
    assert num_blobs(tmp_path / "store") == 0
    with pytest.raises(PromptNotFoundError, match="no deleted version"):
        store.restore("p")
    store.close()


def test_replicas_restore_what_another_deleted(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    with postgres_url() as url:
        here, there = (open_store(tmp_path / "shared", catalog_url=url) for _ in range(2))
        try:
            publish(here, peft_files["p_tuning"])
            here.delete_prompt("p")
            assert there.restore("p").versions == (1,)
            assert there.read_file("p", 1, "adapter_config.json") == peft_files["p_tuning"][0]
            wait_until(lambda: here.resolve(PromptRef("p")).version == 1, 2.0)
        finally:
            here.close()
            there.close()
