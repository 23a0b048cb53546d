"""The use of versions, and the deletion of those that are not needed, on both databases."""

from __future__ import annotations

import threading
import time

import pytest

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog import usage
from prompt_store.catalog.catalog import Catalog
from prompt_store.errors import PromptForbiddenError, PromptNotFoundError
from prompt_store.registry import Registry
from prompt_store.types import Access
from prompt_store.use import Use
from tests.prompt_store.catalog.conftest import publish


def now(seconds: float = 0.0) -> int:
    return int((time.time() + seconds) * 1e6)


@pytest.fixture
def registry(catalog: Catalog) -> Registry:
    return Registry(catalog, CachedCatalog(catalog))


def used(registry: Registry, name: str) -> dict[int, Use]:
    return {one.version: one.use for one in registry.usage(name)[0]}


def prune(
    catalog: Catalog, *, keep: int, before: int, spared: set[int] | None = None, dry_run: bool = False
) -> list[int]:
    with catalog.changing("ada") as change:
        return usage.prune(change, "p", None, keep=keep, before=before, spared=spared or set(), dry_run=dry_run)


def test_uses_are_added_up(catalog: Catalog, registry: Registry) -> None:
    for content in "ab":
        publish(catalog, "p", content)
    revision = catalog.revision()
    registry.add_use({("p", 1): Use(2, 30, 4, 500), ("p", 9): Use(1, 1, 1, 1), ("gone", 1): Use(1, 1, 1, 1)})
    registry.add_use({("p", 1): Use(1, 10, 1, 400), ("p", 2): Use(1, 5, 5, 600)})
    registry.add_use({})
    assert used(registry, "p") == {2: Use(1, 5, 5, 600), 1: Use(3, 40, 5, 500)}
    assert catalog.revision() == revision  # it is no change of the name
    page, has_more = registry.usage("p", 1)
    assert ([one.version for one in page], has_more) == ([2], True)
    page, has_more = registry.usage("p", 1, before=2)
    assert ([one.version for one in page], has_more) == ([1], False)
    assert Use(1, 2, 3, 4) + Use(10, 20, 30, 1) == Use(11, 22, 33, 4)


def test_many_uses_from_several_threads_are_all_counted(catalog: Catalog, registry: Registry) -> None:
    names = [f"n{index}" for index in range(30)]
    for name in names:
        publish(catalog, name, name)
    more = {(f"x{index}", 1): Use(1, 1, 1, 1) for index in range(500)}
    counts = more | {(name, 1): Use(1, 2, 3, 4) for name in names}
    threads = [threading.Thread(target=registry.add_use, args=(counts,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(used(registry, name) == {1: Use(4, 8, 12, 4)} for name in names)


def test_the_use_of_a_shared_name_is_for_those_who_may_change_it(catalog: Catalog, registry: Registry) -> None:
    publish(catalog, "ours", "a")
    publish(catalog, "mine", "b", owner="t")
    with pytest.raises(PromptForbiddenError):
        registry.usage("ours", access=Access("t"))
    with pytest.raises(PromptNotFoundError):
        registry.usage("mine", access=Access("u"))
    assert len(registry.usage("mine", access=Access("t"))[0]) == 1
    assert len(registry.usage("ours", access=Access("t", may_change_shared=True))[0]) == 1


def test_unused_names_are_listed(catalog: Catalog, registry: Registry) -> None:
    for name in ("a", "b", "c"):
        publish(catalog, name, name, tags=("t",))
    after = now(1)
    registry.add_use({("b", 1): Use(1, 1, 1, now(10))})

    def names(limit: int = 10, after_name: str | None = None, tag: str | None = None) -> tuple[list[str], bool]:
        found, has_more = catalog.list_prompts(limit, after_name, tag, unused_since=after)
        return [one.name for one in found], has_more

    assert names() == names(tag="t") == (["a", "c"], False)
    assert names(1) == names(1, tag="t") == (["a"], True)
    assert names(1, "a") == names(1, "a", "t") == (["c"], False)
    assert [one.name for one in catalog.list_prompts(10, None, None, unused_since=now(-60))[0]] == []


def test_prune_keeps_what_may_be_needed(catalog: Catalog, registry: Registry) -> None:
    for content in "abcdefg":
        publish(catalog, "p", content)
    catalog.set_alias("p", "prod", 2, None)
    registry.add_use({("p", 3): Use(1, 1, 1, now(100)), ("p", 4): Use(1, 1, 1, 1)})
    assert prune(catalog, keep=2, before=now(-60)) == []  # all are new
    revision = catalog.revision()
    assert prune(catalog, keep=2, before=now(60), spared={5}, dry_run=True) == [1, 4]
    assert catalog.revision() == revision
    assert prune(catalog, keep=2, before=now(60), spared={5}) == [1, 4]
    assert [one.version for one in catalog.list_versions("p", 10, None)[0]] == [7, 6, 5, 3, 2]
    assert catalog.get_prompt("p").aliases == {"latest": 7, "prod": 2}
    assert catalog.get_prompt("p").num_versions == 5
    assert list(catalog.restore("p", None, deleted_after=now(-60)).versions) == [1, 4]
    assert prune(catalog, keep=10, before=now(60)) == []
    with pytest.raises(PromptNotFoundError), catalog.changing(None) as change:
        usage.prune(change, "q", None, keep=1, before=0, spared=(), dry_run=True)
