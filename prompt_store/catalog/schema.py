"""The tables of the catalog, the same on SQLite and PostgreSQL. ``migrations/`` creates them.

Times are microseconds since 1970, UTC, because integers mean the same in every database.
"""

from __future__ import annotations

import sqlalchemy as sa

Identity = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""SQLite numbers rows automatically only if the type is INTEGER."""

Name = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")
"""Names sort by bytes in both databases, so that cursors of pages mean the same."""

Digest = sa.String(64)

metadata = sa.MetaData()

state = sa.Table(
    "state",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    # The number of changes. Every write locks this row first, so that revisions become visible in order.
    sa.Column("revision", sa.BigInteger, nullable=False),
)
prompts = sa.Table(
    "prompts",
    metadata,
    sa.Column("id", Identity, primary_key=True),
    sa.Column("name", Name, nullable=False, unique=True),
    # The tenant that alone sees it, empty for all. It is kept after a deletion, as the history is.
    sa.Column("owner", Name, nullable=False, server_default=""),
    # Not reset by deletions: a version number is never reused.
    sa.Column("last_version", sa.BigInteger, nullable=False),
    sa.Column("num_versions", sa.BigInteger, nullable=False),
    sa.Index("prompts_by_owner", "owner", "name"),
)
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("id", Identity, primary_key=True),
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("digest", Digest, nullable=False),
    sa.Column("peft_type", sa.String(64), nullable=False),
    sa.Column("task_type", sa.String(64), nullable=False),
    sa.Column("num_virtual_tokens", sa.Integer, nullable=False),
    sa.Column("num_tasks", sa.Integer),
    sa.Column("num_labels", sa.Integer),
    sa.Column("dtype", sa.String(16), nullable=False),
    sa.Column("base_model_name_or_path", sa.Text),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("metadata", sa.Text, nullable=False),
    sa.Column("lineage", sa.Text, nullable=False),
    sa.Column("overrides", sa.Text, nullable=False, server_default="{}"),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("created_by", sa.Text),
    # A deleted version keeps its files and tags until it can no longer be restored.
    sa.Column("deleted_at", sa.BigInteger),
    # The revision of the deletion, as long as it can be undone; its history entries name the removed aliases.
    sa.Column("deleted_in", sa.BigInteger),
    sa.UniqueConstraint("prompt_id", "version", name="versions_by_number"),
    sa.Index("versions_by_digest", "prompt_id", "digest"),
    sa.Index("versions_by_deletion", "deleted_in"),
)
blobs = sa.Table(
    "blobs",
    metadata,
    sa.Column("sha256", Digest, primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    # NULL while a version names it, also a deleted one that can be restored. Otherwise the time of the last upload
    # or deletion that concerned it; a blob is garbage some time after that.
    sa.Column("unnamed_since", sa.BigInteger, index=True),
)
version_files = sa.Table(
    "version_files",
    metadata,
    sa.Column("version_id", sa.ForeignKey("versions.id"), primary_key=True),
    sa.Column("filename", sa.String(64), primary_key=True),
    # The foreign key prevents a version without its bytes.
    sa.Column("sha256", sa.ForeignKey("blobs.sha256"), nullable=False, index=True),
)
tags = sa.Table(
    "tags",
    metadata,
    sa.Column("version_id", sa.ForeignKey("versions.id"), primary_key=True),
    sa.Column("tag", Name, primary_key=True),
    sa.Column("name", Name, nullable=False),
    sa.Index("tags_by_tag", "tag", "name"),
)
aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), primary_key=True),
    sa.Column("alias", Name, primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
)
history = sa.Table(
    "history",
    metadata,
    sa.Column("id", Identity, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False, index=True),
    sa.Column("name", Name, nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("alias", Name),
    sa.Column("version", sa.BigInteger),
    sa.Column("previous_version", sa.BigInteger),
    sa.Column("actor", sa.Text),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Index("history_by_name", "name", "id"),
)
