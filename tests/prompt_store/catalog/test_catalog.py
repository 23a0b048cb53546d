"""Names, versions, aliases and history, on both databases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

import prompt_store
from prompt_store.catalog import schema
from prompt_store.catalog.catalog import BlobsGoneError, Catalog
from prompt_store.catalog.database import Database
from prompt_store.changes import HistoryAction
from prompt_store.errors import (
    PromptConflictError,
    PromptForbiddenError,
    PromptNotFoundError,
    PromptStoreError,
    StoreUnavailableError,
)
from prompt_store.types import SHARED, Access, Lineage, PromptRef, StoreTotals
from tests.prompt_store.catalog.conftest import digest_of, new, publish, resolve
from tests.prompt_store.databases import postgres_url, refuse_connections


def garbage(catalog: Catalog, is_held: Callable[[str], bool] = lambda _: False) -> set[str]:
    with catalog.garbage(time.time_ns() // 1000, 100, is_held) as digests:
        return set(digests)


def forget_all(catalog: Catalog) -> None:
    """Give up the files of deleted versions."""
    catalog.forget_deleted(time.time_ns() // 1000)


def test_a_published_version_is_read_back(catalog: Catalog) -> None:
    lineage = Lineage("run-7", "p@1", "sha256:abc", {"accuracy": 0.5})
    version = new(
        "p",
        "a",
        num_tasks=3,
        num_labels=2,
        description="text",
        tags=("b", "a"),
        metadata={"k": [1, None]},
        lineage=lineage,
        overrides={"allow_other_base": True, "task_type": "CAUSAL_LM"},
    )
    catalog.reserve(version.files)
    before = datetime.now(UTC)
    published, is_new = catalog.publish(version, "latest", "ada")
    assert is_new
    assert before <= published.created_at <= datetime.now(UTC)
    assert (published.name, published.version, published.digest) == ("p", 1, version.digest)
    assert published.files == version.files
    assert published.tags == ("a", "b")
    fields = ("num_tasks", "num_labels", "description", "metadata", "lineage", "overrides", "peft_type", "dtype")
    for field in fields:
        assert getattr(published, field) == getattr(version, field)
    assert published.created_by == "ada"
    assert catalog.resolve(PromptRef.parse("p@1")) == published


def test_equal_content_is_one_version_and_numbers_are_not_reused(catalog: Catalog) -> None:
    assert [publish(catalog, "p", content) for content in ("a", "b", "a")] == [1, 2, 1]
    assert resolve(catalog, "p") == 1
    catalog.delete_version("p", 2)
    assert publish(catalog, "p", "b") == 3
    catalog.delete_prompt("p", force=True)
    assert publish(catalog, "p", "b") == 4
    assert catalog.totals() == StoreTotals(1, 1, 3, 4100)  # deleted versions keep their blobs


def test_a_version_is_never_recorded_without_its_blobs(catalog: Catalog) -> None:
    version = new("p", "a")
    with pytest.raises(BlobsGoneError):
        catalog.publish(version, "latest")
    catalog.reserve(version.files)
    assert garbage(catalog) == {file.sha256 for file in version.files}
    with pytest.raises(BlobsGoneError):
        catalog.publish(version, "latest")
    assert catalog.totals() == StoreTotals()


def test_blobs_without_a_name_become_garbage(catalog: Catalog) -> None:
    publish(catalog, "p", "a")
    publish(catalog, "q", "a")
    publish(catalog, "q", "b")
    assert garbage(catalog) == set()
    catalog.delete_prompt("p")
    forget_all(catalog)
    assert garbage(catalog) == set()
    catalog.delete_prompt("q", force=True)
    assert garbage(catalog) == set()
    forget_all(catalog)
    held = digest_of("a")
    assert garbage(catalog, lambda digest: digest == held) == {digest_of("b"), digest_of("config")}
    with catalog.garbage(0, 100, lambda _: False) as digests:
        assert digests == []  # nothing is that old
    assert garbage(catalog) == {held}
    assert garbage(catalog) == set()


def test_failed_collection_leaves_the_records(catalog: Catalog) -> None:
    catalog.reserve(new("p", "a").files)
    with (
        pytest.raises(RuntimeError, match="disk"),
        catalog.garbage(time.time_ns() // 1000, 100, lambda _: False),
    ):
        raise RuntimeError("disk")
    assert len(garbage(catalog)) == 2


def test_upload_waits_for_a_collection_of_the_same_bytes(catalog: Catalog) -> None:
    version = new("p", "a")
    catalog.reserve(version.files)
    done = threading.Event()

    def upload() -> None:
        catalog.reserve(version.files)
        done.set()

    thread = threading.Thread(target=upload)
    with catalog.garbage(time.time_ns() // 1000, 100, lambda _: False) as digests:
        assert len(digests) == 2
        thread.start()
        assert not done.wait(0.3)
    thread.join(timeout=20)
    assert done.is_set()
    assert catalog.publish(version, "latest")[1]


def test_aliases_move_only_from_the_expected_version(catalog: Catalog) -> None:
    for content in "abc":
        publish(catalog, "p", content)
    catalog.set_alias("p", "prod", 1, None)
    with pytest.raises(PromptConflictError, match="points at 1, not at 2"):
        catalog.set_alias("p", "prod", 3, 2)
    with pytest.raises(PromptConflictError, match="points at nothing, not at 2"):
        catalog.set_alias("p", "canary", 3, 2)
    catalog.set_alias("p", "prod", 2, 1)
    assert resolve(catalog, "p@prod") == 2
    with pytest.raises(PromptNotFoundError, match="no version 9"):
        catalog.set_alias("p", "prod", 9, None)
    with pytest.raises(PromptNotFoundError, match="soft prompt 'q' does not exist"):
        catalog.set_alias("q", "prod", 1, None)
    catalog.delete_alias("p", "prod")
    with pytest.raises(PromptNotFoundError, match="no alias 'prod'"):
        catalog.delete_alias("p", "prod")
    with pytest.raises(PromptNotFoundError, match="no alias 'prod'"):
        resolve(catalog, "p@prod")
    with pytest.raises(PromptNotFoundError, match="no version 9"):
        catalog.delete_version("p", 9)
    assert resolve(catalog, "p") == 3


def test_rollbacks_undo_promotions_one_by_one(catalog: Catalog) -> None:
    for content in "abcd":
        publish(catalog, "p", content, alias=None)
    for version in (1, 2, 3):
        catalog.set_alias("p", "prod", version, None)
    assert catalog.rollback("p", "prod", None) == 2
    assert catalog.rollback("p", "prod", 2) == 1
    with pytest.raises(PromptConflictError, match="no earlier version"):
        catalog.rollback("p", "prod", None)
    catalog.set_alias("p", "prod", 4, None)
    assert catalog.rollback("p", "prod", None) == 1
    with pytest.raises(PromptConflictError, match="not at 4"):
        catalog.rollback("p", "prod", 4)
    with pytest.raises(PromptNotFoundError, match="no alias 'canary'"):
        catalog.rollback("p", "canary", None)


def test_rollback_skips_deleted_versions_and_removed_aliases(catalog: Catalog) -> None:
    for content in "abc":
        publish(catalog, "p", content, alias=None)
    for version in (1, 2, 3):
        catalog.set_alias("p", "prod", version, None)
    catalog.delete_version("p", 2)
    assert catalog.rollback("p", "prod", None) == 1
    catalog.delete_alias("p", "prod")
    catalog.set_alias("p", "prod", 3, None)
    with pytest.raises(PromptConflictError, match="no earlier version"):
        catalog.rollback("p", "prod", None)


def test_the_history_records_actors_and_outlives_the_name(catalog: Catalog) -> None:
    publish(catalog, "p", "a")
    version = new("p", "b")
    catalog.reserve(version.files)
    catalog.publish(version, "latest", "ada")
    catalog.rollback("p", "latest", None, "bob")
    catalog.set_alias("p", "latest", 1, None)  # it is there already: nothing happens
    catalog.delete_version("p", 2, actor="eve")
    catalog.delete_prompt("p", actor="eve")
    entries, has_more = catalog.list_history("p", 4, None)
    assert has_more
    rest, has_more = catalog.list_history("p", 10, entries[-1].id)
    assert not has_more
    found = [(e.action, e.alias, e.version, e.previous_version, e.actor) for e in [*entries, *rest]]
    assert found == [
        (HistoryAction.DELETE_PROMPT, None, None, None, "eve"),
        (HistoryAction.DELETE_ALIAS, "latest", None, 1, "eve"),
        (HistoryAction.DELETE_VERSION, None, 2, None, "eve"),
        (HistoryAction.ROLLBACK, "latest", 1, 2, "bob"),
        (HistoryAction.PROMOTE, "latest", 2, 1, "ada"),
        (HistoryAction.PUBLISH, None, 2, None, "ada"),
        (HistoryAction.PROMOTE, "latest", 1, None, None),
        (HistoryAction.PUBLISH, None, 1, None, None),
    ]
    with pytest.raises(PromptNotFoundError, match="does not exist"):
        catalog.list_history("q", 10, None)


def test_pages_continue_after_the_last_key(catalog: Catalog) -> None:
    names = ["a-1", "a.1", "a1", "a_1", "b"]
    for name in reversed(names):
        publish(catalog, name, name, tags=("odd",) if name in {"a1", "b"} else ())
    publish(catalog, "gone", "gone", tags=("odd",))
    catalog.delete_prompt("gone")
    pages = []
    after = None
    while True:
        page, has_more = catalog.list_prompts(2, after, None)
        pages += [summary.name for summary in page]
        after = pages[-1]
        if not has_more:
            break
    assert pages == names
    page, has_more = catalog.list_prompts(1, None, "odd")
    assert ([summary.name for summary in page], has_more) == (["a1"], True)
    page, has_more = catalog.list_prompts(1, "a1", "odd")
    assert ([summary.name for summary in page], has_more) == (["b"], False)
    for content in "xyz":
        publish(catalog, "b", content)
    versions, has_more = catalog.list_versions("b", 3, None)
    assert ([version.version for version in versions], has_more) == ([4, 3, 2], True)
    versions, has_more = catalog.list_versions("b", 3, 2)
    assert ([version.version for version in versions], has_more) == ([1], False)


def test_changes_since_a_revision_are_listed(catalog: Catalog) -> None:
    start = catalog.revision()
    publish(catalog, "p", "a")
    publish(catalog, "q", "a")
    assert catalog.revision() == start + 2
    assert catalog.changed_since(start) == {"p", "q"}
    assert catalog.changed_since(start + 1) == {"q"}
    publish(catalog, "q", "a")  # nothing new
    assert catalog.revision() == start + 2
    with pytest.raises(PromptNotFoundError):
        catalog.set_alias("q", "x", 5, None)
    assert catalog.changed_since(start + 2) == set()


def test_threads_get_numbers_without_gaps(catalog: Catalog) -> None:
    numbers: list[int] = []

    def work(thread: int) -> None:
        numbers.extend([publish(catalog, "p", f"{thread}-{turn}") for turn in range(5)])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 21))


def test_migrations_give_the_tables_of_the_schema(url: str) -> None:
    Database(url).close()
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    inspector = sa.inspect(engine)
    found = {
        table: {column["name"]: column["nullable"] for column in inspector.get_columns(table)}
        for table in inspector.get_table_names()
    }
    indexes = {index["name"] for table in found for index in inspector.get_indexes(table)}
    engine.dispose()
    del found["alembic_version"]
    assert found == {
        table.name: {column.name: column.nullable for column in table.columns}
        for table in schema.metadata.tables.values()
    }
    assert {index.name for table in schema.metadata.tables.values() for index in table.indexes} <= indexes


def test_a_newer_schema_and_other_databases_are_rejected(url: str) -> None:
    Database(url).close()
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(PromptStoreError, match="newer release"):
        Database(url)
    for other, reason in (("mysql://host/db", "must be sqlite"), ("sqlite://", "must be sqlite"), ("?", "be read")):
        with pytest.raises(PromptStoreError, match=reason):
            Database(other)


def test_replicas_that_start_together_migrate_once() -> None:
    with postgres_url() as url:
        errors: list[Exception] = []

        def start() -> None:
            try:
                Catalog(Database(url)).close()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


def test_an_unreachable_database_is_reported_and_nothing_is_lost() -> None:
    with postgres_url() as url:
        catalog = Catalog(Database(url))
        publish(catalog, "p", "a")
        refuse_connections(url, refuse=True)
        for use in (
            lambda: catalog.resolve(PromptRef.parse("p")),
            lambda: publish(catalog, "p", "b"),
            lambda: catalog.delete_prompt("p"),
            catalog.listen,
            lambda: Database(url),
        ):
            with pytest.raises(StoreUnavailableError, match="cannot be used now"):
                use()
        refuse_connections(url, refuse=False)
        assert resolve(catalog, "p") == 1
        catalog.close()
    with pytest.raises(StoreUnavailableError):
        Database("postgresql://postgres@127.0.0.1:1/test")


def test_password_is_not_shown() -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        Database("postgresql://user:secret@127.0.0.1:1/test")
    assert "secret" not in str(caught.value)


def test_owners(catalog: Catalog) -> None:
    """A tenant sees its own and shared names; names of others look missing, and cannot be used."""
    for name, owner in (("a-own", "a"), ("b-own", "b"), ("shared", SHARED)):
        publish(catalog, name, name, owner=owner, tags=("t",))
    tenant, admin, other = Access("a"), Access("a", may_change_shared=True), Access("b")
    for tag in (None, "t"):
        listed = [summary.name for summary in catalog.list_prompts(10, None, tag, tenant)[0]]
        assert listed == ["a-own", "shared"]
        page, has_more = catalog.list_prompts(1, "a-own", tag, other)
        assert ([summary.name for summary in page], has_more) == (["b-own"], True)
    assert len(catalog.list_prompts(10, None, None)[0]) == 3
    assert catalog.resolve(PromptRef("a-own"), tenant).owner == "a"
    assert catalog.get_prompt("shared", other).latest.owner == SHARED

    unseen: list[Callable[[str], object]] = [
        lambda name: catalog.resolve(PromptRef(name), other),
        lambda name: catalog.resolve(PromptRef(name, version=9, alias=None), other),
        lambda name: catalog.get_prompt(name, other),
        lambda name: catalog.list_versions(name, 10, None, other),
        lambda name: catalog.list_history(name, 10, None, other),
        lambda name: catalog.list_history(name, 10, 5, other),
    ]
    changes: list[Callable[[str, Access], object]] = [
        lambda name, access: catalog.set_alias(name, "x", 1, None, access=access),
        lambda name, access: catalog.rollback(name, "latest", None, access=access),
        lambda name, access: catalog.delete_alias(name, "latest", access=access),
        lambda name, access: catalog.delete_version(name, 1, access=access),
        lambda name, access: catalog.delete_prompt(name, access=access),
    ]

    def as_other(change: Callable[[str, Access], object]) -> Callable[[str], object]:
        return lambda name: change(name, other)

    for call in [*unseen, *map(as_other, changes)]:
        messages = []
        for name in ("a-own", "nobodys"):
            with pytest.raises(PromptNotFoundError) as error:
                call(name)
            messages.append(str(error.value).replace(name, "NAME"))
        assert messages[0] == messages[1]
    for change in changes:
        with pytest.raises(PromptForbiddenError, match="shared"):
            change("shared", other)
    catalog.set_alias("shared", "x", 1, None, access=admin)
    catalog.delete_prompt("a-own", access=tenant)

    for name, owner in (("a-own", "b"), ("b-own", "a"), ("b-own", SHARED)):
        with pytest.raises(PromptConflictError, match=f"^the name '{name}' is taken$"):
            publish(catalog, name, "other", owner=owner)
    with pytest.raises(PromptConflictError, match="published as shared ones"):
        publish(catalog, "shared", "other", owner="a")
    assert publish(catalog, "a-own", "again", owner="a") == 2


def downgraded(url: str, revision: str, table: str) -> set[str]:
    """Downgrade a database to a revision; returns the columns of a table there."""
    config = Config()
    config.set_main_option("script_location", str(Path(prompt_store.__file__).with_name("catalog") / "migrations"))
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)
        columns = {column["name"] for column in sa.inspect(connection).get_columns(table)}
    engine.dispose()
    return columns


def test_versions_older_than_overrides_have_none(url: str) -> None:
    before = Catalog(Database(url))
    publish(before, "p", "one")
    before.close()
    assert "overrides" not in downgraded(url, "0002", "versions")
    after = Catalog(Database(url))
    assert after.resolve(PromptRef("p")).overrides == {}
    after.close()


def test_soft_prompts_older_than_owners_are_shared(url: str) -> None:
    before = Catalog(Database(url))
    publish(before, "p", "one")
    before.close()
    assert "owner" not in downgraded(url, "0001", "prompts")
    after = Catalog(Database(url))
    assert after.resolve(PromptRef("p"), Access("anybody")).owner == SHARED
    after.close()
