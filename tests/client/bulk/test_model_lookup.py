"""Lookup of the model to request, and the default concurrency."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from prompt_store.types import PromptRef
from server.client.bulk.model_lookup import ResolvedModel, default_concurrency, resolve_model
from server.client.bulk.sender import SendLimits
from server.client.http import ClientError, PreludeClient


class Client(PreludeClient):
    """A client of a server that knows some names."""

    def __init__(
        self,
        version: dict[str, Any] | ClientError,
        model: ClientError | None = None,
        card: dict[str, Any] | None = None,
    ) -> None:
        self._version = version
        self._model = model
        self._card = card or {}

    def version(self, ref: PromptRef) -> dict[str, Any]:
        if isinstance(self._version, ClientError):
            raise self._version
        return self._version

    def model(self, name: str) -> dict[str, Any]:
        if self._model is not None:
            raise self._model
        return {"id": name, **self._card}


def failure(status: int | None) -> ClientError:
    return ClientError("it said no", status=status)


@pytest.mark.parametrize(
    ("name", "client", "resolved"),
    [
        ("a", Client({"id": "a", "version": 3, "task_type": "CAUSAL_LM"}), ("a@3", False)),
        ("a@x", Client({"id": "a", "version": 3, "task_type": "SEQ_CLS"}), ("a@3", True)),
        ("a", Client(failure(404)), ("a", False)),  # the base model has this name
        ("Org/Base", Client(failure(500)), ("Org/Base", False)),
        ("base:a@2", Client(failure(500)), ("base:a@2", False)),
        ("a@x", Client(failure(403), failure(403)), ("a@x", False)),  # a key with only the scope "generate"
    ],
)
def test_a_name_resolves_to_the_model_to_request(name: str, client: Client, resolved: tuple[str, bool]) -> None:
    found = resolve_model(client, name)
    assert (found.model, found.has_head) == resolved
    model, has_head = resolved
    assert found == ResolvedModel(model, has_head, found.record)


@pytest.mark.parametrize("client", [Client(failure(404), failure(404)), Client(failure(None)), Client(failure(500))])
def test_a_name_that_does_not_resolve_is_an_error(client: Client) -> None:
    with pytest.raises(ClientError, match="it said no"):
        resolve_model(client, "a")


@pytest.mark.parametrize(
    ("card", "count"),
    [
        ({"max_num_seqs": 256, "max_waiting": 1024}, 512),
        ({"max_num_seqs": 64, "max_waiting": 10}, 74),  # the server refuses more than these
        ({"max_num_seqs": 64, "max_waiting": 0}, 64),
        ({}, SendLimits().concurrency),  # a server that does not report its limits
        ({"max_num_seqs": None, "max_waiting": "x"}, SendLimits().concurrency),
        (failure(None), SendLimits().concurrency),  # a server that is unreachable when a run resumes
    ],
)
def test_the_default_concurrency_follows_the_servers_limits(card: dict[str, Any] | ClientError, count: int) -> None:
    client = Client({}, card) if isinstance(card, ClientError) else Client({}, card=card)
    assert default_concurrency(client, "a@3") == count


class Registry(PreludeClient):
    """A client of a server with a base, a soft prompt and two adapters, one of them with a head."""

    KINDS: ClassVar = {
        "tone": ("soft_prompt", "CAUSAL_LM"),
        "triage": ("adapter", "CAUSAL_LM"),
        "topics": ("adapter", "SEQ_CLS"),
    }

    def __init__(self) -> None:
        """Connect to nothing."""

    def version(self, ref: PromptRef) -> dict[str, Any]:
        if ref.name not in self.KINDS:
            raise failure(404)
        kind, task_type = self.KINDS[ref.name]
        return {"id": ref.name, "version": ref.version or 3, "kind": kind, "task_type": task_type}

    def model(self, name: str) -> dict[str, Any]:
        names = {part.partition("@")[0] for part in name.removeprefix("base:").split("+")}
        if name != "base" and not names <= self.KINDS.keys():
            raise failure(404)
        return {"id": name, "parent": None if name == "base" else "base"}


@pytest.mark.parametrize(
    ("name", "adapter", "model", "has_head", "record"),
    [
        ("tone+triage", None, "tone@3+triage@3", False, "tone"),
        ("triage@2+tone", None, "triage@2+tone@3", False, "tone"),
        ("tone@1", "triage", "tone@1+triage@3", False, "tone"),
        ("tone", "topics", "tone@3+topics@3", True, "tone"),
        ("base", "triage", "triage@3", False, "triage"),
        ("base:tone", "triage", "base:tone+triage@3", False, "triage"),
        ("base:tone+triage", None, "base:tone+triage", False, None),
        ("topics", None, "topics@3", True, "topics"),
    ],
)
def test_both_names_of_a_pair_become_versions(
    name: str, adapter: str | None, model: str, has_head: bool, record: str | None
) -> None:
    found = resolve_model(Registry(), name, adapter)
    assert (found.model, found.has_head) == (model, has_head)
    assert (found.record and found.record["id"]) == record


@pytest.mark.parametrize(("name", "adapter"), [("tone+none", None), ("tone", "none"), ("none", "triage")])
def test_a_missing_one_of_a_pair_is_an_error(name: str, adapter: str | None) -> None:
    with pytest.raises(ClientError, match="it said no"):
        resolve_model(Registry(), name, adapter)
