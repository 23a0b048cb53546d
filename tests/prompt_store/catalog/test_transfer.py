"""Versions, aliases and history of another catalog, on both databases."""

from __future__ import annotations

import pytest

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog.catalog import Catalog
from prompt_store.changes import HistoryAction, HistoryEntry, ImportedEntry, ImportedVersion
from prompt_store.errors import PromptConflictError, PromptForbiddenError, PromptNotFoundError
from prompt_store.registry import Registry
from prompt_store.types import Access, PromptVersion
from tests.prompt_store.catalog.conftest import new, publish

SECOND = 1_000_000
P, R = HistoryAction.PROMOTE, HistoryAction.ROLLBACK


@pytest.fixture
def registry(catalog: Catalog) -> Registry:
    return Registry(catalog, CachedCatalog(catalog))


def imported(
    catalog: Catalog, version: int, content: str, name: str = "p", owner: str = ""
) -> tuple[PromptVersion, bool]:
    found = new(name, content, owner=owner)
    catalog.reserve(found.files)
    return catalog.publish(found, "latest", "me", ImportedVersion(version, 5 * SECOND, "key-there"))


def entries(catalog: Catalog, name: str = "p") -> list[HistoryEntry]:
    return catalog.list_history(name, 100, None)[0][::-1]


def test_a_version_keeps_its_number_and_time(catalog: Catalog) -> None:
    version, is_new = imported(catalog, 7, "a")
    assert (version.version, version.created_by, is_new) == (7, "key-there", True)
    assert version.created_at.timestamp() == 5
    assert imported(catalog, 7, "a") == (version, False)
    assert imported(catalog, 3, "b")[0].version == 3
    assert catalog.get_prompt("p").aliases == {}
    assert [(entry.action, entry.version, entry.actor) for entry in entries(catalog)] == [
        ("import", 7, "me"),
        ("import", 3, "me"),
    ]
    assert publish(catalog, "p", "c") == 8


def test_a_number_in_use_is_a_conflict(catalog: Catalog) -> None:
    imported(catalog, 1, "a")
    with pytest.raises(PromptConflictError, match="exists here with other bytes"):
        imported(catalog, 1, "b")
    imported(catalog, 2, "b")
    catalog.delete_version("p", 2)
    with pytest.raises(PromptConflictError, match="was deleted here.*restore it"):
        imported(catalog, 2, "b")
    with pytest.raises(PromptConflictError, match="is taken"):
        imported(catalog, 3, "c", owner="t")


def test_history_and_aliases_are_added_once(catalog: Catalog, registry: Registry) -> None:
    for number, content in ((1, "a"), (2, "b")):
        imported(catalog, number, content)
    history = [
        ImportedEntry(action=HistoryAction.PUBLISH, version=1, at=10 * SECOND, actor="key-there"),
        ImportedEntry(action=P, alias="latest", version=1, at=10 * SECOND, actor="key-there", actor_name="ci"),
        ImportedEntry(action=P, alias="latest", version=2, previous_version=1, at=20 * SECOND, reason="go"),
        ImportedEntry(action=R, alias="latest", version=1, previous_version=2, at=20 * SECOND),
        ImportedEntry(action=P, alias="latest", version=2, previous_version=1, at=20 * SECOND, details={"a": 1}),
        ImportedEntry(action=HistoryAction.DELETE_VERSION, version=9, at=30 * SECOND),
    ]
    aliases = {"latest": 2, "old": 1, "lost": 9}
    done = registry.import_history("p", history, aliases, actor="me")
    assert (done.aliases, done.kept_aliases, done.missing_aliases) == ({"latest": 2, "old": 1}, {}, ("lost",))
    assert done.num_entries == 6
    found = [entry for entry in entries(catalog) if entry.is_imported]
    assert [(entry.action, entry.version) for entry in found] == [(one.action, one.version) for one in history]
    assert (found[1].actor_name, found[2].reason, found[4].details) == ("ci", "go", {"a": 1})
    assert [entry.at.timestamp() for entry in found] == [10, 10, 20, 20, 20, 30]
    revision = catalog.revision()
    again = registry.import_history("p", history, aliases)
    assert (again.aliases, again.num_entries) == ({}, 0)
    assert catalog.revision() == revision
    assert registry.import_history("p", history[2:3], {}).num_entries == 0
    more = [ImportedEntry(action=P, alias="latest", version=2, previous_version=1, at=20 * SECOND + 7)] * 3
    assert registry.import_history("p", more, {}).num_entries == 1  # two of the three are known
    assert catalog.rollback("p", "latest", None) == 1
    assert publish(catalog, "p", "c", alias=None) == 10  # 9 was used there


def test_aliases_that_moved_on_are_moved_only_on_request(catalog: Catalog, registry: Registry) -> None:
    for number, content in ((1, "a"), (2, "b")):
        imported(catalog, number, content)
    catalog.set_alias("p", "latest", 1, None)
    kept = registry.import_history("p", [], {"latest": 2})
    assert (kept.aliases, kept.kept_aliases) == ({}, {"latest": 1})
    moved = registry.import_history("p", [], {"latest": 2}, move_aliases=True)
    assert (moved.aliases, moved.kept_aliases) == ({"latest": 2}, {})
    assert catalog.rollback("p", "latest", None) == 1


def test_an_import_needs_the_right_to_change(catalog: Catalog, registry: Registry) -> None:
    imported(catalog, 1, "a")
    with pytest.raises(PromptForbiddenError):
        registry.import_history("p", [], {"x": 1}, access=Access("t"))
    with pytest.raises(PromptNotFoundError):
        registry.import_history("q", [], {"x": 1})
    with pytest.raises(ValueError, match="alias '7' is not valid"):
        registry.import_history("p", [], {"7": 1})
