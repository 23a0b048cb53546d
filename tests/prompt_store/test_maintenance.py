"""Backup, restoration and verification, on both databases and on an object store."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

import prompt_store.catalog
from prompt_store.blobs.blobs import BlobDirectory
from prompt_store.errors import CorruptBlobError, PromptConflictError, PromptStoreError
from prompt_store.maintenance import backup, copying
from prompt_store.maintenance.backup import back_up, restore
from prompt_store.maintenance.verification import verify
from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import PromptRef
from tests.prompt_store.conftest import Publish
from tests.prompt_store.databases import postgres_url

MIGRATIONS = Path(prompt_store.catalog.__file__).parent / "migrations" / "versions"
SCHEMA = max(path.name[1:5] for path in MIGRATIONS.glob("v*.py"))
"""The newest revision of the catalog's schema."""

Files = dict[str, tuple[bytes, bytes]]
Place = tuple[str, str | None]
"""The location of a store and the URL of its catalog."""


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield str(tmp_path / "store"), None
        return
    with postgres_url() as url:
        yield str(tmp_path / "store"), url


@pytest.fixture
def running(place: Place, publish: Publish, peft_files: Files) -> Iterator[PromptStore]:
    """A store in use: two names, an alias, and a deleted version that can be restored."""
    store = open_store(place[0], catalog_url=place[1])
    publish(store, peft_files["p_tuning"], tags=["t"], metadata={"k": [1]}, description="one", actor="ada")
    publish(store, peft_files["prompt_tuning"], alias="canary")
    publish(store, peft_files["prefix_tuning"], alias=None)
    publish(store, peft_files["p_tuning"], name="q", owner="tenant")
    store.delete_version("p", 3)
    yield store
    store.close()


def content(store: PromptStore) -> object:
    names = store.list_prompts()[0]
    versions = [store.list_versions(summary.name)[0] for summary in names]
    files = [
        store.read_file(version.name, version.version, file.filename)
        for page in versions
        for version in page
        for file in version.files
    ]
    return names, versions, files, [store.list_history(summary.name)[0] for summary in names]


def blob_path(location: str | Path, store: PromptStore, name: str) -> Path:
    digest = store.resolve(PromptRef(name)).files[1].sha256
    return Path(location) / "blobs" / digest[:2] / digest


@pytest.mark.parametrize("form", ["backup", "backup.tar"])
@pytest.mark.parametrize("to", ["sqlite", "postgresql"])
def test_a_backup_of_a_running_store_is_restored(
    place: Place, running: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path, form: str, to: str
) -> None:
    report = back_up(*place, tmp_path / form)
    assert (report.prompts, report.versions, report.blobs, report.damaged) == (2, 3, 6, ())
    before = content(running)
    publish(running, peft_files["cpt"], name="later")
    with postgres_url() as url:
        target = str(tmp_path / "new"), (url if to == "postgresql" else None)
        assert restore(tmp_path / form, *target).versions == 3
        assert verify(*target).faults == verify(*target).orphans == ()
        store = open_store(target[0], catalog_url=target[1])
        assert content(store) == before
        assert store.restore("p", 3).versions == (3,)
        assert publish(store, peft_files["cpt"], alias=None)[0].version == 4
        store.close()
        with pytest.raises(PromptConflictError, match="is not empty: restore into a new store"):
            restore(tmp_path / form, *target)


def test_changes_in_the_write_ahead_log_are_in_the_backup(
    tmp_path: Path, publish: Publish, peft_files: Files
) -> None:
    store = open_store(tmp_path / "store")
    publish(store, peft_files["p_tuning"])
    log = tmp_path / "store" / "catalog.sqlite3-wal"
    assert log.stat().st_size > 0
    copied = tmp_path / "alone"
    copied.mkdir()
    shutil.copy(tmp_path / "store" / "catalog.sqlite3", copied)
    back_up(str(tmp_path / "store"), None, tmp_path / "backup")
    without_log = open_store(copied)
    assert without_log.list_prompts() == ([], False)  # the catalog's file alone has lost everything
    without_log.close()
    backed = open_store(tmp_path / "backup")  # a backup in a directory is a store
    assert backed.get_prompt("p").num_versions == 1
    backed.close()
    store.close()


