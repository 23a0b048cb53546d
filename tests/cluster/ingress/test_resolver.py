"""From names to bases and digests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from prompt_store.errors import PromptNotFoundError, StoreUnavailableError
from prompt_store.types import Access, PromptKind, PromptRef, PromptVersion
from server.cluster.ingress.heads import RequestHead
from server.cluster.ingress.resolver import Resolver, Route


class FakeNames:
    def __init__(self, **digests: str) -> None:
        self.digests = digests
        self.keys: list[str | None] = []
        self.is_down = False

    def choose(
        self, ref: PromptRef, access: Access | None = None, key: str | None = None
    ) -> tuple[PromptVersion, PromptRef | None]:
        self.keys.append(key)
        if self.is_down:
            raise StoreUnavailableError("down")
        owner, _, digest = self.digests.get(ref.name, "?").rpartition("/")
        if digest == "?" or access is None or not access.sees(owner):
            raise PromptNotFoundError(f"no {ref.name}")
        kind = PromptKind.ADAPTER if ref.name.startswith("lora") else PromptKind.SOFT_PROMPT
        version: Any = SimpleNamespace(digest=digest, kind=kind)
        return version, None


def route(
    resolver: Resolver, *names: str, base: str | None = None, tenant: str = "", key: str | None = None
) -> Route:
    return asyncio.run(resolver.route(RequestHead(base=base, names=names, key=key), Access(tenant)))


@pytest.fixture
def one() -> FakeNames:
    return FakeNames(intent="a" * 64, lora="b" * 64, mine="tenant/" + "c" * 64)


@pytest.fixture
def resolver(one: FakeNames) -> Resolver:
    return Resolver({"one": one, "two": FakeNames(french="d" * 64, intent="e" * 64)})


def test_a_name_goes_to_the_base_that_has_it(resolver: Resolver) -> None:
    assert route(resolver, "intent") == Route("one", "a" * 16)
    assert route(resolver, "french@3") == Route("two", "d" * 16)
    assert route(resolver, "intent", base="two") == Route("two", "e" * 16)
    assert route(resolver) == Route("one", None)
    assert route(resolver, base="two") == Route("two", None)
    assert route(resolver, base="three") == Route("one", None)


def test_of_a_pair_the_soft_prompt_decides(resolver: Resolver) -> None:
    assert route(resolver, "lora+intent") == route(resolver, "intent", "lora") == Route("one", "a" * 16)
    assert route(resolver, "lora") == Route("one", "b" * 16)


def test_unknown_names_and_those_of_other_tenants_go_to_the_default(resolver: Resolver) -> None:
    assert route(resolver, "none") == route(resolver, "mine") == Route("one", None)
    assert route(resolver, "mine", tenant="tenant") == Route("one", "c" * 16)


def test_the_key_of_a_rollout_is_passed_on(resolver: Resolver, one: FakeNames) -> None:
    route(resolver, "intent", key="user")
    assert one.keys == ["user"]


def test_an_unreachable_catalog_does_not_stop_requests(resolver: Resolver, one: FakeNames) -> None:
    one.is_down = True
    assert route(resolver, "intent", base="one") == Route("one", None)
