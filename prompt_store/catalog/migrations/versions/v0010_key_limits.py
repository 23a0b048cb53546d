"""Count what all servers have used of the limits of keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the tables to this revision; all buckets are full."""
    op.create_table(
        "key_buckets",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("resource", sa.String(16), primary_key=True),
        sa.Column("per_minute", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("full_at", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "key_running",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("server", sa.String(64), primary_key=True),
        sa.Column("running", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
    )


def downgrade() -> None:
    """Downgrade them to the previous revision; each server counts alone again."""
    op.drop_table("key_running")
    op.drop_table("key_buckets")
