"""Adapters in the catalog: their records, soft prompts over them, and older releases on the same database."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from prompt_store.catalog import database as module
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database
from prompt_store.errors import (
    InvalidPromptError,
    PromptConflictError,
    PromptInUseError,
    PromptStoreError,
    StoreUnavailableError,
)
from prompt_store.types import SHARED, Access, PeftType, PromptKind, PromptRef
from tests.prompt_store.catalog.conftest import publish, resolve

ADAPTER: dict[str, Any] = {
    "peft_type": PeftType.LORA,
    "kind": PromptKind.ADAPTER,
    "num_virtual_tokens": 0,
    "rank": 16,
    "num_modules": 8,
    "num_parameters": 3_000_000_000,
    "targets": ("q_proj", "v_proj"),
}


def test_an_adapter_is_recorded(catalog: Catalog) -> None:
    publish(catalog, "a", "lora", **ADAPTER)
    publish(catalog, "a", "rows")
    version = catalog.resolve(PromptRef.parse("a@1"))
    assert {name: getattr(version, name) for name in ADAPTER} == ADAPTER
    assert version.over is None
    second = catalog.resolve(PromptRef.parse("a"))
    assert (second.version, second.kind, second.rank, second.targets) == (2, PromptKind.SOFT_PROMPT, None, ())


def test_names_are_listed_by_the_kind_of_their_versions(catalog: Catalog) -> None:
    publish(catalog, "both", "1", tags=("t",), **ADAPTER)
    publish(catalog, "both", "2", tags=("u",))
    publish(catalog, "lora", "3", tags=("t",), **ADAPTER)
    publish(catalog, "rows", "4", tags=("t",))
    publish(catalog, "gone", "5", **ADAPTER)
    catalog.delete_version("gone", 1, force=True)

    def names(kind: PromptKind | None, tag: str | None = None, limit: int = 10) -> list[str]:
        found, _ = catalog.list_prompts(limit, None, tag, Access(SHARED), kind)
        return [summary.name for summary in found]

    assert names(None) == ["both", "lora", "rows"]
    assert names(PromptKind.ADAPTER) == ["both", "lora"]
    assert names(PromptKind.SOFT_PROMPT) == ["both", "rows"]
    assert names(PromptKind.ADAPTER, "t") == ["both", "lora"]
    assert names(PromptKind.ADAPTER, "u") == []
    assert names(PromptKind.SOFT_PROMPT, "t") == ["rows"]
    page, has_more = catalog.list_prompts(1, None, None, None, PromptKind.ADAPTER)
    assert ([summary.name for summary in page], has_more) == (["both"], True)
    page, has_more = catalog.list_prompts(1, "both", None, None, PromptKind.ADAPTER)
    assert ([summary.name for summary in page], has_more) == (["lora"], False)


def test_a_soft_prompt_over_an_adapter_keeps_it(catalog: Catalog) -> None:
    publish(catalog, "lora", "1", **ADAPTER)
    publish(catalog, "lora", "2", **ADAPTER)
    assert publish(catalog, "p", "rows", over="lora@1") == 1
    assert catalog.resolve(PromptRef.parse("p")).over == "lora@1"
    with pytest.raises(PromptInUseError, match="the adapter lora@1 is in use: 1 versions"):
        catalog.delete_version("lora", 1, force=True)
    with pytest.raises(PromptInUseError, match="the adapter lora@1 is in use: 1 versions"):
        catalog.delete_prompt("lora", force=True)
    catalog.delete_version("lora", 2, force=True)
    catalog.delete_prompt("p")
    catalog.delete_version("lora", 1, force=True)
    with pytest.raises(PromptConflictError, match="the adapter lora@1, which is deleted: restore the adapter first"):
        catalog.restore("p", None, deleted_after=0)
    catalog.restore("lora", 1, deleted_after=0)
    catalog.restore("p", None, deleted_after=0)
    assert resolve(catalog, "p") == 1


def test_a_name_goes_with_the_adapter_of_its_own_soft_prompt(catalog: Catalog) -> None:
    publish(catalog, "p", "lora", **ADAPTER)
    publish(catalog, "p", "rows", over="p@1")
    with pytest.raises(PromptInUseError, match="in use"):
        catalog.delete_version("p", 1, force=True)
    catalog.delete_prompt("p", force=True)
    assert catalog.restore("p", None, deleted_after=0).versions == (1, 2)


def test_the_same_rows_over_another_adapter_are_another_version(catalog: Catalog) -> None:
    publish(catalog, "lora", "1", **ADAPTER)
    publish(catalog, "lora", "2", **ADAPTER)
    assert [publish(catalog, "p", "rows", over=over) for over in (None, "lora@1", "lora@2")] == [1, 2, 3]
    assert [publish(catalog, "p", "rows", over=over) for over in ("lora@2", None, "lora@1")] == [3, 1, 2]


def test_over_names_an_adapter_that_the_owner_sees(catalog: Catalog) -> None:
    publish(catalog, "rows", "1")
    publish(catalog, "mine", "2", owner="t", **ADAPTER)
    for over, owner, why in (
        ("none@1", SHARED, "over: none@1 does not exist"),
        ("rows@1", SHARED, "over: rows@1 is a soft prompt, not an adapter"),
        ("mine@1", SHARED, "a shared soft prompt needs a shared adapter"),
        ("mine@1", "u", "over: mine@1 does not exist"),
        ("mine@2", "t", "over: mine@2 does not exist"),
    ):
        with pytest.raises(InvalidPromptError, match=why) as caught:
            publish(catalog, "p", "rows", over=over, owner=owner)
        assert [fault.code for fault in caught.value.faults] == ["unknown_adapter"]
    assert publish(catalog, "p", "rows", over="mine@1", owner="t") == 1


def test_no_adapter_is_published_beside_an_older_release(catalog: Catalog, url: str) -> None:
    if not catalog.is_shared:
        publish(catalog, "lora", "1", **ADAPTER)  # one process alone uses SQLite
        return
    older = sa.create_engine(
        sa.make_url(url).set(drivername="postgresql+psycopg"), connect_args={"application_name": "prelude"}
    )
    with older.connect():
        with pytest.raises(StoreUnavailableError, match="replicas of an older release"):
            publish(catalog, "lora", "1", **ADAPTER)
        publish(catalog, "p", "rows")
    older.dispose()
    publish(catalog, "lora", "1", **ADAPTER)


def test_the_schema_is_migrated_from_the_release_before(url: str) -> None:
    catalog = Catalog(Database(url))
    publish(catalog, "p", "rows")
    catalog.close()
    _migrate(url, "0006")
    catalog = Catalog(Database(url))
    version = catalog.resolve(PromptRef.parse("p"))
    assert (version.kind, version.rank, version.targets, version.over) == (PromptKind.SOFT_PROMPT, None, (), None)
    publish(catalog, "lora", "1", **ADAPTER)
    catalog.close()
    with pytest.raises(RuntimeError, match="1 versions of adapters, which earlier releases cannot read"):
        _migrate(url, "0006")


def _migrate(url: str, revision: str) -> None:
    database = Database(url)
    config = module._alembic()
    try:
        with database.writing() as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, revision)
    finally:
        database.close()


def test_an_older_release_does_not_start_on_the_new_schema(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Catalog(Database(url)).close()
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg") if "post" in url else url)
    with engine.begin() as connection:  # what this release is to an older one
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(PromptStoreError, match="written by a newer release"):
        Database(url)
