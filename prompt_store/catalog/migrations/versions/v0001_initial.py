"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_Identity = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_Name = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")


def upgrade() -> None:
    """Upgrade the tables to this revision."""
    op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("unnamed_since", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("sha256"),
    )
    op.create_index("ix_blobs_unnamed_since", "blobs", ["unnamed_since"], unique=False)
    op.create_table(
        "history",
        sa.Column("id", _Identity, nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("name", _Name, nullable=False),
        sa.Column("action", sa.String(length=32), nullable=False),
        sa.Column("alias", _Name, nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=True),
        sa.Column("previous_version", sa.BigInteger(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("history_by_name", "history", ["name", "id"], unique=False)
    op.create_index("ix_history_revision", "history", ["revision"], unique=False)
    op.create_table(
        "prompts",
        sa.Column("id", _Identity, nullable=False),
        sa.Column("name", _Name, nullable=False),
        sa.Column("last_version", sa.BigInteger(), nullable=False),
        sa.Column("num_versions", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "state",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "aliases",
        sa.Column("prompt_id", _Identity, nullable=False),
        sa.Column("alias", _Name, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["prompt_id"],
            ["prompts.id"],
        ),
        sa.PrimaryKeyConstraint("prompt_id", "alias"),
    )
    op.create_table(
        "versions",
        sa.Column("id", _Identity, nullable=False),
        sa.Column("prompt_id", _Identity, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("peft_type", sa.String(length=64), nullable=False),
        sa.Column("task_type", sa.String(length=64), nullable=False),
        sa.Column("num_virtual_tokens", sa.Integer(), nullable=False),
        sa.Column("num_tasks", sa.Integer(), nullable=True),
        sa.Column("num_labels", sa.Integer(), nullable=True),
        sa.Column("dtype", sa.String(length=16), nullable=False),
        sa.Column("base_model_name_or_path", sa.Text(), nullable=True),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("lineage", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=True),
        sa.Column("deleted_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["prompt_id"],
            ["prompts.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("prompt_id", "version", name="versions_by_number"),
    )
    op.create_index("versions_by_digest", "versions", ["prompt_id", "digest"], unique=False)
    op.create_table(
        "tags",
        sa.Column("version_id", _Identity, nullable=False),
        sa.Column("tag", _Name, nullable=False),
        sa.Column("name", _Name, nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["versions.id"],
        ),
        sa.PrimaryKeyConstraint("version_id", "tag"),
    )
    op.create_index("tags_by_tag", "tags", ["tag", "name"], unique=False)
    op.create_table(
        "version_files",
        sa.Column("version_id", _Identity, nullable=False),
        sa.Column("filename", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["sha256"],
            ["blobs.sha256"],
        ),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["versions.id"],
        ),
        sa.PrimaryKeyConstraint("version_id", "filename"),
    )
    op.create_index("ix_version_files_sha256", "version_files", ["sha256"], unique=False)
    op.execute("INSERT INTO state (id, revision) VALUES (1, 0)")


def downgrade() -> None:
    """Downgrade them to the previous revision."""
    op.drop_index("ix_version_files_sha256", table_name="version_files")
    op.drop_table("version_files")
    op.drop_index("tags_by_tag", table_name="tags")
    op.drop_table("tags")
    op.drop_index("versions_by_digest", table_name="versions")
    op.drop_table("versions")
    op.drop_table("aliases")
    op.drop_table("state")
    op.drop_table("prompts")
    op.drop_index("ix_history_revision", table_name="history")
    op.drop_index("history_by_name", table_name="history")
    op.drop_table("history")
    op.drop_index("ix_blobs_unnamed_since", table_name="blobs")
    op.drop_table("blobs")
