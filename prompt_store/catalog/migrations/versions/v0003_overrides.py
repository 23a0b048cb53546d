"""Store the overrides of an upload with its version; existing versions have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the tables to this revision."""
    op.add_column("versions", sa.Column("overrides", sa.Text(), nullable=False, server_default="{}"))


def downgrade() -> None:
    """Downgrade them to the previous revision."""
    op.drop_column("versions", "overrides")
