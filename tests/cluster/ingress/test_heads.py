"""What the door reads of a request."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cluster.ingress.heads import RequestHead, names_in_body, read_head

BASES = frozenset({"demo", "other"})


def head(body: object = None, path: str = "/v1/completions", query: str = "", **headers: str) -> RequestHead:
    raw = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return read_head(path, raw, None if body is None else json.dumps(body).encode(), BASES, query.encode())


@pytest.mark.parametrize(
    ("body", "base", "names"),
    [
        ({"model": "demo"}, "demo", ()),
        ({"model": "demo", "prompt_id": "intent@2"}, "demo", ("intent@2",)),
        ({"model": "other:intent"}, "other", ("intent",)),
        ({"model": "intent", "adapter_id": "style"}, None, ("intent", "style")),
        ({"model": ["a", "b"]}, None, ("a", "b")),
        ({"prompt_id": "a+b"}, None, ("a+b",)),
        ({"model": 7}, None, ()),
        ([], None, ()),
    ],
)
def test_names_in_a_body(body: object, base: str | None, names: tuple[str, ...]) -> None:
    found = head(body)
    assert (found.base, found.names) == (base, names)


def test_names_in_a_path() -> None:
    assert head(path="/v1/prompts/intent/versions/2").names == ("intent",)
    assert head(path="/v1/models/other").base == "other"
    assert head(path="/v1/prompts").names == ()


def test_a_pair_has_two_references_and_a_malformed_name_none() -> None:
    assert [str(ref) for ref in head({"prompt_id": "a@1+b@2"}).refs] == ["a@1", "b@2"]
    assert head({"model": "no name at all!"}).refs == []


def test_keys_homes_and_replicas() -> None:
    assert head({"user": "u"}).key == "u"
    assert head({"user": "u"}, x_prelude_sticky_key="k").key == "k"
    assert head(path="/v1/batches/batch_1").home == head(path="/v1/files").home is not None
    assert head(path="/v1/filesystem").home is None
    found = head({}, x_prelude_replica="demo-1", x_prelude_base="other")
    assert (found.replica, found.base) == ("demo-1", "other")


def test_only_bodies_with_names_are_read() -> None:
    assert names_in_body("POST", "/v1/chat/completions")
    assert not names_in_body("POST", "/v1/prompts")
    assert not names_in_body("GET", "/v1/completions")


@pytest.mark.parametrize("path", ["/v1/engine", "/v1/stats", "/v1/events"])
def test_a_query_names_the_replica_that_is_shown(path: str) -> None:
    assert head(path=path, query="topics=live%2Cstats&replica=demo-a.b-1").replica == "demo-a.b-1"
    assert head(path=path, query="replica=one", x_prelude_replica="two").replica == "two"
    for query in ("", "replica=", "replicas=a", "topics=live", "%%%;&&="):
        assert head(path=path, query=query).replica is None
    assert head(path="/v1/history", query="replica=one").replica is None


@given(query=st.binary(max_size=40), path=st.sampled_from(["/v1/engine", "/v1/events"]))
def test_no_query_is_an_error(query: bytes, path: str) -> None:
    found = read_head(path, {}, None, BASES, query)
    assert found.replica is None or b"replica" in query or b"%" in query
