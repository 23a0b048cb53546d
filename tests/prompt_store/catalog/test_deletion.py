"""Deletion and restoration, on both databases."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prompt_store.catalog import schema
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database
from prompt_store.changes import HistoryAction
from prompt_store.errors import (
    AliasNotFoundError,
    PromptConflictError,
    PromptForbiddenError,
    PromptInUseError,
    PromptNotFoundError,
)
from prompt_store.types import SHARED, Access, PromptRef
from tests.prompt_store.catalog.conftest import publish, resolve
from tests.prompt_store.catalog.test_catalog import downgraded


def in_microseconds(seconds: float = 0.0) -> int:
    return int((time.time() + seconds) * 1e6)


def restore(catalog: Catalog, name: str, version: int | None = None, access: Access | None = None) -> list[int]:
    """Restore within an hour; returns the versions."""
    return list(catalog.restore(name, version, deleted_after=in_microseconds(-3600), access=access).versions)


def actions(catalog: Catalog, name: str, limit: int) -> list[tuple[HistoryAction, str | None, int | None]]:
    entries, _ = catalog.list_history(name, limit, None)
    return [(entry.action, entry.alias, entry.version) for entry in reversed(entries)]


def test_a_version_in_use_is_deleted_only_by_force(catalog: Catalog) -> None:
    for content in "ab":
        publish(catalog, "p", content)
    catalog.set_alias("p", "prod", 2, None)
    catalog.set_alias("p", "old", 1, None)
    before = catalog.get_prompt("p"), catalog.revision()
    with pytest.raises(PromptInUseError, match=r"2 of 'p' is in use by the aliases latest, prod: .*force=true"):
        catalog.delete_version("p", 2)
    with pytest.raises(PromptInUseError, match="in use by the alias old"):
        catalog.delete_version("p", 1)
    assert (catalog.get_prompt("p"), catalog.revision()) == before
    deletion = catalog.delete_version("p", 2, force=True)
    assert (deletion.versions, deletion.aliases) == ((2,), {"latest": 2, "prod": 2})
    summary = catalog.get_prompt("p")
    assert (summary.aliases, summary.num_versions, summary.latest.version) == ({"old": 1}, 1, 1)
    with pytest.raises(AliasNotFoundError, match="has no alias 'latest': its aliases are old=1"):
        resolve(catalog, "p")
    catalog.delete_alias("p", "old")
    with pytest.raises(AliasNotFoundError, match="it has none; name a version"):
        resolve(catalog, "p")
    assert catalog.delete_version("p", 1).aliases == {}


def test_only_some_aliases_are_named(catalog: Catalog) -> None:
    publish(catalog, "p", "a", alias=None)
    for number in range(11):
        catalog.set_alias("p", f"a{number:02}", 1, None)
    with pytest.raises(AliasNotFoundError, match=r"a00=1, .*a09=1, \.\.\.$"):
        resolve(catalog, "p")


def test_several_versions_are_deleted_only_by_force(catalog: Catalog) -> None:
    publish(catalog, "p", "a")
    assert catalog.delete_prompt("p").aliases == {"latest": 1}
    for content in "bc":
        publish(catalog, "p", content, alias=None)
    with pytest.raises(PromptInUseError, match="^soft prompt 'p' has 2 versions: .*force=true"):
        catalog.delete_prompt("p")
    catalog.set_alias("p", "prod", 3, None)
    with pytest.raises(PromptInUseError, match="has 2 versions and the alias prod: "):
        catalog.delete_prompt("p")
    assert catalog.delete_prompt("p", force=True).versions == (2, 3)
    with pytest.raises(PromptNotFoundError, match="does not exist"):
        catalog.get_prompt("p")


def test_a_version_comes_back_with_its_aliases(catalog: Catalog) -> None:
    publish(catalog, "p", "a", tags=("t",))
    publish(catalog, "p", "b", tags=("u",), metadata={"k": 1})
    catalog.set_alias("p", "prod", 2, None)
    before = catalog.resolve(PromptRef("p", version=2, alias=None))
    catalog.delete_version("p", 2, force=True)
    assert catalog.list_prompts(10, None, "u") == ([], False)
    catalog.set_alias("p", "latest", 1, None)
    restored = catalog.restore("p", 2, deleted_after=0, actor="eve")
    assert (restored.versions, restored.aliases, restored.kept_aliases) == ((2,), {"prod": 2}, {"latest": 1})
    assert catalog.resolve(PromptRef("p", version=2, alias=None)) == before
    assert catalog.get_prompt("p").aliases == {"latest": 1, "prod": 2}
    assert [summary.name for summary in catalog.list_prompts(10, None, "u")[0]] == ["p"]
    assert actions(catalog, "p", 2) == [
        (HistoryAction.RESTORE, None, 2),
        (HistoryAction.RESTORE, "prod", 2),
    ]
    assert catalog.list_history("p", 1, None)[0][0].actor == "eve"
    with pytest.raises(PromptConflictError, match="version 2 of 'p' is not deleted"):
        restore(catalog, "p", 2)


def test_a_name_comes_back_with_versions_and_aliases(catalog: Catalog) -> None:
    for content in "abc":
        publish(catalog, "p", content)
    catalog.set_alias("p", "prod", 1, None)
    catalog.delete_version("p", 2)
    before = catalog.get_prompt("p")
    catalog.delete_prompt("p", force=True)
    assert restore(catalog, "p") == [1, 3]
    assert catalog.get_prompt("p") == before
    assert restore(catalog, "p") == [2]  # the deletion before
    with pytest.raises(PromptNotFoundError, match="no deleted version that can be restored"):
        restore(catalog, "p")


def test_one_version_of_a_deleted_name_and_then_the_rest(catalog: Catalog) -> None:
    for content in "abc":
        publish(catalog, "p", content)
    catalog.set_alias("p", "prod", 1, None)
    catalog.delete_prompt("p", force=True)
    assert publish(catalog, "p", "d") == 4  # a new life under the old name
    assert restore(catalog, "p", 1) == [1]
    assert catalog.get_prompt("p").aliases == {"latest": 4, "prod": 1}
    restored = catalog.restore("p", None, deleted_after=0)
    assert (restored.versions, restored.aliases, restored.kept_aliases) == ((2, 3), {}, {"latest": 4})


def test_the_same_bytes_may_be_back_twice(catalog: Catalog) -> None:
    publish(catalog, "p", "a")
    catalog.delete_prompt("p")
    assert publish(catalog, "p", "a") == 2
    assert restore(catalog, "p") == [1]
    assert publish(catalog, "p", "a") == 2  # the newest of them


def test_rollback_works_after_a_restoration(catalog: Catalog) -> None:
    for content in "abc":
        publish(catalog, "p", content)
    catalog.delete_version("p", 3, force=True)
    restore(catalog, "p", 3)
    assert catalog.rollback("p", "latest", None) == 2
    catalog.delete_prompt("p", force=True)
    restore(catalog, "p")
    assert catalog.rollback("p", "latest", None) == 1
    with pytest.raises(PromptConflictError, match="no earlier version"):
        catalog.rollback("p", "latest", None)


def test_a_deletion_is_final_after_the_retention_time(catalog: Catalog) -> None:
    for content in "ab":
        publish(catalog, "p", content)
    catalog.delete_version("p", 1)
    later = in_microseconds(1)
    for version, message in ((1, "was deleted at .*Z: too late"), (None, "no deleted version")):
        with pytest.raises(PromptNotFoundError, match=message):
            catalog.restore("p", version, deleted_after=later)
    catalog.forget_deleted(in_microseconds(-60))
    assert restore(catalog, "p", 1) == [1]
    catalog.delete_version("p", 1)
    catalog.forget_deleted(later)
    for version, message in ((1, "too late"), (None, "no deleted version"), (7, "never had a version 7")):
        with pytest.raises(PromptNotFoundError, match=message):
            restore(catalog, "p", version)
    with pytest.raises(PromptNotFoundError, match="'q' does not exist"):
        restore(catalog, "q")


def test_forgetting_takes_no_revision_and_drops_tags(catalog: Catalog) -> None:
    publish(catalog, "p", "a", tags=("t",))
    catalog.delete_prompt("p")
    revision = catalog.revision()
    catalog.forget_deleted(in_microseconds(1))
    assert catalog.revision() == revision
    with catalog._database.reading() as connection:
        for table in (schema.tags, schema.version_files):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 0


def test_owners_restore_their_own(catalog: Catalog) -> None:
    for name, owner in (("own", "a"), ("shared", SHARED)):
        publish(catalog, name, name, owner=owner)
        catalog.delete_prompt(name)
    tenant, admin, other = Access("a"), Access("a", may_change_shared=True), Access("b")
    messages = []
    for name in ("own", "nobodys"):
        with pytest.raises(PromptNotFoundError) as error:
            restore(catalog, name, access=other)
        messages.append(str(error.value).replace(name, "NAME"))
    assert messages[0] == messages[1]
    with pytest.raises(PromptForbiddenError, match="shared"):
        restore(catalog, "shared", access=tenant)
    assert restore(catalog, "shared", access=admin) == [1]
    assert restore(catalog, "own", access=tenant) == [1]
    assert catalog.resolve(PromptRef("own"), tenant).owner == "a"


def test_versions_deleted_by_older_releases_are_final(url: str) -> None:
    catalog = Catalog(Database(url))
    for content in "ab":
        publish(catalog, "p", content)
    catalog.delete_version("p", 1)
    catalog.close()
    assert "deleted_in" not in downgraded(url, "0003", "versions")
    catalog = Catalog(Database(url))
    assert resolve(catalog, "p") == 2
    for version in (1, None):
        with pytest.raises(PromptNotFoundError, match="too late|no deleted version"):
            restore(catalog, "p", version)
    with catalog.garbage(in_microseconds(), 100, lambda _: False) as digests:
        assert len(digests) == 1  # the weights; the configuration is shared
    catalog.close()


class Deletions(RuleBasedStateMachine):
    """Any sequence of changes of one name, compared with a model of its versions, aliases and deletions."""

    open_catalog: Callable[[], Catalog]

    def __init__(self) -> None:
        super().__init__()
        self.catalog = self.open_catalog()
        self.live: set[int] = set()
        self.aliases: dict[str, int] = {}
        self.deletions: list[tuple[set[int], dict[str, int]]] = []
        self.last = 0

    @rule(alias=st.sampled_from([None, "latest", "prod"]))
    def publish(self, alias: str | None) -> None:
        self.last += 1
        assert publish(self.catalog, "p", str(self.last), alias) == self.last
        self.live.add(self.last)
        if alias is not None:
            self.aliases[alias] = self.last

    @precondition(lambda self: self.live)
    @rule(data=st.data(), alias=st.sampled_from(["latest", "prod", "old"]))
    def promote(self, data: st.DataObject, alias: str) -> None:
        version = data.draw(st.sampled_from(sorted(self.live)))
        self.catalog.set_alias("p", alias, version, None)
        self.aliases[alias] = version

    @precondition(lambda self: self.live)
    @rule(data=st.data(), force=st.booleans())
    def delete_version(self, data: st.DataObject, force: bool) -> None:
        version = data.draw(st.sampled_from(sorted(self.live)))
        if not force and version in self.aliases.values():
            with pytest.raises(PromptInUseError):
                self.catalog.delete_version("p", version)
            return
        self.catalog.delete_version("p", version, force=force)
        self._note({version})

    @precondition(lambda self: self.live)
    @rule(force=st.booleans())
    def delete_prompt(self, force: bool) -> None:
        if not force and len(self.live) > 1:
            with pytest.raises(PromptInUseError):
                self.catalog.delete_prompt("p")
            return
        self.catalog.delete_prompt("p", force=force)
        self._note(set(self.live))

    def _note(self, gone: set[int]) -> None:
        self.deletions.append((gone, {alias: v for alias, v in self.aliases.items() if v in gone}))
        self.live -= gone
        self.aliases = {alias: v for alias, v in self.aliases.items() if v not in gone}

    @precondition(lambda self: self.deletions)
    @rule()
    def restore(self) -> None:
        versions, removed = self.deletions.pop()
        assert restore(self.catalog, "p") == sorted(versions)
        self._return(versions, removed)

    @precondition(lambda self: self.deletions)
    @rule(data=st.data())
    def restore_version(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(set().union(*(versions for versions, _ in self.deletions)))))
        versions, removed = next(deletion for deletion in self.deletions if version in deletion[0])
        assert restore(self.catalog, "p", version) == [version]
        versions.discard(version)
        self._return({version}, {alias: v for alias, v in removed.items() if v == version})
        self.deletions = [deletion for deletion in self.deletions if deletion[0]]

    def _return(self, versions: set[int], removed: dict[str, int]) -> None:
        self.live |= versions
        self.aliases = {**{alias: v for alias, v in removed.items() if v in versions}, **self.aliases}

    @invariant()
    def catalog_agrees(self) -> None:
        if not self.live:
            with pytest.raises(PromptNotFoundError):
                self.catalog.get_prompt("p")
            return
        summary = self.catalog.get_prompt("p")
        found = {version.version for version in self.catalog.list_versions("p", 1000, None)[0]}
        assert (found, dict(summary.aliases), summary.num_versions) == (self.live, self.aliases, len(self.live))
        with self.catalog.garbage(in_microseconds(), 100, lambda _: False) as digests:
            assert digests == []

    def teardown(self) -> None:
        self.catalog.close()


def test_any_sequence_of_deletions_and_restorations() -> None:
    # In memory if possible, because every change would wait for the disk.
    memory = Path("/dev/shm")  # noqa: S108 - the directory made in it has a random name
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:

        class InFolder(Deletions):
            @staticmethod
            def open_catalog() -> Catalog:
                return Catalog(Database(f"sqlite:///{folder}/{uuid.uuid4()}.sqlite3"))

        case = InFolder.TestCase
        case.settings = hypothesis_settings(max_examples=25, stateful_step_count=20, deadline=None)
        case("runTest").debug()
