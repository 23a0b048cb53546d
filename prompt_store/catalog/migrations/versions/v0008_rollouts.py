"""Let an alias share its requests among versions, and count the failed requests of each version."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the tables to this revision; existing aliases have no rollout."""
    op.add_column("aliases", sa.Column("rollout", sa.Text(), nullable=True))
    op.add_column("version_usage", sa.Column("errors", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Downgrade them to the previous revision; rollouts end, and every alias keeps the version that it points at."""
    op.execute("DELETE FROM history WHERE action = 'rollout'")
    op.drop_column("version_usage", "errors")
    op.drop_column("aliases", "rollout")
