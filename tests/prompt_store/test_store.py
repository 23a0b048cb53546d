from __future__ import annotations

import errno
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prompt_store.errors import (
    CorruptBlobError,
    InvalidPromptError,
    PromptConflictError,
    PromptNotFoundError,
    PromptStoreError,
    PromptTooLargeError,
    StoreUnavailableError,
)
from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import PromptRef, StoredFile
from tests.prompt_store.conftest import Publish
from tests.support.presence import present

Files = dict[str, tuple[bytes, bytes]]


def staged(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "store" / "staging").glob("*/*") if path.name != "lock"]


def num_blobs(tmp_path: Path) -> int:
    return sum(1 for _ in (tmp_path / "store" / "blobs").glob("*/*"))


def test_versions_count_up_and_the_alias_moves(store: PromptStore, publish: Publish, peft_files: Files) -> None:
    first, created = publish(
        store, peft_files["prompt_tuning"], description="one", tags=["b", "a"], metadata={"k": [1]}
    )
    assert (created, first.version, first.num_virtual_tokens, first.dtype) == (True, 1, 6, "F32")
    assert (first.description, first.tags, first.metadata) == ("one", ("a", "b"), {"k": [1]})
    second, _ = publish(store, peft_files["prefix_tuning"])
    assert second.version == 2
    assert store.resolve(PromptRef.parse("p")) == second
    assert store.resolve(PromptRef.parse("p@1")) == first
    assert store.list_versions("p") == ([second, first], False)
    assert (store.totals().num_prompts, store.totals().num_versions) == (1, 2)


def test_equal_bytes_are_one_version_and_move_the_alias(
    store: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    first, _ = publish(store, peft_files["prompt_tuning"])
    publish(store, peft_files["prefix_tuning"])
    again, created = publish(store, peft_files["prompt_tuning"])
    assert (again, created) == (first, False)
    assert store.resolve(PromptRef.parse("p")) == first
    other, created = publish(store, peft_files["prompt_tuning"], name="q")
    assert created
    assert (other.version, other.digest) == (1, first.digest)
    assert num_blobs(tmp_path) == 4


def test_an_upload_without_an_alias_moves_none(store: PromptStore, publish: Publish, peft_files: Files) -> None:
    publish(store, peft_files["prompt_tuning"])
    publish(store, peft_files["prefix_tuning"], alias="canary")
    publish(store, peft_files["p_tuning"], alias=None)
    assert store.resolve(PromptRef.parse("p")).version == 1
    assert store.get_prompt("p").aliases == {"canary": 2, "latest": 1}
    assert store.get_prompt("p").num_versions == 3


def test_files_come_back_byte_for_byte(store: PromptStore, publish: Publish, peft_files: Files) -> None:
    for name, (config, weights) in peft_files.items():
        publish(store, (config, weights), name=name)
        assert store.read_file(name, 1, "adapter_config.json") == config
        assert store.read_file(name, 1, "adapter_model.safetensors") == weights
    with pytest.raises(PromptNotFoundError, match="no file"):
        store.read_file("p_tuning", 1, "../catalog.sqlite3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Bad Name"}, "name 'Bad Name' is not valid"),
        ({"alias": "7"}, "read as a version"),
        ({"tags": ["a b"]}, "tag 'a b' is not valid"),
        ({"name": "base", "reserved_names": {"base"}}, "the name of the base model"),
    ],
)
def test_invalid_names_are_rejected(
    options: dict[str, object], message: str, store: PromptStore, publish: Publish, peft_files: Files
) -> None:
    with pytest.raises(ValueError, match=message):
        publish(store, peft_files["p_tuning"], **options)
    assert store.totals().num_prompts == 0


