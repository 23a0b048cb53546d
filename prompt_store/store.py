"""The prompt store: catalog, blobs and leases together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from prompt_store.blobs.blobs import BlobStore, TierStats
from prompt_store.blobs.collector import RETENTION_SECONDS, Collector
from prompt_store.blobs.staging import Staging, Upload
from prompt_store.blobs.stored_files import disk_errors
from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog import usage
from prompt_store.catalog.catalog import BlobsGoneError, Catalog
from prompt_store.catalog.records import NewVersion
from prompt_store.catalog.watch import CatalogStatus
from prompt_store.changes import By, Deletion, HistoryEntry, ImportedVersion, Restoration
from prompt_store.checking import CheckedUpload, check_upload
from prompt_store.errors import BlobNotFoundError, CorruptBlobError, PromptNotFoundError, StoreUnavailableError
from prompt_store.formats import PromptFormat
from prompt_store.jobs.jobs import Jobs
from prompt_store.leases import Leases
from prompt_store.limits.shared_limits import SharedLimits
from prompt_store.registry import Registry
from prompt_store.rollouts import NO_ROLLOUT, Rollout
from prompt_store.types import (
    DEFAULT_ALIAS,
    SHARED,
    Access,
    BaseModelSpec,
    LeasedPrompt,
    Lineage,
    PromptKind,
    PromptRef,
    PromptSummary,
    PromptVersion,
    StoreTotals,
    TaskType,
    check_name,
)


class PromptStore:
    """Named, versioned soft prompts. Thread-safe. ``open_store`` creates one.

    Files are on the disk (or in the object store) before the catalog names them, so a version never lacks its bytes.
    A deleted version keeps its files for the retention time. A blob is removed if no version names it and it is not
    held here: at once if this process alone uses the store, after ``COLLECT_GRACE_SECONDS`` if replicas share it,
    which cannot see the leases of each other.

    Methods with an ``access`` raise PromptNotFoundError for a name that the caller does not see, and
    PromptForbiddenError for a change that it may not make. Without ``access`` everything is permitted.

    Args:
        catalog: Names and versions.
        blobs: Bytes.
        staging: Temporary files of uploads.
        max_upload_bytes: Maximum size of a file.
        collect_grace_seconds: How long blobs without a name are kept; None for the default.
        retention_seconds: How long a deleted version can be restored.
        close: Called after catalog and blobs are closed.

    Attributes:
        registry: Corrections, history and use of all names.
        jobs: Evaluations and training runs.
        shared_limits: What all servers have used of the limits of keys; None for a catalog of one process.
    """

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobStore,
        staging: Staging,
        *,
        max_upload_bytes: int = 1024 * 1024 * 1024,
        collect_grace_seconds: float | None = None,
        retention_seconds: float = RETENTION_SECONDS,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._staging = staging
        self._max_upload_bytes = max_upload_bytes
        self._collector = Collector(catalog, blobs, collect_grace_seconds, retention_seconds)
        self._on_close = close
        self._cached = CachedCatalog(catalog)
        self.registry = Registry(catalog, self._cached)
        self.jobs = Jobs(catalog, self._cached)
        self.shared_limits = SharedLimits(catalog, self._cached) if catalog.is_shared else None
        self._leases = Leases(blobs, self._collector)
        try:
            self._collector.try_to_collect()  # blobs that a killed process put and did not name
            self._cached.watch()
        except BaseException:
            self._collector.close()
            raise

    def close(self) -> None:
        """Close catalog and blobs, and release their locks."""
        self._cached.stop_watching()
        self._collector.close()
        self._staging.close()
        self._blobs.close()
        self._catalog.close()
        self._on_close()

    # Publishing

    def upload(self) -> Upload:
        """A context manager with a temporary directory for the files of an upload, to be published."""
        with disk_errors():
            return self._staging.upload(self._max_upload_bytes)

    def publish(
        self,
        upload: Upload,
        *,
        name: str,
        base: BaseModelSpec,
        require_same_base: bool = False,
        allow_float64: bool = False,
        task_type: TaskType | None = None,
        alias: str | None = DEFAULT_ALIAS,
        description: str = "",
        tags: Collection[str] = (),
        metadata: Mapping[str, object] | None = None,
        lineage: Lineage | None = None,
        prompt_format: PromptFormat | None = None,
        over: str | None = None,
        actor: By = None,
        reserved_names: Collection[str] = (),
        owner: str = SHARED,
        checked: CheckedUpload | None = None,
        imported: ImportedVersion | None = None,
    ) -> tuple[PromptVersion, bool]:
        """Validate an upload and make it a version, served from the next request on.

        Args:
            upload: An upload with both files written and closed.
            name: The soft prompt that gets the version.
            base: The served model.
            require_same_base: Reject a configuration that names another base.
            allow_float64: Accept float64 files whose values the serving dtype can hold.
            task_type: Task type, if the configuration of the adapter does not state it.
            alias: The alias to point at the version; None moves no alias.
            description: Free text.
            tags: Words to list by.
            metadata: A JSON object.
            lineage: Origin of the version.
            prompt_format: How the version wants to be asked; None if that is not known.
            over: ``NAME@VERSION`` of the adapter that a soft prompt was trained over; None for no adapter.
            actor: Who publishes.
            reserved_names: Names that may not be used, such as the name of the base model.
            owner: The tenant that alone sees it; ``SHARED`` for all.
            checked: The result of ``check_upload``; None checks the upload here.
            imported: Number and time of a version that comes from another store; no alias is moved.

        Returns:
            The version, and whether it is new. The same files under the same name are the existing version; the
            alias is moved to it too.

        Raises:
            ValueError: If name, alias, a tag or ``over`` is not well formed, or the name is reserved.
            InvalidPromptError: With every fault of the files.
            PromptConflictError: If the name is, or was, another owner's; or the number of an imported version has, or
                had, other bytes.
            StoreUnavailableError: If catalog or blobs cannot be reached; nothing was published.
        """
        check_name(name, "name")
        if name in reserved_names:
            raise ValueError(f"name {name!r} is the name of the base model")
        if alias is not None:
            check_name(alias, "alias")
        for tag in tags:
            check_name(tag, "tag")
        if checked is None:
            checked = check_upload(
                upload, base, require_same_base=require_same_base, allow_float64=allow_float64, task_type=task_type
            )
        new = checked.new_version(
            name,
            description=description,
            tags=tuple(tags),
            metadata=metadata or {},
            lineage=lineage or Lineage(),
            prompt_format=prompt_format,
            over=over,
            owner=owner,
        )
        self._cached.require()
        self._catalog.check_owner(name, owner)  # before any byte is stored that would have to be collected
        try:
            published = self._store(upload, new, alias, actor, imported)
        except BaseException:
            self._collector.collect_if_alone()
            raise
        self._collector.retry_if_failed()
        return published

    # Using

    def resolve(self, ref: PromptRef, access: Access | None = None) -> PromptVersion:
        """Resolve a reference to a version.

        Raises:
            PromptNotFoundError: If there is none.
            StoreUnavailableError: If it is not cached and the catalog cannot be reached.
        """
        return self._cached.resolve(ref, access)

    def lease(self, ref: PromptRef, access: Access | None = None) -> LeasedPrompt:
        """Resolve a reference and hold its files until ``release``, even if the version is deleted.

        An alias means the version that it points at, also during a rollout.

        Raises:
            PromptNotFoundError: If there is no such version.
            CorruptBlobError: If its weights are missing or damaged.
            StoreUnavailableError: If version or weights are not cached and cannot be fetched now.
        """
        return self._lease(self.resolve(ref, access), ref, access)

    def lease_for_request(self, ref: PromptRef, access: Access | None = None, key: str | None = None) -> LeasedPrompt:
        """Lease the version that answers one request: during a rollout, an alias draws it.

        Args:
            ref: What the request names.
            access: What the caller may see.
            key: Requests with the same key get the same version as long as the rollout lasts; None draws at random.

        Raises what ``lease`` does.
        """
        version, shadow = self._cached.choose(ref, access, key)
        leased = self._lease(version, ref, access)
        return leased if shadow is None else replace(leased, shadow=shadow)

    def _lease(self, version: PromptVersion, ref: PromptRef, access: Access | None) -> LeasedPrompt:
        try:
            return self._leases.add(version)
        except BlobNotFoundError:
            # Deleted and collected since it was resolved, or lost: a second lookup decides.
            return self._leases.add(self._cached.resolve_again(ref, access))

    def release(self, leased: LeasedPrompt) -> None:
        """End a lease. Deleted files are removed with the last lease. Releasing twice has no effect."""
        self._leases.release(leased)

    @contextmanager
    def leased(self, ref: PromptRef) -> Iterator[LeasedPrompt]:
        """A lease as a context manager; raises what ``lease`` does."""
        leased = self.lease(ref)
        try:
            yield leased
        finally:
            self.release(leased)

    # Looking

    def subscribe(self, callback: Callable[[set[str] | None], None]) -> None:
        """Register a callback for names changed in a shared catalog; it gets None if all may have changed.

        Args:
            callback: Called from a thread of the store; it must return quickly.
        """
        self._cached.subscribe(callback)

    @property
    def status(self) -> CatalogStatus:
        """Whether the catalog is reachable."""
        return self._cached.status

    def are_local(self, versions: Iterable[PromptVersion]) -> list[bool]:
        """For each version, whether all its files are on the local disk."""
        return [all(self._blobs.has_local(file.sha256) for file in version.files) for version in versions]

    def tier_stats(self) -> list[TierStats]:
        """Size and counters of each blob tier. A tier with all blobs has the size of the last ``totals``."""
        totals = self._cached.last_totals
        known: dict[str, Any] = {"resident": totals.num_blobs, "resident_bytes": totals.blob_bytes}
        return [replace(tier, **known) if tier.resident is None else tier for tier in self._blobs.stats()]

    def get_prompt(self, name: str, access: Access | None = None) -> PromptSummary:
        """A soft prompt with its aliases and newest version; PromptNotFoundError if there is none."""
        self._cached.require()
        return self._catalog.get_prompt(name, access)

    def list_prompts(
        self,
        limit: int = 100,
        after: str | None = None,
        tag: str | None = None,
        access: Access | None = None,
        kind: PromptKind | None = None,
        unused_since: int | None = None,
    ) -> tuple[list[PromptSummary], bool]:
        """Soft prompts by name; the arguments and the result are those of ``Catalog.list_prompts``."""
        self._cached.require()
        return self._catalog.list_prompts(limit, after, tag, access, kind, unused_since)

    def list_versions(
        self, name: str, limit: int = 100, before: int | None = None, access: Access | None = None
    ) -> tuple[list[PromptVersion], bool]:
        """Versions of a name below ``before``, newest first; and whether there are more.

        Raises:
            PromptNotFoundError: If there is no such name.
        """
        self._cached.require()
        return self._catalog.list_versions(name, limit, before, access)

    def list_history(
        self, name: str, limit: int = 100, before: int | None = None, access: Access | None = None
    ) -> tuple[list[HistoryEntry], bool]:
        """Changes of a name before the entry ``before``, newest first; and whether there are more.

        Raises:
            PromptNotFoundError: If the name never existed.
        """
        self._cached.require()
        return self._catalog.list_history(name, limit, before, access)

    def read_file(self, name: str, version: int, filename: str, access: Access | None = None) -> bytes:
        """One file, byte for byte as it was uploaded.

        Raises:
            PromptNotFoundError: If there is no such version, or it has no such file.
            CorruptBlobError: If the bytes are damaged.
            StoreUnavailableError: If they are not cached and cannot be fetched now.
        """
        found = self.resolve(PromptRef(name, version=version, alias=None), access)
        file = found.file(filename)
        if file is None:
            raise PromptNotFoundError(f"{name}@{version} has no file {filename[:128]!r}")
        with self._collector.holding([file.sha256]):
            self._blobs.pin(file.sha256)
            try:
                with disk_errors():
                    data = self._blobs.fetch(file.sha256, file.size).read_bytes()
            finally:
                self._blobs.unpin(file.sha256)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise CorruptBlobError(f"{filename} of {name}@{version} does not match its digest")
        return data

    def totals(self) -> StoreTotals:
        """Number of names, versions and blobs; the last known one while the catalog is unreachable."""
        return self._cached.totals()

    # Changing

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        expected_version: int | None = None,
        actor: By = None,
        access: Access | None = None,
        rollout: Rollout = NO_ROLLOUT,
        expected_rollout: Rollout | None = None,
    ) -> None:
        """Point an alias at a version; a rollout starts, changes or ends in the same transaction.

        Raises:
            ValueError: If the alias is not well formed, or the rollout names the version itself.
            PromptNotFoundError: If there is no such version, also of the rollout.
            PromptConflictError: If the alias does not have the expected version or rollout.
        """
        check_name(alias, "alias")
        with self._cached.changing(name, access):
            self._catalog.set_alias(name, alias, version, expected_version, actor, access, rollout, expected_rollout)

    def rollback(
        self,
        name: str,
        alias: str = DEFAULT_ALIAS,
        expected_version: int | None = None,
        actor: By = None,
        access: Access | None = None,
        expected_rollout: Rollout | None = None,
    ) -> int:
        """End the canaries of an alias, or else point it back at its previous version; returns its version.

        Raises:
            PromptNotFoundError: If there is no such alias.
            PromptConflictError: If there is no earlier version, or as for ``set_alias``.
        """
        with self._cached.changing(name, access):
            return self._catalog.rollback(name, alias, expected_version, actor, access, expected_rollout)

    def delete_alias(self, name: str, alias: str, actor: By = None, access: Access | None = None) -> None:
        """Remove an alias; PromptNotFoundError if there is none."""
        with self._cached.changing(name, access):
            self._catalog.delete_alias(name, alias, actor, access)

    def delete_version(
        self,
        name: str,
        version: int,
        *,
        force: bool = False,
        actor: By = None,
        access: Access | None = None,
    ) -> Deletion:
        """Delete a version; it can be restored for the retention time, and its files stay while leased.

        Raises:
            PromptNotFoundError: If there is none.
            PromptInUseError: If aliases point at it, or rollouts name it; ``force`` removes the aliases and ends the
                rollouts. No alias moves.
        """
        with self._cached.changing(name, access):
            deleted = self._catalog.delete_version(name, version, force=force, actor=actor, access=access)
        self._collector.collect_if_alone()
        return deleted

    def delete_prompt(
        self, name: str, *, force: bool = False, actor: By = None, access: Access | None = None
    ) -> Deletion:
        """Delete a name with all versions and aliases; it can be restored for the retention time.

        Raises:
            PromptNotFoundError: If there is none.
            PromptInUseError: If it has more than one version and ``force`` is not set.
        """
        with self._cached.changing(name, access):
            deleted = self._catalog.delete_prompt(name, force=force, actor=actor, access=access)
        self._collector.collect_if_alone()
        return deleted

    def restore(
        self, name: str, version: int | None = None, *, actor: By = None, access: Access | None = None
    ) -> Restoration:
        """Bring back a deleted version, or all that the last deletion of the name has deleted, with the aliases.

        Raises:
            PromptNotFoundError: If nothing was deleted, or the retention time is over.
            PromptConflictError: If the version is not deleted.
        """
        with self._cached.changing(name, access):
            since = self._collector.restorable_since
            return self._catalog.restore(name, version, deleted_after=since, actor=actor, access=access)

    def prune(
        self,
        name: str,
        *,
        keep: int,
        before: int,
        spared: Collection[int] = (),
        dry_run: bool = False,
        actor: By = None,
        access: Access | None = None,
    ) -> list[int]:
        """Delete versions that are not needed any more; the arguments are those of ``usage.prune``.

        Returns:
            The deleted versions, or those that would be deleted.

        Raises:
            PromptNotFoundError: If there is no such name.
        """
        with self._cached.changing(name, access), self._catalog.changing(actor) as change:
            pruned = usage.prune(change, name, access, keep=keep, before=before, spared=spared, dry_run=dry_run)
        self._collector.collect_if_alone()
        return pruned

    def restorable_until(self, deletion: Deletion) -> float | None:
        """Unix time in seconds until which a deletion can be undone; None if it is final."""
        return self._collector.restorable_until(deletion.at)

    def collect(self) -> int:
        """Remove unreferenced blobs that are not held and whose grace period is over; returns the number.

        Raises:
            StoreUnavailableError: If catalog or blobs cannot be reached; the rest is collected later.
        """
        return self._collector.collect()

    # Inside

    def _store(
        self, upload: Upload, new: NewVersion, alias: str | None, actor: By, imported: ImportedVersion | None
    ) -> tuple[PromptVersion, bool]:
        """Store the files of a new version and record it; raises what ``publish`` raises."""
        with self._collector.holding([file.sha256 for file in new.files]):
            self._catalog.reserve(new.files)
            for file in new.files:
                with disk_errors():
                    self._blobs.put(upload.path(file.filename), file.sha256, file.size)
            with self._cached.changing(new.name):
                try:
                    return self._catalog.publish(new, alias, actor, imported)
                except BlobsGoneError:
                    raise StoreUnavailableError(
                        f"the upload took over {self._collector.grace_seconds:.0f} s and was cancelled; send it again"
                    ) from None
