"""Add owners; existing soft prompts are shared."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_Name = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")


def upgrade() -> None:
    """Upgrade the tables to this revision."""
    op.add_column("prompts", sa.Column("owner", _Name, nullable=False, server_default=""))
    op.create_index("prompts_by_owner", "prompts", ["owner", "name"], unique=False)


def downgrade() -> None:
    """Downgrade them to the previous revision."""
    op.drop_index("prompts_by_owner", table_name="prompts")
    op.drop_column("prompts", "owner")