def test_a_second_backup_copies_only_what_is_new(
    place: Place, running: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    target = tmp_path / "backup"
    assert back_up(*place, target).copied == 6
    gone = blob_path(target, running, "q")
    running.delete_prompt("q")
    running.delete_prompt("p", force=True)
    running._catalog.forget_deleted(2**62)
    publish(running, peft_files["cpt"])
    assert back_up(*place, target).copied == 2
    assert not gone.exists()
    assert sum(1 for _ in target.glob("blobs/*/*")) == 2
    assert json.loads((target / "backup.json").read_text())["versions"] == 1
    assert verify(str(target), None).faults == ()


def test_a_backup_while_versions_come_and_go_is_whole(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    store = open_store(tmp_path / "store", retention_seconds=0)
    ends = threading.Event()

    def change() -> None:
        number = 0
        while not ends.is_set():
            number += 1
            config, weights = peft_files["p_tuning"]
            publish(store, (config[:-1] + f', "note": {number}}}'.encode(), weights), name=f"n{number % 3}")
            if number % 2:
                store.delete_prompt(f"n{number % 3}", force=True)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for number in range(4):
            back_up(str(tmp_path / "store"), None, tmp_path / f"{number}.tar")
            restore(tmp_path / f"{number}.tar", str(tmp_path / f"new{number}"), None)
            found = verify(str(tmp_path / f"new{number}"), None)
            assert (found.faults, found.orphans) == ((), ())
    finally:
        ends.set()
        thread.join()
        store.close()


def test_a_blob_collected_during_the_copy_makes_it_read_the_catalog_again(
    tmp_path: Path, publish: Publish, peft_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "store", retention_seconds=0)
    publish(store, peft_files["p_tuning"])
    publish(store, peft_files["cpt"], name="q")
    snapshots = []

    def snapshot(database: object, path: Path) -> None:
        copying.snapshot(database, path)  # type: ignore[arg-type]
        snapshots.append(path)
        if len(snapshots) == 1:
            store.delete_prompt("q")

    monkeypatch.setattr(backup, "snapshot", snapshot)
    report = back_up(str(tmp_path / "store"), None, tmp_path / "backup")
    assert (len(snapshots), report.versions, report.damaged) == (2, 1, ())
    store.close()


def damage(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("how", [damage, Path.unlink], ids=["damaged", "missing"])
def test_damage_is_found_and_reported(
    place: Place, running: PromptStore, tmp_path: Path, how: Callable[[Path], None]
) -> None:
    how(blob_path(place[0], running, "p"))
    found = verify(*place)
    assert len(found.faults) == 1
    assert "a file of q@1: blob " in found.faults[0] or "a file of p@1: blob " in found.faults[0]
    report = back_up(*place, tmp_path / "backup")
    assert len(report.damaged) == 1
    assert verify(str(tmp_path / "backup"), None).faults
    with pytest.raises(PromptStoreError, match="cannot be restored: a file of [pq]@1"):
        restore(tmp_path / "backup", str(tmp_path / "new"), None)
    store = open_store(tmp_path / "new")
    assert store.list_prompts() == ([], False)
    store.close()


def test_an_interrupted_restoration_can_be_repeated(
    place: Place, running: PromptStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(*place, tmp_path / "backup.tar")

    def fail(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(backup, "copy_tables", fail)
        with pytest.raises(OSError, match="no space"):
            restore(tmp_path / "backup.tar", str(tmp_path / "new"), None)
    assert restore(tmp_path / "backup.tar", str(tmp_path / "new"), None).versions == 3
    assert verify(str(tmp_path / "new"), None).faults == ()
    assert not list((tmp_path / "new").glob("restore-*"))


def test_contradictions_of_the_catalog_and_orphans_are_found(
    place: Place, running: PromptStore, tmp_path: Path
) -> None:
    with running._catalog._database.writing() as connection:
        connection.execute(sa.text("UPDATE aliases SET version = 9 WHERE alias = 'canary'"))
        connection.execute(sa.text("UPDATE prompts SET num_versions = 5 WHERE name = 'q'"))
        connection.execute(sa.text("DELETE FROM version_files WHERE version_id = 2"))
    (Path(place[0]) / "blobs" / "ab").mkdir(exist_ok=True)
    (Path(place[0]) / "blobs" / "ab" / ("ab" * 32)).touch()
    found = verify(*place)
    assert found.faults == (
        "p@2 has no files",
        "p@canary points at version 9, which does not exist",
        "q has 1 versions, and the catalog counts 5",
    )
    assert found.orphans == ("ab" * 32,)
    assert found.schema == SCHEMA


def test_other_targets_and_sources_are_refused(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    location = str(tmp_path / "store")
    for call in (lambda: back_up(location, None, tmp_path / "x"), lambda: verify(location, None)):
        with pytest.raises(PromptStoreError, match="there is no catalog at"):
            call()
    with pytest.raises(PromptStoreError, match="there is no directory"), postgres_url() as url:
        verify(location, url)
    store = open_store(location)
    publish(store, peft_files["p_tuning"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(PromptStoreError, match="is not empty and not a backup"):
        back_up(location, None, tmp_path / "other")
    back_up(location, None, tmp_path / "backup")
    served = open_store(tmp_path / "backup")
    with pytest.raises(PromptStoreError, match="in use by another process"):
        back_up(location, None, tmp_path / "backup")
    served.close()
    with pytest.raises(PromptStoreError, match="in use by another process"):
        restore(tmp_path / "backup", location, None)
    (tmp_path / "backup" / "backup.json").unlink()
    with pytest.raises(PromptStoreError, match=r"not a complete backup: it has no backup\.json"):
        restore(tmp_path / "backup", str(tmp_path / "new"), None)
    (tmp_path / "x.tar").write_bytes(b"not a tar file")
    with pytest.raises(PromptStoreError, match="is not a backup"):
        restore(tmp_path / "x.tar", str(tmp_path / "new"), None)
    with tarfile.open(tmp_path / "y.tar", "w") as archive:
        archive.add(tmp_path / "other" / "file", "../evil")
    with pytest.raises(PromptStoreError, match="not a complete backup"):
        restore(tmp_path / "y.tar", str(tmp_path / "new"), None)
    store.close()


def test_a_failed_backup_leaves_the_old_file(
    tmp_path: Path, publish: Publish, peft_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "store")
    publish(store, peft_files["p_tuning"])
    target = tmp_path / "backup.tar"
    back_up(str(tmp_path / "store"), None, target)
    before = target.read_bytes()

    def fail(*_: object) -> Iterator[bytes]:
        raise OSError("the disk says no")

    monkeypatch.setattr(BlobDirectory, "chunks", fail)
    with pytest.raises(OSError, match="says no"):
        back_up(str(tmp_path / "store"), None, target)
    assert target.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"store", "backup.tar"}
    store.close()


def test_a_damaged_catalog_is_an_error_of_one_line(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    store = open_store(tmp_path / "store")
    publish(store, peft_files["p_tuning"])
    store.close()
    catalog = tmp_path / "store" / "catalog.sqlite3"
    data = bytearray(catalog.read_bytes())
    for damaged, message in (
        (b"no database" * 1000, "cannot be used: file is not a database"),
        (bytes(data[: len(data) // 2]), "cannot be used|cannot be copied|disk image is malformed"),
    ):
        catalog.write_bytes(damaged)
        for call in (
            lambda: back_up(str(tmp_path / "store"), None, tmp_path / "b.tar"),
            lambda: verify(str(tmp_path / "store"), None),
        ):
            with pytest.raises(PromptStoreError, match=message):
                call()
        assert not (tmp_path / "b.tar").exists()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path / "store").close()
    with closing(sqlite3.connect(tmp_path / "store" / "catalog.sqlite3")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0003'")
        connection.commit()
    with pytest.raises(PromptStoreError, match=f"has the schema 0003, this release has {SCHEMA}"):
        verify(str(tmp_path / "store"), None)


def test_an_object_store_is_backed_up_and_restored(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    (tmp_path / "bucket").mkdir()
    location, catalog = f"file://{tmp_path}/bucket", f"sqlite:///{tmp_path}/c.sqlite3"
    store = open_store(location, catalog_url=catalog, cache_path=tmp_path / "cache")
    publish(store, peft_files["p_tuning"])
    before = content(store)
    assert back_up(location, catalog, tmp_path / "backup.tar").blobs == 2
    assert verify(location, catalog).faults == ()
    (tmp_path / "bucket" / "blobs" / "ab").mkdir()
    (tmp_path / "bucket" / "blobs" / "ab" / ("ab" * 32)).write_bytes(b"x")
    damage(blob_path(tmp_path / "bucket", store, "p"))
    found = verify(location, catalog)
    assert ["a file of p@1" in fault for fault in found.faults] == [True]
    assert found.orphans == ("ab" * 32,)
    blob_path(tmp_path / "bucket", store, "p").unlink()
    assert "there is no such object" in verify(location, catalog).faults[0]
    store.close()
    (tmp_path / "new").mkdir()
    target = f"file://{tmp_path}/new", f"sqlite:///{tmp_path}/new.sqlite3"
    restore(tmp_path / "backup.tar", *target)
    store = open_store(target[0], catalog_url=target[1], cache_path=tmp_path / "other-cache")
    assert content(store) == before
    store.close()


def test_blobs_cannot_be_read_beyond_their_size(tmp_path: Path) -> None:
    blobs = BlobDirectory(tmp_path)
    digest = "ab" * 32
    blobs.path(digest).parent.mkdir()
    blobs.path(digest).write_bytes(b"x" * 100)
    with pytest.raises(CorruptBlobError):
        list(blobs.chunks(digest, 10))


def test_blobs_beside_an_empty_catalog_are_warned_of(
    tmp_path: Path, publish: Publish, peft_files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    with caplog.at_level(logging.WARNING):
        store = open_store(folder)
        publish(store, peft_files["p_tuning"])
        store.close()
        open_store(folder).close()
        assert caplog.records == []
        (folder / "catalog.sqlite3").unlink()
        open_store(folder).close()
    assert ["files of soft prompts are stored beside it" in record.message for record in caplog.records] == [True]
