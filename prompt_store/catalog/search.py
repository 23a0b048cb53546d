"""Search for soft prompts by text and type, in several orders."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from prompt_store.catalog import lookups, records, usage
from prompt_store.catalog.lookups import live
from prompt_store.catalog.schema import prompts, tags, version_usage, versions
from prompt_store.types import Access, PeftType, PromptKind, PromptSummary


class PromptSort(StrEnum):
    """What soft prompts are ordered by; of equals, by name."""

    NAME = "name"
    CREATED = "created"
    """When the oldest version was published."""
    UPDATED = "updated"
    """When the newest version was published."""
    USED = "used"
    """When a version was last used; those never used count as the oldest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSearch:
    """Which soft prompts are searched; None does not filter.

    Attributes:
        text: A part of the name, of a tag, or of a description, in any case.
        peft_type: The method of a version.
        tag: A tag of a version.
        kind: The kind of a version.
        unused_since: Only names of which no version was published or used since then (microseconds, UTC).
        sort: The order.
        is_descending: Whether the last comes first.
        after: The name that the page follows.
        limit: Maximum number.
    """

    text: str | None = None
    peft_type: PeftType | None = None
    tag: str | None = None
    kind: PromptKind | None = None
    unused_since: int | None = None
    sort: PromptSort = PromptSort.NAME
    is_descending: bool = False
    after: str | None = None
    limit: int = 100


def search(
    connection: sa.Connection, wanted: PromptSearch, access: Access | None
) -> tuple[list[PromptSummary], bool]:
    """The soft prompts that a caller sees, in order; and whether there are more.

    Raises:
        ValueError: If ``after`` is not a name of a visible soft prompt, and the order is not by name.
    """
    key = _key(wanted.sort)
    query = sa.select(prompts.c.id).where(prompts.c.num_versions > 0, lookups.visible(prompts.c.owner, access))
    for condition in _conditions(wanted):
        query = query.where(condition)
    if wanted.after is not None:
        query = query.where(_follows(connection, wanted, key, access))
    columns = [prompts.c.name] if wanted.sort is PromptSort.NAME else [key, prompts.c.name]
    order = [column.desc() if wanted.is_descending else column.asc() for column in columns]
    ids = connection.execute(query.order_by(*order).limit(wanted.limit + 1)).scalars().all()
    return records.summaries(connection, ids[: wanted.limit]), len(ids) > wanted.limit


def _conditions(wanted: PromptSearch) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    own = versions.c.prompt_id == prompts.c.id
    if wanted.text is not None:
        text = wanted.text
        tagged = sa.select(tags.c.version_id).where(tags.c.tag.contains(text.lower(), autoescape=True))
        described = sa.or_(versions.c.description.icontains(text, autoescape=True), versions.c.id.in_(tagged))
        found.append(
            sa.or_(
                prompts.c.name.contains(text.lower(), autoescape=True),
                sa.exists().where(own, live, described),
            )
        )
    of_version = []
    if wanted.peft_type is not None:
        of_version.append(versions.c.peft_type == wanted.peft_type.value)
    if wanted.kind is not None:
        of_version.append(versions.c.kind == wanted.kind.value)
    if wanted.tag is not None:
        of_version.append(versions.c.id.in_(sa.select(tags.c.version_id).where(tags.c.tag == wanted.tag)))
    if of_version:
        found.append(sa.exists().where(own, live, *of_version))
    if wanted.unused_since is not None:
        found.append(usage.is_unused(wanted.unused_since))
    return found


def _key(sort: PromptSort) -> sa.ColumnElement[object]:
    """The value that a row of ``prompts`` is ordered by."""
    own = (versions.c.prompt_id == prompts.c.id, live)
    match sort:
        case PromptSort.NAME:
            return prompts.c.name
        case PromptSort.CREATED:
            return sa.select(sa.func.min(versions.c.created_at)).where(*own).correlate(prompts).scalar_subquery()
        case PromptSort.UPDATED:
            return sa.select(sa.func.max(versions.c.created_at)).where(*own).correlate(prompts).scalar_subquery()
        case PromptSort.USED:
            last = sa.func.coalesce(sa.func.max(version_usage.c.last_used_at), 0)
            joined = versions.join(version_usage, version_usage.c.version_id == versions.c.id)
            return sa.select(last).select_from(joined).where(*own).correlate(prompts).scalar_subquery()


def _follows(
    connection: sa.Connection, wanted: PromptSearch, key: sa.ColumnElement[object], access: Access | None
) -> sa.ColumnElement[bool]:
    """The condition that a row comes after the name ``after``."""
    if wanted.sort is PromptSort.NAME:
        return prompts.c.name < wanted.after if wanted.is_descending else prompts.c.name > wanted.after
    last = connection.execute(
        sa.select(key).where(
            prompts.c.name == wanted.after, prompts.c.num_versions > 0, lookups.visible(prompts.c.owner, access)
        )
    ).one_or_none()
    if last is None:
        raise ValueError(f"after: there is no soft prompt {wanted.after!r}")
    row, place = sa.tuple_(key, prompts.c.name), sa.tuple_(last[0], wanted.after)
    return row < place if wanted.is_descending else row > place
