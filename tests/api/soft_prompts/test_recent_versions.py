"""The versions that requests have used last: each once, in the order of their use, and not without bound."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from server.api.soft_prompts.recent_versions import MAX_VERSIONS, RecentVersions


def version(digest: object) -> Any:
    return SimpleNamespace(digest=str(digest))


def test_a_version_stands_once_where_it_was_used_last() -> None:
    recent = RecentVersions()
    for digest in "abca":
        recent.note(version(digest))
    assert [one.digest for one in recent.all()] == ["b", "c", "a"]


def test_the_versions_used_longest_ago_are_forgotten() -> None:
    recent = RecentVersions()
    for digest in range(MAX_VERSIONS + 2):
        recent.note(version(digest))
    assert [one.digest for one in recent.all()] == [str(digest) for digest in range(2, MAX_VERSIONS + 2)]
