"""Names, immutable versions, aliases and history of soft prompts; everything except their bytes.

Every write is one transaction that first locks the ``state`` row. So the writes of all replicas are serial, each with
its own revision, and a reader of revision R has seen every change up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from prompt_store.catalog import deletion, lookups, records, transfer, usage
from prompt_store.catalog.change import Change, lock_blobs, now
from prompt_store.catalog.database import Database, Listener
from prompt_store.catalog.lookups import live
from prompt_store.catalog.over import require_adapter
from prompt_store.catalog.records import NewVersion, Prompt
from prompt_store.catalog.schema import blobs, history, prompts, state, tags, versions
from prompt_store.changes import By, Deletion, HistoryAction, HistoryEntry, ImportedVersion, Restoration
from prompt_store.errors import PromptConflictError, PromptNotFoundError, StoreUnavailableError
from prompt_store.rollouts import NO_ROLLOUT, Rollout
from prompt_store.types import (
    DEFAULT_ALIAS,
    Access,
    PromptKind,
    PromptRef,
    PromptSummary,
    PromptVersion,
    StoredFile,
    StoreTotals,
)

CHANNEL = "prelude_catalog"
"""The channel of PostgreSQL that notifies replicas; the payload is the new revision."""

_MAX_CHANGES = 10_000


class BlobsGoneError(Exception):
    """The files of a publication were collected before it; they have to be put again."""


class Catalog:
    """Queries and changes of the tables. Thread-safe.

    Every method raises StoreUnavailableError if the database cannot be reached.

    Methods with an ``access`` raise PromptNotFoundError for a name that the caller does not see, and
    PromptForbiddenError for a change that it may not make. Without ``access`` everything is permitted.

    Args:
        database: The database with the tables; closed with the catalog.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def is_shared(self) -> bool:
        """Whether other processes write to the same catalog."""
        return self._database.is_shared

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    # Reading

    def resolve(self, ref: PromptRef, access: Access | None = None) -> PromptVersion:
        """The version that a reference names now; PromptNotFoundError if there is none."""
        return self.look_up(ref, access)[0]

    def look_up(self, ref: PromptRef, access: Access | None = None) -> tuple[PromptVersion, Rollout]:
        """The version that a reference names now, and the rollout of its alias; raises what ``resolve`` does."""
        with self._database.reading() as connection:
            prompt = lookups.find(connection, ref.name, access)
            if ref.version is not None:
                return lookups.version_of(connection, prompt, ref.version), NO_ROLLOUT
            alias = ref.alias or DEFAULT_ALIAS
            version = lookups.alias_target(connection, prompt, alias)
            if version is None:
                raise lookups.alias_not_found(connection, prompt, alias)
            return lookups.version_of(connection, prompt, version), lookups.rollout_of(connection, prompt, alias)

    def get_prompt(self, name: str, access: Access | None = None) -> PromptSummary:
        """A soft prompt with its aliases and newest version; PromptNotFoundError if there is none."""
        with self._database.reading() as connection:
            return records.summaries(connection, [lookups.find(connection, name, access).id])[0]

    def list_prompts(
        self,
        limit: int,
        after: str | None,
        tag: str | None,
        access: Access | None = None,
        kind: PromptKind | None = None,
        unused_since: int | None = None,
    ) -> tuple[list[PromptSummary], bool]:
        """Soft prompts by name, after the name ``after``, which need not exist; and whether there are more.

        Args:
            limit: Maximum number.
            after: The name that the page follows.
            tag: Only names with a version with this tag.
            access: What the caller may see.
            kind: Only names that have a version of it; any version of the name may be the newest.
            unused_since: Only names of which no version was published or used since then (microseconds, UTC).
        """
        of_kind = sa.true() if kind is None else versions.c.kind == kind.value
        query = sa.select(prompts.c.id).where(prompts.c.num_versions > 0, lookups.visible(prompts.c.owner, access))
        if kind is not None:
            query = query.where(prompts.c.id.in_(sa.select(versions.c.prompt_id).where(of_kind, live)))
        if tag is not None:
            # The index on (tag, name) gives the names of one page in order, whatever the number of tagged names.
            tagged = (
                sa.select(tags.c.name)
                .join(versions, versions.c.id == tags.c.version_id)
                .where(tags.c.tag == tag, live, of_kind)
            )
            if access is not None:
                owned = prompts.alias()
                tagged = tagged.join(owned, owned.c.name == tags.c.name).where(lookups.visible(owned.c.owner, access))
            if after is not None:
                tagged = tagged.where(tags.c.name > after)
            names = tagged.distinct()
            if unused_since is None:
                names = names.order_by(tags.c.name).limit(limit + 1)
            query = query.where(prompts.c.name.in_(names.scalar_subquery()))
        elif after is not None:
            query = query.where(prompts.c.name > after)
        if unused_since is not None:
            query = query.where(usage.is_unused(unused_since))
        with self._database.reading() as connection:
            ids = connection.execute(query.order_by(prompts.c.name).limit(limit + 1)).scalars().all()
            return records.summaries(connection, ids[:limit]), len(ids) > limit

    def list_versions(
        self, name: str, limit: int, before: int | None, access: Access | None = None
    ) -> tuple[list[PromptVersion], bool]:
        """Versions of a name below ``before``, newest first; and whether there are more.

        Raises:
            PromptNotFoundError: If there is no such name.
        """
        with self._database.reading() as connection:
            prompt = lookups.find(connection, name, access)
            query = sa.select(versions).where(versions.c.prompt_id == prompt.id, live)
            if before is not None:
                query = query.where(versions.c.version < before)
            rows = connection.execute(query.order_by(versions.c.version.desc()).limit(limit + 1)).all()
            return records.versions_of(connection, rows[:limit], {prompt.id: prompt}), len(rows) > limit

    def list_history(
        self, name: str, limit: int, before: int | None, access: Access | None = None
    ) -> tuple[list[HistoryEntry], bool]:
        """Changes of a name before the entry ``before``, newest first; and whether there are more.

        The history remains after deletion. PromptNotFoundError if the name never existed.
        """
        query = sa.select(history).where(history.c.name == name)
        if before is not None:
            query = query.where(history.c.id < before)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(history.c.id.desc()).limit(limit + 1)).all()
            owner = connection.execute(sa.select(prompts.c.owner).where(prompts.c.name == name)).scalar_one_or_none()
            if owner is None or not (access is None or access.sees(owner)):
                raise PromptNotFoundError(f"soft prompt {name!r} does not exist")
            return [records.history_entry(row) for row in rows[:limit]], len(rows) > limit

    def check_owner(self, name: str, owner: str) -> None:
        """Raise PromptConflictError if a name belongs, or belonged, to another owner."""
        with self._database.reading() as connection:
            lookups.publishable_prompt(connection, name, owner)

    def totals(self) -> StoreTotals:
        """Number of names, versions and blobs."""
        names = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(prompts.c.num_versions), 0)).where(
            prompts.c.num_versions > 0
        )
        files = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(blobs.c.size), 0)).select_from(blobs)
        adapters = sa.select(sa.func.count(sa.distinct(versions.c.prompt_id))).where(
            versions.c.peft_type.in_(("LORA", "IA3")), versions.c.deleted_at.is_(None)
        )
        with self._database.reading() as connection:
            num_prompts, num_versions = connection.execute(names).one()
            num_blobs, blob_bytes = connection.execute(files).one()
            num_adapters = connection.execute(adapters).scalar_one()
        return StoreTotals(int(num_prompts), int(num_versions), int(num_blobs), int(blob_bytes), int(num_adapters))

    def revision(self) -> int:
        """Number of changes so far."""
        with self._database.reading() as connection:
            found: int = connection.execute(_revision).scalar_one()
        return found

    def changed_since(self, revision: int) -> set[str] | None:
        """The names changed after a revision; None if there are too many."""
        query = sa.select(history.c.name).where(history.c.revision > revision).distinct().limit(_MAX_CHANGES + 1)
        with self._database.reading() as connection:
            names = set(connection.execute(query).scalars())
        return names if len(names) <= _MAX_CHANGES else None

    def listen(self) -> Listener:
        """A connection that receives notifications of changes; only for a shared catalog."""
        return self._database.listen(CHANNEL)

    # Writing

    def reserve(self, files: Collection[StoredFile]) -> None:
        """Record blobs that are about to be put, so that no collection removes them before they have a name."""
        insert = (postgresql.insert if self.is_shared else sqlite.insert)(blobs)
        reserved_at = now()
        statement = insert.on_conflict_do_update(
            index_elements=[blobs.c.sha256],
            set_={"unnamed_since": sa.case((blobs.c.unnamed_since.is_not(None), reserved_at), else_=None)},
        )
        # Ordered, so that two uploads of the same files cannot deadlock.
        values = {
            file.sha256: {"sha256": file.sha256, "size": file.size, "unnamed_since": reserved_at} for file in files
        }
        with self._database.writing() as connection:
            for _, row in sorted(values.items()):
                connection.execute(statement, row)

    def publish(
        self, new: NewVersion, alias: str | None, actor: By = None, imported: ImportedVersion | None = None
    ) -> tuple[PromptVersion, bool]:
        """Record a version whose blobs are stored, and point an alias at it.

        Args:
            new: The version.
            alias: The alias; None moves none.
            actor: Who publishes.
            imported: Number and time of a version of another store; no alias is moved.

        Returns:
            The version, and whether it is new: the same files under the same name, over the same adapter, are the
            existing version.

        Raises:
            BlobsGoneError: If its blobs were collected since they were reserved.
            InvalidPromptError: If there is no adapter that ``over`` names.
            PromptConflictError: If the name belongs, or belonged, to another owner.
            StoreUnavailableError: If it is an adapter, and a release that cannot read it uses the catalog.
        """
        with self.changing(actor) as change:
            connection = change.connection
            if new.over is not None:
                require_adapter(connection, new.over, new.owner)
            if new.kind is PromptKind.ADAPTER and self._database.has_older_clients(connection):
                raise StoreUnavailableError(
                    "replicas of an older release use this catalog, and could not list its soft prompts any more; "
                    "publish adapters when all replicas have this release"
                )
            digests = {file.sha256 for file in new.files}
            lock_blobs(connection, digests)
            named = connection.execute(
                blobs.update().where(blobs.c.sha256.in_(digests)).values(unnamed_since=None)
            ).rowcount
            if named != len(digests):
                raise BlobsGoneError
            if imported is not None:
                return transfer.import_version(change, new, imported)
            prompt = lookups.publishable_prompt(connection, new.name, new.owner)
            if prompt is None:
                values = {"name": new.name, "owner": new.owner, "last_version": 0, "num_versions": 0}
                prompt = Prompt(records.insert(connection, prompts, values), new.name, 0, new.owner)
            # There can be two: a restored version, and the same bytes uploaded again while it was deleted.
            version: int | None = connection.execute(
                sa.select(sa.func.max(versions.c.version)).where(
                    versions.c.prompt_id == prompt.id,
                    versions.c.digest == new.digest,
                    versions.c.over == new.over,  # IS NULL for None
                    live,
                )
            ).scalar_one()
            is_new = version is None
            if version is None:
                version = prompt.last_version + 1
                by = change.actor.id
                records.record(connection, prompt.id, version, new, created_at=change.at, created_by=by)
                connection.execute(
                    prompts.update()
                    .where(prompts.c.id == prompt.id)
                    .values(last_version=version, num_versions=prompts.c.num_versions + 1)
                )
                change.add_entry(new.name, HistoryAction.PUBLISH, version=version)
            if alias is not None:
                change.move_alias(prompt, alias, version, HistoryAction.PROMOTE)
            return lookups.version_of(connection, prompt, version), is_new

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        expected_version: int | None,
        actor: By = None,
        access: Access | None = None,
        rollout: Rollout = NO_ROLLOUT,
        expected_rollout: Rollout | None = None,
    ) -> None:
        """Point an alias at a version, and start, change or end its rollout.

        Raises:
            PromptNotFoundError: If there is no such version, also of the rollout.
            PromptConflictError: If ``expected_version`` is given and the alias does not point there, or
                ``expected_rollout`` is given and it has another one.
            ValueError: If the rollout names the version itself.
        """
        rollout.check(version)
        with self.changing(actor) as change:
            prompt = lookups.find(change.connection, name, access, to_change=True)
            for number in (version, *sorted(rollout.versions)):
                lookups.require_version(change.connection, prompt, number)
            lookups.require_target(change.connection, prompt, alias, expected_version, expected_rollout)
            change.move_alias(prompt, alias, version, HistoryAction.PROMOTE, rollout)

    def rollback(
        self,
        name: str,
        alias: str,
        expected_version: int | None,
        actor: By = None,
        access: Access | None = None,
        expected_rollout: Rollout | None = None,
    ) -> int:
        """End the canaries of an alias; if it has none, undo its last promotion.

        Another rollback undoes the promotion before it. Versions deleted meanwhile are skipped.

        Returns:
            The version that the alias points at now.

        Raises:
            PromptNotFoundError: If there is no such alias.
            PromptConflictError: If there is no earlier version, or the alias is not at ``expected_version`` or has
                another rollout than the expected one.
        """
        with self.changing(actor) as change:
            connection = change.connection
            prompt = lookups.find(connection, name, access, to_change=True)
            current = lookups.alias_target(connection, prompt, alias)
            if current is None:
                raise lookups.alias_not_found(connection, prompt, alias)
            lookups.require_target(connection, prompt, alias, expected_version, expected_rollout)
            if lookups.rollout_of(connection, prompt, alias).canaries:
                change.move_alias(prompt, alias, current, HistoryAction.ROLLBACK)
                return current
            earlier = lookups.earlier_versions(connection, name, alias)
            while earlier:
                version = earlier.pop()
                if version != current and lookups.has_version(connection, prompt, version):
                    change.move_alias(prompt, alias, version, HistoryAction.ROLLBACK)
                    return version
            raise PromptConflictError(
                f"alias {alias!r} of {name!r} points at {current}, and there is no earlier version to go back to"
            )

    def delete_alias(self, name: str, alias: str, actor: By = None, access: Access | None = None) -> None:
        """Remove an alias; PromptNotFoundError if there is none."""
        with self.changing(actor) as change:
            prompt = lookups.find(change.connection, name, access, to_change=True)
            previous = lookups.alias_target(change.connection, prompt, alias)
            if previous is None:
                raise lookups.alias_not_found(change.connection, prompt, alias)
            change.remove_alias(prompt, alias, previous)

    def delete_version(
        self,
        name: str,
        version: int,
        *,
        force: bool = False,
        actor: By = None,
        access: Access | None = None,
    ) -> Deletion:
        """Delete one version; raises what ``deletion.delete_version`` does."""
        with self.changing(actor) as change:
            return deletion.delete_version(change, name, version, access, force=force)

    def delete_prompt(
        self, name: str, *, force: bool = False, actor: By = None, access: Access | None = None
    ) -> Deletion:
        """Delete all versions and aliases of a name; raises what ``deletion.delete_prompt`` does."""
        with self.changing(actor) as change:
            return deletion.delete_prompt(change, name, access, force=force)

    def restore(
        self,
        name: str,
        version: int | None,
        *,
        deleted_after: int,
        actor: By = None,
        access: Access | None = None,
    ) -> Restoration:
        """Undo the last deletion of a name, or that of one version; raises what ``deletion.restore`` does."""
        with self.changing(actor) as change:
            return deletion.restore(change, name, version, access, deleted_after=deleted_after)

    def forget_deleted(self, before: int) -> None:
        """Give up the files of versions deleted before a time (microseconds, UTC), which then cannot be restored."""
        if deletion.has_forgettable(self._database, before):
            with self.changing(None) as change:
                deletion.forget(change, before)

    @contextmanager
    def garbage(self, unnamed_before: int, limit: int, is_held: Callable[[str], bool]) -> Iterator[list[str]]:
        """Blobs that no version names; their records are removed if the block ends without an error.

        During the block they cannot be reserved: an upload of the same bytes waits, and puts them again.

        Args:
            unnamed_before: Skip blobs that lost their last name, or were reserved, after this time (microseconds,
                UTC).
            limit: Maximum number.
            is_held: Whether a blob must be kept; called while the rows are locked, so that none can get a name.
        """
        query = (
            sa.select(blobs.c.sha256)
            .where(blobs.c.unnamed_since <= unnamed_before)
            .order_by(blobs.c.unnamed_since)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._database.writing() as connection:
            digests = [digest for digest in connection.execute(query).scalars() if not is_held(digest)]
            yield digests
            if digests:
                connection.execute(blobs.delete().where(blobs.c.sha256.in_(digests)))

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the catalog."""
        with self._database.reading() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that changes no name, such as one that adds to counters."""
        with self._database.writing() as connection:
            yield connection

    @contextmanager
    def changing(self, actor: By) -> Iterator[Change]:
        """A transaction that changes names, committed unless the block raises."""
        with self._database.writing() as connection:
            # On SQLite, FOR UPDATE has no effect, and BEGIN IMMEDIATE has locked everything.
            revision = connection.execute(_revision.with_for_update()).scalar_one()
            change = Change(connection, revision + 1, actor)
            yield change
            if change.has_entries:
                connection.execute(state.update().values(revision=revision + 1))
                if self.is_shared:
                    connection.execute(sa.select(sa.func.pg_notify(CHANNEL, str(revision + 1))))


_revision = sa.select(state.c.revision)
