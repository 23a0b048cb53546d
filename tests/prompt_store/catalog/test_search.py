"""Search for soft prompts, on both databases."""

from __future__ import annotations

import pytest

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.search import PromptSearch, PromptSort
from prompt_store.registry import Registry
from prompt_store.types import Access, PeftType
from prompt_store.use import Use
from tests.prompt_store.catalog.conftest import publish


@pytest.fixture
def registry(catalog: Catalog) -> Registry:
    publish(catalog, "beta", "b1", tags=("poetry",), description="Writes 100% of a Haiku")
    publish(catalog, "alpha", "a1", peft_type=PeftType.PROMPT_TUNING, owner="acme")
    publish(catalog, "gamma_x", "c1", description="another_one")
    publish(catalog, "beta", "b2", description="a second")
    registry = Registry(catalog, CachedCatalog(catalog))
    uses = {("alpha", 1): 500, ("beta", 1): 900, ("beta", 2): 100}
    registry.add_use({key: Use(1, 1, 1, at) for key, at in uses.items()})
    return registry


def names(registry: Registry, access: Access | None = None, **wanted: object) -> list[str]:
    return [one.name for one in registry.search(PromptSearch(**wanted), access)[0]]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a", ["alpha", "beta", "gamma_x"]),
        ("ALPHA", ["alpha"]),
        ("haiku", ["beta"]),
        ("poet", ["beta"]),
        ("0%", ["beta"]),
        ("%", ["beta"]),
        ("_", ["gamma_x"]),
        ("second", ["beta"]),
        ("'; --", []),
    ],
)
def test_text_is_found_in_names_tags_and_descriptions(registry: Registry, text: str, found: list[str]) -> None:
    assert names(registry, text=text) == found


def test_filters_are_combined(registry: Registry) -> None:
    assert names(registry, peft_type=PeftType.PROMPT_TUNING) == ["alpha"]
    assert names(registry, peft_type=PeftType.PROMPT_TUNING, text="beta") == []
    assert names(registry, tag="poetry") == ["beta"]
    assert names(registry, tag="poetry", peft_type=PeftType.PROMPT_TUNING) == []


@pytest.mark.parametrize(
    ("sort", "ascending"),
    [
        (PromptSort.NAME, ["alpha", "beta", "gamma_x"]),
        (PromptSort.CREATED, ["beta", "alpha", "gamma_x"]),
        (PromptSort.UPDATED, ["alpha", "gamma_x", "beta"]),
        (PromptSort.USED, ["gamma_x", "alpha", "beta"]),
    ],
)
def test_every_order_has_pages_in_both_directions(registry: Registry, sort: PromptSort, ascending: list[str]) -> None:
    for is_descending in (False, True):
        expected = ascending[::-1] if is_descending else ascending
        assert names(registry, sort=sort, is_descending=is_descending) == expected
        found: list[str] = []
        has_more, after = True, None
        while has_more:
            wanted = PromptSearch(sort=sort, is_descending=is_descending, after=after, limit=1)
            page, has_more = registry.search(wanted)
            found += [one.name for one in page]
            after = found[-1]
        assert found == expected


def test_a_tenant_finds_its_own_and_shared_names(registry: Registry) -> None:
    assert names(registry, Access("acme"), text="a") == ["alpha", "beta", "gamma_x"]
    assert names(registry, Access("other"), text="a") == ["beta", "gamma_x"]
    for after in ("alpha", "nothing"):
        with pytest.raises(ValueError, match="after: there is no soft prompt"):
            names(registry, Access("other"), sort=PromptSort.USED, after=after)


def test_deleted_versions_are_not_found(registry: Registry, catalog: Catalog) -> None:
    catalog.delete_version("beta", 1, force=True)
    assert names(registry, text="haiku") == []
    assert names(registry, sort=PromptSort.CREATED) == ["alpha", "gamma_x", "beta"]
    catalog.delete_prompt("beta", force=True)
    assert names(registry) == ["alpha", "gamma_x"]
