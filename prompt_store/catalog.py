"""Names, immutable versions and aliases, in SQLite.

Write-ahead logging with ``synchronous=FULL``: what was acknowledged survives ``kill -9`` and a power cut. Every write
is one ``BEGIN IMMEDIATE`` transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from prompt_store.errors import PromptConflictError, PromptNotFoundError, PromptStoreError
from prompt_store.types import DEFAULT_ALIAS, PeftType, PromptRef, PromptSummary, PromptVersion, StoredFile

SCHEMA_VERSION = 1

_metadata = sa.MetaData()
_prompts = sa.Table(
    "prompts",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(128), nullable=False, unique=True),
    # Counts on through deletions: a version number never comes to mean something else.
    sa.Column("last_version", sa.Integer, nullable=False),
)
_versions = sa.Table(
    "versions",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("peft_type", sa.String(64), nullable=False),
    sa.Column("task_type", sa.String(64), nullable=False),
    sa.Column("num_virtual_tokens", sa.Integer, nullable=False),
    sa.Column("dtype", sa.String(16), nullable=False),
    sa.Column("base_model_name_or_path", sa.Text),
    sa.Column("files", sa.Text, nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("deleted_at", sa.String(40)),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("metadata", sa.Text, nullable=False),
    sa.UniqueConstraint("prompt_id", "version"),
    sa.Index("versions_by_digest", "prompt_id", "digest"),
)
_tags = sa.Table(
    "tags",
    _metadata,
    sa.Column("version_id", sa.ForeignKey("versions.id"), primary_key=True),
    sa.Column("tag", sa.String(128), primary_key=True),
    sa.Index("tags_by_tag", "tag"),
)
_aliases = sa.Table(
    "aliases",
    _metadata,
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), primary_key=True),
    sa.Column("alias", sa.String(128), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)
_live = _versions.c.deleted_at.is_(None)


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What a publication records; the catalog adds number and time.

    Attributes: as in ``PromptVersion``.
    """

    name: str
    digest: str
    peft_type: PeftType
    task_type: str
    num_virtual_tokens: int
    dtype: str
    base_model_name_or_path: str | None
    files: tuple[StoredFile, ...]
    description: str
    tags: tuple[str, ...]
    metadata: Mapping[str, object]


