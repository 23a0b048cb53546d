"""What operators do with the catalog besides serving: correct, audit, see the use, prune, move."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog import audit, edits, lookups, search, transfer, usage
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.search import PromptSearch
from prompt_store.changes import By, HistoryEntry, HistoryFilter, ImportedEntry, ImportedHistory, VersionEdit
from prompt_store.rollouts import Rollout
from prompt_store.types import SHARED, Access, PromptSummary, PromptVersion, check_name
from prompt_store.use import Use, VersionUse


class Registry:
    """Corrections, history and use of all names. Thread-safe; a part of ``PromptStore``.

    Methods with an ``access`` raise what those of ``PromptStore`` do. Every method raises StoreUnavailableError if
    the catalog cannot be reached.

    Args:
        catalog: The catalog.
        cached: Its cache, which changes invalidate.
    """

    def __init__(self, catalog: Catalog, cached: CachedCatalog) -> None:
        self._catalog = catalog
        self._cached = cached

    def edit(
        self,
        name: str,
        version: int,
        edit: VersionEdit,
        *,
        actor: By = None,
        access: Access | None = None,
    ) -> tuple[PromptVersion, tuple[str, ...]]:
        """Change what is known about a version, with an entry in the history; its bytes stay.

        Returns:
            The version, and the names of the fields whose values have changed.

        Raises:
            PromptNotFoundError: If there is no such version.
            ValueError: If a tag is not well formed, the labels do not fit the head, or the metadata is too large.
        """
        for tag in edit.tags or ():
            check_name(tag, "tag")
        with self._cached.changing(name, access), self._catalog.changing(actor) as change:
            return edits.edit_version(change, name, version, edit, access)

    def change_owner(self, name: str, owner: str, *, actor: By = None, access: Access | None = None) -> None:
        """Give a soft prompt with its versions and its history to another tenant, or to all (``SHARED``).

        Raises:
            PromptNotFoundError: If there is no such name.
            ValueError: If the owner is not well formed.
        """
        if owner != SHARED:
            check_name(owner, "tenant")
        with self._cached.changing(name, access), self._catalog.changing(actor) as change:
            edits.change_owner(change, name, owner, access)

    def check_owner(self, name: str, owner: str) -> None:
        """Raise PromptConflictError if a name belongs, or belonged, to another owner."""
        self._cached.require()
        self._catalog.check_owner(name, owner)

    def same_bytes(
        self, digest: str, over: str | None = None, access: Access | None = None, limit: int = 16
    ) -> list[PromptVersion]:
        """Versions with a digest, over the same adapter, by name; at most ``limit`` of those that a caller sees."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return lookups.with_digest(connection, digest, over, access, limit)

    def search(self, wanted: PromptSearch, access: Access | None = None) -> tuple[list[PromptSummary], bool]:
        """Soft prompts by text, type and more, in any order; raises and returns what ``search.search`` does."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return search.search(connection, wanted, access)

    def list_history(
        self, only: HistoryFilter, limit: int = 100, before: int | None = None, access: Access | None = None
    ) -> tuple[list[HistoryEntry], bool]:
        """Changes of all names that precede the entry ``before``, newest first; and whether there are more."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return audit.list_all(connection, only, limit, before, access)

    def add_use(self, uses: Mapping[tuple[str, int], Use]) -> None:
        """Add to the use of versions, by name and version; versions that do not exist any more are skipped."""
        self._cached.require()
        with self._catalog.writing() as connection:
            usage.add(connection, uses, is_postgresql=self._catalog.is_shared)

    def usage(
        self, name: str, limit: int = 100, before: int | None = None, access: Access | None = None
    ) -> tuple[list[VersionUse], bool]:
        """The use of the versions of a name below ``before``, newest first; and whether there are more.

        Raises:
            PromptNotFoundError: If there is no such name.
            PromptForbiddenError: If it is shared and the caller may not change it: the use is that of all tenants.
        """
        self._cached.require()
        with self._catalog.reading() as connection:
            return usage.of_prompt(connection, name, limit, before, access)

    def usage_of(self, names: Collection[str], access: Access | None = None) -> dict[str, Use]:
        """The use of names, over their versions; without those that the caller may not change."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return usage.of_prompts(connection, names, access)

    def import_history(
        self,
        name: str,
        entries: Sequence[ImportedEntry],
        aliases: Mapping[str, int],
        *,
        rollouts: Mapping[str, Rollout] | None = None,
        move_aliases: bool = False,
        actor: By = None,
        access: Access | None = None,
    ) -> ImportedHistory:
        """Add entries of another store's history that are not known yet, oldest first, and the aliases.

        Raises:
            PromptNotFoundError: If there is no such name; its versions are imported before.
            ValueError: If an alias is not well formed, or a rollout names the version that its alias points at.
        """
        for alias in aliases:
            check_name(alias, "alias")
        with self._cached.changing(name, access), self._catalog.changing(actor) as change:
            return transfer.import_history(
                change, name, entries, aliases, access, move_aliases=move_aliases, rollouts=rollouts
            )

    def note_read(
        self, name: str, owner: str, details: dict[str, object], version: int | None = None, *, actor: By = None
    ) -> None:
        """Record that an administrator has read what belongs to another tenant.

        Args:
            name: The soft prompt; empty for a list.
            owner: Whose history it belongs to.
            details: What was read.
            version: The version that was read, if it was one.
            actor: Who has read it.
        """
        self._cached.require()
        with self._catalog.changing(actor) as change:
            audit.note_read(change, name, owner, details, version)
