"""Which soft prompts, versions and tenants have time series of their own: the most used ones."""

from __future__ import annotations

from typing import TypeVar

from prometheus_client import Counter, Histogram

from server.metrics.top_names import TopNames

BASE_LABEL = "-"
"""The label of requests to the base model, and of requests without a tenant; no name starts with a dash."""

OTHER_LABEL = "other"
"""The label of all names except the most used, and of one named ``other``."""

GOLDEN_CHECK = ".golden-check-"
"""Part of the temporary names of ``prelude train``, which take no place among the labels."""

_VERSIONS_PER_NAME = 4
"""Places for versions, for each place of a soft prompt."""

Family = TypeVar("Family", Counter, Histogram)


class Series:
    """The time series of labels, so that all of a label's series can be removed at once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], set[tuple[Counter | Histogram, tuple[str, ...]]]] = {}

    def child(self, family: Family, labels: tuple[str, ...], *more: str) -> Family:
        """The series of a family with some labels, and more that differ by request."""
        self._found.setdefault(labels, set()).add((family, more))
        return family.labels(*labels, *more)

    def remove(self, *labels: str) -> None:
        """Remove all series whose first labels are these. To add them to another would show a jump in its rate."""
        for known in [known for known in self._found if known[: len(labels)] == labels]:
            for family, more in self._found.pop(known):
                family.remove(*known, *more)


class VersionLabels:
    """The labels ``prompt`` and ``version`` of requests.

    Args:
        size: Number of soft prompts with labels of their own.
        series: Where the series of a replaced label are removed.
    """

    def __init__(self, size: int, series: Series) -> None:
        self._series = series
        self._prompts = TopNames(size)
        self._versions = TopNames(_VERSIONS_PER_NAME * size)

    def use(self, prompt: str | None, version: str | None) -> tuple[str, str]:
        """The labels of one request, which counts as a use of them.

        Args:
            prompt: The soft prompt; None for the base model.
            version: Its version; None for the base model.
        """
        if prompt is None:
            return BASE_LABEL, BASE_LABEL
        if prompt == OTHER_LABEL or GOLDEN_CHECK in prompt:
            return OTHER_LABEL, OTHER_LABEL
        replaced = self._prompts.use(prompt)
        if replaced is not None:
            self._series.remove(replaced)
        if not self._prompts.holds(prompt):
            return OTHER_LABEL, OTHER_LABEL
        key = f"{prompt}@{version}"
        replaced = self._versions.use(key)
        if replaced is not None:
            self._series.remove(*replaced.rsplit("@", 1))
        return prompt, str(version) if self._versions.holds(key) else OTHER_LABEL


class TenantLabels:
    """The label ``tenant`` of requests.

    Args:
        size: Number of tenants with labels of their own.
        series: Where the series of a replaced label are removed.
    """

    def __init__(self, size: int, series: Series) -> None:
        self._series = series
        self._tenants = TopNames(size)

    def use(self, tenant: str) -> tuple[str]:
        """The label of one request, which counts as a use of it; an empty tenant is none."""
        if not tenant:
            return (BASE_LABEL,)
        replaced = self._tenants.use(tenant)
        if replaced is not None:
            self._series.remove(replaced)
        return (tenant if tenant != OTHER_LABEL and self._tenants.holds(tenant) else OTHER_LABEL,)
