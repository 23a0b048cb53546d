"""Soft prompts that were trained over an adapter: the adapter stays as long as such a version is there."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from prompt_store.catalog.lookups import live
from prompt_store.catalog.schema import prompts, versions
from prompt_store.errors import Fault, InvalidPromptError, PromptConflictError, PromptInUseError
from prompt_store.types import SHARED, PromptKind, PromptRef

_MAX_NAMED = 5


def check_over(over: str) -> PromptRef:
    """The adapter version that ``over`` names.

    Raises:
        ValueError: If it is not ``NAME@VERSION``.
    """
    ref = PromptRef.parse(over)
    if ref.version is None:
        raise ValueError(f"over must name a version, NAME@VERSION, not {over[:160]!r}")
    return ref


def require_adapter(connection: sa.Connection, over: str, owner: str) -> None:
    """Check that a soft prompt may be published over an adapter.

    Args:
        connection: The transaction of the publication.
        over: ``NAME@VERSION``.
        owner: The owner of the soft prompt, who has to see the adapter.

    Raises:
        InvalidPromptError: If there is no such version, or it is no adapter.
    """
    ref = check_over(over)
    query = (
        sa.select(versions.c.kind)
        .join(prompts, prompts.c.id == versions.c.prompt_id)
        .where(prompts.c.name == ref.name, versions.c.version == ref.version, live)
        .where(prompts.c.owner.in_((SHARED, owner)))
    )
    kind = connection.execute(query).scalar_one_or_none()
    if kind == PromptKind.ADAPTER.value:
        return
    why = "does not exist" if kind is None else "is a soft prompt, not an adapter"
    hint = "; a shared soft prompt needs a shared adapter" if kind is None and owner == SHARED else ""
    raise InvalidPromptError([Fault("unknown_adapter", f"over: {over} {why}{hint}", field="over")])


def require_unused(connection: sa.Connection, name: str, numbers: Sequence[int]) -> None:
    """Check that no other version was trained over one of these versions, which are about to be deleted.

    Raises:
        PromptInUseError: If there is one; the message names some.
    """
    query = (
        sa.select(prompts.c.name, versions.c.version, versions.c.over)
        .join(prompts, prompts.c.id == versions.c.prompt_id)
        .where(versions.c.over.in_([f"{name}@{number}" for number in numbers]), live)
        .where(sa.not_(sa.and_(prompts.c.name == name, versions.c.version.in_(numbers))))
        .order_by(prompts.c.name, versions.c.version)
        .limit(_MAX_NAMED + 1)
    )
    rows = connection.execute(query).all()
    if rows:
        # The names of other tenants' soft prompts are not shown: only their owner knows them.
        message = (
            f"the adapter {rows[0].over} is in use: {len(rows) if len(rows) <= _MAX_NAMED else f'over {_MAX_NAMED}'} "
            "versions of soft prompts were trained over it; delete those first"
        )
        raise PromptInUseError(message)


def trained_over(connection: sa.Connection, name: str) -> set[int]:
    """The versions of a name over which other versions were trained."""
    query = sa.select(versions.c.over).where(versions.c.over.like(f"{name}@%"), live).distinct()
    refs = (check_over(over) for over in connection.execute(query).scalars())
    return {ref.version for ref in refs if ref.name == name and ref.version is not None}


def require_adapters_of(connection: sa.Connection, prompt_id: int, numbers: Sequence[int]) -> None:
    """Check that the adapters of these versions, which are about to be restored, are there or restored with them.

    Raises:
        PromptConflictError: If one is deleted.
    """
    query = sa.select(versions.c.version, versions.c.over).where(
        versions.c.prompt_id == prompt_id, versions.c.version.in_(numbers), versions.c.over.is_not(None)
    )
    name = connection.execute(sa.select(prompts.c.name).where(prompts.c.id == prompt_id)).scalar_one()
    for row in connection.execute(query).all():
        ref = check_over(row.over)
        found = sa.select(versions.c.id).join(prompts, prompts.c.id == versions.c.prompt_id)
        found = found.where(prompts.c.name == ref.name, versions.c.version == ref.version, live)
        is_restored_too = ref.name == name and ref.version in numbers
        if not is_restored_too and connection.execute(found).first() is None:
            raise PromptConflictError(
                f"version {row.version} of {name!r} was trained over the adapter {row.over}, which is deleted: "
                "restore the adapter first"
            )