class Catalog:
    """The tables and what is done with them.

    Args:
        path: The SQLite file; created where it does not exist.

    Raises:
        PromptStoreError: If a newer release has written the file.
    """

    def __init__(self, path: Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{path}")
        sa.event.listen(self._engine, "connect", _configure)
        with self._writing() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found > SCHEMA_VERSION:
                raise PromptStoreError(
                    f"the catalog {path} has schema {found}; this release knows {SCHEMA_VERSION}: use a newer release"
                )
            _metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # Reading

    def resolve(self, ref: PromptRef) -> PromptVersion:
        """The version that a reference means now.

        Raises:
            PromptNotFoundError: If there is none.
        """
        with self._engine.connect() as connection:
            prompt_id = self._prompt_id(connection, ref.name)
            version = ref.version
            if version is None:
                version = connection.execute(
                    sa.select(_aliases.c.version).where(
                        _aliases.c.prompt_id == prompt_id, _aliases.c.alias == ref.alias
                    )
                ).scalar_one_or_none()
                if version is None:
                    raise PromptNotFoundError(f"soft prompt {ref.name!r} has no alias {ref.alias!r}")
            return self._version(connection, prompt_id, ref.name, version)

    def get_prompt(self, name: str) -> PromptSummary:
        """A name with its aliases and newest version; PromptNotFoundError if there is none."""
        with self._engine.connect() as connection:
            return self._summary(connection, self._prompt_id(connection, name), name)

    def list_prompts(self, limit: int, after: str | None, tag: str | None) -> tuple[list[PromptSummary], bool]:
        """Names in order, those behind ``after`` (which need not exist any more); and whether there are more."""
        query = sa.select(_prompts.c.id, _prompts.c.name).where(
            sa.exists().where(_versions.c.prompt_id == _prompts.c.id, _live)
        )
        if after is not None:
            query = query.where(_prompts.c.name > after)
        if tag is not None:
            tagged = sa.select(_versions.c.prompt_id).join(_tags).where(_tags.c.tag == tag, _live)
            query = query.where(_prompts.c.id.in_(tagged))
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(_prompts.c.name).limit(limit + 1)).all()
            summaries = [self._summary(connection, row.id, row.name) for row in rows[:limit]]
        return summaries, len(rows) > limit

    def list_versions(self, name: str) -> list[PromptVersion]:
        """All versions of a name, newest first; PromptNotFoundError if there is none."""
        with self._engine.connect() as connection:
            prompt_id = self._prompt_id(connection, name)
            query = sa.select(_versions).where(_versions.c.prompt_id == prompt_id, _live)
            rows = connection.execute(query.order_by(_versions.c.version.desc())).all()
            return [self._to_version(connection, row, name) for row in rows]

    def counts(self) -> tuple[int, int]:
        """(names, versions) that are not deleted."""
        query = sa.select(sa.func.count(sa.distinct(_versions.c.prompt_id)), sa.func.count()).where(_live)
        with self._engine.connect() as connection:
            names, versions = connection.execute(query).one()
        return names, versions

    def blob_digests(self) -> set[str]:
        """Digests of the files of all versions that are not deleted."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_versions.c.files).where(_live)).scalars()
            return {file["sha256"] for text in rows for file in json.loads(text)}

    # Writing

    def publish(self, new: NewVersion, alias: str | None) -> tuple[PromptVersion, bool]:
        """Record a version and point an alias at it.

        Returns:
            The version, and whether it is new: the same files under the same name are the version that is there.
        """
        with self._writing() as connection:
            row = connection.execute(sa.select(_prompts).where(_prompts.c.name == new.name)).one_or_none()
            if row is None:
                prompt_id, last = _insert(connection, _prompts, {"name": new.name, "last_version": 0}), 0
            else:
                prompt_id, last = row.id, row.last_version
            same = connection.execute(
                sa.select(_versions.c.version).where(
                    _versions.c.prompt_id == prompt_id, _versions.c.digest == new.digest, _live
                )
            ).scalar_one_or_none()
            if same is None:
                self._record(connection, prompt_id, last + 1, new)
            version = last + 1 if same is None else same
            if alias is not None:
                self._point(connection, prompt_id, alias, version)
            return self._version(connection, prompt_id, new.name, version), same is None

    def set_alias(self, name: str, alias: str, version: int, expected_version: int | None) -> None:
        """Point an alias at a version.

        Raises:
            PromptNotFoundError: If there is no such version.
            PromptConflictError: If ``expected_version`` is given and the alias does not point there.
        """
        with self._writing() as connection:
            prompt_id = self._prompt_id(connection, name)
            self._version(connection, prompt_id, name, version)
            if expected_version is not None:
                found = connection.execute(
                    sa.select(_aliases.c.version).where(_aliases.c.prompt_id == prompt_id, _aliases.c.alias == alias)
                ).scalar_one_or_none()
                if found != expected_version:
                    raise PromptConflictError(
                        f"alias {alias!r} of {name!r} points at {found or 'nothing'}, not at {expected_version}"
                    )
            self._point(connection, prompt_id, alias, version)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias; PromptNotFoundError if there is none."""
        with self._writing() as connection:
            prompt_id = self._prompt_id(connection, name)
            gone = connection.execute(
                _aliases.delete().where(_aliases.c.prompt_id == prompt_id, _aliases.c.alias == alias)
            )
            if gone.rowcount == 0:
                raise PromptNotFoundError(f"soft prompt {name!r} has no alias {alias!r}")

    def delete_version(self, name: str, version: int) -> None:
        """Delete one version.

        ``latest`` falls back to the highest version that is left; other aliases of the version are removed.

        Raises:
            PromptNotFoundError: If there is no such version.
        """
        with self._writing() as connection:
            prompt_id = self._prompt_id(connection, name)
            self._version(connection, prompt_id, name, version)
            mine = _versions.c.prompt_id == prompt_id
            connection.execute(
                _versions.update().where(mine, _versions.c.version == version).values(deleted_at=_now())
            )
            pointing = sa.and_(_aliases.c.prompt_id == prompt_id, _aliases.c.version == version)
            had_latest = connection.execute(
                sa.select(_aliases.c.alias).where(pointing, _aliases.c.alias == DEFAULT_ALIAS)
            ).scalar_one_or_none()
            connection.execute(_aliases.delete().where(pointing))
            highest = connection.execute(sa.select(sa.func.max(_versions.c.version)).where(mine, _live)).scalar_one()
            if had_latest and highest is not None:
                self._point(connection, prompt_id, DEFAULT_ALIAS, highest)

    def delete_prompt(self, name: str) -> None:
        """Delete all versions and aliases of a name; PromptNotFoundError if there is none."""
        with self._writing() as connection:
            prompt_id = self._prompt_id(connection, name)
            connection.execute(_aliases.delete().where(_aliases.c.prompt_id == prompt_id))
            connection.execute(
                _versions.update().where(_versions.c.prompt_id == prompt_id, _live).values(deleted_at=_now())
            )

    # Inside

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    def _prompt_id(self, connection: sa.Connection, name: str) -> int:
        query = sa.select(_prompts.c.id).where(
            _prompts.c.name == name, sa.exists().where(_versions.c.prompt_id == _prompts.c.id, _live)
        )
        found: int | None = connection.execute(query).scalar_one_or_none()
        if found is None:
            raise PromptNotFoundError(f"there is no soft prompt {name!r}")
        return found

    def _version(self, connection: sa.Connection, prompt_id: int, name: str, version: int) -> PromptVersion:
        query = sa.select(_versions).where(_versions.c.prompt_id == prompt_id, _versions.c.version == version, _live)
        row = connection.execute(query).one_or_none()
        if row is None:
            raise PromptNotFoundError(f"soft prompt {name!r} has no version {version}")
        return self._to_version(connection, row, name)

    def _summary(self, connection: sa.Connection, prompt_id: int, name: str) -> PromptSummary:
        aliases = connection.execute(
            sa.select(_aliases.c.alias, _aliases.c.version)
            .where(_aliases.c.prompt_id == prompt_id)
            .order_by(_aliases.c.alias)
        ).all()
        pointed = {row.alias: row.version for row in aliases}
        mine = sa.select(sa.func.max(_versions.c.version), sa.func.count()).where(
            _versions.c.prompt_id == prompt_id, _live
        )
        highest, count = connection.execute(mine).one()
        latest = self._version(connection, prompt_id, name, pointed.get(DEFAULT_ALIAS, highest))
        return PromptSummary(name, pointed, latest, count)

    def _to_version(self, connection: sa.Connection, row: sa.Row[Any], name: str) -> PromptVersion:
        tags = connection.execute(sa.select(_tags.c.tag).where(_tags.c.version_id == row.id).order_by(_tags.c.tag))
        return PromptVersion(
            name=name,
            version=row.version,
            digest=row.digest,
            peft_type=PeftType(row.peft_type),
            task_type=row.task_type,
            num_virtual_tokens=row.num_virtual_tokens,
            dtype=row.dtype,
            base_model_name_or_path=row.base_model_name_or_path,
            files=tuple(StoredFile(**file) for file in json.loads(row.files)),
            created_at=datetime.fromisoformat(row.created_at),
            description=row.description,
            tags=tuple(tags.scalars()),
            metadata=json.loads(row.metadata),
        )

    def _record(self, connection: sa.Connection, prompt_id: int, version: int, new: NewVersion) -> None:
        files = [{"filename": file.filename, "sha256": file.sha256, "size": file.size} for file in new.files]
        values = {
            "prompt_id": prompt_id,
            "version": version,
            "digest": new.digest,
            "peft_type": new.peft_type.value,
            "task_type": new.task_type,
            "num_virtual_tokens": new.num_virtual_tokens,
            "dtype": new.dtype,
            "base_model_name_or_path": new.base_model_name_or_path,
            "files": json.dumps(files),
            "created_at": _now(),
            "description": new.description,
            "metadata": json.dumps(dict(new.metadata)),
        }
        version_id = _insert(connection, _versions, values)
        for tag in sorted(set(new.tags)):
            connection.execute(_tags.insert().values(version_id=version_id, tag=tag))
        connection.execute(_prompts.update().where(_prompts.c.id == prompt_id).values(last_version=version))

    def _point(self, connection: sa.Connection, prompt_id: int, alias: str, version: int) -> None:
        connection.execute(_aliases.delete().where(_aliases.c.prompt_id == prompt_id, _aliases.c.alias == alias))
        connection.execute(_aliases.insert().values(prompt_id=prompt_id, alias=alias, version=version))


def _configure(connection: Any, _record: object) -> None:
    # sqlite3 would begin transactions by itself, and late; BEGIN IMMEDIATE above begins them.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _insert(connection: sa.Connection, table: sa.Table, values: Mapping[str, object]) -> int:
    row_id: int = connection.execute(table.insert().values(values).returning(table.c.id)).scalar_one()
    return row_id


def _now() -> str:
    return datetime.now(UTC).isoformat()
