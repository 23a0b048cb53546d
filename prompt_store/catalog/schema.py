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
    # How it wants to be asked, as JSON; NULL if that is not known.
    sa.Column("format", sa.Text),
    sa.Column("kind", sa.String(16), nullable=False, server_default="soft_prompt"),
    sa.Column("rank", sa.Integer),
    sa.Column("num_modules", sa.Integer),
    sa.Column("num_parameters", sa.BigInteger),
    sa.Column("targets", sa.Text, nullable=False, server_default="[]"),
    # NAME@VERSION of the adapter that a soft prompt was trained over.
    sa.Column("over", sa.String(160)),
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
    sa.Index("versions_by_kind", "kind", "prompt_id"),
    sa.Index("versions_by_over", "over"),
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
    # A JSON object: the rollout, and the version ("of") that it was made for. A release that does not know rollouts
    # moves the alias and leaves this as it is; then it is not valid any more. NULL if there is none.
    sa.Column("rollout", sa.Text),
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
    sa.Column("actor_name", sa.Text),
    sa.Column("reason", sa.Text),
    # A JSON object; NULL if empty.
    sa.Column("details", sa.Text),
    # The owner of the name, so that a tenant's entries are found by an index; it changes with the name's.
    sa.Column("owner", Name, nullable=False, server_default=""),
    # Whether the change was made in another store.
    sa.Column("imported", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Index("history_by_name", "name", "id"),
    # Pages over all names are ordered by time, then id, whatever they are filtered by.
    sa.Index("history_by_owner", "owner", "at", "id"),
    sa.Index("history_by_time", "at", "id"),
    sa.Index("history_by_actor", "actor", "at", "id"),
    sa.Index("history_by_actor_name", "actor_name", "at", "id"),
    sa.Index("history_by_action", "action", "at", "id"),
)
version_usage = sa.Table(
    "version_usage",
    metadata,
    sa.Column("version_id", sa.ForeignKey("versions.id"), primary_key=True),
    sa.Column("last_used_at", sa.BigInteger, nullable=False),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("errors", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
)
evaluations = sa.Table(
    "evaluations",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    # The tenant that alone sees it, also of shared soft prompts; empty for callers without a tenant.
    sa.Column("owner", Name, nullable=False),
    sa.Column("key", sa.Text),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    # No foreign keys: an evaluation outlives the version that it is of.
    sa.Column("prompt", Name),
    sa.Column("version", sa.BigInteger),
    sa.Column("is_recorded", sa.Boolean, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("dataset", sa.Text, nullable=False),
    sa.Column("dataset_digest", Digest, nullable=False),
    sa.Column("metric", sa.String(32), nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("total", sa.BigInteger, nullable=False),
    sa.Column("num_right", sa.BigInteger, nullable=False),
    sa.Column("num_errors", sa.BigInteger, nullable=False),
    sa.Column("num_answered", sa.BigInteger, nullable=False),
    # A JSON object; NULL until it is over.
    sa.Column("scores", sa.Text),
    sa.Column("failure", sa.Text),
    # Bytes of the texts of its rows, against the tenant's budget.
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    # The server that runs it, until when it counts as running it, and NULL if no server does.
    sa.Column("runner", sa.String(64)),
    sa.Column("leased_until", sa.BigInteger),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.BigInteger),
    sa.Column("finished_at", sa.BigInteger),
    sa.Index("evaluations_by_owner", "owner", "created_at", "id"),
    sa.Index("evaluations_by_prompt", "owner", "prompt", "created_at"),
    sa.Index("evaluations_by_status", "status", "created_at"),
)
evaluation_rows = sa.Table(
    "evaluation_rows",
    metadata,
    sa.Column("evaluation_id", sa.ForeignKey("evaluations.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("line", sa.Integer, nullable=False),
    # NULL until the row has an answer or an error.
    sa.Column("outcome", sa.String(8)),
    sa.Column("expected", sa.Text),
    sa.Column("answer", sa.Text),
    sa.Column("text", sa.Text),
    sa.Column("error", sa.Text),
)
training_runs = sa.Table(
    "training_runs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("owner", Name, nullable=False),
    sa.Column("key", sa.Text),
    sa.Column("name", Name, nullable=False),
    sa.Column("method", sa.String(64), nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("num_steps", sa.BigInteger),
    sa.Column("settings", sa.Text, nullable=False),
    # A JSON object with all that is known at the end: scores, golden check, warnings, version.
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger),
    sa.Column("started_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Column("finished_at", sa.BigInteger),
    sa.Index("training_runs_by_owner", "owner", "started_at", "id"),
    sa.Index("training_runs_by_name", "owner", "name", "started_at"),
)
training_points = sa.Table(
    "training_points",
    metadata,
    sa.Column("run_id", sa.ForeignKey("training_runs.id"), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("numbers", sa.Text, nullable=False),
)
# The two tables for the limits of keys are used on PostgreSQL only, whose clock their times are of.
key_buckets = sa.Table(
    "key_buckets",
    metadata,
    # The name of the key in records, which does not reveal it.
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("resource", sa.String(16), primary_key=True),
    # Part of the key: a changed limit starts with a full bucket.
    sa.Column("per_minute", sa.BigInteger, primary_key=True, autoincrement=False),
    # When it is full again. A row in the past is a full bucket, and means the same as no row.
    sa.Column("full_at", sa.BigInteger, nullable=False),
)
key_running = sa.Table(
    "key_running",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("server", sa.String(64), primary_key=True),
    sa.Column("running", sa.BigInteger, nullable=False),
    # After this time the server counts as ended.
    sa.Column("until", sa.BigInteger, nullable=False),
)
