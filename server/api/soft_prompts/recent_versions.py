"""The versions that requests have used last, for a report of what lies on this server's disk."""

from __future__ import annotations

import threading
from collections import OrderedDict

from prompt_store.types import PromptVersion

MAX_VERSIONS = 1024
"""Maximum number of versions; those used last stay."""


class RecentVersions:
    """Versions by content digest, the last used at the end. Thread-safe."""

    def __init__(self) -> None:
        self._versions: OrderedDict[str, PromptVersion] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, version: PromptVersion) -> None:
        """A request uses a version."""
        with self._lock:
            self._versions[version.digest] = version
            self._versions.move_to_end(version.digest)
            if len(self._versions) > MAX_VERSIONS:
                self._versions.popitem(last=False)

    def all(self) -> list[PromptVersion]:
        """The versions, the last used at the end."""
        with self._lock:
            return list(self._versions.values())
