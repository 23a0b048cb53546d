"""Rollouts: an alias that shares its requests among versions, or copies some of them to another version."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_CANARIES = 8
MAX_KEY_CHARS = 256
"""Maximum length of the key that makes a client's version sticky."""

_HASH_BYTES = 8
_FRACTION_BITS = 53
"""Those of a float, so that no share rounds up to 1."""
_MAX_VERSION = 2**63


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that gets copies of requests; its answers are compared and never returned.

    Attributes:
        version: The version.
        percent: Share of the alias's requests that are copied, above 0 and at most 100.
    """

    version: int
    percent: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """How an alias treats requests, besides the version that it points at.

    Attributes:
        canaries: Percent of the requests by version, each above 0, together at most 100. The version that the alias
            points at answers all others.
        shadow: The version that gets copies, if any.
    """

    canaries: Mapping[int, float] = field(default_factory=dict)
    shadow: Shadow | None = None

    @classmethod
    def parse(cls, value: object) -> Rollout:
        """Check a JSON value: ``{"canaries": {"8": 5}, "shadow": {"version": 9, "percent": 10}}``, both optional.

        Raises:
            ValueError: If it is not such an object, a number is out of range, or there are too many versions.
        """
        if not isinstance(value, Mapping) or value.keys() - {"canaries", "shadow"}:
            raise ValueError("a rollout must be an object with canaries and shadow")
        canaries = value.get("canaries") or {}
        if not isinstance(canaries, Mapping) or len(canaries) > MAX_CANARIES:
            raise ValueError(f"canaries must be an object of at most {MAX_CANARIES} versions")
        parsed = {_version(key, "canaries"): _percent(percent, "canaries") for key, percent in canaries.items()}
        if len(parsed) != len(canaries):
            raise ValueError("canaries names a version twice")
        if math.fsum(parsed.values()) > 100:
            raise ValueError(f"canaries take {math.fsum(parsed.values()):g}% of the requests, more than 100%")
        shadow = value.get("shadow")
        if shadow is None:
            return cls(dict(sorted(parsed.items())))
        if not isinstance(shadow, Mapping) or shadow.keys() != {"version", "percent"}:
            raise ValueError("shadow must be an object with version and percent")
        copied = Shadow(_version(shadow["version"], "shadow"), _percent(shadow["percent"], "shadow"))
        return cls(dict(sorted(parsed.items())), copied)

    def to_json(self) -> dict[str, object]:
        """The parts that there are, as ``parse`` reads them."""
        parts: dict[str, object] = {}
        if self.canaries:
            parts["canaries"] = {str(version): percent for version, percent in self.canaries.items()}
        if self.shadow is not None:
            parts["shadow"] = {"version": self.shadow.version, "percent": self.shadow.percent}
        return parts

    @property
    def versions(self) -> set[int]:
        """All versions that it names."""
        return {*self.canaries, *([] if self.shadow is None else [self.shadow.version])}

    def check(self, version: int) -> None:
        """Raise ValueError if it names the version that the alias points at, which takes the rest already."""
        if version in self.canaries:
            raise ValueError(f"canaries: version {version} is the alias's own, which answers all other requests")
        if self.shadow is not None and self.shadow.version == version:
            raise ValueError(f"shadow: version {version} is the alias's own")

    def draw(self, version: int, name: str, key: str | None) -> int:
        """The version that answers a request.

        A key gets the same version from every server as long as the rollout names the same versions. A larger percent
        of a single canary adds keys to it and takes none away.

        Args:
            version: The version that the alias points at.
            name: The soft prompt's name, so that the same keys are not the first of every rollout.
            key: Who asks; None draws at random.
        """
        position = 100 * (random.random() if key is None else self._share(name, key))  # noqa: S311 - no secret
        for canary, percent in self.canaries.items():
            position -= percent
            if position < 0:
                return canary
        return version

    def draw_shadow(self) -> int | None:
        """The version that gets a copy of a request; None for most requests."""
        if self.shadow is None or 100 * random.random() >= self.shadow.percent:  # noqa: S311 - no secret
            return None
        return self.shadow.version

    def _share(self, name: str, key: str) -> float:
        """A number in [0, 1) that follows from a key."""
        text = "\0".join([name, ",".join(map(str, self.canaries)), key])
        digest = hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()
        return (int.from_bytes(digest) >> 8 * _HASH_BYTES - _FRACTION_BITS) / float(1 << _FRACTION_BITS)


NO_ROLLOUT = Rollout()
"""All requests of an alias go to the version that it points at."""


def _version(value: object, field_name: str) -> int:
    number = (
        int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20 else value
    )
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < _MAX_VERSION:
        raise ValueError(f"{field_name}: {str(value)[:32]!r} is not a version number")
    return number


def _percent(value: object, field_name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 100:
        raise ValueError(f"{field_name}: a percent must be a number above 0 and at most 100")
    return float(value)
