"""The names in a request, and the versions that they mean: one of each kind at most."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from prompt_store.errors import AliasNotFoundError, PromptNotFoundError
from prompt_store.types import Access, LeasedPrompt, PeftType, PromptKind, PromptRef, PromptVersion
from server.api.inference.pair import LeasedPair, lease_pair, versions_of
from server.api.inference.target import Target, resolve
from server.api.services import Services
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.engine.types import Member
from server.errors import InvalidRequestError, ModelNotFoundError, SoftPromptNotFoundError, WrongAdapterError

pytestmark = pytest.mark.anyio

ACCESS = Access("someone")
SOFT_PROMPT, ADAPTER = PromptKind.SOFT_PROMPT, PromptKind.ADAPTER


def version(name: str, number: int, kind: PromptKind, **more: Any) -> PromptVersion:
    values: dict[str, Any] = {
        "name": name,
        "version": number,
        "digest": f"{name}{number}",
        "peft_type": PeftType.PROMPT_TUNING,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 4 if kind is SOFT_PROMPT else 0,
        "dtype": "F32",
        "base_model_name_or_path": None,
        "files": (),
        "created_at": datetime.now(UTC),
        "kind": kind,
        "num_parameters": None if kind is SOFT_PROMPT else 64,
    }
    return PromptVersion(**{**values, **more})


VERSIONS = [
    version("tone", 1, SOFT_PROMPT),
    version("tone", 2, ADAPTER),
    version("tone", 3, SOFT_PROMPT, over="style@2"),
    version("plain", 1, SOFT_PROMPT),
    version("style", 1, ADAPTER),
    version("style", 2, ADAPTER),
    version("orphan", 1, SOFT_PROMPT, over="gone@4"),
    version("triage", 1, ADAPTER, num_labels=3),
]
ALIASES = {("tone", "latest"): 3, ("tone", "canary"): 1, ("plain", "latest"): 1, ("style", "latest"): 1}
ALIASES |= {("orphan", "latest"): 1, ("triage", "latest"): 1}


class FakeStore:
    """Has the versions above, and counts its leases."""

    def __init__(self) -> None:
        self.num_leased = 0

    async def resolve(self, ref: PromptRef, access: Access) -> PromptVersion:
        assert access is ACCESS
        if ref.name not in {found.name for found in VERSIONS}:
            raise PromptNotFoundError(f"soft prompt {ref.name!r} does not exist")
        number = ALIASES.get((ref.name, ref.alias)) if ref.alias is not None else ref.version
        if number is None:
            raise AliasNotFoundError(f"soft prompt {ref.name!r} has no alias {ref.alias!r}")
        for found in VERSIONS:
            if (found.name, found.version) == (ref.name, number):
                return found
        raise PromptNotFoundError(f"soft prompt {ref.name!r} has no version {number}")

    @asynccontextmanager
    async def lease_for_request(
        self, ref: PromptRef, access: Access, key: str | None = None
    ) -> AsyncIterator[LeasedPrompt]:
        found = await self.resolve(ref, access)
        self.num_leased += 1
        try:
            yield LeasedPrompt(found, Path("/weights"), config_path=Path("/config"))
        finally:
            self.num_leased -= 1


def named(*names: str | None, base: str = "base") -> Target:
    """The target of ``model``, ``prompt_id`` and ``adapter_id``, as many as are given."""
    model, prompt_id, adapter_id = (*names, None, None, None)[:3]
    return resolve(model, prompt_id, adapter_id, base_name=base, access=ACCESS)


async def leased(*names: str | None) -> LeasedPair:
    store = FakeStore()
    async with AsyncExitStack() as stack:
        found = await lease_pair(cast("AsyncPromptStore", store), named(*names), stack)
        assert store.num_leased == len(found.both)
    assert store.num_leased == 0
    return found


async def refused(error: type[Exception], *names: str | None) -> tuple[str | None, str]:
    """The field and the message of the error, which ends all leases."""
    store = FakeStore()
    with pytest.raises(error) as caught:
        async with AsyncExitStack() as stack:
            await lease_pair(cast("AsyncPromptStore", store), named(*names), stack)
    assert store.num_leased == 0
    assert type(caught.value) is error
    return getattr(caught.value, "param", None), str(caught.value)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((None, None, None), None),
        (("base", None, None), None),
        (("plain",), "plain@1"),
        (("style",), "style@1"),
        (("base:style@2",), "style@2"),
        (("plain+style",), "plain@1+style@1"),
        (("style@2+plain",), "plain@1+style@2"),
        (("base:style+plain@latest",), "plain@1+style@1"),
        (("base", "plain"), "plain@1"),
        (("base", "style"), "style@1"),
        ((None, "style+plain"), "plain@1+style@1"),
        ((None, None, "style@2"), "style@2"),
        (("base", None, "style"), "style@1"),
        (("plain", None, "style"), "plain@1+style@1"),
        (("base", "plain", "style"), "plain@1+style@1"),
        (("tone@canary+tone@2",), "tone@1+tone@2"),
        (("tone",), "tone@3+style@2"),
        (("tone", None, "style@2"), "tone@3+style@2"),
        (("style@2+tone",), "tone@3+style@2"),
    ],
)
async def test_a_request_names_one_of_each_kind_in_either_order(
    names: Iterable[str | None], found: str | None
) -> None:
    pair = await leased(*names)
    assert pair.name == found
    assert pair.label == (found and "+".join(part.partition("@")[0] for part in found.split("+")))
    assert [one.kind for one in pair.versions] in ([], [SOFT_PROMPT], [ADAPTER], [SOFT_PROMPT, ADAPTER])
    assert pair.num_virtual_tokens == (4 if pair.soft_prompt else 0)


async def test_the_engine_gets_both_of_a_pair() -> None:
    pair = await leased("plain+style@2")
    member = pair.member(None)
    assert member.soft_prompt is not None
    assert member.adapter is not None
    assert (member.soft_prompt.digest, member.adapter.digest) == ("plain1", "style2")
    assert (member.adapter.path, member.adapter.config_path) == ("/weights", "/config")
    assert (member.adapter.num_parameters, member.adapter.num_labels) == (64, None)
    assert (await leased("base")).member(None) == Member()
    head = (await leased("plain+triage")).with_head
    assert head is not None
    assert head.version.name == "triage"


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (("plain+tone@1",), "model"),
        (("style+tone@2",), "model"),
        (("style@1+style@2",), "model"),
        (("plain@1+plain@latest",), "model"),
        ((None, "plain+tone@1"), "prompt_id"),
        ((None, "style", "tone@2"), "prompt_id"),
        (("style", None, "tone@2"), "model"),
        (("style", None, "plain"), "adapter_id"),
        (("plain", None, "tone@1"), "adapter_id"),
        ((None, None, "plain"), "adapter_id"),
    ],
)
async def test_two_of_one_kind_are_refused(names: Iterable[str | None], field: str) -> None:
    param, message = await refused(InvalidRequestError, *names)
    assert param == field
    assert message.startswith(f"{field}: ")
    assert "at most one soft prompt and one adapter" in message or "is not an adapter" in message


@pytest.mark.parametrize(
    ("names", "field", "text"),
    [
        (("plain+style+tone",), "model", "are 3"),
        ((None, "plain+style+tone"), "prompt_id", "are 3"),
        (("plain+style", None, "tone@2"), "adapter_id", "are 3"),
        ((None, "plain+tone", "style"), "adapter_id", "are 3"),
        (("plain+plain",), "model", "plain@latest is named twice"),
        (("plain+plain@latest",), "model", "plain@latest is named twice"),
        (("style", None, "style"), "adapter_id", "style@latest is named twice"),
        ((None, "style@1", "style@1"), "adapter_id", "style@1 is named twice"),
        ((None, None, "style+plain"), "adapter_id", "'style+plain' is not valid"),
        ((None, None, "Style"), "adapter_id", "'Style' is not valid"),
        ((None, "plain+", None), "prompt_id", "'' is not valid"),
        (("plain", "style", None), "prompt_id", "already names"),
        (("plain", "plain", "style"), "prompt_id", "already names"),
    ],
)
def test_names_that_cannot_be_a_pair_are_refused_before_anything_is_looked_up(
    names: tuple[str | None, ...], field: str, text: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        named(*names)
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field}: ")
    assert text in caught.value.message


@pytest.mark.parametrize("model", ["plain+", "+plain", "a+B", "plain+style@0", "x/y", "plain++style"])
def test_a_malformed_model_does_not_exist(model: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        named(model)
    assert caught.value.param == "model"


def test_a_base_may_have_a_plus_in_its_name() -> None:
    assert named("my+model", base="my+model").names == ()
    pair = named("my+model:plain+style", base="my+model")
    assert [str(one.ref) for one in pair.names] == ["plain@latest", "style@latest"]


@pytest.mark.parametrize(
    ("names", "field", "text"),
    [
        (("plain+missing",), "model", "soft prompt 'missing' does not exist"),
        (("missing+style",), "model", "soft prompt 'missing' does not exist"),
        (("plain", None, "missing"), "adapter_id", "adapter_id: soft prompt 'missing' does not exist"),
        (("plain", None, "style@9"), "adapter_id", "no version 9"),
        (("plain@canary", None, "style"), "model", "no alias 'canary'"),
        ((None, "missing", "style"), "prompt_id", "'missing' does not exist"),
        (
            ("orphan",),
            "model",
            "the soft prompt orphan@1 was trained over the adapter gone@4, and soft prompt 'gone'",
        ),
    ],
)
async def test_the_missing_one_of_a_pair_is_named(names: Iterable[str | None], field: str, text: str) -> None:
    param, message = await refused(SoftPromptNotFoundError, *names)
    assert (param, text in message) == (field, True), message


async def test_an_unknown_bare_model_may_be_another_base() -> None:
    assert (await refused(ModelNotFoundError, "missing"))[0] == "model"


@pytest.mark.parametrize(
    ("names", "field"),
    [(("tone+style@1",), "model"), (("style+tone",), "model"), (("tone", None, "style"), "adapter_id")],
)
async def test_a_soft_prompt_is_not_served_over_another_adapter_than_its_own(
    names: Iterable[str | None], field: str
) -> None:
    param, message = await refused(WrongAdapterError, *names)
    assert param == field
    assert "trained over the adapter style@2" in message
    assert "style@1" in message


async def test_a_look_up_checks_what_a_lease_checks() -> None:
    class FakeServices:
        store = FakeStore()

    services = cast("Services", FakeServices())
    assert await versions_of(services, named("base")) == []
    assert [one.name for one in await versions_of(services, named("style+plain"))] == ["plain", "style"]
    for error, names in (
        (InvalidRequestError, ("plain+tone@1",)),
        (WrongAdapterError, ("tone+style",)),
        (SoftPromptNotFoundError, ("plain+missing",)),
    ):
        with pytest.raises(error):
            await versions_of(services, named(*names))