def test_a_rejected_upload_leaves_nothing(
    store: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    config, weights = peft_files["p_tuning"]
    with pytest.raises(InvalidPromptError):
        publish(store, (config, weights[:-1]))
    with store.upload() as upload, pytest.raises(InvalidPromptError, match="adapter_model.safetensors is missing"):
        with upload.open("adapter_config.json") as file:
            file.write(config)
        store.publish(upload, name="p", base=None)  # type: ignore[arg-type]
    assert num_blobs(tmp_path) == 0
    assert staged(tmp_path) == []
    assert store.totals().num_prompts == 0


@pytest.mark.parametrize("filename", ["README.md", "adapter_model.bin", "../x", "/etc/passwd", ""])
def test_other_files_are_rejected(filename: str, store: PromptStore) -> None:
    with store.upload() as upload, pytest.raises(InvalidPromptError, match="nothing else"):
        upload.open(filename)


def test_a_file_is_accepted_once_and_up_to_its_limit(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", max_upload_bytes=10)
    with store.upload() as upload:
        file = upload.open("adapter_config.json")
        with pytest.raises(InvalidPromptError, match="twice"):
            upload.open("adapter_config.json")
        file.write(b"0123456789")
        with pytest.raises(PromptTooLargeError, match="larger than the 10 bytes"):
            file.write(b"x")
    assert staged(tmp_path) == []
    store.close()


def test_missing_names_versions_and_aliases_are_errors(
    store: PromptStore, publish: Publish, peft_files: Files
) -> None:
    publish(store, peft_files["p_tuning"])
    for call in (
        lambda: store.resolve(PromptRef.parse("q")),
        lambda: store.resolve(PromptRef.parse("p@2")),
        lambda: store.lease(PromptRef.parse("p@canary")),
        lambda: store.get_prompt("q"),
        lambda: store.list_versions("q"),
        lambda: store.read_file("p", 2, "adapter_config.json"),
        lambda: store.set_alias("p", "x", 2),
        lambda: store.delete_alias("p", "x"),
        lambda: store.delete_version("p", 2),
        lambda: store.delete_prompt("q"),
    ):
        with pytest.raises(PromptNotFoundError):
            call()


def test_an_alias_moves_only_from_the_expected_version(
    store: PromptStore, publish: Publish, peft_files: Files
) -> None:
    publish(store, peft_files["p_tuning"])
    publish(store, peft_files["prompt_tuning"])
    with pytest.raises(PromptConflictError, match="points at 2, not at 1"):
        store.set_alias("p", "latest", 1, expected_version=1)
    store.set_alias("p", "latest", 1, expected_version=2)
    assert store.resolve(PromptRef.parse("p")).version == 1
    store.set_alias("p", "canary", 2)
    store.delete_alias("p", "canary")
    with pytest.raises(PromptNotFoundError):
        store.resolve(PromptRef.parse("p@canary"))


def test_a_forced_deletion_removes_aliases_and_numbers_are_never_reused(
    store: PromptStore, publish: Publish, peft_files: Files
) -> None:
    publish(store, peft_files["p_tuning"])
    publish(store, peft_files["prompt_tuning"])
    store.set_alias("p", "canary", 2)
    store.delete_version("p", 2, force=True)
    assert store.get_prompt("p").aliases == {}
    assert publish(store, peft_files["prompt_tuning"])[0].version == 3
    store.delete_prompt("p", force=True)
    assert store.list_prompts() == ([], False)
    assert publish(store, peft_files["prompt_tuning"])[0].version == 4


@pytest.fixture
def final_store(tmp_path: Path) -> Iterator[PromptStore]:
    """A store that restores nothing, and so keeps no file of a deleted version."""
    opened = open_store(tmp_path / "store", retention_seconds=0)
    yield opened
    opened.close()


def test_deleted_files_are_removed_with_the_last_lease(
    final_store: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    store = final_store
    publish(store, peft_files["p_tuning"])
    leases = [store.lease(PromptRef.parse("p")) for _ in range(2)]
    store.delete_prompt("p")
    with pytest.raises(PromptNotFoundError):
        store.lease(PromptRef.parse("p"))
    for lease in leases:
        assert lease.weights_path.read_bytes() == peft_files["p_tuning"][1]
        store.release(lease)
    assert num_blobs(tmp_path) == 0


def test_files_that_another_version_shares_are_not_collected(
    final_store: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    store = final_store
    publish(store, peft_files["p_tuning"])
    publish(store, peft_files["p_tuning"], name="q")
    store.delete_prompt("p")
    assert num_blobs(tmp_path) == 2
    with store.leased(PromptRef.parse("q")) as leased:
        assert leased.weights_path.exists()


def test_lists_continue_after_a_name_and_filter_by_tag(
    store: PromptStore, publish: Publish, peft_files: Files
) -> None:
    for name in ("d", "a", "c", "b"):
        publish(store, peft_files["p_tuning"], name=name, tags=["odd"] if name in "ac" else [])
    page, more = store.list_prompts(limit=2)
    assert ([item.name for item in page], more) == (["a", "b"], True)
    page, more = store.list_prompts(limit=2, after="b")
    assert ([item.name for item in page], more) == (["c", "d"], False)
    assert [item.name for item in store.list_prompts(tag="odd")[0]] == ["a", "c"]


def test_a_restart_loses_nothing(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    store = open_store(tmp_path / "store")
    version, _ = publish(store, peft_files["prefix_tuning"], tags=["t"], metadata={"a": 1})
    file = StoredFile("adapter_config.json", hashlib.sha256(b"x").hexdigest(), 1)
    (tmp_path / "x").write_bytes(b"x")
    store._catalog.reserve([file])
    store._blobs.put(tmp_path / "x", file.sha256, file.size)
    assert num_blobs(tmp_path) == 3  # one that nobody comes to name
    store.close()
    (tmp_path / "store" / "staging" / "left" / "upload").mkdir(parents=True)
    store = open_store(tmp_path / "store")
    assert store.resolve(PromptRef.parse("p")) == version
    assert num_blobs(tmp_path) == 2
    assert staged(tmp_path) == []
    store.close()


def test_one_process_at_a_time_and_no_newer_schema(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    with pytest.raises(PromptStoreError, match="in use by another process"):
        open_store(tmp_path / "store")
    store.close()
    connection = sqlite3.connect(tmp_path / "store" / "catalog.sqlite3")
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    with pytest.raises(PromptStoreError, match="newer release"):
        open_store(tmp_path / "store")


def test_damaged_and_missing_blobs_are_errors(
    store: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    version, _ = publish(store, peft_files["p_tuning"])
    weights = present(version.file("adapter_model.safetensors"))
    path = tmp_path / "store" / "blobs" / weights.sha256[:2] / weights.sha256
    path.write_bytes(b"damaged")
    with pytest.raises(CorruptBlobError, match="not what was stored"):
        store.read_file("p", 1, "adapter_model.safetensors")
    assert not path.exists()  # it was put aside
    with pytest.raises(CorruptBlobError, match="no blob|missing|not there|gone"):
        store.lease(PromptRef.parse("p"))
    publish(store, peft_files["p_tuning"])  # the same bytes again heal it
    with store.leased(PromptRef.parse("p")) as leased:
        assert leased.weights_path.read_bytes() == peft_files["p_tuning"][1]


def test_threads_publish_without_gaps(store: PromptStore, publish: Publish, peft_files: Files) -> None:
    config, weights = peft_files["prompt_tuning"]
    numbers: list[int] = []

    def work(thread: int) -> None:
        for turn in range(6):
            mine = config[:-1] + f', "note": "{thread}-{turn}"}}'.encode()
            numbers.append(publish(store, (mine, weights))[0].version)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 31))


def test_a_full_disk_is_reported_as_unavailable(
    store: PromptStore, publish: Publish, peft_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, peft_files["prompt_tuning"])

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StoreUnavailableError, match="No space left"):
            publish(store, peft_files["p_tuning"])
    with monkeypatch.context() as patch:
        patch.setattr(store._blobs, "put", full)
        with pytest.raises(StoreUnavailableError, match="No space left"):
            publish(store, peft_files["p_tuning"])
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", full)
        with pytest.raises(StoreUnavailableError, match="No space left"):
            store.upload()
    assert publish(store, peft_files["p_tuning"])[0].version == 2


def away(root: Path, how: str) -> Callable[[], None]:
    """Remove the directory of a store like an unmounted volume; returns a function that restores it."""
    kept = root.with_name("kept")
    root.rename(kept)
    if how != "gone":
        root.mkdir()
    if how == "an empty folder of blobs":
        (root / "blobs").mkdir()

    def bring_back() -> None:
        if how == "an empty folder of blobs":
            (root / "blobs").rmdir()
        if how != "gone":
            root.rmdir()
        kept.rename(root)

    return bring_back


@pytest.mark.parametrize("how", ["gone", "an empty folder", "an empty folder of blobs"])
def test_an_unmounted_directory_has_lost_nothing(
    final_store: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path, how: str
) -> None:
    store = final_store
    publish(store, peft_files["prompt_tuning"])
    publish(store, peft_files["prefix_tuning"], name="q")
    ref = PromptRef("p")
    upload = store.upload()
    bring_back = away(tmp_path / "store", how)

    def delete_and_collect() -> None:
        store.delete_prompt("q")
        store.collect()

    acts: list[Callable[[], object]] = [
        lambda: store.lease(ref),
        lambda: store.read_file("p", 1, "adapter_config.json"),
        store.upload,
        lambda: upload.open("adapter_config.json"),
        lambda: publish(store, peft_files["prompt_tuning"], name="r"),
        delete_and_collect,
    ]
    for act in acts:
        with pytest.raises(StoreUnavailableError):
            act()
    bring_back()
    leased = store.lease(ref)
    assert leased.weights_path.exists()
    store.release(leased)
    assert store.read_file("p", 1, "adapter_config.json") == peft_files["prompt_tuning"][0]
    publish(store, peft_files["prompt_tuning"], name="r")
    store.collect()  # what could not be removed while it was away
    assert num_blobs(tmp_path) == 2


def test_a_single_missing_blob_is_damage(
    store: PromptStore, publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    version, _ = publish(store, peft_files["prompt_tuning"])
    digest = present(version.file("adapter_model.safetensors")).sha256
    (tmp_path / "store" / "blobs" / digest[:2] / digest).unlink()
    with pytest.raises(CorruptBlobError, match="is missing"):
        store.lease(PromptRef("p"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE])
def test_a_failing_disk_has_lost_nothing(
    store: PromptStore, publish: Publish, peft_files: Files, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    publish(store, peft_files["prompt_tuning"])

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "the disk says no")

    with monkeypatch.context() as patch:
        patch.setattr("prompt_store.blobs.blobs.FileIdentity.of", fail)
        for act in (
            lambda: store.lease(PromptRef("p")),
            lambda: store.read_file("p", 1, "adapter_config.json"),
            lambda: publish(store, peft_files["prefix_tuning"]),
        ):
            with pytest.raises(StoreUnavailableError, match="the disk says no"):
                act()
    store.release(store.lease(PromptRef("p")))


def test_a_missing_catalog_is_not_created_again(tmp_path: Path, publish: Publish, peft_files: Files) -> None:
    """A connection that is opened while the volume is unmounted finds no file, and creates none."""
    root = tmp_path / "store ?#%"
    store = open_store(root)
    publish(store, peft_files["prompt_tuning"])
    store._catalog._database._engine.dispose()
    bring_back = away(root, "an empty folder")
    with pytest.raises(StoreUnavailableError, match="unable to open"):
        store.get_prompt("p")
    assert list(root.iterdir()) == []
    bring_back()
    assert store.get_prompt("p").num_versions == 1
    store.close()
