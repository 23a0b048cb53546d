"""Two stores on one PostgreSQL catalog: each serves the changes of the other; and outages of the catalog."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import sqrt
from pathlib import Path

import pytest

from prompt_store import rollouts
from prompt_store.errors import PromptNotFoundError, PromptStoreError, StoreUnavailableError
from prompt_store.open_store import open_store
from prompt_store.rollouts import Rollout
from prompt_store.store import PromptStore
from prompt_store.types import PromptRef
from tests.prompt_store.conftest import Publish
from tests.prompt_store.databases import postgres_url, refuse_connections
from tests.support.presence import present
from tests.support.waiting import wait_until

Files = dict[str, tuple[bytes, bytes]]


def resolves_to(store: PromptStore, ref: str, version: int | None) -> Callable[[], bool]:
    def holds() -> bool:
        try:
            return store.resolve(PromptRef.parse(ref)).version == version
        except PromptNotFoundError:
            return version is None

    return holds


@pytest.fixture
def url() -> Iterator[str]:
    with postgres_url() as found:
        yield found


@pytest.fixture
def replicas(url: str, tmp_path: Path) -> Iterator[tuple[PromptStore, PromptStore]]:
    """Two stores on one database and one directory."""
    with ExitStack() as stack:
        opened = []
        for _ in range(2):
            store = open_store(tmp_path / "shared", catalog_url=url)
            stack.callback(store.close)
            opened.append(store)
        yield opened[0], opened[1]


def test_changes_of_one_replica_are_served_by_the_other(
    replicas: tuple[PromptStore, PromptStore], publish: Publish, peft_files: Files
) -> None:
    here, there = replicas
    publish(here, peft_files["prompt_tuning"])
    assert wait_until(resolves_to(there, "p", 1), 1.0) < 1.0
    publish(here, peft_files["p_tuning"])
    wait_until(resolves_to(there, "p", 2), 1.0)
    there.set_alias("p", "latest", 1)
    wait_until(resolves_to(here, "p", 1), 1.0)
    with there.leased(PromptRef.parse("p@2")) as leased:
        here.delete_version("p", 2)  # latest is version 1
        wait_until(resolves_to(there, "p@2", None), 1.0)
        assert leased.weights_path.read_bytes() == peft_files["p_tuning"][1]
    here.delete_prompt("p")
    wait_until(resolves_to(there, "p", None), 1.0)
    assert there.totals().num_prompts == 0


def test_changes_arrive_by_polling_alone(
    url: str, tmp_path: Path, publish: Publish, peft_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Like a pooler that drops LISTEN: the store listens on a channel without notifications.
    monkeypatch.setattr("prompt_store.catalog.catalog.CHANNEL", "nothing_is_sent_here")
    deaf = open_store(tmp_path / "shared", catalog_url=url)
    monkeypatch.undo()
    here = open_store(tmp_path / "shared", catalog_url=url)
    try:
        publish(here, peft_files["prompt_tuning"])
        wait_until(resolves_to(deaf, "p", 1), 1.0)
        publish(here, peft_files["p_tuning"])
        wait_until(resolves_to(deaf, "p", 2), 1.0)
    finally:
        deaf.close()
        here.close()


def test_cached_versions_are_served_while_the_catalog_is_unreachable(
    url: str, replicas: tuple[PromptStore, PromptStore], publish: Publish, peft_files: Files
) -> None:
    here, there = replicas
    publish(here, peft_files["prompt_tuning"])
    publish(here, peft_files["p_tuning"], name="unseen")
    wait_until(resolves_to(there, "p", 1), 1.0)
    wait_until(lambda: there.totals().num_versions == 2, 1.0)
    wait_until(lambda: there.status.revision == here._catalog.revision(), 1.0)
    before = there.totals()
    assert there.resolve(PromptRef.parse("p")).version == 1  # in use: from now on it is held
    refuse_connections(url, refuse=True)
    wait_until(lambda: not there.status.is_available, 10.0)
    assert "the catalog postgresql://" in (there.status.reason or "")
    with there.leased(PromptRef.parse("p")) as leased:
        assert leased.version.version == 1
    started = time.monotonic()
    for use in (
        lambda: there.resolve(PromptRef.parse("unseen")),
        lambda: publish(there, peft_files["prefix_tuning"]),
        lambda: there.set_alias("p", "x", 1),
        lambda: there.delete_prompt("p"),
        there.list_prompts,
    ):
        with pytest.raises(StoreUnavailableError):
            use()
    assert time.monotonic() - started < 2.0  # nothing tries, and waits, each time
    assert there.totals() == before
    refuse_connections(url, refuse=False)
    wait_until(lambda: there.status.is_available, 10.0)
    assert there.resolve(PromptRef.parse("unseen")).version == 1
    publish(there, peft_files["prefix_tuning"])
    wait_until(resolves_to(here, "p", 2), 10.0)


def test_blobs_without_a_name_stay_for_the_grace_period(
    url: str, tmp_path: Path, publish: Publish, peft_files: Files
) -> None:
    folder = tmp_path / "shared"
    store = open_store(folder, catalog_url=url, retention_seconds=0)
    version, _ = publish(store, peft_files["prompt_tuning"])
    store.delete_prompt("p")
    assert store.collect() == 0
    assert len([path for path in (folder / "blobs").rglob("*") if path.is_file()]) == 2
    store.close()
    # It collects at its start.
    store = open_store(folder, catalog_url=url, collect_grace_seconds=0.0, retention_seconds=0)
    assert [path for path in (folder / "blobs").rglob("*") if path.is_file()] == []
    again, is_new = publish(store, peft_files["prompt_tuning"])
    assert is_new
    assert again.digest == version.digest
    assert store.read_file("p", again.version, "adapter_config.json") == peft_files["prompt_tuning"][0]
    store.close()


def test_a_lost_blob_keeps_the_cache_while_the_catalog_is_unreachable(
    url: str, replicas: tuple[PromptStore, PromptStore], publish: Publish, peft_files: Files, tmp_path: Path
) -> None:
    store = replicas[0]
    lost, _ = publish(store, peft_files["prompt_tuning"])
    publish(store, peft_files["p_tuning"])
    for ref in ("p@1", "p"):
        store.release(store.lease(PromptRef.parse(ref)))
    digest = present(lost.file("adapter_model.safetensors")).sha256
    wait_until(lambda: store.status.revision == store._catalog.revision(), 2.0)
    store.release(store.lease(PromptRef.parse("p")))
    store.resolve(PromptRef.parse("p@1"))
    refuse_connections(url, refuse=True)
    wait_until(lambda: not store.status.is_available, 10.0)
    (tmp_path / "shared" / "blobs" / digest[:2] / digest).unlink()
    with pytest.raises(StoreUnavailableError):
        store.lease(PromptRef.parse("p@1"))
    with store.leased(PromptRef.parse("p")) as leased:
        assert leased.version.version == 2
    refuse_connections(url, refuse=False)


def test_a_hung_catalog_is_detected(
    replicas: tuple[PromptStore, PromptStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = replicas[0]
    monkeypatch.setattr("prompt_store.catalog.watch.MAX_POLL_SECONDS", 0.2)
    release = threading.Event()
    monkeypatch.setattr("prompt_store.catalog.database.Listener.scalar", lambda *_: release.wait(20) and 0)
    wait_until(lambda: not store.status.is_available, 5.0)
    assert "does not answer" in (store.status.reason or "")
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        store.list_prompts()
    monkeypatch.undo()
    release.set()
    wait_until(lambda: store.status.is_available, 5.0)


def test_contradictory_arguments_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(PromptStoreError, match="needs --catalog"):
        open_store("s3://bucket/prefix", cache_path=tmp_path)
    with pytest.raises(PromptStoreError, match="needs a directory for local copies"):
        open_store("s3://bucket/prefix", catalog_url=f"sqlite:///{tmp_path}/c.sqlite3")
    (tmp_path / "file").touch()
    with pytest.raises(PromptStoreError, match="cannot be created"):
        open_store(tmp_path / "file" / "store")


def test_two_replicas_draw_by_the_weights_while_the_alias_is_promoted(
    replicas: tuple[PromptStore, PromptStore], publish: Publish, peft_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "random", random.Random(2))
    here, there = replicas
    for kind in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        publish(here, peft_files[kind])
    here.set_alias("p", "latest", 1, rollout=Rollout({2: 5.0}))
    wait_until(lambda: there._cached._look_up(PromptRef("p"), None)[1] == Rollout({2: 5.0}), 1.0)
    found: list[Counter[int]] = [Counter(), Counter()]
    after: list[Counter[int]] = [Counter(), Counter()]
    at_half = threading.Barrier(3)

    def draw(index: int) -> None:
        store = replicas[index]
        for _ in range(5000):
            leased = store.lease_for_request(PromptRef("p"))
            found[index][leased.version.version] += 1
            assert leased.weights_path.read_bytes() == peft_files[KINDS[leased.version.version]][1]
            store.release(leased)
        at_half.wait()
        while not after[index][3]:  # the promotion arrives while it draws; every draw gives one of the versions
            leased = store.lease_for_request(PromptRef("p"))
            after[index][leased.version.version] += 1
            store.release(leased)
        for _ in range(100):
            with store.leased(PromptRef("p")) as leased:
                after[index][leased.version.version] += 1

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    at_half.wait()
    there.set_alias("p", "latest", 3)
    for thread in threads:
        thread.join()
    both = found[0] + found[1]
    assert both.keys() == {1, 2}
    assert abs(both[2] - 500) < 3 * sqrt(10_000 * 0.05 * 0.95)
    assert min(counts[2] for counts in found) > 0
    assert all(counts.keys() <= {1, 2, 3} and counts[3] == 101 for counts in after)


KINDS = {1: "prompt_tuning", 2: "p_tuning", 3: "prefix_tuning"}


def test_a_canary_that_is_deleted_between_two_lookups_is_not_missed(
    replicas: tuple[PromptStore, PromptStore], publish: Publish, peft_files: Files
) -> None:
    here, there = replicas
    for kind in ("prompt_tuning", "p_tuning"):
        publish(here, peft_files[kind])
    here.set_alias("p", "latest", 1, rollout=Rollout({2: 100.0}))
    wait_until(lambda: there._cached.choose(PromptRef("p"))[0].version == 2, 1.0)
    there._cached.stop_watching()  # it does not hear of the deletion
    here.delete_version("p", 2, force=True)
    there._cached._resolved.invalidate(["p"])
    there._cached._resolved.add(
        PromptRef("p"), here.resolve(PromptRef("p")), there._cached._resolved.generation, Rollout({2: 100.0})
    )
    leased = there.lease_for_request(PromptRef("p"))
    assert leased.version.version == 1
    there.release(leased)
