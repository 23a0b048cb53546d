"""Soft prompts belong to a tenant; those that are there already belong to everybody."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_Name = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")


def upgrade() -> None:
    """Bring the tables to this revision."""
    op.add_column("prompts", sa.Column("owner", _Name, nullable=False, server_default=""))
    op.create_index("prompts_by_owner", "prompts", ["owner", "name"], unique=False)


def downgrade() -> None:
    """Bring them back to the one before."""
    op.drop_index("prompts_by_owner", table_name="prompts")
    op.drop_column("prompts", "owner")
