"""Corrections of versions, changes of owners, and the history of all names, on both databases."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database
from prompt_store.catalog.schema import history
from prompt_store.changes import Actor, HistoryAction, HistoryEntry, HistoryFilter, VersionEdit
from prompt_store.errors import PromptForbiddenError, PromptNotFoundError
from prompt_store.registry import Registry
from prompt_store.types import SHARED, Access, Lineage, PromptRef
from tests.prompt_store.catalog.conftest import publish
from tests.prompt_store.catalog.test_catalog import downgraded

ADA = Actor("key-0123456789ab", "ada", "because")


@pytest.fixture
def registry(catalog: Catalog) -> Registry:
    return Registry(catalog, CachedCatalog(catalog))


def entries(registry: Registry, access: Access | None = None, **only: object) -> list[HistoryEntry]:
    found, has_more = registry.list_history(HistoryFilter(**only), access=access)  # type: ignore[arg-type]
    assert not has_more
    return found


def test_an_edit_changes_what_is_given_and_is_recorded(catalog: Catalog, registry: Registry) -> None:
    publish(catalog, "p", "a", description="old", tags=("x", "y"), metadata={"a": 1, "b": 2}, num_labels=2)
    before = catalog.resolve(PromptRef("p"))
    edit = VersionEdit(
        description="new",
        tags=("z", "y"),
        metadata={"a": 3, "b": None, "c": [4]},
        labels=("no", "yes"),
        lineage=Lineage("run"),
    )
    edited, changed = registry.edit("p", 1, edit, actor=ADA)
    assert changed == ("description", "lineage", "metadata", "tags")
    assert (edited.description, edited.tags, edited.lineage) == ("new", ("y", "z"), Lineage("run"))
    assert edited.metadata == {"a": 3, "c": [4], "labels": ["no", "yes"]}
    assert catalog.resolve(PromptRef("p")) == edited
    assert (edited.files, edited.digest, edited.created_at) == (before.files, before.digest, before.created_at)
    assert [summary.name for summary in catalog.list_prompts(10, None, "z")[0]] == ["p"]
    assert catalog.list_prompts(10, None, "x")[0] == []
    (entry,) = entries(registry, action=HistoryAction.EDIT)
    assert (entry.name, entry.version, entry.actor) == ("p", 1, "key-0123456789ab")
    assert (entry.actor_name, entry.reason, entry.is_imported) == ("ada", "because", False)
    assert entry.details == {
        "description": {"from": "old", "to": "new"},
        "tags": {"from": ["x", "y"], "to": ["y", "z"]},
        "metadata": {"from": {"a": 1, "b": 2}, "to": {"a": 3, "b": None, "c": [4], "labels": ["no", "yes"]}},
        "lineage": {"from": {}, "to": {"training_run": "run"}},
    }
    revision = catalog.revision()
    assert registry.edit("p", 1, edit)[1] == ()
    assert registry.edit("p", 1, VersionEdit())[1] == ()
    assert catalog.revision() == revision
    assert registry.edit("p", 1, VersionEdit(tags=(), description=""))[1] == ("description", "tags")


def test_an_edit_that_does_not_fit_changes_nothing(catalog: Catalog, registry: Registry) -> None:
    publish(catalog, "p", "a")
    publish(catalog, "head", "b", num_labels=2)
    revision = catalog.revision()
    for name, edit, message in (
        ("p", VersionEdit(labels=("a", "b")), "labels: p@1 has no classification head"),
        ("head", VersionEdit(labels=("a",)), "labels: the head has 2 labels, not 1"),
        ("head", VersionEdit(labels=("a", "a")), "labels: must be different"),
        ("head", VersionEdit(labels=("a", "")), "labels: must be different, and not empty"),
        ("p", VersionEdit(metadata={"k": "x" * 70_000}), "metadata: would exceed the limit of 65536 bytes"),
        ("p", VersionEdit(description="new", tags=("Not a tag",)), "tag 'Not a tag' is not valid"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.edit(name, 1, edit)
    with pytest.raises(PromptNotFoundError, match="no version 2"):
        registry.edit("p", 2, VersionEdit(description="x"))
    with pytest.raises(PromptForbiddenError):
        registry.edit("p", 1, VersionEdit(description="x"), access=Access("t"))
    with pytest.raises(ValueError, match="tenant 'Not one'"):
        registry.change_owner("p", "Not one")
    assert catalog.revision() == revision


def test_a_change_of_the_owner_takes_the_history_along(catalog: Catalog, registry: Registry) -> None:
    publish(catalog, "p", "a", owner="one")
    one, two, other = Access("one"), Access("two"), Access("other")
    with pytest.raises(PromptNotFoundError):
        registry.change_owner("p", "two", access=two)
    registry.change_owner("p", "two", actor=ADA, access=Access("root", may_change_shared=True, all_tenants=True))
    assert catalog.resolve(PromptRef("p"), two).owner == "two"
    with pytest.raises(PromptNotFoundError):
        catalog.resolve(PromptRef("p"), one)
    assert [entry.action for entry in entries(registry, two)] == ["change_owner", "promote", "publish"]
    assert entries(registry, two)[0].details == {"from": "one", "to": "two"}
    assert entries(registry, one) == []
    registry.change_owner("p", SHARED)
    revision = catalog.revision()
    registry.change_owner("p", SHARED)
    assert catalog.revision() == revision
    assert len(entries(registry, other)) == 4


def test_the_history_of_all_names_is_filtered(catalog: Catalog, registry: Registry) -> None:
    publish(catalog, "mine", "a", owner="t")
    publish(catalog, "other", "b", owner="u")
    publish(catalog, "ours", "c")
    catalog.set_alias("mine", "prod", 1, None, ADA)
    catalog.delete_prompt("ours", actor="key-ffffffffffff")
    t = Access("t")
    assert {entry.name for entry in entries(registry, t)} == {"mine", "ours"}
    assert {entry.name for entry in entries(registry)} == {"mine", "ours", "other"}
    assert {entry.name for entry in entries(registry, Access("x", all_tenants=True))} == {"mine", "ours", "other"}
    for actor in ("ada", "key-0123456789ab"):
        assert [entry.alias for entry in entries(registry, t, actor=actor)] == ["prod"]
    assert [entry.name for entry in entries(registry, t, action=HistoryAction.DELETE_PROMPT)] == ["ours"]
    assert [entry.name for entry in entries(registry, t, name="other")] == []
    middle = round(entries(registry)[2].at.timestamp() * 1e6)
    since, until = entries(registry, since=middle), entries(registry, until=middle)
    assert len(since) == 3
    assert [*since, *until] == entries(registry)
    registry.note_read("mine", "t", {"read": "version"}, 1, actor=ADA)
    registry.note_read("", "root", {"read": "list"}, actor=ADA)
    newest = entries(registry, t, actor="ada")[0]
    assert (newest.name, newest.version, newest.details) == ("mine", 1, {"read": "version"})
    assert entries(registry, Access("root"))[0].name == ""
    assert registry.list_history(HistoryFilter(), before=10**9) == ([], False)


@pytest.fixture(scope="module")
def filled() -> Iterator[Registry]:
    """A history in which times do not follow the ids, and many are equal."""
    memory = Path("/dev/shm")  # noqa: S108 - the directory made in it has a random name
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        database = Database(f"sqlite:///{folder}/{uuid.uuid4().hex}.sqlite3")
        catalog = Catalog(database)
        rows = [
            {
                "revision": index,
                "name": f"n{index % 7}",
                "action": "promote" if index % 3 else "edit",
                "actor": f"key-{index % 4}",
                "owner": ("", "t", "u")[index % 3],
                "at": (index * 37) % 23,
            }
            for index in range(120)
        ]
        with database.writing() as connection:
            connection.execute(history.insert(), rows)
        yield Registry(catalog, CachedCatalog(catalog))
        catalog.close()


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(1, 50),
    tenant=st.sampled_from([None, "t", "u", "none"]),
    actor=st.sampled_from([None, "key-1"]),
    action=st.sampled_from([None, HistoryAction.EDIT]),
    since=st.none() | st.integers(0, 25),
    until=st.none() | st.integers(0, 25),
)
def test_pages_give_each_entry_once_in_order(
    filled: Registry,
    limit: int,
    tenant: str | None,
    actor: str | None,
    action: HistoryAction | None,
    since: int | None,
    until: int | None,
) -> None:
    only = HistoryFilter(actor=actor, action=action, since=since, until=until)
    access = None if tenant is None else Access(tenant)
    found: list[HistoryEntry] = []
    before, has_more = None, True
    while has_more:
        page, has_more = filled.list_history(only, limit, before, access)
        assert len(page) == limit or not has_more
        found += page
        before = page[-1].id if page else None
    keys = [(entry.at, entry.id) for entry in found]
    assert keys == sorted(keys, reverse=True)
    expected = [
        index + 1
        for index in range(120)
        if (tenant is None or ("", "t", "u")[index % 3] in ("", tenant))
        and actor in (None, f"key-{index % 4}")
        and (action is None or index % 3 == 0)
        and (since is None or (index * 37) % 23 >= since)
        and (until is None or (index * 37) % 23 < until)
    ]
    assert sorted(entry.id for entry in found) == expected


def test_histories_of_older_schemas_get_their_owners(url: str) -> None:
    before = Catalog(Database(url))
    publish(before, "mine", "a", owner="t")
    publish(before, "ours", "b")
    Registry(before, CachedCatalog(before)).edit("mine", 1, VersionEdit(description="x"))
    before.close()
    assert {"owner", "reason", "details"}.isdisjoint(downgraded(url, "0005", "history"))
    database = Database(url)
    after = Catalog(database)
    registry = Registry(after, CachedCatalog(after))
    assert [entry.name for entry in entries(registry, Access("u"))] == ["ours", "ours"]
    assert [entry.action for entry in entries(registry, Access("t"), name="mine")] == ["promote", "publish"]
    with database.reading() as connection:
        assert set(connection.execute(sa.select(history.c.details)).scalars()) == {None}
    assert json.dumps(entries(registry)[0].details) == "{}"
    after.close()
