"""Check a store: every version has its bytes, the catalog agrees with itself, and no blob is left over."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from prompt_store.catalog import schema
from prompt_store.catalog.lookups import live
from prompt_store.catalog.records import rollout_in
from prompt_store.catalog.schema import aliases, prompts, version_files, versions
from prompt_store.errors import CorruptBlobError
from prompt_store.maintenance.existing import existing_store, named_blobs


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of a check.

    Attributes:
        schema: The revision of the schema.
        versions: Number of versions that are not deleted.
        blobs: Number of files that versions name, including deleted ones that can be restored.
        bytes: Their size.
        faults: What is wrong, one line each.
        orphans: Digests of blobs that the catalog does not know: a waste of space, and a loss only if the catalog
            was replaced by an older one.
    """

    schema: str
    versions: int
    blobs: int
    bytes: int
    faults: tuple[str, ...]
    orphans: tuple[str, ...]


def verify(location: str, catalog_url: str | None) -> Verification:
    """Read all files of a store, also while servers run on it; nothing is changed.

    Args:
        location: See ``open_store``; also a directory written by ``back_up``.
        catalog_url: See ``open_store``.

    Raises:
        PromptStoreError: If there is no catalog, or another release has written it.
        StoreUnavailableError: If catalog or blobs cannot be read now.
    """
    with existing_store(location, catalog_url) as (database, blobs):
        with database.reading() as connection:
            named = named_blobs(connection)
            faults = _catalog_faults(connection)
            count = connection.execute(sa.select(sa.func.count()).select_from(versions).where(live)).scalar_one()
        damaged = {}
        for blob in named:
            try:
                for _ in blobs.chunks(blob.digest, blob.size):
                    pass
            except CorruptBlobError as error:
                damaged[blob.digest] = f"a file of {blob.name}: {error}"
        stored = set(blobs.digests())
        # Read the catalog after the blobs: an upload records a blob before it stores it.
        with database.reading() as connection:
            known = set(connection.execute(sa.select(schema.blobs.c.sha256)).scalars())
            still_named = {blob.digest for blob in named_blobs(connection)}
        faults += [text for digest, text in damaged.items() if digest in still_named]
        return Verification(
            schema=database.schema_revision(),
            versions=count,
            blobs=len(named),
            bytes=sum(blob.size for blob in named),
            faults=tuple(faults),
            orphans=tuple(sorted(stored - known)),
        )


def _catalog_faults(connection: sa.Connection) -> list[str]:
    """Contradictions inside the catalog."""
    faults = []
    has_files = sa.exists().where(version_files.c.version_id == versions.c.id)
    without = (
        sa.select(prompts.c.name, versions.c.version)
        .join(prompts, prompts.c.id == versions.c.prompt_id)
        .where(live, ~has_files)
        .order_by(prompts.c.name, versions.c.version)
    )
    faults += [f"{name}@{version} has no files" for name, version in connection.execute(without)]
    target = sa.exists().where(
        versions.c.prompt_id == aliases.c.prompt_id, versions.c.version == aliases.c.version, live
    )
    dangling = (
        sa.select(prompts.c.name, aliases.c.alias, aliases.c.version)
        .join(prompts, prompts.c.id == aliases.c.prompt_id)
        .where(~target)
        .order_by(prompts.c.name, aliases.c.alias)
    )
    faults += [
        f"{name}@{alias} points at version {version}, which does not exist"
        for name, alias, version in connection.execute(dangling)
    ]
    faults += _rollout_faults(connection)
    number = sa.select(sa.func.count()).where(versions.c.prompt_id == prompts.c.id, live).scalar_subquery()
    wrong = sa.select(prompts.c.name, prompts.c.num_versions, number).where(prompts.c.num_versions != number)
    faults += [
        f"{name} has {found} versions, and the catalog counts {counted}"
        for name, counted, found in connection.execute(wrong.order_by(prompts.c.name))
    ]
    return faults


def _rollout_faults(connection: sa.Connection) -> list[str]:
    """Rollouts that name versions which do not exist."""
    query = (
        sa.select(aliases, prompts.c.name)
        .join(prompts, prompts.c.id == aliases.c.prompt_id)
        .where(aliases.c.rollout.is_not(None))
        .order_by(prompts.c.name, aliases.c.alias)
    )
    faults = []
    for row in connection.execute(query).all():
        numbers = rollout_in(row).versions
        existing = sa.select(versions.c.version).where(
            versions.c.prompt_id == row.prompt_id, versions.c.version.in_(numbers), live
        )
        missing = sorted(numbers - set(connection.execute(existing).scalars()))
        faults += [f"{row.name}@{row.alias} sends requests to version {one}, which does not exist" for one in missing]
    return faults
